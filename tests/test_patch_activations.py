"""Passes on activations: each form becomes the others, and computes the same; what is not the same is bounded."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.exporters.onnx import to_onnx
from npulab.passes.activations import PASSES
from npulab.passes.certificate import compared
from npulab.passes.pipeline import patched
from npulab.targets.facts.board import find_board

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")

from test_patch import Net, check, ops  # noqa: E402

FORMS = {}


def form(function):
    FORMS[function.__name__] = function
    return function


@form
def silu(n, x):
    return n.op("Mul", x, n.op("Sigmoid", x))


@form
def silu_of_scaled(n, x):
    return n.op("Mul", n.op("Sigmoid", n.op("Mul", x, n.constant(1.5))), x)


@form
def swish(n, x):
    return n.op("Swish", x, alpha=1.25)


@form
def hardswish(n, x):
    return n.op("HardSwish", x)


@form
def hardswish_by_hardsigmoid(n, x):
    return n.op("Mul", n.op("HardSigmoid", x, alpha=1 / 6, beta=0.5), x)


@form
def hardswish_by_clip(n, x):
    gate = n.op("Clip", n.op("Add", n.constant(3), x), n.constant(0), n.constant(6))
    return n.op("Div", n.op("Mul", x, gate), n.constant(6))


@form
def hardswish_by_scaled_clip(n, x):
    gate = n.op("Clip", n.op("Add", x, n.constant(3)), n.constant(0), n.constant(6))
    return n.op("Mul", x, n.op("Div", gate, n.constant(6)))


@form
def hardsigmoid(n, x):
    return n.op("HardSigmoid", x, alpha=0.3, beta=0.4)


@form
def hardsigmoid_by_clip(n, x):
    gate = n.op("Add", n.op("Mul", x, n.constant(0.3)), n.constant(0.4))
    return n.op("Clip", gate, n.constant(0), n.constant(1))


@form
def hardsigmoid_of_six(n, x):
    gate = n.op("Clip", n.op("Add", x, n.constant(3)), n.constant(0), n.constant(6))
    return n.op("Div", gate, n.constant(6))


@form
def mish(n, x):
    return n.op("Mish", x)


@form
def mish_by_softplus(n, x):
    return n.op("Mul", x, n.op("Tanh", n.op("Softplus", x)))


@form
def softplus(n, x):
    return n.op("Softplus", x)


@form
def softplus_by_log(n, x):
    return n.op("Log", n.op("Add", n.op("Exp", x), n.constant(1)))


@form
def gelu(n, x):
    return n.op("Gelu", x)


@form
def gelu_tanh(n, x):
    return n.op("Gelu", x, approximate="tanh")


@form
def gelu_by_erf(n, x):
    bell = n.op("Add", n.op("Erf", n.op("Div", x, n.constant(math.sqrt(2)))), n.constant(1))
    return n.op("Mul", n.op("Mul", x, bell), n.constant(0.5))


@form
def gelu_by_erf_in_another_order(n, x):
    bell = n.op("Add", n.constant(1), n.op("Erf", n.op("Mul", x, n.constant(math.sqrt(0.5)))))
    return n.op("Mul", n.op("Mul", n.constant(0.5), x), bell)


@form
def gelu_by_half_erf(n, x):
    bell = n.op("Mul", n.op("Erf", n.op("Mul", x, n.constant(math.sqrt(0.5)))), n.constant(0.5))
    return n.op("Mul", n.op("Add", bell, n.constant(0.5)), x)


@form
def gelu_by_tanh(n, x):
    cube = n.op("Mul", n.op("Pow", x, n.constant(3)), n.constant(0.044715))
    inner = n.op("Mul", n.op("Add", x, cube), n.constant(math.sqrt(2 / math.pi)))
    return n.op("Mul", n.op("Mul", x, n.constant(0.5)), n.op("Add", n.op("Tanh", inner), n.constant(1)))


@form
def gelu_by_tanh_factored(n, x):
    square = n.op("Add", n.op("Mul", n.op("Mul", x, x), n.constant(0.044715)), n.constant(1))
    inner = n.op("Mul", n.op("Mul", x, n.constant(math.sqrt(2 / math.pi))), square)
    return n.op("Mul", n.op("Mul", x, n.op("Add", n.op("Tanh", inner), n.constant(1))), n.constant(0.5))


@form
def prelu(n, x):
    return n.op("PRelu", x, n.constant(n.rng.normal(size=(4, 1, 1))))


@form
def prelu_of_one_slope(n, x):
    return n.op("PRelu", x, n.constant(np.full((4, 1, 1), 0.25)))


@form
def leaky(n, x):
    return n.op("LeakyRelu", x, alpha=0.1)


@form
def elu(n, x):
    return n.op("Elu", x, alpha=0.7)


@form
def selu(n, x):
    return n.op("Selu", x)


@form
def celu(n, x):
    return n.op("Celu", x, alpha=1.7)


@form
def thresholded(n, x):
    return n.op("ThresholdedRelu", x, alpha=0.5)


@form
def relu6(n, x):
    return n.op("Clip", x, n.constant(0), n.constant(6))


@form
def clip(n, x):
    return n.op("Clip", x, n.constant(-1.5), n.constant(2.5))


@form
def clip_from_zero(n, x):
    return n.op("Clip", x, n.constant(0))


@form
def relu6_by_min(n, x):
    return n.op("Min", n.op("Relu", x), n.constant(6))


@form
def clip_by_max_of_min(n, x):
    return n.op("Max", n.op("Min", x, n.constant(2.5)), n.constant(-1.5))


@form
def divided(n, x):
    return n.op("Div", x, n.constant(n.rng.normal(size=(4, 1, 1)) + 3))


@form
def less(n, x):
    return n.op("Sub", x, n.constant(n.rng.normal(size=(4, 1, 1))))


@form
def squared(n, x):
    return n.op("Pow", x, n.constant(2))


@form
def cubed(n, x):
    return n.op("Pow", x, n.constant(3))


@form
def negative(n, x):
    return n.op("Neg", x)


@form
def absolute(n, x):
    return n.op("Abs", x)


@form
def inverse(n, x):
    return n.op("Reciprocal", n.op("Exp", x))


@form
def three(n, x):
    return n.op("Sum", x, n.op("Sin", x), n.constant(n.rng.normal(size=(4, 1, 1))))


LATER = {"swish": 24, "gelu": 20, "gelu_tanh": 20, "mish": 18, "mish_by_softplus": 18}
"""The first opset that has them; the rest are written in 17."""
TURNS = [
    ("silu", "silu-to-swish", ["Swish"]),
    ("silu_of_scaled", "silu-to-swish", ["Swish"]),
    ("swish", "swish-to-sigmoid", ["Mul", "Sigmoid", "Mul"]),
    ("hardswish", "hardswish-to-hardsigmoid", ["HardSigmoid", "Mul"]),
    ("hardswish", "hardswish-to-clip", ["Add", "Clip", "Mul", "Mul"]),
    ("hardswish_by_hardsigmoid", "hardswish", ["HardSwish"]),
    ("hardswish_by_clip", "hardswish", ["HardSwish"]),
    ("hardswish_by_scaled_clip", "hardswish", ["HardSwish"]),
    ("hardsigmoid", "hardsigmoid-to-clip", ["Mul", "Add", "Clip"]),
    ("hardsigmoid_by_clip", "hardsigmoid", ["HardSigmoid"]),
    ("hardsigmoid_of_six", "hardsigmoid", ["HardSigmoid"]),
    ("mish", "mish-to-softplus", ["Softplus", "Tanh", "Mul"]),
    ("mish_by_softplus", "mish", ["Mish"]),
    ("mish", "mish-to-exp", ["Relu", "Mul", "Sub", "Exp", "Add", "Log", "Add", "Tanh", "Mul"]),
    ("mish_by_softplus", "mish-to-exp", ["Relu", "Mul", "Sub", "Exp", "Add", "Log", "Add", "Tanh", "Mul"]),
    ("softplus", "softplus-to-exp", ["Relu", "Mul", "Sub", "Exp", "Add", "Log", "Add"]),
    ("softplus_by_log", "softplus", ["Softplus"]),
    ("gelu", "gelu-to-erf", ["Mul", "Erf", "Mul", "Add", "Mul"]),
    ("gelu_tanh", "gelu-to-erf", ["Mul", "Mul", "Add", "Mul", "Mul", "Tanh", "Mul", "Add", "Mul"]),
    *((name, "gelu", ["Gelu"]) for name in FORMS if name.startswith("gelu_by")),
    ("prelu", "prelu-to-relu-parts", ["Relu", "Sub", "Mul", "Add"]),
    ("leaky", "prelu-to-relu-parts", ["Relu", "Sub", "Mul", "Add"]),
    ("leaky", "leakyrelu-to-max", ["Mul", "Max"]),
    ("leaky", "leakyrelu-to-prelu", ["PRelu"]),
    ("prelu_of_one_slope", "prelu-to-leakyrelu", ["LeakyRelu"]),
    ("elu", "elu-to-exp", ["Relu", "Sub", "Exp", "Sub", "Mul", "Add"]),
    ("selu", "elu-to-exp", ["Relu", "Sub", "Exp", "Sub", "Mul", "Add", "Mul"]),
    ("celu", "elu-to-exp", ["Relu", "Sub", "Mul", "Exp", "Sub", "Mul", "Add"]),
    ("thresholded", "thresholdedrelu-to-where", ["Greater", "Where"]),
    ("relu6", "clip-to-min-max", ["Relu", "Min"]),
    ("clip", "clip-to-min-max", ["Max", "Min"]),
    ("relu6", "clip-to-relu", ["Relu", "Sub", "Relu", "Sub"]),
    ("clip", "clip-to-relu", ["Sub", "Relu", "Sub", "Relu", "Sub", "Add"]),
    ("clip_from_zero", "clip-to-relu", ["Relu"]),
    ("relu6_by_min", "min-max-to-clip", ["Clip"]),
    ("clip_by_max_of_min", "min-max-to-clip", ["Clip"]),
    ("divided", "div-to-mul", ["Mul"]), ("less", "sub-to-add", ["Add"]), ("squared", "pow-to-mul", ["Mul"]),
    ("cubed", "pow-to-mul", ["Mul", "Mul"]), ("negative", "neg-to-mul", ["Mul"]),
    ("absolute", "abs-to-relu", ["Relu", "Mul", "Relu", "Add"]), ("inverse", "reciprocal-to-div", ["Exp", "Div"]),
    ("three", "sum-to-add", ["Sin", "Add", "Add"]),
]


def network(name, seed, spread=4.0, opset=None):
    """Something of both signs, and the activation of it."""
    n = Net(seed, size=(3, 5))
    w = n.constant(n.rng.normal(size=(4, 4, 1, 1)) * spread)
    y = n.op("Sub", n.op("Conv", "x", w), "x")  # no pass goes through it
    return n.graph(FORMS[name](n, y), opset=opset or LATER.get(name, 17))


@pytest.mark.parametrize(("name", "rule", "found"), TURNS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_an_activation_in_another_form_computes_the_same(name, rule, found, seed):
    after, _ = check(network(name, seed), [rule], expect=[rule])

    assert sorted(ops(after)) == sorted(["Conv", "Sub", *found])


def test_every_pass_on_activations_is_tried():
    inexact = {p.name for p in PASSES if not p.exact}
    assert {rule for _, rule, _ in TURNS} == {p.name for p in PASSES} - inexact
    assert {rule for _, rule, _ in REPLACED} == inexact


@pytest.mark.parametrize("rule", sorted({rule for _, rule, _ in TURNS}))
def test_what_only_looks_alike_stays(rule):
    n = Net(1)
    x, y = n.conv("x", 4), n.op("Relu", "x")
    k = n.constant
    last = [
        n.op("Mul", x, n.op("Sigmoid", y)), n.op("Mul", x, n.op("HardSigmoid", x, alpha=0.2, beta=0.5)),
        n.op("Div", n.op("Mul", x, n.op("Clip", n.op("Add", x, k(3)), k(0), k(6))), k(5)),
        n.op("Mul", y, n.op("Tanh", n.op("Softplus", x))) if rule != "softplus-to-exp" else x,
        n.op("Mul", n.op("Mul", x, n.op("Add", n.op("Erf", n.op("Mul", x, k(0.7))), k(1))), k(0.5)),
        n.op("Mul", n.op("Mul", y, n.op("Add", n.op("Erf", n.op("Mul", x, k(math.sqrt(0.5)))), k(1))), k(0.5)),
        n.op("Log", n.op("Add", n.op("Exp", x), k(2))), n.op("Max", n.op("Min", x, k(1)), k(2)), n.op("Min", x, y),
    ]
    before = n.graph(n.op("Sum", *last), opset=18)
    changes = check(before, [rule])[1]

    assert not [c for c in changes if c.name == rule] or rule in (
        "clip-to-relu", "clip-to-min-max", "hardsigmoid-to-clip", "div-to-mul", "sum-to-add"), changes


REPLACED = [
    ("silu", "silu-to-relu", 0.28), ("swish", "silu-to-relu", 0), ("silu", "silu-to-hardswish", 0.15),
    ("hardswish", "hardswish-to-relu", 0.38), ("hardswish_by_clip", "hardswish-to-relu", 0.38),
    ("gelu", "gelu-to-relu", 0.17), ("gelu_by_erf", "gelu-to-relu", 0.17), ("gelu_by_erf", "gelu-to-tanh", 0.0005),
    ("gelu", "gelu-to-sigmoid", 0.021), ("gelu_by_tanh", "gelu-to-sigmoid", 0.021), ("mish", "mish-to-relu", 0.31),
    ("mish_by_softplus", "mish-to-relu", 0.31), ("mish", "mish-to-hardswish", 0.29), ("elu", "elu-to-relu", 0.7),
    ("selu", "elu-to-relu", 1.76), ("celu", "elu-to-relu", 1.7), ("leaky", "leakyrelu-to-relu", 1.01),
]


@pytest.mark.parametrize(("name", "rule", "bound"), REPLACED)
def test_what_is_put_in_place_of_an_activation_is_as_near_as_its_rule_says(name, rule, bound):
    n = Net(0, channels=1, size=(200, 200))
    y = n.op("Sub", n.op("Mul", "x", n.constant(20)), n.constant(10))
    before = n.graph(FORMS[name](n, y), opset=LATER.get(name, 17))
    after, changes = patched(before, [rule])
    if not bound:  # Swish with another slope is no SiLU
        assert not changes
        return
    worst = compared(before, after)[0].largest
    text = next(p.rule for p in PASSES if p.name == rule)

    assert bound / 5 < worst <= bound
    assert name.startswith(("elu", "selu", "celu", "leaky")) or f"within {bound:g} " in text
    assert "RETRAINING" in text
    assert not any(c.exact for c in changes)


@pytest.mark.parametrize(("opset", "rule", "name"), [
    (13, "hardswish", "hardswish_by_clip"), (13, "gelu", "gelu_by_erf"), (12, "silu-to-swish", "silu")])
def test_no_network_older_than_opset_14_is_raised(opset, rule, name):
    assert not patched(network(name, 0, opset=opset), [rule])[1]


def test_raising_the_opset_takes_what_has_changed_along():
    n = Net(0)
    y = FORMS["gelu_by_erf"](n, n.conv("x", 4))
    a, b = "left", "right"
    n.nodes.append(onnx.helper.make_node("Split", [y], [a, b], "halves", axis=1))
    y = n.op("ReduceMax", n.op("ReduceMean", n.op("Add", a, b), axes=[2], keepdims=0), axes=[1])
    after, _ = check(n.graph(y), ["gelu"], expect=["gelu"])

    assert dict(after.header.opsets)[""] == 20
    assert ops(after) == ["Conv", "Gelu", "Split", "Add", "ReduceMean", "ReduceMax"]


def test_a_network_whose_operators_have_changed_is_not_raised():
    n = Net(0)
    y = n.op("AveragePool", FORMS["gelu_by_erf"](n, n.conv("x", 4)), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)

    assert not patched(n.graph(y), ["gelu"])[1]


TABLES = [("silu", ("kendryte_k210", "hailo8", "rk3588", "axera_ax650")), ("hardswish", ("ethos_u55", "ethos_u85")),
          ("gelu", ("ethos_u55", "ethos_u85", "axera_ax650")), ("mish", ("rk3588", "axera_ax650")),
          ("elu", ("ethos_u55", "kendryte_k210")), ("softplus", ("rk3588", "kendryte_k210")),
          ("leaky", ("rk3588", "ethos_u55"))]


@pytest.mark.parametrize(("name", "board"), [(name, b) for name, found in TABLES for b in found])
def test_chips_with_a_table_for_a_function_keep_it(name, board):
    """What a chip has as a table, or as one operator, is left to it, and so is what follows."""
    target, before = find_board(board), network(name, 0)
    after, changes = patched(before, (), lambda g: {f.node for f in target.check(g, "int8").findings
                                                    if f.where != "npu"})
    assert not changes
    assert ops(after) == ops(before)


def test_boards_that_lack_an_operator_get_it_in_others():
    """What the network needs to run without anything else."""
    gained = {}
    for name in ("leaky", "selu", "mish", "softplus", "hardsigmoid"):
        before = network(name, 0)
        for board in map(find_board, ("qualcomm_htp", "samsung_enn", "rk3588", "ethos_u55", "ethos_u85", "tflm_cpu")):
            def off(g, board=board):
                return {f.node for f in board.check(g, "int8").findings if f.where != "npu"}
            if off(before) and not off(patched(before, (), off)[0]):
                gained.setdefault(name, set()).add(board.name)
    assert "qualcomm_htp" in gained["leaky"]
    assert "tflm_cpu" in gained["softplus"]


def test_written_networks_are_valid_and_keep_their_names():
    before = network("gelu_by_erf", 3)
    after, _ = patched(before, ["gelu"])
    model = onnx.load_from_string(to_onnx(after))

    onnx.checker.check_model(model, full_check=True)
    assert [o.name for o in model.graph.output] == [before.values[v].name for v in before.outputs]
