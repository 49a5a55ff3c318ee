"""Memory of a quantization: weights stay in files, a part of the network at a time; and files are put together again
byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import onnx.shape_inference
import pytest
from onnx import TensorProto, helper, numpy_helper

import npulab
from npulab import quantizing
from npulab.errors import ModelError
from npulab.importers.onnx_parts import DamagedError, left_out, thin
from npulab.program.pages import LARGE, arrays_away, let_go, put_away
from npulab.quantization import parts, sampling, session
from npulab.quantization.job import Options
from npulab.quantization.observe import observe
from npulab.quantization.parts import each
from npulab.quantization.session import runner
from npulab.quantization.types import ListedSamples
from npulab.targets.facts.quantization import rules_of

CHANNELS, LAYERS, SIZE = 256, 12, 8
WEIGHTS = LAYERS * CHANNELS * CHANNELS * 9 * 4
"""Bytes of the network's weights: 27 MiB."""


def deep(layers: int = LAYERS, channels: int = CHANNELS, size: int = SIZE, residual: bool = True) -> onnx.ModelProto:
    """Convolutions with their clamps, every other one around a residual sum."""
    rng = np.random.default_rng(0)
    nodes, constants, now = [], [], "x"
    for i in range(layers):
        w = rng.standard_normal((channels, channels, 3, 3), np.float32) / np.float32(3 * channels**0.5)
        constants.append(numpy_helper.from_array(w, f"w{i}"))
        nodes += [helper.make_node("Conv", [now, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]),
                  helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}")]
        if residual and i % 2:
            nodes.append(helper.make_node("Add", [f"r{i}", now], [f"a{i}"], f"add{i}"))
        now = nodes[-1].output[0]
    nodes.append(helper.make_node("GlobalAveragePool", [now], ["y"], "pool"))
    graph = helper.make_graph(
        nodes, "deep", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, 1, 1])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


RUN = """
import json, sys
import numpy as np
import onnx, onnx.reference, onnx.shape_inference, onnxruntime
import npulab, npulab.quantizing as q
from npulab.quantization.job import Options
from npulab.quantization.types import ListedSamples
from npulab.targets.facts.quantization import rules_of
from npulab.targets.facts.quantization import rules_of
def memory(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
rng = np.random.default_rng(0)
shape = json.loads(sys.argv[2])
samples = ListedSamples([{"x": rng.standard_normal(shape, np.float32)} for _ in range(32)], "noise")
before = memory()
made = q.quantize(npulab.load(sys.argv[1]), samples, rules_of("generic-onnx"), Options(recipe="min-max"))
print(json.dumps({"peak": memory() - before, "bytes": len(made.data)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_quantizing_takes_less_memory_than_three_times_the_weights(tmp_path):
    """It was nine times when every stage held the whole network, and its file, and its session's copy of it."""
    path = tmp_path / "deep.onnx"
    onnx.save(deep(), path)
    done = subprocess.run([sys.executable, "-c", RUN, str(path), json.dumps([1, CHANNELS, SIZE, SIZE])],
                          capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)

    assert said["bytes"] > WEIGHTS / 4
    assert said["peak"] < 3 * WEIGHTS, f"{said['peak'] / WEIGHTS:.1f} times"


def samples(count: int, size: int, channels: int = 64) -> ListedSamples:
    rng = np.random.default_rng(1)
    return ListedSamples([{"x": rng.standard_normal((1, channels, size, size), np.float32)} for _ in range(count)], "")


@pytest.mark.parametrize("disk", [1 << 30, 200_000, 1000])
def test_a_network_in_parts_gives_the_same_numbers_to_the_last_bit(monkeypatch, disk):
    model = deep(8, 64, 16).SerializeToString()
    some, names = samples(7, 16), ["r1", "a3", "a7", "y"]
    whole = runner(model, names)
    wanted = [whole(feeds) for feeds in some]
    monkeypatch.setattr(parts, "PART", 300_000)
    monkeypatch.setattr(parts, "STEP", 400_000)
    monkeypatch.setattr(parts, "DISK", disk)
    monkeypatch.setattr(parts, "TURN", 3)
    pieces = parts._parts(thin(model), names, len(some))

    assert len(pieces) > 1 if disk > 1000 else len(pieces) == 1  # less than a tensor: nothing may lie between
    assert sum(map(len, pieces)) > 2
    found = list(each(model, names, some, list))
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, y)


def test_sums_and_clamps_stay_with_what_they_are_fused_to(monkeypatch):
    monkeypatch.setattr(parts, "STEP", 1)
    monkeypatch.setattr(parts, "PART", 1)
    pieces = [step for part in parts._parts(thin(deep(8, 64, 16).SerializeToString()), ["y"], 1) for step in part]

    assert len(pieces) > 3
    for step in pieces:
        first = step.model.proto.graph.node[0]
        assert first.op_type == "Conv"


def test_a_thin_model_is_written_as_protobuf_writes_the_whole_one():
    proto = deep(2)
    proto.doc_string, proto.graph.doc_string = "of the model", "of the graph"
    helper.set_model_props(proto, {"key": "value"})
    proto.graph.value_info.append(helper.make_tensor_value_info("c0", TensorProto.FLOAT, [1, CHANNELS, SIZE, SIZE]))
    data = proto.SerializeToString(deterministic=True)
    made = thin(data)

    assert set(made.contents) == {"w0", "w1"}
    assert len(made.proto.SerializeToString()) < 2000
    assert bytes(made) == data
    assert bytes(made.file()) == data
    assert made.pieces()[0] == len(data)


def test_constants_of_nodes_stay_in_the_file_too():
    w = np.arange(8192, dtype=np.float32)
    value = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w))
    graph = helper.make_graph([value, helper.make_node("Add", ["x", "w"], ["y"])], "g",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8192])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8192])])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    (constant,) = [v for v in npulab.load(data).values if v.is_constant]

    np.testing.assert_array_equal(constant.array(), w)
    assert len(left_out(data)[0]) < 200
    assert constant.constant is not None
    assert constant.constant.obj is data


@pytest.mark.parametrize("cut", [1, 7, 100, 20_000])
def test_damaged_files_are_said_to_be_damaged(cut):
    data = deep(1, 64).SerializeToString()
    with pytest.raises(ModelError, match="damaged"):
        npulab.load(data[:-cut])
    with pytest.raises(DamagedError):
        left_out(data[:-cut])


def test_arrays_that_are_put_away_are_the_same_and_can_be_let_go():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((3, 5), np.float32), rng.integers(0, 9, LARGE).astype(np.int8),
              rng.standard_normal((4, 6), np.float32).T, np.zeros((0, 3)), np.array(1.5)]
    kept = arrays_away(arrays)
    for _ in range(2):
        for x, y in zip(arrays, kept, strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.shape == y.shape
            assert x.dtype == y.dtype
            assert y.flags.aligned
            let_go(y)
    let_go(b"nothing")
    let_go(np.zeros(3))
    view = put_away([b"a" * LARGE, b"b"], LARGE + 1)
    let_go(view[5:9])
    assert bytes(view[-3:]) == b"aab"


def with_constant_node(attribute: onnx.AttributeProto) -> bytes:
    """y = x + w of 8192 elements, w a Constant node."""
    node = onnx.NodeProto(op_type="Constant", output=["w"], attribute=[attribute])
    graph = helper.make_graph([node, helper.make_node("Add", ["x", "w"], ["y"])], "g",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8192])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8192])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


def test_a_model_with_constants_of_nodes_runs():
    """They were left out of the message, and nothing put them in again."""
    w = np.arange(8192, dtype=np.float32)
    data = with_constant_node(helper.make_attribute("value", numpy_helper.from_array(w)))

    np.testing.assert_array_equal(runner(data, ["y"])({"x": w})[0], 2 * w)
    assert bytes(thin(data)) == data


def test_a_constant_s_content_is_that_of_the_attribute_that_counts():
    attribute = helper.make_attribute("value_floats", [1.0] * 8192)
    attribute.t.CopyFrom(numpy_helper.from_array(np.zeros(8192, np.float32)))
    (constant,) = [v for v in npulab.load(with_constant_node(attribute)).values if v.is_constant]

    assert (constant.array() == 1).all()


def chain(between, shape: tuple[int, ...] = (1, 8, 64, 64), layers: int = 4) -> bytes:
    """Products of rows with their weights; `between(i, name)` gives the nodes behind each, the name of what these make,
    and constants."""
    rng = np.random.default_rng(0)
    nodes, constants, now = [], {}, "x"
    for i in range(layers):
        constants[f"w{i}"] = rng.standard_normal((64, 64), np.float32) / 8
        nodes.append(helper.make_node("MatMul", [now, f"w{i}"], [f"h{i}"], f"product{i}"))
        more, now, own = between(i, f"h{i}")
        nodes += more
        constants |= own
    nodes.append(helper.make_node("Identity", [now], ["y"]))
    graph = helper.make_graph(nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
                              [numpy_helper.from_array(a, name) for name, a in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


def rows(count: int = 6, shape: tuple[int, ...] = (1, 8, 64, 64)) -> ListedSamples:
    rng = np.random.default_rng(1)
    return ListedSamples([{"x": rng.standard_normal(shape, np.float32)} for _ in range(count)], "")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART", 1 << 14)


def as_whole(model: bytes, names: list[str]) -> None:
    """Raises unless the model is run in parts, and gives what it gives in one."""
    assert len(parts._parts(thin(model), names, 6, together=True)) > 1
    run = runner(model, names)
    for got, feeds in zip(each(model, names, rows(), list), rows(), strict=True):
        for x, y in zip(got, run(feeds), strict=True):
            np.testing.assert_array_equal(x, y)


def through(kind: int):
    """Nodes that turn a tensor into another type and back."""
    def between(i, name):
        return [helper.make_node("Cast", [name], [f"{name}_in"], to=kind),
                helper.make_node("Cast", [f"{name}_in"], [f"{name}_out"], to=TensorProto.FLOAT)], f"{name}_out", {}
    return between


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.STRING])
def test_only_numbers_that_both_sides_know_lie_between_parts(small_parts, kind):
    """bfloat16 is smaller than float32, so that it was first choice, and ONNX Runtime does not give it away."""
    as_whole(chain(through(kind)), ["y"])


def test_what_only_constants_decide_is_observed_too(small_parts):
    """A table that is resized, as of positions: no sample goes through what makes it."""
    def between(i, name):
        if i != 1:
            return [], name, {}
        table = np.random.default_rng(2).standard_normal((1, 8, 32, 32), np.float32)
        return [helper.make_node("Resize", ["table", "", "scales"], ["resized"], mode="nearest"),
                helper.make_node("Add", [name, "resized"], ["sum"])], "sum", {
                    "table": table, "scales": np.array([1, 1, 2, 2], np.float32)}
    sizes = dict.fromkeys(("resized", "sum"), 1 << 15)
    found = observe(chain(between), ["resized", "sum", "y"], rows(), True, sizes=sizes)
    (table,) = runner(chain(between), ["resized"])(rows().feeds[0])

    assert found["resized"].samples == found["y"].samples == 6
    assert found["resized"].high == table.max()


def test_a_part_ends_where_something_of_the_samples_goes_on(small_parts):
    """Behind what begins anew, as random numbers do, no part would know of a sample."""
    def between(i, name):
        made = helper.make_node("RandomUniform", [], ["anew"], shape=[1, 8, 64, 64])
        return ([made], "anew", {}) if i == 1 else ([], name, {})

    assert len(list(each(chain(between), ["y"], rows(), list))) == 6


def test_bodies_read_what_lies_between_parts_and_other_parts_constants(small_parts):
    def between(i, name):
        if i != 2:
            return [], name, {}
        def body(node):
            return helper.make_graph([node], "body", [],
                                     [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [1, 8, 64, 64])])
        then = body(helper.make_node("MatMul", ["h0", "w0"], ["then"]))
        other = body(helper.make_node("Mul", ["h1", "h0"], ["other"]))
        return [helper.make_node("ReduceMax", [name], ["largest"], keepdims=0),
                helper.make_node("Greater", ["largest", "limit"], ["above"]),
                helper.make_node("If", ["above"], ["chosen"], then_branch=then, else_branch=other)], "chosen", {
                    "limit": np.array(4, np.float32)}
    as_whole(chain(between), ["y"])


def test_bodies_of_what_only_constants_decide_have_their_constants(small_parts):
    def between(i, name):
        if i != 2:
            return [], name, {}
        body = helper.make_graph([helper.make_node("Neg", ["table"], ["less"])], "body", [],
                                 [helper.make_tensor_value_info("less", TensorProto.FLOAT, [64])])
        return [helper.make_node("If", ["always"], ["chosen"], then_branch=body, else_branch=body),
                helper.make_node("Mul", [name, "chosen"], ["product"])], "product", {
                    "table": np.arange(64, dtype=np.float32), "always": np.array(True)}
    as_whole(chain(between), ["y"])


def test_tensors_are_asked_for_twice_and_inputs_and_constants_are_too(small_parts):
    as_whole(chain(lambda i, name: ([], name, {})), ["y", "h1", "x", "w2", "y"])


def test_shapes_that_grow_without_end_are_not_followed(monkeypatch):
    """Each joint doubles a shape, and the importer does not follow them either."""
    nodes = [helper.make_node("Shape", ["x"], ["c0"]),
             *(helper.make_node("Concat", [f"c{i}"] * 2, [f"c{i + 1}"], axis=0) for i in range(20))]
    graph = helper.make_graph(nodes, "joints", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
                              [helper.make_tensor_value_info("c20", TensorProto.INT64, [2 << 20])])
    asked = []
    infer = onnx.shape_inference.infer_shapes
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes",
                        lambda proto, data_prop: asked.append(data_prop) or infer(proto, data_prop=data_prop))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    types = parts._types(thin(model.SerializeToString()))

    assert asked == [False]
    assert types["c20"][1] == 8 * 2 << 20


def test_large_models_run_where_open_files_have_no_names(monkeypatch):
    """As in a root without /proc."""
    model = chain(lambda i, name: ([], name, {}), layers=80)
    assert len(model) > LARGE
    (want,) = runner(model, ["y"])(rows().feeds[0])
    monkeypatch.setattr(session, "OPEN_FILES", "/nowhere")

    np.testing.assert_array_equal(runner(model, ["y"])(rows().feeds[0])[0], want)


HEAP = """
import re, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from npulab.quantization.session import share_heap
if sys.argv[1] == "shared":
    share_heap()
with ThreadPoolExecutor(1) as pool:
    kept = pool.submit(lambda: [np.ones(60_000, np.uint8) for _ in range(50)]).result()
low, high = (int(x, 16) for x in re.search(r"(\\w+)-(\\w+) .*\\[heap\\]", open("/proc/self/maps").read()).groups())
print(sum(low <= x.ctypes.data < high for x in kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_threads_take_memory_from_the_one_heap():
    """Their own kept what samples took in them: 25 MiB of EfficientNet's."""
    found = [int(subprocess.run([sys.executable, "-c", HEAP, how], capture_output=True, text=True, check=True).stdout)
             for how in ("own", "shared")]

    assert found == [0, 50]


def test_samples_at_hand_leave_memory_behind_the_one_that_is_read(monkeypatch):
    gone = []
    monkeypatch.setattr(sampling, "let_go", gone.append)
    kept = sampling.held(samples(4, 64)).take([0, 2, 3])
    for i, (feeds, want) in enumerate(zip(kept, samples(4, 64).take([0, 2, 3]), strict=True)):
        np.testing.assert_array_equal(feeds["x"], want["x"])
        assert len(gone) == i
    assert len(gone) == 3


EXACT = """
import sys
import numpy as np
import npulab
from npulab.reference import prepare
def memory(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
graph = npulab.load(sys.argv[1])
(x,) = [graph.values[v] for v in graph.inputs]
feeds = {x.name: np.zeros(x.shape, np.float32)}
import npulab.reference.qdq
before = memory()
made = prepare(graph, "onnx")
for _ in range(2):
    made.run(feeds)
print(memory() - before, "onnxruntime" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_the_exact_simulation_needs_no_copy_of_weights_and_no_runtime(tmp_path):
    """ONNX Runtime alone took 19 MiB, and a session for each layer several times its weights."""
    pytest.importorskip("npulab._sums")
    made = quantizing.quantize(npulab.load(deep(layers=8).SerializeToString()), samples(2, SIZE, CHANNELS),
                               rules_of("generic-onnx"), Options(recipe="min-max"))
    path = tmp_path / "integers.onnx"
    path.write_bytes(made.data)
    done = subprocess.run([sys.executable, "-c", EXACT, str(path)], capture_output=True, text=True, check=True)
    taken, imported = done.stdout.split()

    assert imported == "False"
    assert int(taken) < 1.5 * path.stat().st_size, f"{int(taken) >> 20} MiB"
