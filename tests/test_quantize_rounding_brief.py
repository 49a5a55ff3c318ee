"""Rounding of weights of 8 bits: loops against exact algebra, sums against those in full, results against ONNX Runtime.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from npulab.errors import UsageError
from npulab.program.pages import Scratch
from npulab.quantization import rounding_brief, rounding_loops
from npulab.quantization.emit import float_model, integer_model
from npulab.quantization.gram import moments, reference, upto
from npulab.quantization.rounding import adaround
from npulab.quantization.rounding_brief import Reading, _read, _Rounding
from npulab.quantization.sampling import drawn
from npulab.quantization.session import runner
from npulab.quantization.types import ListedSamples, Scheme
from quantized import small
from test_quantize_rounding import _noise, _truth, every_kind, keeps, ready

pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")

EIGHT = Scheme(8, symmetric=True, narrow=True, per_channel=True)
SCHEMES = [EIGHT, Scheme(8, symmetric=True), Scheme(8), Scheme(8, signed=False),
           Scheme(8, signed=False, per_channel=True), Scheme(8, symmetric=True, per_channel=True, power_of_two=True),
           Scheme(16, symmetric=True, per_channel=True)]
SHAPES = [(1, 1, 1), (1, 3, 2), (5, 1, 9), (2, 65, 33), (1, 130, 70), (3, 64, 32)]
"""Groups, rows, weights of a row: fewer and more than are rounded side by side."""
COMPILED = pytest.param(True, id="C", marks=pytest.mark.skipif(
    rounding_loops.loops is None, reason="npulab._rounding is not built: no C compiler"))


@pytest.fixture(params=[COMPILED, pytest.param(False, id="NumPy")])
def loops(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(rounding_loops, "loops", None)


def problem(groups, rows, k, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, 3 * k + 5, k)) * rng.uniform(0.1, 3, (groups, 1, k))
    h = x.transpose(0, 2, 1) @ x / x.shape[1] + 0.02 * np.eye(k)
    return h.astype(np.float32), rng.normal(size=(groups, rows, k)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loops_do_what_algebra_says(loops, shape):
    """The witness is LAPACK in double precision."""
    h, rows = problem(*shape)
    lower, exact = h.copy(), np.linalg.cholesky(h.astype(np.float64))
    if rounding_loops.loops is not None:
        lower[:, *np.triu_indices(shape[2], 1)] = np.nan  # is not to be read
    assert rounding_loops.factor(lower)
    lower = np.tril(np.nan_to_num(lower))
    np.testing.assert_allclose(lower, exact, atol=2e-6 * np.abs(exact).max())
    np.testing.assert_allclose(rounding_loops.lengths(lower, rows), np.square(rows @ exact).sum(axis=2), rtol=1e-5)
    solved = rows.copy()
    rounding_loops.solve(lower, solved)
    truth = np.linalg.solve(h.astype(np.float64), rows.astype(np.float64).transpose(0, 2, 1)).transpose(0, 2, 1)
    np.testing.assert_allclose(solved, truth, atol=1e-3 * np.abs(truth).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", [Scheme(8, narrow=True), Scheme(8, signed=False), Scheme(16)], ids=str)
def test_each_integer_is_the_nearest_with_what_those_before_it_left(loops, shape, scheme):
    """Weight by weight, in double precision; a choice counts as right where it is within a hair of the middle."""
    h, rows = problem(*shape, seed=1)
    groups, count, k = shape
    lower = np.linalg.cholesky(h.astype(np.float64))
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.02, 0.04, (groups, count)).astype(np.float32)
    zero = rng.integers(max(-9, scheme.low), 9, (groups, count)).astype(np.float32)
    codes, costs = rounding_loops.sequential(lower.astype(np.float32), rows, scale, zero, scheme)
    assert codes.dtype == scheme.holder
    s, z = scale.astype(np.float64), zero.astype(np.float64)
    off = (codes - z[..., None]) * s[..., None] - rows
    np.testing.assert_allclose(costs, np.square(off @ lower).sum(axis=2), rtol=1e-4, atol=1e-12)
    for j in range(k):
        known = np.einsum("grm,gm->gr", off[:, :, j + 1 :], lower[:, j + 1 :, j])
        wish = (rows[:, :, j] - known / lower[:, j, j, None]) / s + z
        best = np.clip(wish, scheme.low, scheme.high)
        assert np.abs(codes[:, :, j] - best).max() <= 0.5 + 1e-3


def test_what_is_not_positive_definite_is_said(loops):
    assert not rounding_loops.factor(np.array([[[1, 2], [2, 1]]], np.float32))
    assert not rounding_loops.factor(np.full((1, 2, 2), np.nan, np.float32))


@pytest.mark.skipif(rounding_loops.loops is None, reason="npulab._rounding is not built: no C compiler")
def test_sizes_that_do_not_belong_together_are_refused():
    c = rounding_loops.loops
    h, rows, out = np.ones((1, 2, 2), np.float32), np.ones((1, 3, 2), np.float32), np.ones((1, 3))
    codes, one = np.ones((1, 3, 2), np.int8), np.ones((1, 3), np.float32)
    for call in (lambda: c.factor(h, 1, 3), lambda: c.factor(h, 0, 2), lambda: c.factor(h, 2**62, 2**62),
                 lambda: c.solve(h, rows, 1, 4, 2), lambda: c.solve(h, rows, 1, -3, 2),
                 lambda: c.lengths(h, rows, out[:, :2].copy(), 1, 3, 2),
                 lambda: c.sequential(h, rows, one, one, codes, out, 1, 3, 2, -8, 7, 2),
                 lambda: c.sequential(h, rows, one, one, codes, out, 1, 3, 2, 7, -8, 1),
                 lambda: c.sequential(h, rows, one, one, codes, out, 1, 3, 2, -(1 << 20), 7, 1)):
        with pytest.raises(ValueError, match="sizes do not belong together"):
            call()


def roundings(net, data, file):
    readings = [Reading.of(net, layer, len(data)) for layer in net.layers]
    model = upto(reference(net).model(), [net.name(r.layer.data) for r in readings])
    _read(net, readings, model, data, file, None)
    with ThreadPoolExecutor(2) as pool:
        return [(_Rounding(net, r, file, pool), r) for r in readings]


@pytest.mark.parametrize("make", [every_kind, small])
def test_covariances_are_those_in_full(make):
    """Of x and q together those of single numbers are; the others are what these say of them."""
    net, data = ready(EIGHT, make(), count=40)
    full = moments(net, net.layers, data, reference(net))
    with Scratch() as file:
        for m, (r, reading) in zip(full, roundings(net, data, file), strict=True):
            second, cross, _ = m.covariances(r.centred)
            lower = np.tril(r.lower.astype(np.float64))
            mine = lower @ lower.transpose(0, 2, 1) - r.damping[:, :, None] * np.eye(lower.shape[1])
            back = np.argsort(r.order, axis=1)
            mine = np.take_along_axis(np.take_along_axis(mine, back[:, :, None], 1), back[:, None, :], 2)
            scale = float(np.abs(second).max())
            np.testing.assert_allclose(mine, second, atol=1e-5 * scale)
            diagonal = np.diagonal(second, axis1=1, axis2=2)
            some = diagonal > 1e-6 * scale
            factors = np.take_along_axis(r.factors, back, axis=1)
            both = np.diagonal(cross, axis1=1, axis2=2)
            np.testing.assert_allclose(factors[some], both[some] / diagonal[some], atol=1e-3)
            n = reading.count
            assert n == m.count
            np.testing.assert_allclose(r.mean_q, m.sums / n, atol=1e-5 * np.sqrt(scale))
            np.testing.assert_allclose(r.mean_x, m.float_sums / n, atol=1e-5 * np.sqrt(scale))
            mixed = factors[:, :, None] * mine
            np.testing.assert_allclose(mixed, cross, atol=2e-2 * scale)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_is_kept_and_noise_shrinks(loops, scheme):
    """The noise is that of ONNX Runtime's results."""
    net, data = ready(scheme)
    truth = _truth(net, data)
    before = _noise(net, data, truth)
    notes = adaround(net, data)
    assert [n.split(":")[0] for n in notes] == [layer.name for layer in net.layers]
    for layer in net.layers:
        keeps(layer, scheme)
    assert _noise(net, data, truth) < before


@pytest.mark.parametrize("make", [every_kind, small])
def test_the_error_that_is_said_is_the_error_of_the_results(make):
    """Of a layer that reads integers, against the float network, in ONNX Runtime. Both in dB, of all channels."""
    net, data = ready(Scheme(8), make(), count=40)
    notes = adaround(net, data)
    aim = reference(ready(Scheme(8), make(), count=40)[0])
    for layer, note in zip(net.layers, notes, strict=True):
        if layer.data not in net.graph.inputs:
            continue  # what it reads cannot be given
        axis = -1 if layer.kind in ("gemm", "matmul") else 1
        name, result = net.name(layer.data), net.name(layer.linear)
        run = runner(upto(aim.model(), [name, result]), [name, result])
        was, layer.weight = layer.weight, layer.seen
        again = runner(upto(float_model(net), [result]), [result])
        layer.weight = was
        noise = power = 0.0
        for f in data:
            _, y = run(f)
            off = again({**f, name: net.of[layer.data].params.seen(f[name])})[0] - y
            other = tuple(i for i in range(y.ndim) if i != axis % y.ndim)
            noise, power = noise + np.square(off).mean(axis=other).sum(), power + np.square(y).mean(axis=other).sum()
        said = float(note.split("-> ")[1].removesuffix(" dB"))
        assert abs(said - 10 * np.log10(noise / power)) < 2, note


def test_biases_take_the_mean_error_away():
    net, data = ready(EIGHT)
    layer = net.layers[0]
    aim = reference(net)
    adaround(net, data)
    shown = net.of[layer.data].params
    name = net.name(layer.linear)
    before = runner(upto(aim.model(), [name]), [name])
    layer.weight = layer.seen
    after = runner(upto(float_model(net), [name]), [name])
    means = [np.mean([run({"x": a})[0].mean(axis=(0, 2, 3)) for a in x], axis=0) for run, x in (
        (after, [shown.seen(f["x"]) for f in data]), (before, [f["x"] for f in data]))]
    np.testing.assert_allclose(*means, atol=1e-5)


def test_the_same_bytes_for_any_cores_and_however_much_fits_the_file(monkeypatch):
    made = []
    for cores, disk in ((1, 1 << 28), (2, 1 << 28), (2, 1 << 12), (1, 1)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(rounding_brief, "DISK", disk)
        net, data = ready(EIGHT)
        adaround(net, data)
        made.append(integer_model(net))
    assert len(set(map(bytes, made))) == 1


def test_rows_in_parts_are_the_rows(monkeypatch):
    made = []
    for rows, size in ((64, 1 << 18), (1, 1), (3, 1)):
        monkeypatch.setattr(rounding_brief, "ROWS", rows)
        monkeypatch.setattr(rounding_brief, "ROWS_BYTES", size)
        net, data = ready(Scheme(8, symmetric=True), every_kind())
        adaround(net, data)
        made.append([layer.codes for layer in net.layers])
    for others in made[1:]:
        for a, b in zip(made[0], others, strict=True):
            assert (a == b).all()


def test_numpy_comes_to_the_same_noise(monkeypatch):
    noise = []
    for loops in (rounding_loops.loops, None):
        monkeypatch.setattr(rounding_loops, "loops", loops)
        net, data = ready(EIGHT, every_kind())
        truth = _truth(net, data)
        adaround(net, data)
        noise.append(_noise(net, data, truth))
    assert abs(noise[0] / noise[1] - 1) < 0.05


def test_layers_that_read_floats_are_rounded_too():
    net, data = ready(EIGHT)
    net.of.pop(net.layers[0].data)
    truth = _truth(net, data)
    before = _noise(net, data, truth)
    adaround(net, data)
    assert _noise(net, data, truth) < before


def test_inputs_that_are_all_zero_leave_the_nearest_integers(loops):
    net, _ = ready(EIGHT)
    zeros = ListedSamples([{"x": np.zeros((1, 3, 16, 16), np.float32)}])
    plain = net.layers[0].params
    adaround(net, zeros, scales=False)
    assert (net.layers[0].codes == plain.codes(net.layers[0].weight)).all()
    assert all(np.isfinite(layer.bias).all() for layer in net.layers)


def test_no_samples_are_no_samples():
    net, _ = ready(EIGHT)
    with pytest.raises(UsageError, match="no samples"):
        adaround(net, ListedSamples([]))


def test_places_are_drawn_once_each_alike_and_for_ever():
    assert drawn(5, 12, 3, 4).tolist() == [1, 2, 3, 7, 11]
    counts = np.zeros(40)
    for seed in range(4000):
        at = drawn(10, 40, 7, seed)
        assert (np.diff(at) > 0).all()
        counts[at] += 1
    chi = float(np.square(counts - 1000).sum() / 1000 / (1 - 10 / 40))  # without replacement they vary less
    assert chi < 73.4  # 0.999 of chi squared with 39 degrees
    assert drawn(10, 40, 7, 1).tolist() != drawn(10, 40, 7, 2).tolist() != drawn(10, 40, 8, 1).tolist()
    assert drawn(40, 40, 1).tolist() == list(range(40))
