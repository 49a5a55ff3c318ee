"""Verdicts read critically: operators spelled out, marks of quantization, limits of public logs, constant data."""

import json

import numpy as np
import pytest

from npulab import api
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.targets.facts.board import Board, find_board, view_of
from npulab.targets.facts.properties import Properties
from shared import MODELS, needs_shared
from test_facts import CONV, conv, facts, onnx_graph

X = {"x": ("float32", [1, 8, 4, 4])}


def where(board, graph, assume=""):
    board = find_board(board) if isinstance(board, str) else board
    return [f.where for f in board.check(graph, assume).findings]


# operators spelled out

def gelu(order, root=2 ** 0.5, half=0.5, one=1.0, out=("y",)):
    """x / 2 (1 + erf(x / sqrt 2)) in one of six orders."""
    first = ("Div", ["x", "r"]) if order % 2 else ("Mul", ["r", "x"])
    nodes = [(first[0], first[1], ["a"], {}), ("Erf", ["a"], ["e"], {}), ("Add", ["e", "one"], ["b"], {})]
    nodes += [[("Mul", ["x", "b"], ["c"], {}), ("Mul", ["c", "half"], ["y"], {})],
              [("Mul", ["x", "half"], ["c"], {}), ("Mul", ["c", "b"], ["y"], {})],
              [("Mul", ["half", "b"], ["c"], {}), ("Mul", ["c", "x"], ["y"], {})]][order // 2]
    numbers = {"r": root if order % 2 else 1 / root, "half": half, "one": one}
    return onnx_graph(nodes, X, {k: np.float32(v) for k, v in numbers.items()}, list(out))


@pytest.mark.parametrize("order", range(6))
def test_an_error_function_and_what_is_around_it_are_gelu(order):
    board = Board(facts("[[op]]\nnames = ['Gelu']\ndtypes = ['int8']\n"))
    found = board.check(gelu(order), "int8").findings
    assert {(f.where, f.name) for f in found} == {("npu", "Gelu")}
    assert "Erf and what is around it are Gelu." in str(found[0].notes[-1])
    assert set(where(board, gelu(order))) == {"refused"}  # floats break Gelu's own rule
    assert set(where("rk3588", gelu(order), "int8")) == {"npu"}


@pytest.mark.parametrize("wrong", [{"root": 1.5}, {"half": 0.4}, {"one": 2.0}, {"out": ("y", "e")}])
def test_what_is_nearly_gelu_is_not(wrong):
    for order in range(6):
        assert "refused" in where(Board(facts("[[op]]\nnames = ['Gelu']\n")), gelu(order, **wrong))


def test_softplus_tanh_and_mul_are_mish():
    nodes = [("Softplus", ["x"], ["s"], {}), ("Tanh", ["s"], ["t"], {}), ("Mul", ["t", "x"], ["y"], {})]
    board = Board(facts("[[op]]\nnames = ['Mish']\n"))
    assert where(board, onnx_graph(nodes, X)) == ["npu"] * 3
    nodes[2] = ("Mul", ["t", "t"], ["y"], {})
    assert set(where(board, onnx_graph(nodes, X))) == {"refused"}


# marks of quantization

def quantized_relu():
    """x -> Q -> DQ -> Conv of DQ weights -> Relu -> Q -> DQ: Relu's own input is never quantized."""
    constants = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((8, 8, 3, 3), np.int8)}
    q = "QuantizeLinear"
    return onnx_graph([
        (q, ["x", "s", "z"], ["xq"], {}), ("DequantizeLinear", ["xq", "s", "z"], ["xd"], {}),
        ("DequantizeLinear", ["w", "s", "z"], ["wd"], {}), ("Conv", ["xd", "wd"], ["c"], {}),
        ("Relu", ["c"], ["r"], {}), (q, ["r", "s", "z"], ["rq"], {}), ("DequantizeLinear", ["rq", "s", "z"], ["y"], {}),
    ], X, constants)


def test_an_activation_before_its_quantization_has_its_type():
    graph = quantized_relu()
    p = Properties(graph, graph.nodes[4])
    assert [p.get(n) for n in ("dtype", "out_dtype", "quantized")] == ["int8", "int8", True]
    assert Properties(graph, graph.nodes[3]).get("out_dtype") == "int8"
    for board in ("coral_edgetpu", "ethos_u55", "ethos_u85", "nxp_neutron", "samsung_enn"):
        assert set(where(board, graph)) == {"npu"}, board


def test_tensorrt_takes_a_network_with_marks_of_quantization():
    """NVIDIA's list has types of ONNX's tensors: Conv's are floats, which DequantizeLinear gives it."""
    assert set(where("nvidia_tensorrt", quantized_relu())) == {"npu"}
    assert where(Board(facts("[[op]]\nnames = ['Conv']\ndtypes = ['float32']\n")), quantized_relu())[3] == "refused"


def test_marks_that_the_vendor_lists_for_the_cpu_are_not_folded():
    assert where("nvidia_dla_orin", quantized_relu())[:2] == ["host", "host"]


def tflite(*operators, dtype="int8"):
    """operators: (name, inputs or None for what is before, shape, options); data is (1, 4, 4, 8)."""
    b = ModelBuilder("m")
    last = first = b.tensor("x", (1, 4, 4, 8), dtype, **({} if dtype == "float32" else {"scale": 0.1, "zero_point": 0}))
    for k, (name, extra, shape, to, options) in enumerate(operators):
        out = b.tensor(f"v{k}", shape, to, **({} if to == "float32" else {"scale": 0.1, "zero_point": 1}))
        more = [b.tensor(f"c{k}", e.shape, str(e.dtype), data=e) for e in extra]
        b.op(name, [last, *more], [out], **options)
        last = out
    return load(b.build([first], [last]))


S = (1, 4, 4, 8)
RELU, SCALED = ("RELU", (), S, "int8", {}), ("QUANTIZE", (), S, "int8", {})
FROM_FLOAT, TO_FLOAT = ("QUANTIZE", (), S, "int8", {}), ("DEQUANTIZE", (), S, "float32", {})


@pytest.mark.parametrize("board", ["esp32_espdl", "axera_ax650", "axera_m57", "hailo8"])
def test_tools_that_read_tflite_into_operators_of_their_own_fold_its_marks(board):
    graph = tflite(RELU, SCALED, RELU, TO_FLOAT)
    assert set(where(board, graph)) == {"npu"}
    found = find_board(board).check(graph).findings[1]
    assert "Marks of quantization" in str(found.notes[-1])


def test_compilers_of_tflite_files_keep_them():
    graph = tflite(FROM_FLOAT, RELU, RELU, TO_FLOAT, dtype="float32")
    for board in ("coral_edgetpu", "ethos_u55", "ethos_u85"):
        assert where(board, graph) == ["host", "npu", "npu", "host"], board


@needs_shared
def test_biases_that_a_file_stores_smaller_are_constant():
    graph = load(MODELS / "float" / "face_detection_short_range.tflite")
    for board in ("ethos_u85", "ethos_u55"):
        assert set(where(board, graph, "int8")) == {"npu"}
    assert not any("constant" in str(r) or "One computed" in str(r)
                   for f in find_board("ti_tidl_c7x").check(graph, "int8").findings for r in f.reasons)


# boards

def test_one_part_begins_where_the_npu_does():
    graph = onnx_graph([("Erf", ["x"], ["a"], {}), ("Relu", ["a"], ["b"], {}), ("Erf", ["b"], ["c"], {}),
                        ("Relu", ["c"], ["y"], {})], X)
    board = Board(facts("[[op]]\nnames = ['Relu']\n", "host", "host_from_first = true\n"))
    assert where(board, graph) == ["host", "npu", "host", "host"]


def test_a_rule_may_send_an_operator_to_the_cpu_whatever_the_policy():
    rule = "    [[op.rule]]\n    text = 't'\n    require = 'kernel_h <= {}'\n    effect = '{}'\n"
    assert where(Board(facts(CONV + rule.format(2, "host"))), conv()) == ["host"]
    assert where(Board(facts(CONV + rule.format(3, "host"))), conv()) == ["npu"]
    assert where(Board(facts(CONV + rule.format(2, "host") + rule.format(2, "refuse"))), conv()) == ["refused"]
    softmax = onnx_graph([("Softmax", ["x"], ["y"], {"axis": 2})], X)
    assert where("rv1103_rv1106", softmax, "int8") == ["host"]


def test_coral_leaves_what_public_logs_leave():
    turned = ("TRANSPOSE", (np.array([0, 3, 1, 2], np.int32),), (1, 8, 4, 4), "int8", {})
    assert where("coral_edgetpu", tflite(RELU, turned, ("RELU", (), (1, 8, 4, 4), "int8", {}))) == \
        ["npu", "host", "host"]
    stepped = ("STRIDED_SLICE", (np.zeros(4, np.int32), np.array(S, np.int32), np.array([1, 2, 2, 1], np.int32)),
               (1, 2, 2, 8), "int8", {})
    assert where("coral_edgetpu", tflite(RELU, stepped)) == ["npu", "host"]
    for shape, want in (((1, 1, 128), "npu"), ((1, 16, 8), "npu"), ((1, 2, 2, 4, 8), "host"), ((4, 1, 4, 8), "host"),
                        ((1, 1, 4, 4, 8), "npu")):
        reshape = ("RESHAPE", (np.array(shape, np.int32),), shape, "int8", {})
        assert where("coral_edgetpu", tflite(RELU, reshape)) == ["npu", want], shape
    for shape, want in (((1, 128), "npu"), ((16, 8), "host")):
        graph = tflite(("RESHAPE", (np.array(shape, np.int32),), shape, "int8", {}),
                       ("SOFTMAX", (), shape, "int8", {"beta": 1.0}))
        assert where("coral_edgetpu", graph) == ["npu", want]


@needs_shared
def test_coral_leaves_the_tail_of_a_detector():
    graph = load(MODELS / "quantized" / "yolov8n_full_integer_quant_416.tflite")
    found = find_board("coral_edgetpu").check(graph).findings
    assert (found[150].where, found[-1].where) == ("npu", "host")
    assert next(f for f in found if f.where != "npu").op == "TRANSPOSE"


def test_a_window_of_one_axis_is_one_pixel_high_and_its_data_keeps_rank_3():
    graph = onnx_graph([("Conv", ["x", "w"], ["y"], {})], {"x": ("float32", [1, 8, 20])},
                       {"w": np.ones((16, 8, 3), np.float32)})
    p = Properties(graph, graph.nodes[0])
    assert [p.get(n) for n in ("rank", "kernel_h", "kernel_w", "stride_h", "height")] == [3, 1, 3, 1, 1]
    rule = "    [[op.rule]]\n    text = 't'\n    require = 'rank == 4'\n"
    assert where(Board(facts(CONV + rule)), graph) == ["refused"]
    assert where(Board(facts("[[fact]]\nkey = 'max_rank'\nvalue = 3\nsource = 'S1'\n" + CONV)), graph) == ["npu"]


def test_names_of_zero_points_and_of_several_scales():
    b = ModelBuilder("m")
    x = b.tensor("x", (1, 4, 4, 2), "int16", scale=0.1, zero_point=5)
    w = b.tensor("w", (2, 1, 1, 2), "int8", data=np.ones((2, 1, 1, 2), np.int8), scale=0.1, zero_point=3)
    y = b.tensor("y", (1, 4, 4, 2), "int16", scales=[0.1, 0.2], axis=3)
    b.op("CONV_2D", [x, w], [y], stride_h=1, stride_w=1, padding="VALID")
    graph = load(b.build([x], [y]))
    p = Properties(graph, graph.nodes[0])
    assert [p.get(n) for n in ("inputs_centred", "results_per_channel", "data_per_channel")] == [False, True, True]
    p = Properties(conv(), conv().nodes[0])
    assert (p.get("inputs_centred"), p.get("results_per_channel")) == (None, None)
    graph = conv()
    p = Properties(graph, graph.nodes[0], "int8")
    assert (p.get("inputs_centred"), p.get("results_per_channel")) == (True, False)


def test_the_view_of_a_graph_is_kept():
    graph = conv()
    assert view_of(graph, "int8") is view_of(graph, "int8")


# constant data, on a chip that npulab compiles for

def constant_data(operator):
    """x + f(constant)."""
    b = ModelBuilder("m")
    q = {"scale": 0.1, "zero_point": 3}
    shape = (1, 8, 32, 8) if operator == "RESHAPE" else (1, 18, 18, 8) if operator == "PAD" else (1, 16, 16, 8)
    c = b.tensor("c", (1, 16, 16, 8), "uint8", data=np.ones((1, 16, 16, 8), np.uint8), **q)
    r = b.tensor("r", shape, "uint8", **q)
    w = {"CONV_2D": (8, 1, 1, 8), "DEPTHWISE_CONV_2D": (1, 3, 3, 8)}.get(operator)
    extra = [] if w is None else [b.tensor("w", w, "uint8", data=np.ones(w, np.uint8), scale=0.01, zero_point=0),
                                  b.tensor("b", (8,), "int32", data=np.zeros(8, np.int32), scale=0.001, zero_point=0)]
    if operator == "RESHAPE":
        extra = [b.tensor("s", (4,), "int32", data=np.array(shape, np.int32))]
    if operator == "PAD":
        extra = [b.tensor("s", (4, 2), "int32", data=np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))]
    options = {"stride_h": 1, "stride_w": 1, "padding": "SAME"} if w else {}
    if operator == "DEPTHWISE_CONV_2D":
        options["depth_multiplier"] = 1
    b.op(operator, [c, *extra], [r], **options)
    x, y = b.tensor("x", shape, "uint8", **q), b.tensor("y", shape, "uint8", scale=0.2, zero_point=3)
    b.op("ADD", [x, r], [y])
    return b.build([x], [y]), shape


@pytest.mark.parametrize("operator", ["RESHAPE", "CONV_2D", "DEPTHWISE_CONV_2D", "PAD", "RELU"])
def test_an_operator_of_constant_data_stays_on_the_host(operator):
    data, shape = constant_data(operator)
    graph = load(data)
    found = api.check(graph)[0]
    assert found.where == "host"
    assert "Data is computed" in str(found.reasons[0])
    assert "'c' is constant" in str(found.reasons[0])
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    x = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    i = interpreter.Interpreter(model_content=data,
                                experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_REF)
    i.allocate_tensors()
    i.set_tensor(i.get_input_details()[0]["index"], x)
    i.invoke()
    want = i.get_tensor(i.get_output_details()[0]["index"])
    (got,) = api.open_session(api.compile(graph)).run({"x": x}).values()
    assert np.abs(got.astype(int) - want).max() <= 1


def test_json_of_several_boards_is_what_it_was(capsys):
    from npulab.cli.check import _write
    from npulab.cli.printing import write_json

    for data in ({"a": [1, 2.5, "\N{GREEK SMALL LETTER MU}", None, True, {}, []]}, [{"b": {"c": [[]]}}],
                 {"n": float("nan")}):
        _write(data)
        ours = capsys.readouterr().out
        write_json(data)
        assert ours == capsys.readouterr().out
    assert json.loads(ours) == {"n": None}
