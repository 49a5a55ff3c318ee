"""Scales and zero points of activations from statistics, of weights from the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from npulab.ir.ops import OnnxOp
from npulab.program.pages import let_go
from npulab.quantization.emit import float_model
from npulab.quantization.network import Layer, Network, Point, clamp_of, softmax_of
from npulab.quantization.observe import Statistics, observe
from npulab.quantization.ranges import NEEDS_HISTOGRAM, fixed, method, min_max, params_of, weight_params
from npulab.quantization.session import Progress, give_back
from npulab.quantization.types import Params, Samples, Scheme

Known = dict[tuple[str, int, str, Scheme], Params]
"""Params of tensors and weights: what, its value or node, the method, the scheme."""
BIAS_ROOM = 2.0**30
"""Biases stay below this many steps of their sums, so that these have room for products."""


def statistics(net: Network, samples: Samples, how: str = "min-max", channels: Sequence[int] = (),
               progress: Progress | None = None) -> dict[int, Statistics]:
    """Statistics of each point's first tensor, and of the tensors `channels` by channel, by value."""
    method(how)
    values = list(dict.fromkeys([*(p.value for p in net.quantized_points()), *channels]))
    names = [net.name(v) for v in values]
    found = observe(float_model(net), names, samples, how in NEEDS_HISTOGRAM, [net.name(v) for v in channels], progress,
                    {net.name(v): net.graph.values[v].elements for v in values})
    return {v: found[net.name(v)] for v in values}


def calibrate(net: Network, seen: Mapping[int, Statistics], how: str = "min-max", clip: str = "min-max") -> None:
    """Params of all points and weights. `how`: a method of ranges.METHODS; `clip` of weights: "min-max" or "mse"."""
    choose_activations(net, seen, how)
    choose_weights(net, clip)


def choose_activations(net: Network, seen: Mapping[int, Statistics], how: str = "min-max", known: Known | None = None
                       ) -> None:
    """Params of the points: what the format prescribes, else by the method from the statistics; extremes where answers
    come out of a Softmax, for clipped ones would be alike. `known`: what was chosen from these before; it is added to.
    """
    choose, known = method(how), {} if known is None else known
    answers = {s.outputs[0] for v in net.graph.outputs if (s := softmax_of(net.graph, v)) is not None}
    for p in net.quantized_points():
        assert p.scheme is not None
        p.params, key = _prescribed(net, p), ("tensor", p.value, how, p.scheme)
        if p.params is None:
            if key not in known:
                own = min_max if p.value in answers else choose
                known[key] = params_of(own(seen[p.value], p.scheme), p.scheme)
            p.params = known[key]
    _share_with_concat(net)


def _prescribed(net: Network, p: Point) -> Params | None:
    made = net.graph.producer.get(p.value)
    if made is None or not isinstance(made.op, OnnxOp) or p.scheme is None:
        return None
    found = net.rules.fixed.get((made.op.name, p.scheme.dtype))
    return fixed(*found, p.scheme) if found else None


def _share_with_concat(net: Network) -> None:
    """A tensor that only a concatenation reads is made in the result's scale at once."""
    for n in reversed(net.graph.nodes):
        if n.op.name != "Concat" or n.outputs[0] not in net.of:
            continue
        result = net.of[n.outputs[0]]
        for v in n.inputs:
            p = net.of.get(v)
            if p is None or p is result or p.scheme is None or result.params is None or p.scheme != result.scheme:
                continue
            if _prescribed(net, p) is None and all(
                    {r.index for r in net.readers(u)} <= {n.index} for u in p.values) and not (
                    set(p.values) & set(net.graph.inputs)):
                p.params = result.params


def choose_weights(net: Network, clip: str = "min-max", known: Known | None = None) -> None:
    """Params of the weights of all layers in integers; codes of earlier roundings are gone. `known`: what was chosen
    for the same weights before; it is added to."""
    known = {} if known is None else known
    for layer in net.layers:
        layer.codes = None
        if layer.scheme is None:
            layer.params = None
            continue
        key = "weights", layer.node, clip, layer.scheme
        if key not in known:
            known[key] = weight_params(layer.rows(), layer.scheme, layer.axis, clip)
            let_go(layer.weight)
        layer.params = roomy(net, layer, known[key])
    give_back()  # what the search for ranges took


def roomy(net: Network, layer: Layer, p: Params) -> Params:
    """The params with scales so large that the biases fit their integers: channels of (nearly) nothing but zeros."""
    data = net.of.get(layer.data)
    if layer.bias is None or data is None or data.params is None:
        return p
    largest = np.abs(layer.bias.astype(np.float64))
    least = largest / (BIAS_ROOM * float(data.params.scales[0]))
    needed = least if p.axis is not None else least.max(keepdims=True)
    if (p.scales >= needed).all():
        return p
    scales = np.maximum(p.scales, needed)
    if p.scheme.power_of_two:
        scales = 2.0 ** np.ceil(np.log2(scales))
    return Params(p.scheme, scales.astype(np.float32), p.zeros, p.axis)


def clamps_of(net: Network, p: Point) -> tuple[float, float]:
    """Limits that a point's numbers cannot leave, by the clamp that makes them."""
    made = net.graph.producer.get(p.value)
    if made is not None and made.op.name in ("Relu", "Clip"):
        return clamp_of(net.graph, made) or (-np.inf, np.inf)
    return -np.inf, np.inf
