"""How far the integer network's outputs are from the float one's, sample by sample: what a search decides by.

In front of a Softmax that makes an output, what counts is how far each row's first class lies before its rivals: that
decides the answer. Behind it a few samples that are in doubt make up all of the noise, and a range that clips the first
class does not show. The noise of all classes does not say it either, of which the first is one of a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from npulab.ir.ops import OnnxOp
from npulab.program.pages import Buffer
from npulab.quantization.agreement import RIVALS
from npulab.quantization.compare import SILENCE, Noise, noise
from npulab.quantization.emit import shown_model
from npulab.quantization.joints import parted
from npulab.quantization.network import Network, softmax_of
from npulab.quantization.parts import each
from npulab.quantization.types import Array, Samples

QUIET = 1e-10
"""Noise over the samples' mean signal below which none is heard: 100 dB. One exact sample is not worth all others."""
EACH_AXIS_SINCE = 13
"""The opset from which Softmax takes one axis; before, all from its axis on (ONNX)."""
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class End:
    """A tensor whose noise counts. `classes`: the axis that a Softmax behind it takes, `flat`: with all behind that."""

    name: str
    classes: int | None = None
    flat: bool = False

    def heard(self, x: Array, y: Array) -> Noise:
        """Of one sample, `y` against the float network's `x`."""
        return noise(*((x, y) if self.classes is None else self._leads(x, y, self.classes)))

    def _leads(self, x: Array, y: Array, axis: int) -> tuple[Array, Array]:
        """How far the first class of each row of `x` lies before those next to it, and the same classes in `y`."""
        rows, other = (z.reshape(math.prod(z.shape[:axis]), -1) if self.flat else np.moveaxis(z, axis, -1)
                       for z in (x, y))
        order = np.argsort(-rows, axis=-1, kind="stable")[..., : RIVALS + 1]
        first, rivals = order[..., :1], order[..., 1:]
        if not rivals.size:
            return x, y
        a, b = (np.take_along_axis(z, first, -1) - np.take_along_axis(z, rivals, -1) for z in (rows, other))
        return a, b


def ends_of(net: Network) -> list[End]:
    """The outputs, in front of a Softmax that makes one; of detectors whose heads were parted, the parts."""
    joined = parted(net)
    return [End(net.name(v)) for v in joined] or [_end(net, v) for v in net.graph.outputs]


def _end(net: Network, output: int) -> End:
    soft = softmax_of(net.graph, output)
    if soft is None or not isinstance(soft.op, OnnxOp):
        return End(net.name(output))
    rank = len(net.graph.values[soft.inputs[0]].shape)
    opset = next((v for domain, v in net.graph.header.opsets if not domain), EACH_AXIS_SINCE) if net.graph.header \
        else EACH_AXIS_SINCE
    axis = soft.op.attributes.get("axis", -1 if opset >= EACH_AXIS_SINCE else 1)
    assert isinstance(axis, int)
    return End(net.name(soft.inputs[0]), axis % max(1, rank), opset < EACH_AXIS_SINCE)


@dataclass(frozen=True)
class Distance:
    """Noise by sample and end."""

    noises: Sequence[Sequence[Noise]]

    @property
    def decibels(self) -> float:
        """Signal-to-noise ratio over all samples, the mean over the ends."""
        return float(np.mean([sum(one, SILENCE).decibels for one in zip(*self.noises, strict=True)]))

    def less_than(self, other: Distance) -> tuple[float, float]:
        """By how many decibels a sample is nearer with this than with the other, on average, and the standard error of
        that. Each sample counts as much as any other: one whose answer tips over does not outweigh the rest."""
        signal = np.mean([[n.signal for n in one] for one in self.noises], axis=0)
        mine, its = (np.array([[n.noise for n in one] for one in d.noises]) + QUIET * signal + 1e-300
                     for d in (self, other))
        gains = np.mean(10 * np.log10(its / mine), axis=1)
        error = float(np.std(gains, ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else 0.0
        return float(np.mean(gains)), error


def simplest(found: Mapping[K, Distance]) -> K:
    """The first of those that the nearest is not nearer than by more than the standard error of their difference: what
    is left between them is which samples these are (Breiman et al. 1984, "Classification and Regression Trees")."""
    best, *others = found
    for k in others:
        if found[k].less_than(found[best])[0] > 0:
            best = k
    lead = {k: found[best].less_than(found[k]) for k in found}
    return next(k for k, (gain, error) in lead.items() if gain <= error)  # the best itself: 0 and 0


def heard(reference: Buffer, ends: Sequence[End], samples: Samples) -> list[list[Array]]:
    """The ends of the float network, by sample."""
    return list(each(reference, [e.name for e in ends], samples, list))


def distance(net: Network, ends: Sequence[End], wanted: Iterable[Sequence[Array]], samples: Samples) -> Distance:
    """Of the network as it is now, its ends as their own integers show them. `wanted`: the float network's."""
    model, shown = shown_model(net)
    outputs = {net.name(v) for v in net.graph.outputs}
    names = [e.name if e.name in outputs else shown.get(e.name, e.name) for e in ends]
    made = each(model, names, samples, list)
    del model
    return Distance([[e.heard(np.asarray(x), np.asarray(y)) for e, x, y in zip(ends, xs, ys, strict=True)]
                     for xs, ys in zip(wanted, made, strict=True)])
