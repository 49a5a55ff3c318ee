"""int8 attention on an OpenCL device: as near to the exact result as rounding shares allows (`checks`), and so that a
kernel that is wrong is not."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npulab.errors import CapacityError, InvariantError, UnsupportedError
from npulab.gpu.compute import (
    attention,
    checks,
    integer_attention,
    integer_attention_cpu,
    integer_attention_gpu,
    modules_integer_attention,
)
from npulab.gpu.compute.attention_cpu import Lanes
from npulab.gpu.compute.attention_gpu import Items
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.modules import run
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Kernel
from npulab.gpu.compute.watch import Doing
from test_gpu_attention import CPU, GPU, SMALL_CPU, computed, turns
from test_gpu_modules import unpadded, valid

STEPS = {True: integer_attention_cpu.STEPS, False: integer_attention_gpu.STEPS}
SCALES, ZEROS, OUT = (0.02, 0.03, 0.04), (5, -7, 11), (0.02, -9)
"""A step of V is two of the output: what is a step of V off is seen."""


@pytest.fixture(params=["cpu", "gpu"])
def traits(request):
    return {"cpu": CPU, "gpu": GPU}[request.param]


def heads(*shape, scale=0.4, causal=False):
    return Attention(*shape, scale, causal, "int8")


CASES = {
    "one key": heads(2, 5, 1, 3, 5),
    "one number": heads(1, 1, 1, 1, 1),
    "odd": heads(2, 33, 17, 3, 5),
    "197": heads(1, 65, 197, 64, 64, scale=0.125),
    "few queries": heads(3, 2, 40, 7, 6),
    "causal": heads(2, 70, 70, 9, 7, causal=True),
    "causal, more keys": heads(1, 5, 40, 16, 4, causal=True),
    "causal, more queries": heads(1, 40, 9, 16, 33, causal=True),
    "negative": heads(1, 20, 50, 8, 8, scale=-0.4),
}


def drawn(what, seed=0, low=-128, high=127):
    r = np.random.default_rng([seed, what.queries, what.keys, what.depth])
    return [r.integers(low, high, (what.batch, *x), endpoint=True).astype(np.int8) for x in (
        (what.queries, what.depth), (what.keys, what.depth), (what.keys, what.width))]


def ran(device, traits, what, inputs, scales=SCALES, zeros=ZEROS, out=OUT, choice=None, changes=()):
    """changes: what is put in the place of what in the source."""
    lowered = integer_attention.lower(what, traits, scales, zeros, *out, choice)
    launch, = lowered.launches
    source = launch.kernel.source
    for old, new in changes:
        assert old in source, source
        source = source.replace(old, new)
    lowered = replace(lowered, launches=(replace(launch, kernel=Kernel(source, launch.kernel.entry)),))
    return computed(device, lowered, inputs, (what.batch, what.queries, what.width), "int8")


def off(traits, what, found, inputs, scales=SCALES, zeros=ZEROS, out=OUT, tile=4):
    """The largest part of the bound that is used: a right kernel's is 1 at most."""
    want, bound = checks.integer_attention(what, *inputs, scales, zeros, *out, STEPS[traits.cpu], tile)
    return (np.abs(found - want) / bound).max()


@pytest.mark.parametrize("name", CASES)
def test_int8_attention(device, traits, name):
    what = CASES[name]
    inputs = drawn(what)
    found = ran(device, traits, what, inputs)
    assert what.keys == 1 or len(np.unique(found)) > 3
    assert off(traits, what, found, inputs) <= 1


@pytest.mark.parametrize("choice", [Lanes(1, 24), Lanes(2, 12), Lanes(3, 16)])
def test_tiles_of_any_size_on_vectors_of_four(device, choice):
    what = heads(1, 30, 61, 10, 9, causal=True)
    inputs = drawn(what)
    assert off(SMALL_CPU, what, ran(device, SMALL_CPU, what, inputs, choice=choice), inputs) <= 1


@pytest.mark.parametrize("traits", [replace(CPU, vector=8, registers=128), replace(CPU, vector=1, registers=16)],
                         ids=["8", "1"])
def test_other_vectors(device, traits):
    what = heads(1, 21, 35, 5, 6)
    inputs = drawn(what)
    assert off(traits, what, ran(device, traits, what, inputs), inputs) <= 1


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 90), st.integers(1, 20), st.integers(1, 20), st.booleans(),
       st.booleans(), st.tuples(*[st.integers(-128, 127)] * 4))
def test_any_shape_and_any_zero_points(device, batch, queries, keys, depth, width, causal, cpu, zeros):
    what, traits = heads(batch, queries, keys, depth, width, causal=causal), CPU if cpu else GPU
    inputs, more = drawn(what), {"zeros": zeros[:3], "out": (0.02, zeros[3])}
    assert off(traits, what, ran(device, traits, what, inputs, **more), inputs, **more) <= 1


# extremes


@turns("name", ["one key has all", "all alike", "the output is a sign", "the largest sums"])
def test_extremes(device, traits, name):
    what = heads(1, 18, 37, 32, 5, scale={"one key has all": 1e30, "all alike": 0.0}.get(name, 0.01))
    inputs, more = drawn(what), {}
    if name == "the output is a sign":
        more = {"out": (1e-30, 0)}
    if name == "the largest sums":
        inputs, more = drawn(what, low=127), {"zeros": (-128, 127, -128)}
        inputs[1][0, ::3] = -128
    found = ran(device, traits, what, inputs, **more)
    assert off(traits, what, found, inputs, **more) <= 1
    if name == "one key has all":
        q, k, v = (x.astype(int) - z for x, z in zip(inputs, ZEROS, strict=True))
        best = (q @ k.swapaxes(1, 2)).argmax(-1)
        assert (found == np.clip(2 * v[0, best] + OUT[1], -128, 127)).all()


@turns("scale", [0.4, 1e-3, 30.0])
def test_scores_that_rise_and_fall_from_tile_to_tile(device, traits, scale):
    what = heads(1, 17, 80, 4, 6, scale=scale)
    for rising in (1, -1):
        inputs = drawn(what)
        inputs[0][:], inputs[1][:] = (100, 5, 5, 5), 0
        inputs[1][0, :, 0] = np.linspace(-128, 127, 80)[::rising]
        choice = Lanes(2, 12) if traits.cpu else None
        assert off(traits, what, ran(device, traits, what, inputs, choice=choice), inputs) <= 1


def test_a_constant_stays(device, traits):
    """Weights of any rounding have a sum, and that is what they are divided by."""
    what = heads(1, 18, 45, 7, 3)
    q, k, v = drawn(what)
    v[:] = 31
    assert (ran(device, traits, what, [q, k, v]) == 2 * (31 - ZEROS[2]) + OUT[1]).all()


def test_keys_that_are_not_seen_have_no_part(device, traits):
    what = heads(1, 20, 33, 8, 4, causal=True)
    q, k, v = drawn(what)
    found = ran(device, traits, what, [q, k, v])
    k[:, 20:], v[:, 20:] = 127, -128
    assert (ran(device, traits, what, [q, k, v]) == found).all()


def test_the_zero_point_of_keys_makes_no_difference(device, traits):
    what = heads(1, 20, 33, 8, 4)
    inputs = drawn(what)
    found = [ran(device, traits, what, inputs, zeros=(5, zero, 11)) for zero in (-128, 0, 90)]
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


# kernels that are wrong


WRONG = {
    "the zero point of Q is one off": (True, None, {"zeros": (6, -7, 11)}),
    "the zero point of V is one off": (True, None, {"zeros": (5, -7, 12)}),
    "the output's is": (True, None, {"out": (0.02, -8)}),
    "the scale of K is 4 % off": (True, None, {"scales": (0.02, 0.0312, 0.04)}),
    "what was added up is not scaled": (True, [("* fade0);", ");")], {}),
    "nor what is added": (True, [("part0, to", "1.0f, to")], {}),
    "a number of a vector is left out": (True, [("d < 8; d++) {", "d < 7; d++) {")], {}),
    "the last two keys are left out": (True, [("i < (count + 1) / 2;", "i < (count - 1) / 2;")], {}),
    "shares are cut": (True, [("rounded(a) +", "(rounded(a) & 255) +")], {}),
    "GPU: the zero point of Q is one off": (False, None, {"zeros": (6, -7, 11)}),
    "GPU: the zero point of V is one off": (False, None, {"zeros": (5, -7, 12)}),
    "GPU: what was added up is not scaled": (False, [("* fade0);", ");")], {}),
    "GPU: nor what is added": (False, [("fma((float)o0_0, part0,", "fma((float)o0_0, 1.0f,")], {}),
    "GPU: a word of a vector is left out": (False, [("d < 4; d++) {", "d < 3; d++) {")], {}),
    "GPU: four keys are left out": (False, [("for (int j = 0; j < 2; j++) {\n            uint",
                                             "for (int j = 0; j < 1; j++) {\n            uint")], {}),
    "GPU: bytes of shares have a sign": (False, [("SHARED(p", "DOT(p")], {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_outside_the_bound(device, name):
    """Keys grow from tile to tile."""
    cpu, changes, more = WRONG[name]
    what, traits = heads(1, 32, 48, 16, 8, scale=0.2), CPU if cpu else GPU
    inputs = drawn(what)
    inputs[1] = (inputs[1] * np.linspace(0.1, 1, 48)[:, None]).astype(np.int8)
    choice = Lanes(2, 12) if cpu else None
    assert off(traits, what, ran(device, traits, what, inputs, choice=choice), inputs) <= 1
    found = ran(device, traits, what, inputs, choice=choice, changes=changes or (), **more)
    assert off(traits, what, found, inputs) > 1


# other witnesses


def test_it_is_attention_on_floats(device, traits):
    """The fused kernel of floats, on what the bytes stand for; its own errors are far below the output's step."""
    what = CASES["197"]
    inputs = drawn(what)
    floats = [((x.astype(float) - z) * s).astype(np.float32) for x, z, s in zip(inputs, ZEROS, SCALES, strict=True)]
    lowered = attention.lower(replace(what, number="float32"), traits)
    want = computed(device, lowered, floats, (1, 65, 64)) / OUT[0] + OUT[1]
    _, bound = checks.integer_attention(what, *inputs, SCALES, ZEROS, *OUT, STEPS[traits.cpu])
    found = ran(device, traits, what, inputs)
    assert (np.abs(found - np.clip(want, -128, 127)) <= bound + 0.01).all()


def test_it_is_onnx_runtime_s_attention_between_quantized_tensors(device, traits):
    """DequantizeLinear, MatMul, Softmax, MatMul, QuantizeLinear: one more rounding."""
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    from onnx import helper
    what = CASES["odd"]
    inputs = drawn(what)
    constants = [onnx.numpy_helper.from_array(x, n) for n, x in [
        ("f", np.float32(what.scale)), *((f"s{i}", np.float32(s)) for i, s in enumerate((*SCALES, OUT[0]))),
        *((f"z{i}", np.int8(z)) for i, z in enumerate((*ZEROS, OUT[1])))]]
    nodes = [helper.make_node("DequantizeLinear", [n, f"s{i}", f"z{i}"], [f"{n}f"]) for i, n in enumerate("qkv")]
    nodes += [helper.make_node(*x, **more) for x, more in [
        (("Transpose", ["kf"], ["kt"]), {"perm": [0, 2, 1]}), (("MatMul", ["qf", "kt"], ["s"]), {}),
        (("Mul", ["s", "f"], ["m"]), {}), (("Softmax", ["m"], ["p"]), {"axis": -1}),
        (("MatMul", ["p", "vf"], ["of"]), {}), (("QuantizeLinear", ["of", "s3", "z3"], ["o"]), {})]]
    infos = [helper.make_tensor_value_info(n, 3, x.shape) for n, x in zip("qkv", inputs, strict=True)]
    out = helper.make_tensor_value_info("o", 3, (what.batch, what.queries, what.width))
    model = helper.make_model(helper.make_graph(nodes, "attention", infos, [out], constants), ir_version=8,
                              opset_imports=[helper.make_opsetid("", 17)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, dict(zip("qkv", inputs, strict=True)))[0].astype(int)
    _, bound = checks.integer_attention(what, *inputs, SCALES, ZEROS, *OUT, STEPS[traits.cpu])
    assert (np.abs(ran(device, traits, what, inputs) - want) <= bound + 0.501).all()


# refusals


REFUSED = [
    ({"zeros": (128, 0, 0)}, InvariantError, "the zero point of Q is no byte"),
    ({"zeros": (0, 0.5, 0)}, InvariantError, "the zero point of K is no byte"),
    ({"out": (0.1, -129)}, InvariantError, "the zero point of the output is no byte"),
    ({"scales": (0.1, np.inf, 0.1)}, InvariantError, "the scale of K is none"),
    ({"scales": (0.1, 0.1, np.nan)}, InvariantError, "the scale of V is none"),
    ({"scales": (0.0, 0.1, 0.1)}, InvariantError, "the scale of Q is none"),
    ({"out": (-0.1, 0)}, InvariantError, "the scale of the output is none"),
    ({"scales": (0.1, 0.1)}, InvariantError, "one each for Q, K and V"),
    ({"scales": (1e30, 1e30, 0.1)}, InvariantError, "the factor of the scores is no float32"),
    ({"out": (1e-300, 0)}, InvariantError, "the factor of the output is no float32"),
    ({"what": heads(1, 2, 2, 2, 2, scale=np.nan)}, InvariantError, "the factor of the scores is no float32"),
    ({"what": heads(1, 2, 2, 32897, 2)}, CapacityError, "may not fit 32 bits"),
    ({"what": replace(heads(1, 2, 2, 2, 2), number="float32")}, UnsupportedError, "integer attention is of bytes"),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED)
def test_what_would_be_wrong_is_refused(changed, error, message):
    given = {"what": heads(1, 2, 2, 2, 2), "scales": SCALES, "zeros": ZEROS, "out": OUT} | changed
    with pytest.raises(error, match=message):
        integer_attention.lower(given["what"], CPU, given["scales"], given["zeros"], *given["out"])


def test_heads_that_have_no_room(device):
    with pytest.raises(CapacityError, match="no room on a thread's stack"):
        integer_attention.lower(heads(1, 64, 64, 20000, 64), CPU, SCALES, ZEROS, *OUT)
    with pytest.raises(CapacityError, match="no room in local memory"):
        integer_attention.lower(heads(1, 64, 64, 20000, 64), GPU, SCALES, ZEROS, *OUT)
    with pytest.raises(InvariantError, match="no fours"):
        integer_attention.lower(heads(1, 4, 4, 4, 4), GPU, SCALES, ZEROS, *OUT, Items(3, 1, 1))


def test_a_group_has_the_local_memory_that_is_counted():
    """Of the arrays that the source declares."""
    import re
    for what in (CASES["odd"], CASES["197"], heads(1, 8, 8, 4, 200)):
        source = integer_attention.lower(what, GPU, SCALES, ZEROS, *OUT).launches[0].kernel.source
        sizes = re.findall(r"\w+\[(\d+)\]", "".join(re.findall(r"__local (?:uint|int) [^*;]*;", source)))
        fit = next(s for s in integer_attention_gpu.SHAPES if s[0] * s[1] <= 8)
        assert len(sizes) == 4
        assert 4 * sum(map(int, sizes)) == integer_attention_gpu.local_bytes(what, *fit)


@pytest.mark.parametrize(("elements", "source", "language"), [
    ({"int8x4"}, "dot_4x8packed", "CL3.0"), ({"int8x4"}, "x * y", "CL1.2"), ({"char4"}, "dot_4x8packed", "CL1.2")])
def test_dot_products_are_compiled_in_the_language_that_has_them(elements, source, language):
    seen = []

    class Program:
        def __init__(self, context, source):
            self.f = source

        def build(self, options):
            seen.extend(options)
            return self

    cl, limits = SimpleNamespace(Program=Program, Error=OSError), SimpleNamespace(elements=elements)
    stub = SimpleNamespace(cl=cl, limits=limits, context=None, doing=Doing(), _programs={})
    assert Device.kernel(stub, Kernel(source, "f")) == source
    assert seen == [f"-cl-std={language}"]


# as SPIR-V


def over_vulkan(bench, what, inputs, scales=SCALES, zeros=ZEROS, out=OUT, local_bytes=1 << 14):
    layer = modules_integer_attention.attention(what, scales, zeros, *out, local_bytes)
    found, _ = run(bench, layer, dict(zip(("input", "input1", "input2"), inputs, strict=True)))
    unpadded(found)
    return found


def off_vulkan(what, found, inputs, **more):
    given = {"scales": SCALES, "zeros": ZEROS, "out": OUT} | more
    want, bound = checks.integer_attention(what, *inputs, given["scales"], given["zeros"], *given["out"],
                                           modules_integer_attention.STEPS)
    return (np.abs(found - want) / bound).max()


@pytest.mark.parametrize("name", CASES)
def test_int8_attention_over_vulkan(vulkan_bench, name):
    what = CASES[name]
    inputs = drawn(what)
    found = over_vulkan(vulkan_bench, what, inputs)
    assert what.keys == 1 or len(np.unique(found)) > 3
    assert off_vulkan(what, found, inputs) <= 1


@pytest.mark.parametrize("scale", [1e30, 0.0, 1.0])
def test_extremes_over_vulkan(vulkan_bench, scale):
    """Scores that rise, then fall, from tile to tile; with the largest numbers there are."""
    what = heads(1, 18, 37, 32, 5, scale=scale)
    for rising in (1, -1):
        inputs = drawn(what, low=127)
        inputs[1][0] = np.linspace(-128, 127, 37)[::rising, None]
        more = {"zeros": (-128, 127, -128)}
        assert off_vulkan(what, over_vulkan(vulkan_bench, what, inputs, **more), inputs, **more) <= 1


def test_smaller_tiles_over_vulkan(vulkan_bench):
    what = heads(1, 37, 21, 20, 12, causal=True)
    inputs, sizes = drawn(what), set()
    for local_bytes in (1 << 14, 5000, 3100, 2450):
        layer = modules_integer_attention.attention(what, SCALES, ZEROS, *OUT, local_bytes)
        sizes.add(layer.modules[0].local_bytes)
        assert off_vulkan(what, over_vulkan(vulkan_bench, what, inputs, local_bytes=local_bytes), inputs) <= 1
    assert len(sizes) == 4


@pytest.mark.parametrize("name", ["Q", "V", "out", "scale", "unscaled", "unseen"])
def test_a_wrong_shader_is_outside_the_bound(vulkan_bench, monkeypatch, name):
    what = heads(1, 20, 48, 16, 8, scale=0.2, causal=name == "unseen")
    inputs = drawn(what)
    inputs[1] = (inputs[1] * np.linspace(0.1, 1, 48)[:, None]).astype(np.int8)
    assert off_vulkan(what, over_vulkan(vulkan_bench, what, inputs), inputs) <= 1
    flash = modules_integer_attention._Flash
    if name == "unscaled":  # what was added up, when larger scores come
        real = flash._shares

        def shares(self, *given):
            with pytest.MonkeyPatch.context() as inside:
                inside.setattr(flash, "_exponential", exponential)
                real(self, *given)

        exponential = flash._exponential
        monkeypatch.setattr(flash, "_shares", shares)
        monkeypatch.setattr(flash, "_exponential", lambda self, x: self.s.constant(1.0, "float"))
    if name == "unseen":
        monkeypatch.setattr(flash, "_seen", lambda self, key, place: key < self.what.keys)
    more = {"Q": {"zeros": (6, -7, 11)}, "V": {"zeros": (5, -7, 12)}, "out": {"out": (0.02, -8)},
            "scale": {"scales": (0.02, 0.0312, 0.04)}}.get(name, {})
    assert off_vulkan(what, over_vulkan(vulkan_bench, what, inputs, **more), inputs) > 1


def test_modules_of_int8_attention_are_valid_for_vulkan(tmp_path):
    valid(tmp_path, [modules_integer_attention.attention(what, SCALES, ZEROS, *OUT) for what in CASES.values()])


def test_what_the_shader_of_int8_attention_has_not():
    attend = modules_integer_attention.attention
    with pytest.raises(UnsupportedError, match="integer attention is of bytes"):
        attend(replace(CASES["odd"], number="float32"), SCALES, ZEROS, *OUT)
    with pytest.raises(UnsupportedError, match="32 bits"):
        attend(heads(1 << 16, 1 << 10, 1, 1 << 10, 1), SCALES, ZEROS, *OUT)
    with pytest.raises(CapacityError, match="no tile of attention fits"):
        attend(heads(1, 1, 1, 4096, 1), SCALES, ZEROS, *OUT)
