"""Passes on ONNX graphs: random networks before and after in ONNX Runtime, and the certificate that says so."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab import zoo
from npulab.cli import run_arguments
from npulab.errors import UsageError
from npulab.exporters.onnx import to_onnx
from npulab.importers import load
from npulab.passes import certificate, constants, pipeline
from npulab.passes.certificate import compared
from npulab.passes.pipeline import PASSES, patched, post_of
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from shared import MODELS, needs_shared

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT = TensorProto.FLOAT


class Net:
    """Nodes in a row over an image, with random constants."""

    def __init__(self, seed, channels=4, size=(9, 11)):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.constants, self.count = [], [], 0
        self.channels, self.shape = channels, (1, channels, *size)
        self.top = "x"

    def constant(self, array, dtype=np.float32):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def op(self, name, *inputs, **attributes):
        self.count += 1
        out = f"v{self.count}"
        self.nodes.append(helper.make_node(name, inputs, [out], f"n{self.count}", **attributes))
        return out

    def conv(self, x, out, kernel=3, groups=1, bias=True, channels=None, **attributes):
        channels = channels or self.channels
        w = self.constant(self.rng.normal(size=(out, channels // groups, kernel, kernel)) / (3 * kernel))
        b = [self.constant(self.rng.normal(size=out))] if bias else []
        attributes.setdefault("pads", [kernel // 2] * 4)
        return self.op("Conv", x, w, *b, group=groups, **attributes)

    def batch_norm(self, x, channels):
        scale, shift, mean = (self.constant(self.rng.normal(size=channels)) for _ in range(3))
        return self.op("BatchNormalization", x, scale, shift, mean,
                       self.constant(self.rng.uniform(0.1, 2, channels)), epsilon=float(self.rng.uniform(1e-5, 1e-2)))

    def graph(self, *outputs, opset=17):
        made = helper.make_graph(self.nodes, "net", [helper.make_tensor_value_info("x", FLOAT, self.shape)],
                                 [helper.make_tensor_value_info(o, FLOAT, None) for o in outputs], self.constants)
        return load(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
                    .SerializeToString())


def check(before, passes=(), expect=None, **options):
    after, changes = patched(before, passes, **options)
    for a in compared(before, after, None, post_of(before, after, changes)):
        assert a.relative <= 1e-5 or a.largest <= 2e-6, a  # sums of numbers near 1 that cancel
    if expect is not None:
        assert sorted({c.name for c in changes}) == sorted(expect)
    onnx.checker.check_model(to_onnx(after))
    return after, changes


def ops(graph):
    return [n.op.name for n in graph.nodes]


# one pass at a time


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["conv", "grouped", "transposed", "transposed groups", "gemm"]),
       st.booleans(), st.booleans())
def test_batch_normalization_goes_into_what_is_before_it(seed, kind, bias, shared):
    n = Net(seed)
    match kind:
        case "conv" | "grouped":
            y, c = n.conv("x", 6 if kind == "conv" else 8, groups=1 if kind == "conv" else 2, bias=bias), 0
            c = 6 if kind == "conv" else 8
        case "gemm":
            flat = n.op("Flatten", "x")
            w = n.constant(n.rng.normal(size=(5, 4 * 99)) / 20)
            y, c = n.op("Gemm", flat, w, *([n.constant(n.rng.normal(size=5))] if bias else []), transB=1), 5
        case _:
            groups = 1 if kind == "transposed" else 2
            w = n.constant(n.rng.normal(size=(4, 3, 3, 3)))
            y, c = n.op("ConvTranspose", "x", w, *([n.constant(n.rng.normal(size=3 * groups))] if bias else []),
                        group=groups), 3 * groups
    z = n.batch_norm(y, c)
    g = n.graph(z, y) if shared else n.graph(n.op("Relu", z))

    after, _ = check(g, expect=[] if shared else ["batch-norm"])
    assert ("BatchNormalization" in ops(after)) == shared


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
def test_branches_of_a_repvgg_block_are_one_convolution(seed, stride, groups, identity, batch_norms):
    n = Net(seed)

    def normed(y):
        return n.batch_norm(y, 4) if batch_norms else y
    branches = [normed(n.conv("x", 4, 3, groups, bias=not batch_norms, strides=[stride] * 2)),
                normed(n.conv("x", 4, 1, groups, bias=not batch_norms, strides=[stride] * 2))]
    if identity and stride == 1:
        branches.append(n.batch_norm("x", 4) if batch_norms else "x")
    y = branches[0]
    for b in branches[1:]:
        y = n.op("Add", y, b)
    after, _ = check(n.graph(y))

    assert ops(after) == ["Conv"]


def test_branches_that_do_not_belong_together_stay():
    n = Net(0)
    a, b = n.conv("x", 4, 3), n.conv("x", 4, 3, dilations=[2, 2], pads=[2] * 4)
    c = n.conv(n.op("Relu", "x"), 4, 1)
    after, changes = check(n.graph(n.op("Add", n.op("Add", a, b), c)))

    assert not changes
    assert ops(after) == ["Conv", "Conv", "Relu", "Conv", "Add", "Add"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 5]), st.integers(0, 2), st.permutations([0, 1, 2, 3]),
       st.booleans())
def test_focus_is_one_convolution(seed, kernel, pad, order, two_slices):
    n = Net(seed, channels=3, size=(12, 16))
    corners = []
    for k in order:
        y, x = divmod(k, 2)
        if two_slices:
            rows = n.op("Slice", "x", *(n.constant([v], np.int64) for v in (y, 2**31 - 1, 2, 2)))
            corners.append(n.op("Slice", rows, *(n.constant([v], np.int64) for v in (x, 2**31 - 1, 3, 2))))
        else:
            corners.append(n.op("Slice", "x", *(n.constant(v, np.int64) for v in (
                [y, x], [12, 16], [2, 3], [2, 2]))))
    y = n.conv(n.op("Concat", *corners, axis=1), 5, kernel, channels=12, pads=[pad] * 4)
    after, _ = check(n.graph(y), ["focus"], expect=["focus"])

    assert ops(after) == ["Conv"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([5, 7, 9, 13]))
def test_large_max_pools_are_chains(seed, kernel):
    n = Net(seed, size=(int(6 + seed % 9), 8))
    y = n.op("MaxPool", "x", kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, strides=[1, 1])
    after, _ = check(n.graph(n.op("Relu", y)), ["pool-chain"], expect=["pool-chain"])

    assert ops(after) == ["MaxPool"] * (kernel // 2) + ["Relu"]
    assert compared(n.graph(y), patched(n.graph(y), ["pool-chain"])[0])[0].largest == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 3), min_size=4, max_size=4), st.sampled_from([11, 13, 17]))
def test_padding_goes_into_the_convolution(seed, pads, opset):
    n = Net(seed)
    own = n.constant([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)
    y = n.op("Pad", "x", own, *([n.constant(0.0)] if seed % 2 else []))
    after, _ = check(n.graph(n.conv(y, 3, 3, pads=[1, 0, 2, 1]), opset=opset))

    assert ops(after) == ["Conv"]


@pytest.mark.parametrize("value", [1.0, -0.5])
def test_padding_with_something_else_stays(value):
    n = Net(0)
    y = n.op("Pad", "x", n.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64), n.constant(value))

    assert ops(check(n.graph(n.conv(y, 3)))[0]) == ["Pad", "Conv"]


def test_shapes_and_constants_fold_through_long_chains():
    n = Net(0)
    shape = n.op("Shape", "x")
    part = n.op("Slice", shape, n.constant([0], np.int64), n.constant([1], np.int64))
    total = n.constant([1], np.int64)
    for _ in range(30):
        total = n.op("Mul", total, n.constant([1], np.int64))
    minus = n.op("Sub", n.constant([0], np.int64), total)
    y = n.op("Reshape", n.op("Identity", "x"), n.op("Concat", part, minus, axis=0))
    after, _ = check(n.graph(n.op("Relu", y)), expect=["constants", "identities"])

    assert ops(after) == ["Reshape", "Relu"]
    assert after.values[after.outputs[0]].shape == (1, 4 * 9 * 11)


def test_what_would_be_huge_or_random_is_not_folded(monkeypatch):
    n = Net(0)
    big = n.op("ConstantOfShape", n.constant([1 << 20, 1 << 20], np.int64))
    y = n.op("Add", "x", n.op("RandomNormal", shape=[1], seed=1.0))
    g = n.graph(n.op("Add", y, n.op("ReduceMax", big)))

    monkeypatch.setattr(constants, "ELEMENTS_MAX", 100)
    assert "ConstantOfShape" in ops(patched(g)[0])
    assert "RandomNormal" in ops(patched(g)[0])


def test_an_output_keeps_its_name_and_inputs_are_no_outputs():
    n = Net(0)
    g = n.graph(n.batch_norm(n.conv("x", 4), 4), n.op("Identity", "x"))
    after, _ = check(g)

    assert [after.values[v].name for v in after.outputs] == [g.values[v].name for v in g.outputs]
    assert sorted(ops(after)) == ["Conv", "Identity"]


# what is not exact


@pytest.mark.parametrize(("name", "other"), [("silu-to-relu", "Relu"), ("silu-to-hardswish", "HardSwish")])
def test_an_inexact_pass_runs_only_by_name_and_says_so(name, other):
    n = Net(0)
    y = n.conv("x", 4)
    g = n.graph(n.op("Mul", y, n.op("Sigmoid", y)))

    assert not patched(g)[1]
    after, (change,) = patched(g, [name])
    assert (change.exact, change.name) == (False, name)
    assert ops(after) == ["Conv", other]
    assert compared(g, after)[0].relative > 1e-3


def test_every_pass_has_a_rule_and_unknown_ones_are_refused():
    assert all(len(p.rule) > 40 for p in PASSES)
    assert len({p.name for p in PASSES}) == len(PASSES)
    with pytest.raises(UsageError, match="there is no pass 'magic'"):
        patched(load(zoo.build("squeezenet", 64)), ["magic"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_all_exact_passes_together_over_random_networks(seed):
    n = Net(seed)
    top, channels = "x", 4
    for _ in range(int(n.rng.integers(2, 9))):
        match int(n.rng.integers(7)):
            case 0:
                out = int(n.rng.integers(1, 9))
                top, channels = n.conv(top, out, int(n.rng.choice([1, 3, 5])), channels=channels), out
            case 1:
                top = n.batch_norm(top, channels)
            case 2:
                top = n.op("Add", top, n.op("Identity", top))
            case 3:
                top = n.op("MaxPool", top, kernel_shape=[5, 5], pads=[2] * 4, strides=[1, 1])
            case 4:
                top = n.op("Add", n.conv(top, channels, 3, channels=channels), n.conv(top, channels, 1,
                                                                                     channels=channels))
            case 5:
                top = n.op("Mul", top, n.op("Sigmoid", top))
            case 6:
                top = n.op("Pad", top, n.constant([0, 0, 1, 0, 0, 0, 0, 1], np.int64))
    exact = [p.name for p in PASSES if p.exact]
    check(n.graph(top if top != "x" else n.op("Relu", top)), exact)


# the certificate and the command


def wrong(r: Rewrite):
    """Says it is exact, and is not."""
    for node in r.live():
        if node.op.name == "Relu":
            r.change(node, op="Sigmoid")
            return ["a lie"]
    return []


def saved(tmp_path, graph):
    path = tmp_path / "net.onnx"
    path.write_bytes(to_onnx(graph))
    return str(path)


def test_a_pass_that_lies_is_found_out_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "PASSES", (Pass("lie", wrong),))
    n = Net(0)
    out = tmp_path / "out.onnx"

    assert run_arguments(["patch", saved(tmp_path, n.graph(n.op("Relu", "x"))), "-o", str(out)]) == 1
    assert "THE OUTPUTS CHANGED although every pass is exact" in capsys.readouterr().out
    assert not out.exists()


def test_the_command_writes_the_network_and_its_certificate(tmp_path, capsys):
    n = Net(1)
    path = saved(tmp_path, n.graph(n.op("Relu", n.batch_norm(n.conv("x", 6, bias=False), 6))))
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    x = np.random.default_rng(5).random((1, 4, 9, 11), np.float32)
    np.savez(tmp_path / "real.npz", x=x)

    assert run_arguments(["patch", path, "-o", str(out), "--report", str(report), "--input",
                          str(tmp_path / "real.npz")]) == 0
    text = capsys.readouterr().out
    assert "batch-norm: 1 place\n  n2: folded into n1\n" in text
    assert "Equivalent: the outputs agree within 1e-5" in text
    assert max(map(len, text.replace(str(tmp_path), "").splitlines())) <= 80
    data = json.loads(report.read_text())
    assert (data["equivalent"], data["before"]["nodes"], data["after"]["nodes"]) == (True, 3, 2)
    assert data["before"]["macs"] == data["after"]["macs"] == 9 * 11 * 6 * 4 * 9
    assert data["outputs"][0]["relative_error"] <= 1e-5
    assert ops(load(out)) == ["Conv", "Relu"]


def test_an_inexact_patch_says_so_in_capitals(tmp_path, capsys):
    n = Net(2)
    path = saved(tmp_path, n.graph(n.op("Mul", "x", n.op("Sigmoid", "x"))))
    out = tmp_path / "out.onnx"

    assert run_arguments(["patch", path, "-o", str(out), "--pass", "silu-to-relu"]) == 0
    assert "NOT EQUIVALENT: silu-to-relu changed what the network computes." in capsys.readouterr().out
    assert ops(load(out)) == ["Relu"]


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (["{model}"], 2, "npulab patch needs a model and -o OUT"),
    (["{model}", "-o", "out.onnx", "--pass", "magic"], 2, "there is no pass 'magic'"),
    (["{model}", "-o", "out.onnx", "--target", "magic"], 2, "magic"),
    (["{model}", "-o", "out.onnx", "--input", "{model}"], 3, "is not a file of arrays by name"),
    (["{model}", "-o", "out.onnx", "--input", "wrong.npz"], 2, "does not fit"),
    (["{model}", "-o", "out.onnx", "--input", "none.npz"], 2, "has no array 'x'"),
    (["{model}", "-o", "no/such/folder/out.onnx"], 2, "cannot write"),
])
def test_mistakes_are_told(tmp_path, capsys, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    n = Net(3)
    model = saved(tmp_path, n.graph(n.op("Relu", "x")))
    np.savez("wrong.npz", x=np.zeros(3))
    np.savez("none.npz", y=np.zeros(3))

    assert run_arguments(["patch", *(a.format(model=model) for a in arguments)]) == code
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_a_missing_runtime_is_told(monkeypatch):
    import sys

    n = Net(4)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match="measured with ONNX Runtime, which is not installed"):
        certificate.compared(n.graph(n.op("Relu", "x")), n.graph(n.op("Relu", "x")))


@needs_shared
@pytest.mark.parametrize(("name", "dims", "nodes"), [
    ("ch_ppocr_mobile_v2.0_cls_infer", {"x.2": 48, "x.3": 192}, 200),
    ("efficientnet_lite0_imagenet_float", {}, 100), ("yolov5n_coco_float", {}, 260)])
def test_real_networks_are_simpler_and_the_same(name, dims, nodes):
    g = load(MODELS / "float" / f"{name}.onnx", dims)
    after, changes = patched(g, ["cut-head", "focus", "pool-chain"])

    assert len(after.nodes) < nodes < len(g.nodes)
    assert not any(v.dynamic_axes for v in after.values)
    for a in compared(g, after, None, post_of(g, after, changes)):
        assert a.relative <= 1e-5


def test_repvgg_s_training_form_becomes_its_deploy_form():
    train, deploy = (load(zoo.build(name, 64)) for name in ("repvgg-a2-train", "repvgg-a2"))
    after, _ = patched(train)

    assert ops(after) == ops(deploy)
    assert compared(train, after)[0].equal
