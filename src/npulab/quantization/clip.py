"""Clipping of activations by what it does to the layers behind.

The range of least squared error of a tensor itself (`ranges.mse`) counts every number alike. What matters is the error
of what is made of it: of the readers' results, behind their clamps. Ranges around the calibrated one are tried on
samples, all candidates of a point in one run, and the one with the least error is taken (the search of scales by layer
output, as in Wu et al. 2020, EasyQuant, arXiv:2006.16669).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from npulab.quantization.chains import Floats
from npulab.quantization.network import Layer, Network, Point
from npulab.quantization.parts import each
from npulab.quantization.probes import Probed
from npulab.quantization.ranges import params_of
from npulab.quantization.session import Progress
from npulab.quantization.types import ListedSamples, Params, Samples

SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Of the calibrated range that are tried."""
SAMPLES = 16
"""Are enough to rank ranges."""
MARGIN = 0.98
"""A narrower range is taken where it leaves at most this much of the error: samples are few."""
ELEMENTS_MAX = 1 << 24
"""Of a tensor times its candidates; larger ones keep their range."""


@dataclass(frozen=True, eq=False)
class _Probe:
    """A point, the ranges tried, and the names of the errors (candidates,) and of the squares that they compare with,
    one pair for each reader."""

    point: Point
    params: list[Params]
    names: list[tuple[str, str]]


def clip(net: Network, samples: Samples, shares: Sequence[float] = SHARES, progress: Progress | None = None
         ) -> list[str]:
    """Narrow the ranges of points where the layers that read them come out better. Params must be chosen.

    Points whose scale is prescribed or shared with a concatenation, and those that no layer reads, keep theirs.
    """
    few = ListedSamples(list(islice(samples, SAMPLES)), samples.origin)
    probes, model = _probes(net, shares)
    if not probes:
        return []
    names = [name for p in probes for pair in p.names for name in pair]
    totals: list[Floats] | None = None
    for found in each(model, names, few, lambda arrays: [np.array(a, np.float64).reshape(-1) for a in arrays],
                      progress):
        totals = found if totals is None else [t + f for t, f in zip(totals, found, strict=True)]
    assert totals is not None
    by_name = dict(zip(names, totals, strict=True))
    notes = []
    for probe in probes:
        if not all(np.isfinite(by_name[name]).all() for pair in probe.names for name in pair):
            continue  # squares that are no float32: nothing ranks the ranges
        error = np.sum([by_name[e] / np.maximum(by_name[s], 1e-30) for e, s in probe.names], axis=0)
        best = int(np.argmin(error))
        if best and error[best] < MARGIN * error[0]:
            probe.point.params = probe.params[best]
            notes.append(f"{net.name(probe.point.value)}: range to {shares[best]:g} of itself, error behind it "
                         f"{10 * np.log10(error[0] / max(float(error[best]), 1e-300)):.1f} dB less")
    return notes


def _probes(net: Network, shares: Sequence[float]) -> tuple[list[_Probe], bytes]:
    """What is to be measured, and the file that measures it."""
    probed = Probed(net)
    readers: dict[int, list[Layer]] = {}
    for layer in net.layers:
        shape = net.graph.values[layer.data].shape
        fits = len(shape) > 1 and shape[0] == 1 and int(np.prod(shape)) * len(shares) <= ELEMENTS_MAX
        if layer.data in net.of and fits:
            readers.setdefault(id(net.of[layer.data]), []).append(layer)
    uses: dict[int, int] = {}
    for p in net.quantized_points():
        uses[id(p.params)] = uses.get(id(p.params), 0) + 1
    found = []
    for point in net.quantized_points():
        if point.params is None or id(point) not in readers or uses[id(point.params)] > 1 or _is_prescribed(net, point):
            continue
        params = [point.params, *(_narrowed(point.params, share) for share in shares[1:])]
        names = [_errors(probed, net, layer, params) for layer in readers[id(point)]]
        found.append(_Probe(point, params, names))
    return found, probed.model()


def _is_prescribed(net: Network, point: Point) -> bool:
    made = net.graph.producer.get(point.value)
    return made is not None and point.scheme is not None and (made.op.name, point.scheme.dtype) in net.rules.fixed


def _narrowed(p: Params, share: float) -> Params:
    """Params of a part of the range."""
    scale, zero = float(p.scales[0]), int(p.zeros[0])
    return params_of((share * scale * (p.scheme.low - zero), share * scale * (p.scheme.high - zero)), p.scheme)


def _errors(probed: Probed, net: Network, layer: Layer, params: Sequence[Params]) -> tuple[str, str]:
    """Squared errors of the layer's result for its data in each of the params, and the squares of the result."""
    rank = len(net.graph.values[layer.data].shape)
    scheme = params[0].scheme
    ones = (1,) * (rank - 1)
    scale = probed.constant(np.array([p.scales[0] for p in params], np.float32).reshape(-1, *ones))
    zeros = np.array([p.zeros[0] for p in params], np.float32).reshape(-1, *ones)
    x = probed.add("Div", [net.name(layer.data), scale])  # all candidates behind each other, along the batch
    x = probed.round(x)
    x = probed.add("Max", [x, probed.constant(scheme.low - zeros)])
    x = probed.add("Min", [x, probed.constant(scheme.high - zeros)])
    x = probed.add("Mul", [x, scale])
    y = probed.again(layer, x, layer.weight, layer.bias)
    if np.isfinite(layer.clamp[0]):
        y = probed.add("Max", [y, probed.constant(np.array(layer.clamp[0], np.float32))])
    if np.isfinite(layer.clamp[1]):
        y = probed.add("Min", [y, probed.constant(np.array(layer.clamp[1], np.float32))])
    off = probed.add("Sub", [y, net.name(layer.result)])
    size = len(net.graph.values[layer.result].shape)
    return probed.reduce("ReduceSumSquare", off, range(1, size)), \
        probed.reduce("ReduceSumSquare", net.name(layer.result), range(size))
