"""Params and integers that training found, in the schemes that a target takes; what changed, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from npulab.quantization.compare import noise
from npulab.quantization.network import Layer, Network, Point
from npulab.quantization.pairs import Stored, same_levels
from npulab.quantization.ranges import fixed, params_of, weight_params
from npulab.quantization.types import Array, Params, Rules, Scheme

LISTED = 4
"""Names in a note."""
MUCH = "MUCH"


@dataclass(eq=False)
class Said:
    """Reasons, and what each is said of: (name, number that stands for MUCH).

    title  of the target; "" where it is the user who asks for something else than was trained.
    """

    title: str
    found: dict[tuple[str, str], list[tuple[str, float]]] = field(default_factory=dict)

    def add(self, kind: str, reason: str, name: str, number: float = 0.0) -> None:
        self.found.setdefault((kind, reason), []).append((name, number))

    def why(self, scheme: Scheme) -> str:
        return f"as {self.title} does not take {scheme}" if self.title else f"as is asked for, instead of {scheme}"

    def lines(self) -> list[str]:
        out = []
        for (kind, reason), rows in self.found.items():
            numbers = [number for _, number in rows]
            low, high = (f"{x:.3g}" for x in (min(numbers), max(numbers)))
            out.append(f"{len(rows)} {kind}{'s' if rows[1:] else ''}: "
                       + reason.replace(MUCH, low if low == high else f"{low}..{high}")
                       + f" ({names_of(name for name, _ in rows)})")
        return out


def names_of(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(n if len(n) <= 40 else f"...{n[-36:]}" for n in listed[:LISTED]) + (
        f", and {len(listed) - LISTED} more" if listed[LISTED:] else "")


# which schemes are at hand

def tensor_schemes(rules: Rules, tensors: Iterable[Params], weights: Iterable[Stored], bits: int | None
                    ) -> list[Scheme]:
    """In the order in which they are tried. A TFLite file has one signedness of 8 bits: what most tensors have, but
    int8 only if the weights stay symmetric, which its kernels want of them."""
    allowed = [s for s in rules.activations if bits is None or s.bits == bits] or list(rules.activations)
    both = {s.signed for s in allowed if s.bits == 8}
    if rules.file == "tflite" and len(both) > 1:
        signed = [p.scheme.signed for p in tensors if p.scheme.bits == 8]
        most = 2 * sum(signed) >= len(signed) if signed else allowed[0].signed
        channels = any(s.signed and s.per_channel for s in (*rules.weights, *rules.depthwise_weights))
        symmetric = all(w.params.scheme.symmetric and (channels or w.params.axis is None) for w in weights)
        allowed = [s for s in allowed if s.bits != 8 or s.signed == (most and symmetric)]
    return allowed


def weight_schemes(rules: Rules, schemes: Sequence[Scheme], activations: Scheme, bits: int | None,
                    per_channel: bool | None) -> list[Scheme]:
    """TFLite's kernels want weights of the activations' signedness."""
    allowed = [s for s in schemes if (bits is None or s.bits == bits)
               and (per_channel is None or s.per_channel == per_channel)] or list(schemes)
    if rules.file == "tflite":
        allowed = [s for s in allowed if s.signed == activations.signed] or allowed
    return allowed


def _takes(s: Scheme, p: Params) -> bool:
    """Whether a scheme allows the params' scales and, in the same type, their zero points."""
    if s.power_of_two and not (np.frexp(p.scales)[0] == 0.5).all():
        return False
    return not s.symmetric or bool((p.zeros - p.scheme.middle == 0).all())


# tensors

def tensor(net: Network, p: Point | None, params: Params, schemes: Sequence[Scheme], said: Said, name: str = ""
            ) -> Params:
    """The params of a tensor as the target takes them."""
    name = name or net.name(p.value if p else -1)
    made = fitted(params, schemes)
    demanded = _prescribed(net, p, made.scheme) if p else None
    if demanded is not None:
        if not same_levels(demanded, made):
            said.add("tensor", f"the scale that {net.rules.title} prescribes, {MUCH} times the trained one", name,
                     float(demanded.scales[0] / params.scales[0]))
        return demanded
    if same_levels(made, params):
        if made.scheme.signed != params.scheme.signed:
            said.add("tensor", f"{made.scheme.dtype} instead of {params.scheme.dtype}, the zero point moved along, "
                     "nothing lost", name)
    elif made.scheme.bits > params.scheme.bits and made.scheme.power_of_two <= params.scheme.power_of_two:
        said.add("tensor", f"{made.scheme.dtype} instead of {params.scheme.dtype}, {MUCH} steps to one of training's",
                 name, float(params.scales[0] / made.scales[0]))
    else:
        said.add("tensor", f"{made.scheme}, {said.why(params.scheme)}: steps {MUCH} times as large", name,
                 float(made.scales[0] / params.scales[0]))
    return made


def fitted(p: Params, schemes: Sequence[Scheme]) -> Params:
    """The same, the same levels in another type, finer ones, or the trained range anew: the first that is to be had."""
    for signed in (p.scheme.signed, not p.scheme.signed):
        for s in schemes:
            if s.bits == p.scheme.bits and s.signed == signed and _takes(s, p):
                return Params(s, p.scales, (p.zeros - p.scheme.low + s.low).astype(np.int32))
    same = [s for s in schemes if s.bits == p.scheme.bits]
    wide = next((s for s in schemes if s.bits == 16 and p.scheme.bits == 8), None)
    if not same and wide is not None and (not wide.power_of_two or (np.frexp(p.scales)[0] == 0.5).all()):
        return Params(wide, np.asarray(p.scales / 128, np.float32), np.full(1, wide.middle, np.int32))
    s = same[0] if same else schemes[0]
    scale, zero = float(p.scales[0]), int(p.zeros[0])
    return params_of((scale * (p.scheme.low - zero), scale * (p.scheme.high - zero)), s)


def _prescribed(net: Network, p: Point, scheme: Scheme) -> Params | None:
    made = net.graph.producer.get(p.value)
    found = net.rules.fixed.get((made.op.name, scheme.dtype)) if made is not None else None
    return fixed(*found, scheme) if found else None


# layers

def weights(net: Network, layer: Layer, found: Stored, schemes: Sequence[Scheme], said: Said
             ) -> tuple[Params, Array | None]:
    """Params and integers of a layer's weights as the target takes them."""
    p = found.params
    steps = found.codes.astype(np.int32) - p.zeros.reshape(p.along(found.codes.ndim))
    close = [s for s in schemes if s.bits == p.scheme.bits] or list(schemes)
    for s in sorted(close, key=lambda s: (s.signed != p.scheme.signed, s.per_channel != (p.axis is not None))):
        made = _same_steps(layer, p, steps, s)
        if made is not None:
            if s.bits != p.scheme.bits or s.signed != p.scheme.signed:
                said.add("layer", f"{s.dtype} weights instead of {p.scheme.dtype} for the same numbers, nothing lost",
                         layer.name)
            return made
    tried = [_near(layer, p, steps, s) for s in close]
    decibels = [noise(layer.weight, m.seen(layer.weight)).decibels for m in tried]
    best = tried[int(np.argmax(decibels))]
    narrow = " without the lowest code" if best.scheme.narrow else ""
    said.add("layer", f"{best.scheme} weights{narrow}, {said.why(p.scheme)}: rounded a second time, {MUCH} dB over the "
             "difference", layer.name, max(decibels))
    return best, None


def _same_steps(layer: Layer, p: Params, steps: Array, s: Scheme) -> tuple[Params, Array] | None:
    """The same numbers in another scheme; None if it has not all of them."""
    if s.power_of_two and not (np.frexp(p.scales)[0] == 0.5).all():
        return None
    scales, zeros, axis = p.scales, p.zeros, p.axis
    if axis is not None and not s.per_channel:
        if not (scales == scales[0]).all() or not (zeros == zeros[0]).all():
            return None
        scales, zeros, axis = scales[:1], zeros[:1], None
    elif axis is None and s.per_channel:
        scales, zeros, axis = np.repeat(scales, layer.channels), np.repeat(zeros, layer.channels), layer.axis
    zeros = np.full(zeros.shape, s.middle) if s.symmetric else zeros - p.scheme.middle + s.middle
    made = Params(s, scales, zeros.astype(np.int32), axis)
    codes = steps + made.zeros.reshape(made.along(steps.ndim))
    if zeros.min() < s.low or zeros.max() > s.high or codes.min(initial=0) < s.low or codes.max(initial=0) > s.high:
        return None
    return made, codes.astype(s.holder)


def _near(layer: Layer, p: Params, steps: Array, s: Scheme) -> Params:
    """Params of a scheme that has not all of the trained numbers: of their range, or the trained scales, larger where
    the integers do not fit or not; for each scale that which loses least."""
    anew = weight_params(layer.rows(), s, layer.axis)
    if not s.symmetric or s.power_of_two or (p.axis is not None and not s.per_channel):
        return anew
    count = anew.scales.size
    largest = np.abs(layer.rows(steps)).max(axis=1) if count > 1 else np.abs(steps).max(keepdims=True).reshape(-1)
    scales = np.broadcast_to(p.scales, count)
    best, least = anew.scales, np.full(count, np.inf)
    for some in (scales * np.maximum(1.0, largest / (s.high - s.middle)), scales, anew.scales):
        made = replace(anew, scales=np.asarray(some, np.float32))
        off = (layer.rows(made.seen(layer.weight)).astype(np.float64) - layer.rows()) ** 2
        error = off.sum(axis=1) if count > 1 else off.sum(keepdims=True).reshape(-1)
        best, least = np.where(error < least, made.scales, best), np.minimum(error, least)
    return replace(anew, scales=best)
