"""TFLite files to Graphs: what LiteRT sees is what we see, and what is wrong with a file is said."""

import contextlib
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from npulab.errors import ModelError
from npulab.exporters.tflite import write_tflite
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.formats.tflite import schema
from npulab.importers import load
from npulab.importers.tflite import read_tflite
from npulab.ir import DType, Quantization
from npulab.ir.ops import Add, Conv2D, Custom, DepthwiseConv2D, Generic, Pad, Pool2D, Reshape, Softmax
from shared import MODELS, model_files, needs_shared


def interpreter(data: bytes):
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="needs LiteRT: pip install 'npulab[litert]'")
    return litert.Interpreter(model_content=data, experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF,
                              experimental_preserve_all_tensors=True, num_threads=1)


def small() -> ModelBuilder:
    """A convolution, an addition of a constant, a custom operator."""
    model = ModelBuilder("small")
    x = model.tensor("x", (1, 4, 4, 2), "uint8", scale=0.5, zero_point=3)
    w = model.tensor("w", (3, 1, 1, 2), "int8", scales=[0.25, 0.5, 1.0], data=np.arange(6, dtype=np.int8))
    b = model.tensor("b", (3,), "int32", data=np.array([1, 2, 3], np.int32))
    y = model.tensor("y", (1, 2, 2, 3), "uint8", scale=0.125, zero_point=128)
    c = model.tensor("c", (3,), "uint8", scale=1.0, zero_point=0, data=np.array([7, 8, 9], np.uint8))
    z = model.tensor("z", (1, 2, 2, 3), "uint8", scale=0.125, zero_point=128)
    out = model.tensor("out", (5,), "float32")
    model.op("CONV_2D", [x, w, b], [y], padding="VALID", stride_w=2, stride_h=2, fused_activation_function="RELU6")
    model.op("ADD", [y, c], [z], fused_activation_function="NONE")
    model.custom("Mystery", [z, -1], [out], b"\1\2\3")
    return model


SMALL = small().build([0], [6])


def changed(change) -> bytes:
    """SMALL after `change(model dictionary)`."""
    model = small().model([0], [6])
    change(model)
    return write_tflite(model)


def message(data: bytes) -> str:
    with pytest.raises(ModelError) as e:
        read_tflite(data, "small")
    return str(e.value)


# What is read


def test_operators_are_records_with_their_attributes():
    conv, add, custom = load(SMALL).nodes

    assert conv.op == Conv2D(stride=(2, 2), dilation=(1, 1), padding="valid", activation="relu6")
    assert (conv.inputs, conv.outputs, conv.version) == ((0, 1, 2), (3,), 3)
    assert add.op == Add("none")
    assert custom.op == Custom("Mystery", b"\1\2\3")
    assert custom.inputs == (5, -1)


def test_tensors_carry_type_shape_and_quantization():
    x, w, _, _, _, _, out = load(SMALL).values

    assert (x.name, x.shape, x.dtype, x.quantization) == ("x", (1, 4, 4, 2), DType.UINT8, Quantization((0.5,), (3,)))
    assert w.quantization == Quantization((0.25, 0.5, 1.0), (0, 0, 0), 0)
    assert (out.shape, out.dtype, out.quantization) == ((5,), DType.FLOAT32, None)
    assert not x.is_constant


def test_constants_are_views_of_the_file():
    graph = load(SMALL)

    assert graph.values[1].array().tolist() == [[[[0, 1]]], [[[2, 3]]], [[[4, 5]]]]
    assert graph.values[1].constant.obj is graph.source.obj is SMALL
    assert graph.values[1].constant.readonly


def test_a_file_on_disk_is_mapped_and_named_after_itself(tmp_path):
    path = tmp_path / "cat.tflite"
    path.write_bytes(SMALL)
    graph = load(path)

    assert (graph.name, graph.format) == ("cat", "tflite")
    assert bytes(graph.source) == SMALL
    assert graph.digest == load(SMALL).digest
    assert type(graph.source.obj).__name__ == "mmap"
    assert load(str(path)).digest == graph.digest


def outside(data: bytes, where: int, content: bytes) -> bytes:
    return data + bytes(where - len(data)) + content


def test_constants_behind_the_flatbuffer_are_found():
    def move(model):
        model["buffers"][2] = {"offset": 4096, "size": 12}

    graph = load(outside(changed(move), 4096, np.array([10, 20, 30], np.int32).tobytes()))

    assert graph.values[2].array().tolist() == [10, 20, 30]


def test_bytes_inside_go_before_bytes_behind_as_in_litert():
    def both(model):
        model["buffers"][2] |= {"offset": 4096, "size": 12}

    data = outside(changed(both), 4096, np.array([10, 20, 30], np.int32).tobytes())

    assert load(data).values[2].array().tolist() == [1, 2, 3]


def test_a_tensor_whose_buffer_is_empty_is_no_constant():
    data = changed(lambda m: m["buffers"][2].update(data=b""))

    assert message(data) == "CONV_2D (node 0) reads tensor 2 ('b') before anything computed it"


def test_a_tensor_without_elements_is_a_constant_without_bytes():
    model = ModelBuilder("scalar")
    x, shape = model.tensor("x", (1,), "float32"), model.tensor("shape", (0,), "int32", data=np.zeros(0, np.int32))
    model.op("RESHAPE", [x, shape], [model.tensor("y", (), "float32")])
    graph = load(model.build([x], [2]))

    assert graph.values[shape].array().shape == (0,)
    assert graph.nodes[0].op == Reshape("RESHAPE")


def test_old_files_have_the_operator_code_in_a_byte():
    def old(model):
        for code in model["operator_codes"]:
            del code["builtin_code"]

    assert [n.op for n in load(changed(old)).nodes] == [n.op for n in load(SMALL).nodes]


def test_an_operator_that_the_schema_lacks_is_named_by_its_number():
    data = changed(lambda m: m["operator_codes"][1].update(builtin_code=1234))

    assert load(data).nodes[1].op.name == "BUILTIN_1234"


def test_any_other_operator_has_all_its_options_by_name():
    model = ModelBuilder("generic")
    x, y = model.tensor("x", (1, 4), "float32"), model.tensor("y", (1, 4), "int8")
    z = model.tensor("z", (4,), "int8")
    model.op("CAST", [x], [y], in_data_type="FLOAT32", out_data_type="INT8")
    model.op("STRIDED_SLICE", [y], [z], begin_mask=3, shrink_axis_mask=1)
    cast, piece = load(model.build([x], [z])).nodes

    assert cast.op == Generic("CAST", {"in_data_type": "float32", "out_data_type": "int8"})
    assert piece.op.attributes == {"begin_mask": 3, "end_mask": 0, "ellipsis_mask": 0, "new_axis_mask": 0,
                                   "shrink_axis_mask": 1, "offset": False}


def one_operator(name, shapes, **options):
    model = ModelBuilder("one")
    tensors = [model.tensor(f"t{i}", s, "float32") for i, s in enumerate(shapes)]
    model.op(name, tensors[:-1], tensors[-1:], **options)
    return load(model.build(tensors[:-1], tensors[-1:])).nodes[0].op


def test_the_records_of_further_operators():
    pair = ((1, 4, 4, 2), (1, 2, 2, 2))
    pool = {"padding": "SAME", "stride_h": 2, "stride_w": 3, "filter_height": 4, "filter_width": 5}

    assert one_operator("MAX_POOL_2D", pair, **pool) == Pool2D("max", (4, 5), (2, 3), "same", "none")
    assert one_operator("MIRROR_PAD", pair, mode="SYMMETRIC") == Pad(False, "symmetric")
    assert one_operator("PADV2", pair) == Pad(True, "constant")
    assert one_operator("SOFTMAX", pair, beta=0.5) == Softmax(0.5)
    assert one_operator("SQUEEZE", pair) == Reshape("SQUEEZE")
    assert one_operator("EXPAND_DIMS", pair).name == "EXPAND_DIMS"


def test_the_multiplier_of_a_depthwise_convolution_follows_from_its_shapes():
    shapes = ((1, 4, 4, 2), (1, 3, 3, 6), (1, 2, 2, 6))

    op = one_operator("DEPTHWISE_CONV_2D", shapes, stride_h=1, stride_w=1, depth_multiplier=1)

    assert isinstance(op, DepthwiseConv2D)
    assert op.multiplier == 3


def test_dynamic_axes_are_those_that_the_signature_leaves_open():
    value = load(changed(lambda m: m["subgraphs"][0]["tensors"][0].update(shape_signature=[-1, 4, -1, 2]))).values[0]

    assert (value.shape, value.dynamic_axes) == ((1, 4, 4, 2), (0, 2))


def test_a_quantization_without_a_usable_scale_is_none():
    for scale in ([0.0], [float("nan")], [-1.0], [float("inf")], []):
        def change(m, scale=scale):
            m["subgraphs"][0]["tensors"][0]["quantization"] = {"scale": scale, "zero_point": [0] * len(scale)}

        assert load(changed(change)).values[0].quantization is None


def test_scales_are_the_floats_of_the_file():
    data = changed(lambda m: m["subgraphs"][0]["tensors"][0]["quantization"].update(scale=[0.1]))

    assert load(data).values[0].quantization.scale == float(np.float32(0.1))


def test_one_zero_point_serves_all_scales():
    data = changed(lambda m: m["subgraphs"][0]["tensors"][1]["quantization"].update(zero_point=[5]))

    assert load(data).values[1].quantization.zero_points == (5, 5, 5)


def test_the_signature_of_the_main_subgraph_names_inputs_and_outputs():
    def sign(model):
        other = {"signature_key": "other", "subgraph_index": 1, "inputs": [{"name": "no", "tensor_index": 1}]}
        model["signature_defs"] = [other, {"signature_key": "serving_default",
                                           "inputs": [{"name": "image", "tensor_index": 0}],
                                           "outputs": [{"name": "label", "tensor_index": 6}]}]

    graph = load(changed(sign))

    assert (graph.signature_inputs, graph.signature_outputs) == ((("image", 0),), (("label", 6),))


# What is wrong


@pytest.mark.parametrize(("content", "found", "advice"), [
    (b"", "an empty file", "get the file again"),
    (b"TFL", "3 bytes", "get the file again"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer in place of the file", "git lfs pull"),
    (b"<!DOCTYPE html><html>", "a web page or other markup", "download the file itself, not the page about it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (a Keras model)", "convert it to TFLite"),
    (b"NPULAB\r\n" + bytes(32), "a program that npulab compiled", "npulab run FILE.npu"),
    (b"\x1c\0\0\0ABCD" + bytes(60), "bytes 1c 00 00 00 41 42 43 44", "give a .tflite or .onnx file"),
])
def test_another_kind_of_file_is_named(content, found, advice):
    assert message(content) == (
        "'small' is not a TFLite model\n"
        "  want    identifier TFL3 at byte 4\n"
        f"  got     {found}\n"
        f"  try     {advice}"
    )


def test_a_truncated_file_is_damaged():
    text = message(SMALL[: len(SMALL) // 2])

    assert text.startswith("the file is damaged: ")
    assert text.endswith("\n  try     get the file again")


def test_paths_that_are_no_model_file(tmp_path):
    def said(path):
        with pytest.raises(ModelError) as e:
            load(path)
        return str(e.value)

    (tmp_path / "empty").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()

    assert said(tmp_path / "absent.tflite").startswith(f"{tmp_path}/absent.tflite does not exist\n  where   looked in ")
    assert said(tmp_path / "empty") == f"{tmp_path}/empty is empty\n  try     get the file again"
    assert said(tmp_path) == f"{tmp_path} is a directory\n  want    a file\n  try     name the .tflite file in it"
    assert said(tmp_path / "saved") == (f"{tmp_path}/saved is a directory, a TensorFlow SavedModel\n  want    a file\n"
                                        "  try     convert it to TFLite")
    assert said("/dev/zero") == "/dev/zero is not a regular file\n  want    a .tflite file"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ModelError, match="is not a regular file"):
        load(tmp_path / "pipe")


def test_a_file_that_is_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "large.tflite"
    with path.open("wb") as f:
        f.truncate(2**32 + 1)

    with pytest.raises(ModelError) as e:
        load(path)

    assert str(e.value) == (f"{path} is too large for a model file\n  got     4294967297 bytes\n"
                            "  want    at most 4294967296 bytes")


def tensor(i, **fields):
    return lambda m: m["subgraphs"][0]["tensors"][i].update(fields)


def operator(i, **fields):
    return lambda m: m["subgraphs"][0]["operators"][i].update(fields)


@pytest.mark.parametrize(("change", "expected"), [
    (lambda m: m.update(version=2), "'small' has TFLite schema version 2\n  want    3\n"
     "  try     convert the original model with a current converter"),
    (lambda m: m.update(subgraphs=[]), "'small' holds no graph\n  want    1 subgraph or more\n  got     0"),
    (tensor(1, shape=[3, -1, 1, 2]), "tensor 1 'w' has an impossible shape\n  got     [3, -1, 1, 2]\n"
     "  want    at most 32 dimensions, none negative, at most 2**40 elements"),
    (tensor(1, shape=[2**20, 2**20, 2]), "tensor 1 'w' has an impossible shape\n  got     [1048576, 1048576, 2]\n"
     "  want    at most 32 dimensions, none negative, at most 2**40 elements"),
    (tensor(0, shape_signature=[-1, 4]), "tensor 0 'x' has a shape signature of another rank than its shape\n"
     "  want    4 dimensions\n  got     2"),
    (tensor(1, buffer=9), "tensor 1 'w' uses buffer 9, which does not exist\n  want    0..3"),
    (tensor(1, buffer=0, external_buffer=2), "tensor 1 'w' keeps its bytes in another file\n"
     "  got     external buffer 2\n  try     convert the model to a single file"),
    (tensor(1, quantization={"scale": [1.0, 2.0, 3.0], "zero_point": [0, 0]}),
     "tensor 1 'w' has 3 scales and 2 zero points\n  want    as many zero points as scales, or one, or none"),
    (lambda m: m["buffers"].__setitem__(1, {"offset": 10**6, "size": 6}),
     "tensor 1 'w' has its bytes outside the file\n  got     6 bytes at byte 1000000\n"
     "  want    the file's {size} bytes\n  try     get the file again"),
    (operator(0, opcode_index=7), "node 0 has operator code 7, which does not exist\n  want    0..2"),
    (operator(0, builtin_options=("Conv2DOptions", {"stride_h": 2})),
     "CONV_2D (node 0) has stride_h 2 and stride_w 0\n  want    at least 1"),
    (operator(0, builtin_options=("AddOptions", {})),
     "CONV_2D (node 0) has the options of another operator\n  want    Conv2DOptions\n  got     AddOptions"),
    (operator(0, inputs=[0, 1, 77]), "CONV_2D (node 0) reads tensor 77, which does not exist\n  want    -1..6"),
    (operator(0, inputs=[6, 1, 2]), "CONV_2D (node 0) reads tensor 6 ('out') before anything computed it"),
    (operator(1, outputs=[3]), "ADD (node 1) writes tensor 3 ('y') a second time"),
    (lambda m: m.update(signature_defs=[{"inputs": [{"name": "image", "tensor_index": 50}]}]),
     "signature input 'image' names tensor 50, which does not exist\n  want    0..6"),
])
def test_what_is_wrong_with_a_model_is_said(change, expected):
    data = changed(change)

    assert message(data) == expected.replace("{size}", str(len(data)))


def test_an_unknown_activation_is_not_taken_for_none():
    text = message(changed(operator(1, builtin_options=("AddOptions", {"fused_activation_function": 99}))))

    assert text.startswith("the file is damaged: ActivationFunctionType has no value 99\n")
    assert "Model.subgraphs[0].operators[1].builtin_options.fused_activation_function" in text


def test_an_element_type_that_we_do_not_know_is_named():
    text = message(changed(tensor(0, type="FLOAT8_E5M2")))

    assert text.startswith("tensor 0 'x' has an element type that npulab does not know\n  got     FLOAT8_E5M2\n")


def test_a_call_of_a_subgraph_that_is_absent():
    def call(model):
        model["operator_codes"][1] = {"deprecated_builtin_code": 119, "builtin_code": 119}
        model["subgraphs"][0]["operators"][1]["builtin_options"] = ("WhileOptions", {"cond_subgraph_index": 3})

    assert message(changed(call)) == "WHILE (node 1) calls subgraph 3, which does not exist\n  want    0..0"


def test_names_in_messages_cannot_steer_a_terminal():
    text = message(changed(tensor(1, name="\x1b[2J" + "n" * 500, buffer=9)))

    assert "\x1b" not in text
    assert len(text) < 200


# Real models


@pytest.mark.parametrize("path", model_files() or [pytest.param(None, marks=needs_shared)], ids=lambda p: p and p.stem)
def test_tensors_and_operators_are_those_that_litert_lists(path):
    data = path.read_bytes()
    graph = load(path)
    if path.name == "person_detect.tflite":
        with pytest.raises(ValueError, match="quantized_dimension must be in range"):  # LiteRT refuses it, we do not
            interpreter(data)
        return
    run = interpreter(data)
    details = {d["index"]: d for d in run.get_tensor_details()}

    for value in graph.values:
        theirs = details.get(value.index)
        if theirs is None:
            continue
        assert value.name == theirs["name"]
        assert value.shape == tuple(theirs["shape"])
        assert value.dtype.numpy == np.dtype(theirs["dtype"])
        signature = theirs["shape_signature"]
        assert value.dynamic_axes == tuple(np.flatnonzero(np.asarray(signature) < 0))
        parameters = theirs["quantization_parameters"]
        if value.quantization is None:
            assert not len(parameters["scales"])
        else:
            assert value.quantization.scales == tuple(parameters["scales"].tolist())
            assert value.quantization.zero_points == tuple(parameters["zero_points"].tolist())
            assert value.quantization.per_tensor or value.quantization.axis == parameters["quantized_dimension"]
    assert len(details) >= len(graph.values)
    operators = [o for o in run._get_ops_details() if o["op_name"] != "DELEGATE"]
    assert [n.op.name for n in graph.nodes] == [o["op_name"] for o in operators]
    assert [list(n.inputs) for n in graph.nodes] == [o["inputs"].tolist() for o in operators]
    assert [list(n.outputs) for n in graph.nodes] == [o["outputs"].tolist() for o in operators]
    assert list(graph.inputs) == [d["index"] for d in run.get_input_details()]
    assert list(graph.outputs) == [d["index"] for d in run.get_output_details()]


@needs_shared
@pytest.mark.parametrize("name", ["mobilenet_v1_0.25_128_quant", "keras_lstm_mnist_ptq", "pretrainedResnet_quant",
                                  "movenet_single_pose_lightning_ptq"])
def test_constants_are_those_that_litert_holds(name):
    data = (MODELS / "quantized" / f"{name}.tflite").read_bytes()
    graph, run = load(data), interpreter(data)
    run.allocate_tensors()

    for value in graph.values:
        if value.is_constant:
            np.testing.assert_array_equal(value.array(), run.get_tensor(value.index))


@needs_shared
@pytest.mark.parametrize("name", ["mobilenet_v1_1.0_224_quant", "ssdlite_mobiledet_coco_qat_postprocess"])
def test_reading_is_quick(name):
    path = MODELS / "quantized" / f"{name}.tflite"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        load(path)
        times.append(time.perf_counter() - start)

    assert min(times) < 0.1  # 15 ms on a machine with nothing else to do


def test_importing_the_importers_is_quick_and_loads_no_numpy():
    code = "import sys, npulab.importers; print('numpy' in sys.modules, 'flatbuffers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout == "False False\n"


# Hostile files


def mutations(seeds: list[bytes], count: int, rng: random.Random):
    """Damaged copies of `seeds`: flipped bits, extreme numbers where offsets and lengths are, cuts, moved pieces."""
    extremes = [0, 1, 4, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC]
    for i in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data))
            kind = rng.randrange(5)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                at -= at % 4
                data[at : at + 4] = struct.pack("<I", rng.choice(extremes))[: len(data) - at]
            elif kind == 2:
                at -= at % 4
                data[at : at + 4] = struct.pack("<I", rng.randrange(len(data)))[: len(data) - at]
            elif kind == 3:
                source, length = rng.randrange(len(data)), rng.randrange(1, 64)
                piece = data[source : source + length]
                data[at : at + len(piece)] = piece
            elif i % 4 == 0:
                del data[max(at, 8):]
        yield bytes((data[4:8] == b"TFL3" and data) or data[:4] + b"TFL3" + data[8:])


def small_models() -> list[bytes]:
    """SMALL twice (once with bytes behind the FlatBuffer), and the metadata of small real models."""
    behind = changed(lambda m: m["buffers"].__setitem__(2, {"offset": 4096, "size": 12}))
    names = ("split_concat", "keras_lstm_mnist_ptq", "kws_ref_model")
    real = [p.read_bytes() for n in names if (p := MODELS / "quantized" / f"{n}.tflite").exists()]
    return [SMALL, outside(behind, 4096, bytes(12)), *real]


def test_damaged_files_are_refused_or_read_in_bounded_time_and_memory():
    rng = random.Random(1)
    seeds = small_models()
    refused = slowest = 0
    for data in mutations(seeds, 1500, rng):
        start = time.process_time()
        try:
            read_tflite(data, "damaged")
        except ModelError:
            refused += 1
        slowest = max(slowest, time.process_time() - start)

    assert slowest < 0.5
    assert 300 < refused < 1500  # both outcomes are met


def test_damaged_files_take_little_memory():
    rng = random.Random(2)
    cases = list(mutations(small_models(), 150, rng))
    tracemalloc.start()
    try:
        for data in cases:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(ModelError):
                read_tflite(data, "damaged")
            assert tracemalloc.get_traced_memory()[1] - before < 40 * (len(data) + 2**16)
    finally:
        tracemalloc.stop()


def test_every_length_field_attacked_in_turn():
    """Each 32-bit word of a whole file replaced by extremes: none is trusted."""
    for at in range(0, len(SMALL) - 3, 4):
        for value in (0, 0xFFFFFFFF, 0x7FFFFFFF, len(SMALL)):
            data = SMALL[:at] + struct.pack("<I", value) + SMALL[at + 4 :]
            with contextlib.suppress(ModelError):
                read_tflite(data, "attacked")


def test_the_schema_is_read_once():
    assert schema() is schema()
