"""How much each layer's weights, and each tensor, add to the noise of the outputs when only they are in integers.

Measured: the float network is computed once, cut behind each tensor in turn; in the cut the tensor is replaced by what
it is with that layer's weights, or itself, in so many bits, and the rest runs in floats. Predicted: the outputs' noise
is the noise in the cut, over all samples, times the gain from there, which one or two samples give.

Noise is the energy of the outputs' difference over the energy of the outputs, the mean over the outputs. Rounding
errors of different places hardly correlate, so that the noise of a whole configuration is about the sum of its parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UsageError
from npulab.quantization.calibrate import choose_activations, roomy
from npulab.quantization.compare import SILENCE, Noise, noise
from npulab.quantization.cuts import Cuts
from npulab.quantization.network import MOVES, Layer, Network, Point, softmax_of
from npulab.quantization.observe import Statistics
from npulab.quantization.ranges import weight_params
from npulab.quantization.session import Progress, in_order
from npulab.quantization.types import F32, Array, Feeds, ListedSamples, Params, Samples, Scheme

Kind = Literal["weights", "tensor"]
SAMPLES = 8
"""That sensitivities are measured on."""
PROBED = 2
"""That gains are measured on where the outputs' noise is predicted."""
WORK = 3 * 10**11
"""Multiply-accumulates that sensitivities may take, about: half a minute of one core."""
CACHE = 1 << 29
"""Bytes of tensors of all samples in a cut; samples are dropped, the last first, where they are more."""
QUIET = 1e-20
"""Noise over signal below which nothing differs: 200 dB."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one part, alone in so many bits, does to the outputs.

    name       of the layer, or of the tensor.
    index      into the network's layers or points.
    local      noise over signal of the layer's result, or of the tensor.
    noise      of the outputs; measured, or predicted if that was not asked for.
    predicted  the same from a gain.
    share      noise over the sum of the noises of all parts as the network has them now.
    """

    name: str
    kind: Kind
    index: int
    bits: int
    local: float
    noise: float
    predicted: float
    share: float = 0.0

    @property
    def decibels(self) -> float:
        return decibels(self.noise)

    @property
    def predicted_decibels(self) -> float:
        return decibels(self.predicted)


def decibels(ratio: float) -> float:
    """Of noise over signal."""
    return float(-10 * np.log10(max(ratio, QUIET)))


def ratio(decibels: float) -> float:
    """Noise over signal of so many decibels."""
    return float(10 ** (-decibels / 10))


def relative(found: Iterable[Noise]) -> float:
    """Noise over signal, the mean over the outputs: what sensitivities add up to."""
    return float(np.mean([n.noise / max(n.signal, 1e-300) for n in found]))


def ends(net: Network) -> list[int]:
    """Values whose noise counts: the outputs; in front of a Softmax that makes one, because probabilities near 0 and 1
    hide noise, or show nothing else."""
    soft = [softmax_of(net.graph, v) for v in net.graph.outputs]
    return list(dict.fromkeys(v if s is None else s.inputs[0] for v, s in zip(net.graph.outputs, soft, strict=True)))


def weight_schemes(net: Network, layer: Layer) -> dict[int, Scheme]:
    """Schemes that a layer's weights may have, by bits, widest first: for each width the one that is most like the
    default."""
    own = net.rules.depthwise_weights if layer.is_depthwise and net.rules.depthwise_weights else net.rules.weights
    return _by_bits(own)


def tensor_schemes(net: Network) -> dict[int, Scheme]:
    """The same of tensors."""
    return _by_bits(net.rules.activations)


def _by_bits(schemes: Sequence[Scheme]) -> dict[int, Scheme]:
    like = schemes[0]
    found: dict[int, Scheme] = {}
    for bits in sorted({s.bits for s in schemes}, reverse=True):
        fits = [s for s in schemes if s.bits == bits]
        found[bits] = max(fits, key=lambda s: (s.per_channel == like.per_channel, s.signed == like.signed,
                                               s.symmetric == like.symmetric, -fits.index(s)))
    return found


def fresh(net: Network, p: Point) -> list[int]:
    """The point's values that are rounded anew; the others are moved numbers of these."""
    found = []
    for v in p.values:
        made = net.graph.producer.get(v)
        if made is None or made.op.name not in MOVES:
            found.append(v)
    return found


def macs(net: Network, layer: Layer) -> int:
    """Multiply-accumulates of one inference."""
    at = layer.data if layer.kind == "transposed" else layer.linear
    here = net.graph.values[at].elements
    of = layer.weight.shape[0] if layer.kind == "transposed" else layer.channels
    return here * layer.weight.size // max(1, of)


@dataclass(frozen=True, eq=False)
class _Part:
    """A replacement of a tensor: by other weights of the layer that makes it, or by its integers."""

    kind: Kind
    index: int
    bits: int
    name: str
    weight: F32 | None = None
    params: Params | None = None


def sensitivities(net: Network, samples: Samples, seen: Mapping[int, Statistics], how: str = "min-max",
                  clip: str = "min-max", weights: Sequence[int] | None = None, tensors: Sequence[int] | None = None,
                  measured: bool = True, count: int | None = None, outputs: Sequence[int] = (),
                  progress: Progress | None = None, chosen: dict[tuple[int, Scheme], Params] | None = None
                  ) -> list[Sensitivity]:
    """Of each layer in integers and each point in integers, for each width, in the order in which they are computed.

    seen, how, clip     statistics (calibrate.statistics) and methods that ranges are chosen by.
    weights, tensors    widths; None: all that the rules allow. What cannot have one has no row for it.
    measured            run the rest of the network for all of it on `count` samples; else only predict.
    count               samples; None: SAMPLES, fewer where that were more than WORK.
    outputs             values whose noise counts; none: `ends`.
    chosen              params of weights by layer and scheme, taken from here, and put here.

    The network stays as it is. Raises: UsageError without samples.
    """
    parts = _parts(net, seen, how, clip, weights, tensors, {} if chosen is None else chosen)
    outputs = outputs or ends(net)
    if count is None:
        one = sum(macs(net, layer) for layer in net.layers) * sum(map(len, parts.values())) // 2
        count = int(np.clip(WORK // max(1, one), 1, SAMPLES))
    cuts = Cuts(net, outputs)
    kept = [{k: np.asarray(v) for k, v in feeds.items()} for feeds in islice(samples, count)]
    if not kept:
        raise UsageError("there are no samples to measure sensitivities on", got=samples.origin)
    names = [net.name(v) for v in outputs]
    last = max(map(cuts.position, outputs))
    places = sorted((v for v in parts if cuts.position(v) <= last), key=lambda v: (cuts.position(v), v))
    found: list[Sensitivity] = []
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        def over(job: Callable[[Feeds], list[Array]], feeds: Sequence[Feeds]) -> list[list[Array]]:
            return list(in_order(pool, job, ListedSamples(list(feeds)), 3))

        true = over(cuts.whole(kept[0], names), kept)
        front = -1
        for number, v in enumerate(places):
            here = cuts.position(v)
            layers = {p.bits: (net.layers[p.index], p.weight) for p in parts[v]
                      if p.kind == "weights" and p.weight is not None}
            job, wanted = cuts.segment(front, here, kept[0], layers, v)
            made = over(job, kept)
            others = [dict(zip(layers, one[len(wanted):], strict=True)) for one in made]
            kept = [dict(zip(wanted, one[: len(wanted)], strict=True)) for one in made]
            front = here
            most = max(1, CACHE // max(1, sum(a.nbytes for a in kept[0].values()) * (1 + len(layers))))
            kept, true, others = kept[:most], true[:most], others[:most]
            found += _at(net, cuts, v, parts[v], kept, others, true, names, measured, over)
            if progress:
                progress(number + 1, len(places))
    return shared(net, found)


def _at(net: Network, cuts: Cuts, v: int, parts: Sequence[_Part], kept: Sequence[Feeds],
        others: Sequence[Mapping[int, Array]], true: Sequence[Sequence[Array]], ends: Sequence[str], measured: bool,
        over: Callable[[Callable[[Feeds], list[Array]], Sequence[Feeds]], list[list[Array]]]) -> list[Sensitivity]:
    """Rows of the parts that replace the tensor `v`."""
    name = net.name(v)
    rest = cuts.rest(cuts.position(v), kept[0], ends)
    local: dict[_Part, list[Noise]] = {}
    out: dict[_Part, list[dict[str, Noise]]] = {}
    for part in parts:
        changed: list[Feeds] = []
        for one, other in zip(kept, others, strict=True):
            array = part.params.seen(one[name]) if part.params is not None else other[part.bits]
            local.setdefault(part, []).append(noise(one[name], array))
            changed.append({**one, name: array})
        run = len(kept) if measured else PROBED
        out[part] = [{end: noise(x, y) for end, x, y in zip(ends, xs, ys, strict=True)}
                     for xs, ys in zip(true, over(rest, changed[:run]), strict=False)]
    signal = {end: sum(float(np.vdot(xs[i], xs[i])) for xs in (np.asarray(t, np.float64) for t in _column(true, i)))
              for i, end in enumerate(ends)}
    rows = []
    for part in parts:
        here, there = _total(local[part]), _total(local[part][:PROBED])
        gains = [_total([o[end] for o in out[part][:PROBED]]).noise / there.noise if there.noise else 0.0
                 for end in ends]
        predicted = float(np.mean([g * here.noise / max(signal[end], 1e-300) for g, end in zip(gains, ends,
                                                                                              strict=True)]))
        now = relative([_total([o[end] for o in out[part]]) for end in ends]) if measured else predicted
        rows.append(Sensitivity(part.name, part.kind, part.index, part.bits, here.noise / max(here.signal, 1e-300),
                                now, predicted))
    return rows


def _column(arrays: Sequence[Sequence[Array]], i: int) -> Iterable[Array]:
    return (one[i] for one in arrays)


def _total(noises: Iterable[Noise]) -> Noise:
    total = SILENCE
    for n in noises:
        total += n
    return total


def shared(net: Network, rows: Iterable[Sensitivity]) -> list[Sensitivity]:
    """Rows of one part together (a point may be rounded in several places), with their shares of the noise that the
    network has now."""
    joined: dict[tuple[Kind, int, int], Sensitivity] = {}
    for r in rows:
        key = (r.kind, r.index, r.bits)
        old = joined.get(key)
        joined[key] = r if old is None else replace(old, noise=old.noise + r.noise, local=max(old.local, r.local),
                                                    predicted=old.predicted + r.predicted)
    total = sum(r.noise for r in joined.values() if _is_now(net, r))
    return [replace(r, share=r.noise / total if total else 0.0) for r in joined.values()]


def _is_now(net: Network, r: Sensitivity) -> bool:
    scheme = (net.layers if r.kind == "weights" else net.points)[r.index].scheme
    return scheme is not None and scheme.bits == r.bits


def expected_noise(net: Network, rows: Iterable[Sensitivity], predicted: bool = False) -> float:
    """Of the outputs with the widths that the network has now: the sum of its parts, or of their predictions."""
    return float(sum(r.predicted if predicted else r.noise for r in rows if _is_now(net, r)))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of two sequences of the same length; equal numbers have the mean of their ranks."""
    x, y = (r - r.mean() for r in (_ranks(np.asarray(z, np.float64)) for z in (a, b)))
    both = float(np.sqrt(np.dot(x, x) * np.dot(y, y)))
    return float(np.dot(x, y) / both) if both else 1.0


def _ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], np.float64)


# parts


def _parts(net: Network, seen: Mapping[int, Statistics], how: str, clip: str, weights: Sequence[int] | None,
           tensors: Sequence[int] | None, chosen: dict[tuple[int, Scheme], Params]) -> dict[int, list[_Part]]:
    """Every replacement, by the value that is replaced."""
    found: dict[int, list[_Part]] = {}
    jobs = [(i, scheme) for i, layer in enumerate(net.layers) if layer.scheme is not None
            for bits, scheme in weight_schemes(net, layer).items() if weights is None or bits in weights]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        shown = pool.map(lambda job: _shown(net, job[0], job[1], clip, chosen), jobs)
        for (i, scheme), weight in zip(jobs, shown, strict=True):
            layer = net.layers[i]
            found.setdefault(layer.result, []).append(_Part("weights", i, scheme.bits, layer.name, weight=weight))
    for bits, scheme in tensor_schemes(net).items():
        if tensors is not None and bits not in tensors:
            continue
        params = _tensor_params(net, seen, how, scheme)
        for i, p in enumerate(net.points):
            if p.scheme is None or params[i] is None:
                continue
            for v in fresh(net, p):
                if not _rounded_before(net, v, params):
                    found.setdefault(v, []).append(_Part("tensor", i, bits, net.name(p.value), params=params[i]))
    return found


def _shown(net: Network, number: int, scheme: Scheme, clip: str, chosen: dict[tuple[int, Scheme], Params]) -> F32:
    """The weights as integers of that scheme show them: those that the layer has, else nearest ones."""
    layer = net.layers[number]
    if layer.params is not None and layer.params.scheme == scheme:
        return layer.seen
    if (number, scheme) not in chosen:
        chosen[number, scheme] = weight_params(layer.rows(), scheme, layer.axis, clip)
    return roomy(net, layer, chosen[number, scheme]).seen(layer.weight)


def _tensor_params(net: Network, seen: Mapping[int, Statistics], how: str, scheme: Scheme) -> list[Params | None]:
    """Of all points, were they all in that scheme; those that a point of that width has already."""
    own = [p.params if p.scheme is not None and p.scheme == scheme else None for p in net.points]
    before = [(p.scheme, p.params) for p in net.points]
    try:
        for p in net.points:
            if p.scheme is not None:
                p.scheme = scheme
        choose_activations(net, seen, how)
        chosen = [p.params if p.scheme is not None else None for p in net.points]
    finally:
        for p, (s, params) in zip(net.points, before, strict=True):
            p.scheme, p.params = s, params
    return [o or c for o, c in zip(own, chosen, strict=True)]


def _rounded_before(net: Network, v: int, params: Sequence[Params | None]) -> bool:
    """Whether a concatenation joins tensors that are in its own scale already."""
    made = net.graph.producer.get(v)
    if made is None or made.op.name != "Concat":
        return False
    number = {id(p): i for i, p in enumerate(net.points)}

    def of(u: int) -> tuple[float, int] | None:
        p = net.of.get(u)
        found = params[number[id(p)]] if p is not None else None
        return (float(found.scales[0]), int(found.zeros[0])) if found is not None else None

    return all(of(u) == of(v) for u in made.inputs if u >= 0)
