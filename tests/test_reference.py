"""Exact integer arithmetic against LiteRT's reference kernels, ONNX Runtime, the virtual NPU and exact fractions."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import npulab
from npulab.errors import CapacityError, ModelError, UnsupportedError, UsageError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.ir import DType, Value
from npulab.reference import accumulate, prepare, run
from npulab.reference.elementwise import engine_sum
from npulab.reference.requantize import (
    engine_multiplier,
    multiply,
    nearest_even,
    nearest_up,
    power_of_two,
    quantized_multiplier,
    tflite,
)
from npulab.reference.types import Stored, codes
from scripts import loaded
from shared import MODELS, needs_shared

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "src" / "npulab" / "samples" / "digits.tflite"
U8, S8, S16 = (np.dtype(t) for t in ("uint8", "int8", "int16"))


@pytest.fixture(scope="module")
def bench():
    """bench/integer_layers.py as a module: the generator of random layers, and their witnesses."""
    with loaded("bench/integer_layers.py") as module:
        yield module


def rows_of(bench, name, seed, count):
    _, layer, oracle, arithmetic = next(f for f in bench.FORMATS if f[0] == name)
    return bench.compare(((i, layer(seed, i)) for i in range(count)), oracle, arithmetic)


def test_random_layers_equal_litert(bench):
    pytest.importorskip("ai_edge_litert")
    rows = rows_of(bench, "tflite", 77, 290)

    assert {name: r.differing for name, r in rows.items() if r.wrong} == {}
    assert sum(r.layers for r in rows.values()) > 280
    assert len(rows) > 24


def test_random_layers_equal_onnx_runtime(bench):
    pytest.importorskip("onnxruntime")
    rows = rows_of(bench, "onnx", 77, 168)

    assert {name: r.differing for name, r in rows.items() if r.wrong} == {}
    assert sum(r.layers for r in rows.values()) == 168
    assert len(rows) > 20


def test_numpy_alone_gives_the_same_bytes(bench, monkeypatch):
    """What ONNX Runtime's integer kernels add up, NumPy's float64 adds up too."""
    pytest.importorskip("onnxruntime")
    layers = [bench.tflite_layer(5, i) for i in range(21)] + [bench.tflite_layer(6, i) for i in range(21)]
    fast = [prepare(load(x.model)).run(x.feeds) for x in layers]
    monkeypatch.setattr(accumulate, "kernels", None)
    monkeypatch.setattr(accumulate, "runtime", lambda: None)
    plain = [prepare(load(x.model)).run(x.feeds) for x in layers]

    for one, other in zip(fast, plain, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_int32_sums_wrap_alike(monkeypatch):
    pytest.importorskip("onnxruntime")
    weights = np.full((2, 40_000), 255, np.uint8)
    x = np.full((1, 40_000), 255, np.uint8)
    fast = accumulate.matrix(weights, 0, 0, U8)(x)
    monkeypatch.setattr(accumulate, "kernels", None)
    monkeypatch.setattr(accumulate, "runtime", lambda: None)

    assert fast.tolist() == accumulate.matrix(weights, 0, 0, U8)(x).tolist()
    assert fast[0, 0] == 40_000 * 255 * 255 - 2**32


# requantization against exact fractions


def half_away(x: Fraction) -> int:
    return int(x + Fraction(1, 2)) if x >= 0 else -int(-x + Fraction(1, 2))


def half_up(x: Fraction) -> int:
    return (x + Fraction(1, 2)).__floor__()


def sums_and_ties(rng, real, count=400):
    """Sums about the output's range, half of them next to where rounding turns."""
    sums = rng.integers(-(2**24), 2**24, count)
    steps = rng.integers(-300, 300, count)
    sums[::2] = np.clip(np.rint((steps[::2] + 0.5) / real), -(2**31), 2**31 - 1).astype(np.int64) + rng.integers(
        -1, 2, (count + 1) // 2)
    return np.clip(sums, -(2**31), 2**31 - 1).astype(np.int32)


@pytest.mark.parametrize("real", [3e-9, 1e-6, 0.00047, 2.0**-12, 2.0**-11, 0.003, 0.25, 0.6, 1.0, 3.7, 60.0])
@pytest.mark.parametrize("out", [Stored(1.0, 3, U8), Stored(1.0, -128, S8), Stored(1.0, 0, S16)])
def test_two_roundings_are_those_of_the_definition(real, out):
    rng = np.random.default_rng(int(real * 1e9) % 2**31)
    sums = sums_and_ties(rng, real)
    m, shift = quantized_multiplier(real)
    want = []
    for s in sums.tolist():
        left = ((s << max(shift, 0)) + 2**31) % 2**32 - 2**31  # a 32-bit register
        first = half_up(Fraction(left * m, 2**31))
        want.append(half_away(Fraction(first, 2 ** max(-shift, 0))) + out.zero)

    got = tflite(real)(sums.reshape(20, 20), out)
    assert got.dtype == out.dtype
    assert got.reshape(-1).tolist() == [min(max(w, out.low), out.high) for w in want]


def test_chunks_and_axes_give_the_same_codes():
    rng = np.random.default_rng(3)
    sums = rng.integers(-(2**18), 2**18, (2, 5, 170, 190)).astype(np.int32)
    real = rng.uniform(1e-4, 1e-2, 5)
    out = Stored(1.0, 7, U8)

    by_channel = np.stack([tflite(real[c])(sums[:, c], out) for c in range(5)], axis=1)
    np.testing.assert_array_equal(tflite(real)(sums, out, axis=1), by_channel)
    last = np.ascontiguousarray(sums.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(tflite(real)(last, out), by_channel.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(tflite(real)(last, out, 40, 60), np.clip(by_channel, 40, 60).transpose(0, 2, 3, 1))


def test_chips_that_shift_round_half_up_or_to_even():
    sums = np.arange(-4000, 4001, dtype=np.int32)
    out = Stored(1.0, 0, S8)

    for name, whole in (("up", half_up), ("even", round)):
        want = [min(max(whole(Fraction(s, 64)), -128), 127) for s in sums.tolist()]
        assert power_of_two(2.0**-6, name)(sums, out).tolist() == want
    with pytest.raises(UnsupportedError, match="rescales by shifts alone") as e:
        power_of_two(0.3, "up")
    assert "powers of two" in str(e.value)


def test_onnx_rounds_float32_half_to_even():
    out = Stored(1.0, 5, U8)
    sums = np.array([1, 3, 5, -1, -3, 2**24 + 1, -(2**31)], np.int32)

    assert nearest_even(0.5)(sums, out).tolist() == [5, 7, 7, 5, 3, 255, 0]


@pytest.mark.parametrize("seed", range(4))
def test_the_engine_rounds_as_the_virtual_npu_does(seed):
    from npulab.targets.vivante.jobs import requantization
    from npulab.targets.vivante.machine.requantize import requantize

    rng = np.random.default_rng(seed)
    for _ in range(50):
        real = float(np.float32(2.0 ** rng.uniform(-20, 2)))
        assert engine_multiplier(real) == requantization(real)
        acc = rng.integers(-(2**23), 2**23, (3, 100))
        bias = rng.integers(-(2**20), 2**20, 3).astype(np.int32)
        zero, low = (int(v) for v in rng.integers(0, 256, 2))
        want = requantize(acc.astype(np.float32), bias, *engine_multiplier(real), zero, low)

        got = nearest_up(real)((acc + bias[:, None]).astype(np.int32), Stored(1.0, zero, U8), low, 255)
        np.testing.assert_array_equal(got, want)


def test_the_engine_adds_with_the_same_bytes():
    from npulab.ir import Quantization
    from npulab.targets.vivante.best import weighted_sum

    rng = np.random.default_rng(9)
    for _ in range(300):
        scales = [float(np.float32(2.0 ** rng.uniform(-8, 0))) for _ in range(3)]
        zeros = [int(z) for z in rng.integers(0, 256, 3)]
        a, b, out = (Value(i, "t", (1,), DType.UINT8, Quantization((s,), (z,)))
                     for i, (s, z) in enumerate(zip(scales, zeros, strict=True)))
        theirs = weighted_sum(a, b, out, zeros[0], zeros[1])
        ours = engine_sum(*(Stored(s, z, U8) for s, z in zip(scales, zeros, strict=True)), zeros[0], zeros[1])

        assert (ours.first, ours.second, ours.bias) == (theirs.first, theirs.second, theirs.bias)
        assert ours.weight_scale == float(theirs.weight_scale)


# whole networks


def random_feeds(graph, seed=0):
    rng = np.random.default_rng(seed)
    feeds = {}
    for v in (graph.values[i] for i in graph.inputs):
        i = np.iinfo(v.dtype.numpy)
        feeds[v.name] = rng.integers(i.min, i.max + 1, v.shape).astype(v.dtype.numpy)
    return feeds


def assert_every_tensor_is_litert_s(path):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    graph = load(path)
    feeds = random_feeds(graph)
    litert = Interpreter(model_content=path.read_bytes(), num_threads=1,
                         experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
                         experimental_preserve_all_tensors=True)
    litert.allocate_tensors()
    for d in litert.get_input_details():
        litert.set_tensor(d["index"], feeds[d["name"]])
    litert.invoke()
    ours = run(graph, feeds, every=True)
    for node in graph.nodes:
        for v in node.outputs:
            np.testing.assert_array_equal(ours[graph.values[v].name], litert.get_tensor(v), err_msg=str(node))
    outputs = run(graph, feeds)
    assert outputs.keys() == {graph.values[v].name for v in graph.outputs}
    assert all((outputs[k] == ours[k]).all() for k in outputs)


def test_every_tensor_of_the_sample_is_litert_s():
    pytest.importorskip("ai_edge_litert")
    assert_every_tensor_is_litert_s(DIGITS)


@needs_shared
@pytest.mark.parametrize("name", ["mobilenet_v1_0.25_128_quant", "pretrainedResnet_quant", "kws_ref_model",
                                  "vww_96_int8", "ad01_int8", "keras_lstm_mnist_ptq"])
def test_every_tensor_of_a_network_is_litert_s(name):
    pytest.importorskip("ai_edge_litert")
    assert_every_tensor_is_litert_s(MODELS / "quantized" / f"{name}.tflite")


@pytest.mark.parametrize("path", [DIGITS, pytest.param(MODELS / "quantized" / "mobilenet_v1_0.25_128_quant.tflite",
                                                       marks=needs_shared)], ids=("digits", "mobilenet"))
def test_every_tensor_is_what_the_virtual_npu_computes(path):
    graph = load(path)
    feeds = random_feeds(graph)
    seen = {}
    session = npulab.open_session(npulab.compile(path, "a311d", keep_all=True))
    session.run(feeds, trace=lambda v, array: seen.__setitem__(v, np.array(array)))
    ours = run(graph, feeds, "multiplier16", every=True)

    computed = [n.outputs[0] for n in graph.nodes if n.outputs[0] in seen]
    assert len(computed) == len(graph.nodes)
    for v in computed:
        np.testing.assert_array_equal(ours[graph.values[v].name], seen[v], err_msg=str(graph.producer[v]))


@pytest.mark.parametrize("path", [DIGITS, *(pytest.param(MODELS / "quantized" / f"{n}.tflite", marks=needs_shared)
                                            for n in ("kws_ref_model", "pretrainedResnet_quant"))],
                         ids=("digits", "kws", "resnet"))
def test_a_qdq_network_is_onnx_runtime_s(path):
    rt = pytest.importorskip("onnxruntime")
    from npulab.dialects import to_onnx
    from npulab.exporters.onnx import to_onnx as written

    data = written(to_onnx(load(path)))
    graph = load(data)
    options = rt.SessionOptions()
    options.log_severity_level = 4
    session = rt.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    ready = prepare(graph, "onnx")

    assert ready.islands == ()
    for seed in range(3):
        feeds = random_feeds(graph, seed)
        ours = ready.run(feeds)
        for o, want in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            np.testing.assert_array_equal(ours[o.name], want)


# a chip that shifts


def shifting_model(scale=0.25):
    """int8 [1, 4] times int8 [3, 4], all scales powers of two but the output's if so wanted."""
    m = ModelBuilder("shift")
    x = m.tensor("x", (1, 4), "int8", scale=0.125, zero_point=0)
    w = m.tensor("w", (3, 4), "int8", scale=0.0625, data=np.arange(-6, 6, dtype=np.int8).reshape(3, 4))
    y = m.tensor("y", (1, 3), "int8", scale=scale, zero_point=0)
    m.op("FULLY_CONNECTED", [x, w, -1], [y], fused_activation_function="NONE")
    return load(m.build([x], [y]))


def test_the_two_esp_chips_round_the_same_layer_apart():
    graph = shifting_model()
    feeds = {"x": np.array([[16, 0, 0, 0]], np.int8)}  # sums -96, -32, 32: steps -3, -1, 1

    assert run(graph, feeds, "esp32s3")["y"].tolist() == [[-3, -1, 1]]
    half = {"x": np.array([[8, 0, 0, 0]], np.int8)}  # steps -1.5, -0.5, 0.5
    assert run(graph, half, "esp32s3")["y"].tolist() == [[-1, 0, 1]]
    assert run(graph, half, "esp32p4")["y"].tolist() == [[-2, 0, 0]]
    assert run(graph, half, "tflite")["y"].tolist() == [[-2, -1, 1]]
    with pytest.raises(UnsupportedError, match="rescales by shifts alone") as e:
        run(shifting_model(0.3), feeds, "esp32s3")
    assert "FULLY_CONNECTED (node 0)" in str(e.value)


# what is refused


def test_errors_say_what_does_not_fit():
    graph = load(DIGITS)
    name = graph.values[graph.inputs[0]].name
    with pytest.raises(UsageError, match=f"input '{name}' is not given"):
        run(graph, {})
    with pytest.raises(UsageError, match="does not fit") as e:
        run(graph, {name: np.zeros((1, 2), np.float32)})
    assert "got     float32[1, 2]" in str(e.value)
    with pytest.raises(UsageError, match="has no input other"):
        run(graph, {**random_feeds(graph), "other": np.zeros(1)})
    with pytest.raises(UsageError, match="no arithmetic 'gemmlowp'"):
        run(graph, {}, "gemmlowp")
    with pytest.raises(UsageError, match="is a TFLite network"):
        run(graph, {}, "onnx")


def test_what_litert_refuses_is_refused_by_name():
    m = ModelBuilder("custom")
    x, y = (m.tensor(n, (1, 4), "float32") for n in "xy")
    m.custom("Strange", [x], [y])
    with pytest.raises(UnsupportedError, match="Strange") as e:
        run(load(m.build([x], [y])), {"x": np.zeros((1, 4), np.float32)})
    assert "has no integer arithmetic here, and LiteRT cannot run it" in str(e.value)


def test_parts_that_do_not_fit_are_the_file_s_fault():
    m = ModelBuilder("broken")
    x = m.tensor("x", (1, 4), "int8", scale=0.1, zero_point=0)
    w = m.tensor("w", (3, 5), "int8", scale=0.1, data=np.zeros((3, 5), np.int8))
    y = m.tensor("y", (1, 3), "int8", scale=0.1, zero_point=0)
    m.op("FULLY_CONNECTED", [x, w, -1], [y], fused_activation_function="NONE")
    graph = load(m.build([x], [y]))
    with pytest.raises(ModelError, match=r"FULLY_CONNECTED \(node 0\).* cannot be computed: its parts do not fit"):
        run(graph, {"x": np.zeros((1, 4), np.int8)})

    huge = ModelBuilder("huge")
    x = huge.tensor("x", (1 << 20, 1 << 14), "int8", scale=0.1, zero_point=0)
    y = huge.tensor("y", (1 << 20, 1 << 14), "int8", scale=0.1, zero_point=0)
    huge.op("RELU", [x], [y])
    with pytest.raises(CapacityError, match="not worth its memory"):
        prepare(load(huge.build([x], [y])))


def test_four_bits_are_unpacked_low_half_first():
    v = Value(0, "w", (5,), DType.INT4, None, memoryview(bytes([0x81, 0x7F, 0x02])))

    assert codes(v).tolist() == [1, -8, -1, 7, 2]
    with pytest.raises(ModelError, match="wrong length"):
        codes(Value(0, "w", (7,), DType.INT4, None, memoryview(b"abc")))


def test_plain_multiplication_is_the_definition():
    m, shift = quantized_multiplier(0.3)
    assert m / 2**31 * 2.0**shift == pytest.approx(0.3, rel=1e-9)
    assert quantized_multiplier(0) == (0, 0) == quantized_multiplier(2.0**-40)
    assert multiply(np.array([10, -5, 5]), *quantized_multiplier(0.5)).tolist() == [5, -2, 3]  # a first rounding alone
    assert multiply(np.array([10, -10, 6]), *quantized_multiplier(0.25)).tolist() == [3, -3, 2]
