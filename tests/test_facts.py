"""Described boards: the format's refusals, predicates against Python, names of nodes against the files' own shapes."""

import contextlib
import math
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import ModelError, UsageError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.formats.tflite import schema as tflite_schema
from npulab.importers import load
from npulab.ir.ops import DepthwiseConv2D, OnnxOp
from npulab.plan.partition import partition
from npulab.targets.facts import names, schema
from npulab.targets.facts.board import Board, boards, find_board, regions
from npulab.targets.facts.predicates import DEPTH_MAX, LENGTH_MAX, PredicateError, compile_predicate
from npulab.targets.facts.properties import _NAMES, Properties, macs
from shared import MODELS, needs_shared

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(schema.DATA.glob("*.toml"))
REAL = sorted(p for p in MODELS.glob("*/*") if p.suffix in (".tflite", ".onnx"))


# predicates

NUMBER_NAMES = ("kernel_h", "kernel_w", "rank", "channels")
TEXT_NAMES = ("mode", "padding")
LIST_NAMES = ("stride", "dilation")


def _expressions():
    numbers = st.recursive(
        st.integers(-9, 9).map(str) | st.floats(-9, 9, allow_nan=False).map(lambda x: repr(round(x, 2)))
        | st.sampled_from(NUMBER_NAMES),
        lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})")
        | st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
        | inner.map(lambda e: f"abs({e})") | inner.map(lambda e: f"(-{e})"), max_leaves=5)
    lists = st.lists(numbers, min_size=1, max_size=3).map(lambda e: f"[{', '.join(e)}]") | st.sampled_from(LIST_NAMES)
    texts = st.sampled_from(["'same'", "'valid'", "''", *TEXT_NAMES])
    compared = (
        st.tuples(numbers, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), numbers).map(" ".join)
        | st.tuples(numbers, st.sampled_from(["<", "<="]), numbers, st.sampled_from(["<", "<="]), numbers).map(" ".join)
        | st.tuples(numbers, st.sampled_from(["in", "not in"]), lists).map(" ".join)
        | st.tuples(texts, st.sampled_from(["==", "!="]), texts).map(" ".join)
        | st.tuples(lists, st.sampled_from(["==", "!="]), lists).map(" ".join)
        | lists.map(lambda e: f"len({e}) == 2"))
    return st.recursive(compared, lambda inner: st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
        lambda t: f"({t[0]} {t[1]} {t[2]})") | inner.map(lambda e: f"(not {e})")
        | st.lists(inner, min_size=1, max_size=3).map(lambda e: f"all([{', '.join(e)}])")
        | st.lists(inner, min_size=1, max_size=3).map(lambda e: f"any([{', '.join(e)}])"), max_leaves=6)


EXPRESSIONS = _expressions().filter(lambda e: len(e) <= LENGTH_MAX)
VALUES = st.fixed_dictionaries({
    **{n: st.integers(-5, 40) for n in NUMBER_NAMES}, **{n: st.sampled_from(["same", "valid"]) for n in TEXT_NAMES},
    **{n: st.lists(st.integers(1, 3), min_size=2, max_size=2) for n in LIST_NAMES}})


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS, VALUES)
def test_a_decided_predicate_is_what_python_says(text, values):
    try:
        want = bool(eval(text, {}, values))
    except ZeroDivisionError:
        return  # Python stops there; we may still decide it by another side
    assert compile_predicate(text).decide(values.get) is want


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS, VALUES, st.sets(st.sampled_from(NUMBER_NAMES + TEXT_NAMES + LIST_NAMES)), VALUES)
def test_what_is_decided_without_some_names_holds_whatever_their_values(text, values, hidden, others):
    known = {n: v for n, v in values.items() if n not in hidden}
    found = compile_predicate(text).decide(known.get)
    if found is not None:
        for filled in (values, {**others, **known}):
            with contextlib.suppress(ZeroDivisionError):
                assert bool(eval(text, {}, filled)) is found


@pytest.mark.parametrize(("text", "want"), [
    ("x > 1 or rank > 3", True), ("rank > 3 or x > 1", True), ("x > 1 and rank > 9", False),
    ("x > 1 and rank > 3", None),
    ("not x", None), ("x in [1, 2]", None), ("rank in [x, 4]", True), ("rank in [x, 5]", None),
    ("rank // 0 == 1", None),
    ("rank < 'a'", None), ("all([x, rank > 9])", False), ("any([x, rank > 3])", True), ("max(x, 3) > 1", None),
    ("[x, 4] == [1, 4]", None), ("1 < x < 0 < rank", None), ("9 < rank < x", False), ("'a' * 3 == 'aaa'", None)])
def test_three_values(text, want):
    assert compile_predicate(text).decide({"rank": 4}.get) is want


@pytest.mark.parametrize("text", [
    "", "1 +", "__import__('os')", "a.b", "a[0]", "lambda: 1", "2 ** 9", "1 / 2", "f'{a}'", "[x for x in y]", "min()",
    "len(a, b)", "min(*a)", "max(a, key=b)", "a if b else c", "a is b", "(a := 1)", "a; b", "None", "b'x'", "~a", "{1}",
    "(" * 300 + "1" + ")" * 300, "not " * (DEPTH_MAX + 1) + "a", "1" + " + 1" * 600, "a == " + "9" * 1001])
def test_what_is_no_predicate(text):
    with pytest.raises(PredicateError):
        compile_predicate(text)


def test_culprits_are_the_names_of_the_sides_that_fail():
    p = compile_predicate("kernel_h <= 3 and kernel_w <= 3 and rank == 4")
    values = {"kernel_h": 5, "kernel_w": 3, "rank": 4}
    assert p.culprits(values.get) == ("kernel_h",)
    del values["kernel_h"]
    assert p.culprits(values.get) == ("kernel_h",)


# the format

HEAD = 'id = "x"\nvendor = "V"\nname = "X"\nunlisted = "{}"\n'
SOURCE = '[sources.S1]\ntitle = "The list"\n'


def facts(text, unlisted="reject", top=""):
    return schema.parse((HEAD.format(unlisted) + top + SOURCE + text).encode(), "x", "x.toml")


@pytest.mark.parametrize(("text", "want"), [
    ("[[op]]\nnames = ['Conv']\nkernel = 3", ["where   op[0] (Conv)", "unknown field `kernel`", "keys names, vendor"]),
    ("[[op]]\nnames = ['Conv']\nsource = 'S9'", ["op[0] (Conv).source", "S9", "a source of the file: S1"]),
    ("[[op]]\nnames = ['Conv']\n[[op]]\nnames = ['Relu', 'Conv']", ["op[1] (Relu, Conv)", "which op[0] has"]),
    ("[[op]]\nnames = ['conv 2d']", ["an ONNX operator, or tflite:NAME", "conv 2d"]),
    ("[[op]]\nnames = []", ["one operator or more"]),
    ("[[op]]\nnames = ['Conv']\ndtypes = ['w8a8']", ["op[0] (Conv).dtypes", "w8a8", "int8"]),
    ("[[op]]\nnames = ['Conv']\nsupport = 'maybe'", ["op[0].support (Conv)", "npu or host or preview"]),
    ("[[op]]\nnames = ['Conv']\n[[op.rule]]\ntext = 't'\nrequire = 'kernel_h <'", 
     ["op[0] (Conv).rule[0]", "a predicate"]),
    ("[[op]]\nnames = ['Conv']\n[[op.rule]]\ntext = 't'\nrequire = 'kernal_h < 3'", ["kernal_h", "such as kernel_h"]),
    ("[[op]]\nnames = ['Conv']\n[[op.rule]]\ntext = 't'\nrequire = 'rank < 3'\nany = ['rank < 2']", ["both"]),
    ("[[op]]\nnames = ['Conv']\n[[op.rule]]\nrequire = 'rank < 3'", ["op[0].rule[0] (Conv)", "text"]),
    ("[[rule]]\nscope = 'layer'\ntext = 't'", ["rule[0].scope (t)", "graph or node or tensor"]),
    ("[[rule]]\nscope = 'graph'\ntext = 't'\nrequire = 'kernel_h < 3'", ["rule[0]", "kernel_h"]),
    ("[[fact]]\nkey = 'memory_topology'\nvalue = 'big'", ["fact memory_topology", "shared-dram or on-chip"]),
    ("[[fact]]\nkey = 'max_rank'\nvalue = 'four'", ["fact max_rank", "a number"]),
    ("[[fact]]\nkey = 'a'\nvalue = 1\n[[fact]]\nkey = 'a'\nvalue = 2", ["fact a", "2 times"]),
    ("x = 1\nx = 2", ["a TOML file"]), ("\n[[op", ["a TOML file"])])
def test_a_file_that_breaks_the_format_is_refused_with_the_place(text, want):
    with pytest.raises(ModelError) as e:
        facts(text)
    assert "x.toml is not a description of a board" in str(e.value)
    assert not [w for w in want if w not in str(e.value)], str(e.value)


def test_the_id_is_the_files_name_and_words_are_the_formats():
    with pytest.raises(ModelError, match="the file's name, y"):
        schema.parse(HEAD.format("host").encode(), "y", "y.toml")
    with pytest.raises(ModelError, match="host or reject or cut or unknown"):
        schema.parse(HEAD.format("maybe").encode(), "x", "x.toml")
    with pytest.raises(ModelError):
        schema.parse(b"\xff\xfe", "x", "x.toml")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_of_the_package_loads(path):
    schema.load(path)


@pytest.mark.skipif(not FILES, reason="no data files yet")
def test_operators_of_the_package_are_onnx_or_tflite():
    """The witness is the onnx package's list of operators."""
    defs = pytest.importorskip("onnx.defs")
    known = {s.name for s in defs.get_all_schemas_with_history() if s.domain == ""} | {"DepthwiseConv", "Conv3D"}
    odd = {(f.id, n) for f in schema.load_all().values() for e in f.op for n in (*e.names, *e.fuses)
           if n not in known and ":" not in n}
    vendors = {"SpatialTransformer", "Bevpool", "InverseSigmoid"}  # of lists that have operators of their own
    vendors |= {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # experimental operators of ONNX before version 5
    assert not {o for o in odd if o[1] not in vendors}


def test_all_files_load_in_no_time():
    code = ("import time; from npulab.targets.facts import schema; t = time.perf_counter(); schema.load_all(); "
            "print(time.perf_counter() - t)")
    best = min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))
    assert best < 1.5  # 0.2 s on an idle machine


def test_help_does_not_read_the_boards():
    code = "import sys, npulab.cli; assert not any('targets.facts' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_board_is_refused_with_close_names():
    if FILES:
        with pytest.raises(UsageError) as e:
            find_board(FILES[0].stem + "x")
        assert FILES[0].stem in str(e.value)
        assert find_board(FILES[0].stem).facts is boards()[FILES[0].stem].facts


# names of operators


def test_every_builtin_of_tflite_has_a_name_or_is_listed_as_having_none():
    builtins = set(tflite_schema().enums["BuiltinOperator"])
    assert set(names.TFLITE) | names.NONE == builtins
    assert not set(names.TFLITE) & names.NONE
    onnx = pytest.importorskip("onnx.defs")
    known = {s.name for s in onnx.get_all_schemas() if s.domain == ""} | {"DepthwiseConv"}
    assert set(names.TFLITE.values()) <= known
    assert set(names.ACTIVATIONS) == {a.lower() for a in tflite_schema().enums["ActivationFunctionType"]}


def test_the_format_and_the_engine_have_the_same_names():
    assert set(_NAMES) == schema.NAMES


# ONNX graphs


def onnx_graph(nodes, inputs, constants=None, outputs=None, opset=17):
    """nodes: (operator, inputs, outputs, attributes); inputs: name -> (type, shape)."""
    onnx = pytest.importorskip("onnx")
    from npulab.importers.onnx import read_onnx

    h = onnx.helper
    made = [h.make_node(op, i, o, f"{op}_{k}", **a) for k, (op, i, o, a) in enumerate(nodes)]
    last = outputs or [nodes[-1][2][0]]
    types = {"float32": 1, "int8": 3, "int64": 7}
    graph = h.make_graph(
        made, "g", [h.make_tensor_value_info(n, types[t], s) for n, (t, s) in inputs.items()],
        [onnx.ValueInfoProto(name=n) for n in last],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=10)
    return read_onnx(model.SerializeToString(), "g")


def conv(shape=(1, 8, 20, 21), weights=(16, 8, 3, 5), **attributes):
    return onnx_graph([("Conv", ["x", "w"], ["y"], attributes)], {"x": ("float32", shape)},
                      {"w": np.ones(weights, np.float32)})


def properties(graph, i=0, assume=""):
    return Properties(graph, graph.nodes[i], assume)


def test_names_of_an_onnx_convolution():
    p = properties(conv(strides=[2, 1], dilations=[1, 2], pads=[1, 2, 0, 3]))
    got = {n: p.get(n) for n in schema.NAMES}
    want = {"kernel_h": 3, "kernel_w": 5, "stride": [2, 1], "stride_h": 2, "dilation": [1, 2], "dilation_w": 2,
            "pad_top": 1, "pad_left": 2, "pad_bottom": 0, "pad_right": 3, "padding": "EXPLICIT", "groups": 1,
            "channels": 8, "out_channels": 16, "height": 20, "width": 21, "out_height": 10, "out_width": 18, "rank": 4,
            "batch": 1, "shape": [1, 8, 20, 21], "elements": 3360, "dtype": "float32", "weight_bits": 32,
            "weights_constant": True, "inputs": 2, "constant_inputs": 1, "quantized": False, "fused": "none",
            "auto_pad": "NOTSET", "kernel_d": None, "axis": None, "perm": None, "multiplier": None, "broadcast": None}
    assert {n: got[n] for n in want} == want
    assert not p.unknown
    assert p.get("attr_strides") == [2, 1]
    assert p.get("attr_no_such") is None


@pytest.mark.parametrize(("auto", "size", "kernel", "stride", "dilation"), [
    (auto, *numbers) for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")
    for numbers in ((20, 3, 2, 1), (21, 4, 3, 1), (7, 5, 1, 1), (9, 2, 1, 3), (19, 1, 4, 1))
    if auto == "VALID" or numbers[3] == 1])  # ONNX Runtime takes no dilation with SAME
def test_automatic_pads_are_those_that_onnx_runtime_uses(auto, size, kernel, stride, dilation):
    """The same convolution with our pads, written out, gives the same numbers."""
    ort = pytest.importorskip("onnxruntime")
    from npulab.exporters.onnx import to_onnx

    rng = np.random.default_rng(1)
    w = {"w": rng.integers(-4, 5, (2, 1, kernel, kernel)).astype(np.float32)}
    plain = {"strides": [stride] * 2, "dilations": [dilation] * 2}
    x = rng.integers(-4, 5, (1, 1, size, size + 1)).astype(np.float32)
    ours = onnx_graph([("Conv", ["x", "w"], ["y"], {**plain, "auto_pad": auto})], {"x": ("float32", x.shape)}, w)
    p = properties(ours)
    pads = [p.get(f"pad_{side}") for side in ("top", "left", "bottom", "right")]
    stated = onnx_graph([("Conv", ["x", "w"], ["y"], {**plain, "pads": pads})], {"x": ("float32", x.shape)}, w)
    answers = [ort.InferenceSession(to_onnx(g), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
               for g in (ours, stated)]
    assert np.array_equal(*answers)
    assert p.get("padding") == auto[:4].replace("VALI", "VALID")


@pytest.mark.parametrize("auto", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("out", [(8, 9), (7, 8), (6, 10)])
def test_pads_of_a_transposed_convolution_to_a_size_are_those_that_onnx_runtime_uses(auto, out):
    """The same with our pads, written out, gives the same numbers."""
    ort = pytest.importorskip("onnxruntime")
    from npulab.exporters.onnx import to_onnx

    rng = np.random.default_rng(1)
    w = {"w": rng.integers(-4, 5, (1, 2, 3, 3)).astype(np.float32)}
    x = rng.integers(-4, 5, (1, 1, 4, 5)).astype(np.float32)

    def graph(**own):
        return onnx_graph([("ConvTranspose", ["x", "w"], ["y"], {"strides": [2, 2], **own})],
                          {"x": ("float32", x.shape)}, w)

    ours = graph(output_shape=list(out), auto_pad=auto)
    p = properties(ours)
    stated = graph(pads=[p.get(f"pad_{side}") for side in ("top", "left", "bottom", "right")])
    answers = [ort.InferenceSession(to_onnx(g), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
               for g in (ours, stated)]
    assert np.array_equal(*answers)


def test_names_of_other_onnx_operators():
    x = {"x": ("float32", [1, 8, 4, 6])}

    def of(op, inputs=("x",), constants=None, opset=17, **a):
        return properties(onnx_graph([(op, list(inputs), ["y"], a)], x, constants, opset=opset))

    assert of("Softmax").get("axis") == 3
    assert of("Softmax", opset=11).get("axis") == 1  # the default changed with version 13
    assert of("Concat", ("x", "x"), axis=-3).get("axis") == 1
    assert of("Transpose", perm=[0, 2, 3, 1]).get("perm") == [0, 2, 3, 1]
    assert of("Transpose").get("perm") == [3, 2, 1, 0]
    p = of("Clip", ("x", "lo", "hi"), {"lo": np.float32(0), "hi": np.float32(6)})
    assert (p.get("attr_min"), p.get("attr_max")) == (0, 6)
    p = of("Resize", ("x", "", "s"), {"s": np.array([1, 1, 2, 1.5], np.float32)}, mode="linear")
    assert [p.get(n) for n in ("scale_h", "scale_w", "mode", "coordinate_mode", "align_corners", "half_pixel_centers")
            ] == [2, 1.5, "linear", "half_pixel", False, True]
    p = of("MaxPool", kernel_shape=[2, 2])
    assert [p.get(n) for n in ("stride", "ceil_mode", "attr_storage_order", "padding")] == [[1, 1], False, 0, "VALID"]
    p = of("ReduceMean", axes=[-1, 2], keepdims=0)
    assert (p.get("axes"), p.get("keepdims")) == ([2, 3], False)
    assert names.canonical(p.node, p) == ("ReduceMean", "GlobalAveragePool")
    p = of("GlobalAveragePool")
    assert (p.get("kernel_h"), p.get("kernel_w"), p.get("axes")) == (4, 6, [2, 3])
    p = of("Pad", ("x", "p"), {"p": np.array([0, 0, 1, 2, 0, 0, 3, 4])}, mode="reflect")
    assert [p.get(n) for n in ("pad_top", "pad_left", "pad_bottom", "pad_right", "mode")] == [1, 2, 3, 4, "reflect"]
    p = of("LeakyRelu")
    assert p.get("alpha") == pytest.approx(0.01)
    assert of("Elu", alpha=0.5).get("alpha") == 0.5
    for shape, want in (((8, 1, 1), "channel"), ((1,), "scalar"), ((4, 6), "other"), ((1, 8, 4, 6), "none")):
        p = of("Mul", ("c", "x"), {"c": np.ones(shape, np.float32)})
        assert (p.get("broadcast"), p.get("channels"), p.get("same_shapes")) == (want, 8, want == "none")


def test_kinds_of_convolution():
    for weights, group, want in (((8, 1, 3, 3), 8, ("DepthwiseConv", "Conv")), ((16, 4, 3, 3), 2, ("Conv",)),
                                 ((4, 8, 1, 1), 1, ("Conv",))):
        p = properties(conv(weights=weights, group=group))
        assert names.canonical(p.node, p) == want
        assert p.get("groups") == group
    p = properties(conv((1, 8, 3, 9, 9), (4, 8, 2, 3, 4)))
    assert names.canonical(p.node, p) == ("Conv3D", "Conv")
    assert [p.get(f"kernel_{a}") for a in "dhw"] == [2, 3, 4]
    p = properties(conv((1, 8, 9), (4, 8, 3)))
    assert [p.get(n) for n in ("kernel_w", "kernel_h", "stride", "height", "width", "pad_top", "rank")] == [
        3, 1, [1, 1], 1, 9, 0, 3]


def test_a_dynamic_size_is_not_known_and_a_dynamic_batch_is_one():
    p = properties(conv(("n", 8, "h", 21)))
    assert (p.get("batch"), p.get("height"), p.get("width"), p.get("shape")) == (1, None, 21, None)
    assert p.unknown == {"height", "shape"}


def qdq():
    """x -> Q -> DQ -> Conv of DQ weights -> Q -> DQ."""
    s, z = {"s": np.float32(0.1), "z": np.int8(3)}, {"ws": np.full(16, 0.1, np.float32), "wz": np.zeros(16, np.int8)}
    return onnx_graph(
        [("QuantizeLinear", ["x", "s", "z"], ["xq"], {}), ("DequantizeLinear", ["xq", "s", "z"], ["xd"], {}),
         ("DequantizeLinear", ["w", "ws", "wz"], ["wd"], {"axis": 0}), ("Conv", ["xd", "wd"], ["c"], {}),
         ("QuantizeLinear", ["c", "s", "z"], ["cq"], {}), ("DequantizeLinear", ["cq", "s", "z"], ["y"], {})],
        {"x": ("float32", [1, 8, 9, 9])}, {"w": np.ones((16, 8, 3, 3), np.int8), **s, **z})


def test_marks_of_quantization_are_looked_through_and_go_where_their_operators_go():
    graph = qdq()
    p = properties(graph, next(i for i, n in enumerate(graph.nodes) if n.op.name == "Conv"))
    want = {"dtype": "int8", "weight_dtype": "int8", "weight_bits": 8, "out_dtype": "int8", "quantized": True,
            "per_channel": True, "zero_point": 3, "weights_constant": True}
    assert {n: p.get(n) for n in want} == want
    text = "[[op]]\nnames = ['Conv']\ndtypes = ['int8']\nsource = 'S1'\n"
    check = Board(facts(text)).check(graph)
    assert (check.count("npu"), check.partitions, check.npu_percent) == (6, 1, 100)
    check = Board(facts(text + "weight_quant = ['per-tensor']")).check(graph)
    found = check.findings[next(i for i, n in enumerate(graph.nodes) if n.op.name == "Conv")]
    assert found.where == "refused"
    assert str(found.reasons[0]) == ("Weights are quantized per-tensor. Found: per-channel. "
                                     "Try: quantize the weights per-tensor.")
    assert check.count("npu") == 0


# TFLite graphs


def tflite(operator, inputs, output, **options):
    """One operator; inputs: shapes, or arrays for constants."""
    b = ModelBuilder("m")
    tensors = [b.tensor(f"i{k}", i.shape, str(i.dtype), data=i) if isinstance(i, np.ndarray)
               else b.tensor(f"i{k}", i, "int8", scale=0.1, zero_point=4) for k, i in enumerate(inputs)]
    y = b.tensor("y", output, "int8", scale=0.1, zero_point=5)
    b.op(operator, tensors, [y], **options)
    return load(b.build([t for t, i in zip(tensors, inputs, strict=True) if not isinstance(i, np.ndarray)], [y]))


def test_names_of_tflite_operators_are_in_nchw():
    w = np.ones((16, 3, 5, 8), np.int8)
    p = properties(tflite("CONV_2D", [(1, 20, 21, 8), w], (1, 10, 21, 16), padding="SAME", stride_h=2, stride_w=1,
                          fused_activation_function="RELU6"))
    want = {"shape": [1, 8, 20, 21], "out_shape": [1, 16, 10, 21], "kernel_h": 3, "kernel_w": 5, "stride": [2, 1],
            "pad_top": 0, "pad_bottom": 1, "pad_left": 2, "pad_right": 2, "padding": "SAME", "fused": "Clip",
            "channels": 8, "out_channels": 16, "height": 20, "width": 21, "groups": 1, "zero_point": 4,
            "quantized": True, "auto_pad": "NOTSET", "attr_pads": [0, 2, 1, 2]}
    assert {n: p.get(n) for n in want} == want
    p = properties(tflite("CONCATENATION", [(1, 4, 6, 8)] * 2, (1, 4, 6, 16), axis=-1))
    assert p.get("axis") == 1
    p = properties(tflite("SOFTMAX", [(1, 8)], (1, 8), beta=1.0))
    assert (p.get("axis"), p.get("beta")) == (1, 1)
    perm = np.array([0, 3, 1, 2], np.int32)  # NHWC to NCHW
    p = properties(tflite("TRANSPOSE", [(1, 4, 6, 8), perm], (1, 8, 4, 6)))
    x = np.arange(4 * 6 * 8).reshape(1, 4, 6, 8)
    y = x.transpose(perm)
    assert np.array_equal(x.transpose(0, 3, 1, 2).transpose(p.get("perm")), y.transpose(0, 3, 1, 2))
    p = properties(tflite("MEAN", [(1, 4, 6, 8), np.array([1, 2], np.int32)], (1, 8), keep_dims=False))
    assert (p.get("axes"), p.get("keepdims"), p.kind) == ([2, 3], False, "ReduceMean")
    p = properties(tflite("RESIZE_BILINEAR", [(1, 4, 6, 8), np.array([8, 18], np.int32)], (1, 8, 18, 8),
                          half_pixel_centers=True))
    assert [p.get(n) for n in ("scale_h", "scale_w", "mode", "coordinate_mode")] == [2, 3, "linear", "half_pixel"]
    p = properties(tflite("MUL", [(1, 4, 6, 8), np.ones(8, np.int8)], (1, 4, 6, 8)))
    assert (p.get("broadcast"), p.get("constant_inputs")) == ("channel", 1)
    p = properties(tflite("PAD", [(1, 4, 6, 8), np.array([[0, 0], [1, 2], [3, 4], [0, 0]], np.int32)], (1, 7, 13, 8)))
    assert [p.get(f"pad_{s}") for s in ("top", "bottom", "left", "right")] == [1, 2, 3, 4]


def test_names_of_operands_together():
    p = properties(tflite("STRIDED_SLICE", [(1, 8, 9, 4), *(np.array(v, np.int32) for v in (
        [0, 0, 0, 0], [1, 8, 9, 4], [1, 2, 3, 4]))], (1, 4, 3, 1)))
    assert [p.get(n) for n in ("steps", "steps_elsewhere", "parameters_constant")] == [[1, 4, 2, 3], 4, True]
    p = properties(tflite("MAXIMUM", [(1, 4), (1, 4)], (1, 4)))  # zero points 4, 4 and 5
    assert [p.get(n) for n in ("same_quantization", "same_scales", "same_types", "all_quantized", "data_per_channel",
                               "static", "least_rank", "in_bits", "out_bits", "out_zero_point", "weighted")] == [
        False, True, True, True, False, True, 2, 8, 8, 5, False]
    w = np.full((2, 3, 3, 4), -100, np.int8)
    w[1] = 127
    p = properties(tflite("CONV_2D", [(1, 9, 9, 4), w, np.array([5, -70], np.int32)], (1, 9, 9, 2), padding="SAME",
                          stride_h=1, stride_w=1))
    assert [p.get(n) for n in ("weight_sum", "bias_largest", "bias_constant", "weighted", "all_quantized")] == [
        36 * 127, 70, True, True, False]  # the weights have no scale
    p = properties(tflite("RESIZE_BILINEAR", [(1, 4, 6, 8), np.array([8, 12], np.int32)], (1, 8, 12, 8),
                          half_pixel_centers=True, align_corners=True))
    assert (p.get("align_corners"), p.get("half_pixel_centers")) == (True, True)


def test_a_float_model_has_the_weights_and_types_that_a_converter_will_give_it():
    p = properties(conv(weights=(16, 8, 3, 5)), assume="int8")
    assert [p.get(n) for n in ("weight_sum", "out_bits", "same_scales", "all_quantized")] == [120 * 127, 8, True, True]
    p = properties(tflite("FULLY_CONNECTED", [(1, 8), np.ones((4, 8), np.int8)], (1, 4)))
    assert [p.get(n) for n in ("alpha", "beta", "attr_transA", "attr_transB")] == [1, 1, 0, 1]


def test_a_shape_of_a_tflite_file_stays_where_the_list_says():
    graph = tflite("SHAPE", [(1, 4)], (2,))
    listed = "[[op]]\nnames = ['Shape']\nsupport = 'host'\n"
    assert Board(facts(listed)).check(graph).findings[0].where == "host"
    assert Board(facts(CONV)).check(graph).findings[0].where == "npu"


@pytest.mark.parametrize(("alpha", "want"), [(1 / 6, "npu"), (0.2, "refused")])
def test_hard_sigmoid_and_mul_of_one_value_are_hard_swish(alpha, want):
    graph = onnx_graph([("HardSigmoid", ["x"], ["s"], {"alpha": alpha, "beta": 0.5}), ("Mul", ["x", "s"], ["y"], {})],
                       {"x": ("float32", [1, 8, 9, 9])})
    found = Board(facts("[[op]]\nnames = ['HardSwish']\n")).check(graph).findings
    assert [f.where for f in found] == [want] * 2


@needs_shared
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_real_models_agree_with_their_own_shapes(path):
    """Pads, kernels and strides give the output's size that the file states; regions are those of partition."""
    graph = load(path)
    for n in graph.nodes:
        p = Properties(graph, n)
        values = {name: p.get(name) for name in schema.NAMES}
        assert all(v is None or isinstance(v, int | float | str | list) for v in values.values())
        names.canonical(n, p)
        if p.kind not in ("Conv", "DepthwiseConv", "MaxPool", "AveragePool") or p.get("ceil_mode"):
            continue
        for size, before, behind, a in (("height", "pad_top", "pad_bottom", "h"),
                                        ("width", "pad_left", "pad_right", "w")):
            if None in (values[size], values[f"out_{size}"]):
                continue
            inside = values[size] + values[before] + values[behind] - values[f"dilation_{a}"] * (
                values[f"kernel_{a}"] - 1) - 1
            assert values[f"out_{size}"] == inside // values[f"stride_{a}"] + 1, n
        if isinstance(n.op, DepthwiseConv2D):
            assert values["multiplier"] == n.op.multiplier
    rng = np.random.default_rng(3)
    for share in (0.2, 0.5, 0.9):
        on = {n.index for n in graph.nodes if rng.random() < share}
        assert regions(graph, on) == sum(q.on_npu for q in partition(graph, lambda n, on=on: n.index in on))


@needs_shared
@pytest.mark.skipif(not FILES, reason="no data files yet")
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_every_board_answers_for_every_model_in_time(path):
    graph = load(path)
    for board in boards().values():
        for assume in ("", "int8"):
            began = time.perf_counter()
            check = board.check(graph, assume)
            assert time.perf_counter() - began < 2
            assert len(check.findings) == len(graph.nodes)
            for f in check.findings:
                assert (f.where == "npu") == (not f.reasons), f
                assert all(r.rule and r.found and r.source for r in f.reasons), f
            assert 0 <= (check.npu_percent or 0) <= 100


@needs_shared
def test_mobilenet_has_the_macs_of_its_paper():
    """569 million for MobileNet v1 1.0 at 224: Howard et al., 2017, table 8."""
    graph = load(MODELS / "quantized" / "mobilenet_v1_1.0_224_quant.tflite")
    assert round(sum(macs(Properties(graph, n)) for n in graph.nodes) / 1e6) == 569


# verdicts

CONV = "[[op]]\nnames = ['Conv']\nsource = 'S1'\n"
LIMIT = ("    [[op.rule]]\n    text = 'Kernels are at most 2 by 2.'\n    require = 'kernel_h <= 2 and kernel_w <= 2'\n"
         "    remedy = 'split the kernel'\n")


def test_a_broken_rule_says_what_was_found_what_is_allowed_and_who_says_so():
    f = Board(facts(CONV + LIMIT)).check(conv()).findings[0]
    assert (f.where, f.name, f.op) == ("refused", "Conv", "Conv")
    r = f.reasons[0]
    assert (r.rule, r.found, r.source, r.remedy) == (
        "Kernels are at most 2 by 2.", "kernel_h 3, kernel_w 5", "The list", "split the kernel")
    assert r.allowed == "kernel_h <= 2 and kernel_w <= 2"
    assert str(r) == "Kernels are at most 2 by 2. Found: kernel_h 3, kernel_w 5. Try: split the kernel."


@pytest.mark.parametrize(("unlisted", "top", "where", "broken"), [
    ("host", "", "host", "host"), ("reject", "", "refused", "refused"), ("cut", "", "refused", "refused"),
    ("unknown", "", "unknown", "unknown"), ("host", "broken = 'reject'\n", "host", "refused"),
    ("reject", "broken = 'host'\n", "refused", "host")])
def test_policies(unlisted, top, where, broken):
    graph = onnx_graph([("Conv", ["x", "w"], ["c"], {}), ("Erf", ["c"], ["y"], {})], {"x": ("float32", [1, 8, 9, 9])},
                       {"w": np.ones((4, 8, 3, 3), np.float32)})
    check = Board(facts(CONV + LIMIT, unlisted, top)).check(graph)
    assert [f.where for f in check.findings] == [broken, where]
    assert "Erf is not on it" in check.findings[1].reasons[0].found
    assert ("end the network" in check.findings[1].reasons[0].remedy) == (where == "refused")


def test_a_rule_that_is_not_decided_refuses_nothing():
    rule = "    [[op.rule]]\n    text = 't'\n    require = 'height <= 5 and kernel_h <= 3'\n"
    f = Board(facts(CONV + rule)).check(conv((1, 8, "h", 21))).findings[0]
    assert (f.where, f.reasons) == ("npu", ())
    assert f.undecided[0].found == "not known: height"
    f = Board(facts(CONV + rule)).check(conv()).findings[0]
    assert (f.where, f.undecided) == ("refused", ())


def test_slow_and_unknown_effects_and_tables_of_alternatives():
    table = "    [[op.rule]]\n    text = 't'\n    any = ['kernel_h == 1', 'kernel_h == 3 and kernel_w == {}']\n"
    board = Board(facts(CONV + table.format(5)))
    assert board.check(conv()).findings[0].where == "npu"
    f = Board(facts(CONV + table.format(3))).check(conv()).findings[0]
    assert (f.where, f.reasons[0].found) == ("refused", "kernel_h 3, kernel_w 5")
    f = Board(facts(CONV + table.format(3) + "    effect = 'slow'")).check(conv()).findings[0]
    assert (f.where, len(f.notes), f.undecided) == ("npu", 1, ())
    f = Board(facts(CONV + table.format(3) + "    effect = 'unknown'")).check(conv()).findings[0]
    assert (f.where, f.notes, len(f.undecided)) == ("npu", (), 1)


def test_element_types():
    op = "[[op]]\nnames = ['Conv']\nsource = 'S1'\ndtypes = {}\n"
    f = Board(facts(op.format("['int8', 'int16']"))).check(conv()).findings[0]
    assert (f.where, f.reasons[0].found, f.reasons[0].remedy) == ("refused", "float32", "quantize to int8")
    assert f.reasons[0].allowed == "int8, int16"
    assert Board(facts(op.format("['int8']"))).check(conv(), assume="int8").findings[0].where == "npu"
    f = Board(facts(op.format("['int8', 'float16']"))).check(conv()).findings[0]
    assert (f.where, f.notes[0].found) == ("npu", "float32, computed as float16")
    with pytest.raises(UsageError, match="int8, uint8"):
        Board(facts(CONV)).check(conv(), assume="int9")
    fact = "[[fact]]\nkey = 'dtypes'\nvalue = ['int8']\nsource = 'S1'\n"
    assert Board(facts(fact + CONV)).check(conv()).findings[0].reasons[0].remedy == "quantize to int8"


def test_facts_that_are_limits_and_rules_about_everything():
    text = "".join(f"[[fact]]\nkey = '{k}'\nvalue = {v}\nsource = 'S1'\n" for k, v in
                   (("max_rank", 3), ("max_channels", 12), ("max_dim", 20), ("batch", 1), ("dynamic_shapes", "false")))
    text += "[[rule]]\nscope = 'tensor'\ntext = 'Small.'\nrequire = 'elements < 3000'\n"
    text += "[[rule]]\nscope = 'graph'\ntext = 'One input.'\nrequire = 'inputs == 2'\n"
    text += "[[rule]]\nscope = 'graph'\ntext = 'Be kind.'\n"
    check = Board(facts(text + CONV)).check(conv((2, 8, 20, 21)))
    found = {r.found for r in check.findings[0].reasons}
    assert found == {"rank 4", "out_channels 16", "width 21", "tensor 'x': elements 6720", "tensor 'y': elements 9792"}
    assert [r.found for r in check.graph] == ["inputs 1", "batch 2"]
    assert [r.rule for r in check.advice] == ["Be kind."]
    check = Board(facts(text + CONV)).check(conv((1, 8, "h", 21)))
    assert "dynamic along axis 2" in check.graph[-1].found


def chain(*operators):
    nodes = [("Conv", ["x", "w"], ["v0"], {})]
    for k, op in enumerate(operators):
        extra = ["a", "a", "a", "b"] if op == "BatchNormalization" else []
        nodes.append((op, [f"v{k}", *extra], [f"v{k + 1}"], {}))
    ones = np.ones(8, np.float32)
    return onnx_graph(nodes, {"x": ("float32", [1, 8, 9, 9])}, {"w": np.ones((8, 8, 3, 3), np.float32), "a": ones,
                                                                "b": ones})


def test_what_an_operator_takes_up_runs_with_it():
    board = Board(facts(CONV + "fuses = ['Relu', 'Swish']"))
    check = board.check(chain("BatchNormalization", "Relu"))
    assert [f.where for f in check.findings] == ["npu"] * 3
    assert "part of Conv (node 0)" in str(check.findings[2].notes[0])
    assert [f.where for f in board.check(chain("Tanh", "Relu")).findings] == ["npu", "refused", "refused"]


def swish():
    return onnx_graph([("Conv", ["x", "w"], ["c"], {}), ("Sigmoid", ["c"], ["s"], {}), ("Mul", ["c", "s"], ["y"], {})],
                      {"x": ("float32", [1, 8, 9, 9])}, {"w": np.ones((8, 8, 3, 3), np.float32)})


@pytest.mark.parametrize(("text", "want"), [
    (CONV, ["npu", "refused", "refused"]), (CONV + "fuses = ['Swish']\n", ["npu"] * 3),
    (CONV + "[[op]]\nnames = ['Swish']\n", ["npu"] * 3), (CONV + "[[op]]\nnames = ['Sigmoid', 'Mul']\n", ["npu"] * 3),
    (CONV + "[[op]]\nnames = ['Swish']\ndtypes = ['int8']\n", ["npu", "refused", "refused"]),
    (CONV + "[[op]]\nnames = ['Swish']\nsupport = 'host'\n", ["npu", "host", "host"])])
def test_sigmoid_and_mul_of_one_value_are_swish(text, want):
    assert [f.where for f in Board(facts(text)).check(swish()).findings] == want


def test_host_from_the_first():
    graph = onnx_graph([("Relu", ["x"], ["a"], {}), ("Erf", ["a"], ["b"], {}), ("Relu", ["b"], ["y"], {})],
                       {"x": ("float32", [1, 8])})
    text = "[[op]]\nnames = ['Relu']\n"
    check = Board(facts(text, "host", "host_from_first = true\n")).check(graph)
    assert [f.where for f in check.findings] == ["npu", "host", "host"]
    assert check.findings[2].reasons[0].found == "Erf (node 1) is before it"
    assert (check.partitions, Board(facts(text, "host")).check(graph).partitions) == (1, 2)
    assert check.npu_percent is None


def test_constants_and_shapes_are_worked_out_beforehand():
    graph = onnx_graph([("Shape", ["x"], ["s"], {}), ("Cast", ["s"], ["f"], {"to": 1}), ("Relu", ["x"], ["y"], {})],
                       {"x": ("float32", [1, 8])}, outputs=["y", "f"])
    check = Board(facts("[[op]]\nnames = ['Relu']\n")).check(graph)
    assert [f.where for f in check.findings] == ["npu"] * 3
    graph = onnx_graph([("Shape", ["x"], ["s"], {}), ("Relu", ["x"], ["y"], {})], {"x": ("float32", [1, "n"])},
                       outputs=["y", "s"])
    assert Board(facts("[[op]]\nnames = ['Relu']\n")).check(graph).findings[0].where == "refused"


def test_a_board_without_a_list_refuses_nothing():
    f = Board(facts("", "reject")).check(conv()).findings[0]
    assert (f.where, f.reasons[0].rule) == ("unknown", "Which operators run on the NPU is not published.")


def test_nms_goes_where_the_file_says():
    graph = onnx_graph([("NonMaxSuppression", ["b", "s"], ["y"], {})],
                       {"b": ("float32", [1, 5, 4]), "s": ("float32", [1, 2, 5])})
    for nms, want in (("built-in", "npu"), ("host", "host"), ("cut", "refused"), ("unknown", "unknown")):
        assert Board(facts(CONV, "unknown", f"nms = '{nms}'\n")).check(graph).findings[0].where == want


def test_macs_of_a_share():
    check = Board(facts(CONV + LIMIT, "host")).check(conv())
    assert (check.macs, check.npu_macs, check.npu_percent) == (18 * 17 * 16 * 8 * 15, 0, 0)
    assert math.isclose(Board(facts(CONV)).check(conv()).npu_percent, 100)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "MaxPool", "Resize", "Gemm", "LSTM", "Pad", "ReduceMean",
                                "Transpose", "Concat", "Split", "QLinearConv", "Softmax", "Slice"])
def test_attributes_that_no_operator_has_stop_nothing(op):
    graph = conv()
    names_ = ("strides", "pads", "dilations", "kernel_shape", "group", "axis", "axes", "perm", "scales", "auto_pad")
    for value in ("ab", (), (1,), -1, 2**70, (0, "x"), 0.5, b"\xff", ((1, 2),), None, float("nan")):
        bad = replace(graph.nodes[0], op=OnnxOp(op, dict.fromkeys(names_, value)))
        for shape in ((1, 8, 20, 21), (0, 0), (), (3,)):
            values = tuple(replace(v, shape=shape) if not v.is_constant else v for v in graph.values)
            broken = replace(graph, nodes=(bad,), values=values)
            p = Properties(broken, bad)
            for name in schema.NAMES:
                p.get(name)
            assert len(Board(facts(CONV + LIMIT)).check(broken).findings) == 1


def test_operators_of_other_domains_keep_their_names():
    op = OnnxOp("FusedThing", {}, "com.example")
    assert names._onnx(op, None) == ("com.example:FusedThing",)


# the pages


def test_the_generated_pages_are_up_to_date():
    pages = runpy.run_path(str(ROOT / "scripts" / "make_boards.py"))["pages"]()
    docs = ROOT / "docs"
    stale = [name for name, text in pages.items()
             if not (docs / name).is_file() or (docs / name).read_text("utf-8") != text]
    assert not stale, "run scripts/make_boards.py"
    assert {f"boards/{p.name}" for p in (docs / "boards").glob("*.md")} == set(pages) - {"boards.md"}
