"""Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721, section 4.1).

The output channels of a layer are multiplied by s, what reads them is divided by s: the function stays what it is where
what lies between takes factors along. s is chosen so that each channel fills equally much of both weights' ranges:
s = sqrt((r2 / R2) / (r1 / R1)), where r1 and r2 are the channel's largest |weight| before and behind, R1 and R2 the
layers'. Pairs are visited in turn until nothing moves, which settles longer chains.

ReLU6 stops factors: 6 would have to become 6 s, channel by channel, which no integer kernel has. A channel whose
numbers never come near 6 does not meet the limit, and may be multiplied as long as that stays so. How near they come is
known of samples only: measure whether it helps (MobileNet 0.25: much; EfficientNet-Lite0, whose channels mostly do
reach 6: hardly).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npulab.errors import UsageError
from npulab.program.pages import arrays_away, let_go
from npulab.quantization.chains import Floats, Link, by_input, links, scale_results, without_ceiling
from npulab.quantization.network import Layer, Network
from npulab.quantization.types import F32

Ceilings = Literal["keep", "skip", "drop"]
SWEEPS = 100
SETTLED = 1e-3
"""A sweep that moves no factor by more than this share is the last."""
MARGIN = 2.0
"""Other data may make a channel's numbers this many times larger than the samples did: still they stay below a ReLU6.
Without it EfficientNet-Lite0 equalized by 24 images is 15 dB from itself on others."""
LEAST, MOST = 2.0**-12, 2.0**12
"""Limits of a channel's factor in all: float32 keeps its precision, and dead channels do not run away."""


def equalize(net: Network, heights: Mapping[int, Floats] | None = None, ceilings: Ceilings = "keep") -> list[str]:
    """Equalize all links. Lines say which, and by how much.

    heights   `moments.ceilings_met` of the network as it is: how high channels below a ReLU6 go.
    ceilings  "keep": a channel below a ReLU6 gets factors that leave it below, by MARGIN; those that come nearer keep
              theirs, and without `heights` all do. "skip": leave layers with ReLU6 alone. "drop": make ReLU6 a ReLU,
              which changes the function.
    Raises: UsageError for another word.
    """
    if ceilings not in ("keep", "skip", "drop"):
        raise UsageError(f"there is no way '{ceilings}' to treat ReLU6", want="keep, skip, drop")
    found = list(links(net))
    notes: list[str] = []
    tops: dict[int, Floats] = {}
    chosen: list[Link] = []
    for link in found:
        layer = link.first
        if layer.scheme is None and all(r.scheme is None for r, _ in link.readers):
            continue
        if np.isfinite(layer.clamp[1]) and ceilings == "drop" and layer.clamp[0] == 0.0:
            without_ceiling(net, layer)
            notes.append(f"{layer.name}: ReLU6 became ReLU")
        elif np.isfinite(layer.clamp[1]):
            if ceilings != "keep" or layer.clamp[0] != 0.0 or heights is None or layer.linear not in heights:
                continue
            tops[layer.node] = heights[layer.linear]
        chosen.append(link)
    total = {link.first.node: np.ones(link.first.channels) for link in chosen}
    before = {layer.node: spread(layer) for layer in net.layers}
    scaled = {layer.node: _Scaled(layer) for layer in net.layers}
    for _ in range(SWEEPS):
        moved = 0.0
        for link in chosen:
            s = _factors(link, scaled, total[link.first.node], tops.get(link.first.node))
            moved = max(moved, float(np.abs(np.log(s)).max(initial=0.0)))
            total[link.first.node] *= s
            scaled[link.first.node].multiply(outputs=s)
            for reader, channels in link.readers:
                scaled[reader.node].multiply(inputs=1.0 / s[channels])
        if moved < SETTLED:
            break
    changed = [layer for layer in net.layers if scaled[layer.node].is_scaled]
    weights = arrays_away([layer.weight for layer in changed], lambda _, i: scaled[changed[i].node].weight())
    for layer, weight in zip(changed, weights, strict=True):
        if (outputs := scaled[layer.node].outputs) is not None:
            scale_results(net, layer, outputs)
        layer.weight = weight
    for link in chosen:
        layer, s = link.first, total[link.first.node]
        if np.abs(np.log(s)).max(initial=0.0) < SETTLED:
            continue
        held = f", {int(np.count_nonzero(s == 1.0))} of {s.size} held by ReLU6" if layer.node in tops else ""
        notes.append(f"{layer.name}: channels by {s.min():.3g} to {s.max():.3g}, weights' spread "
                     f"{before[layer.node]:.3g} to {spread(layer):.3g}{held}")
    return notes


@dataclass(eq=False)
class _Scaled:
    """A layer, its weights as they are in a file, and what its channels are to be multiplied by; None: nothing."""

    layer: Layer
    outputs: Floats | None = None
    inputs: Floats | None = None

    @property
    def is_scaled(self) -> bool:
        return self.outputs is not None or self.inputs is not None

    def multiply(self, outputs: Floats | None = None, inputs: Floats | None = None) -> None:
        if outputs is not None:
            self.outputs = outputs if self.outputs is None else self.outputs * outputs
        if inputs is not None:
            self.inputs = inputs if self.inputs is None else self.inputs * inputs

    def weight(self, outputs: bool = True, inputs: bool = True) -> F32:
        """With the factors of its output and input channels, or without."""
        w = self.layer.weight
        if inputs and self.inputs is not None:
            w = w * self.layer.by_input(self.inputs.astype(np.float32))
        if outputs and self.outputs is not None:
            w = w * self.layer.by_output(self.outputs.astype(np.float32))
        return w

    def largest_made(self) -> Floats:
        """|weights| of each output channel, the largest."""
        found = np.abs(self.layer.rows(self.weight(outputs=False))).max(axis=1, initial=0.0).astype(np.float64)
        let_go(self.layer.weight)
        return found if self.outputs is None else np.asarray(found * self.outputs)

    def largest_read(self) -> Floats:
        """The same of each input channel."""
        found = np.abs(by_input(self.layer, self.weight(inputs=False))).max(axis=1, initial=0.0).astype(np.float64)
        let_go(self.layer.weight)
        return found if self.inputs is None else np.asarray(found * self.inputs)


def spread(layer: Layer) -> float:
    """How many times larger the largest |weight| is than an output channel's own, in the geometric mean: what one scale
    for all loses."""
    largest = np.abs(layer.rows()).max(axis=1, initial=0.0).astype(np.float64)
    let_go(layer.weight)
    largest = largest[largest > 0]
    return float(np.exp(np.mean(np.log(largest.max() / largest)))) if largest.size else 1.0


def _factors(link: Link, scaled: Mapping[int, _Scaled], total: Floats, top: Floats | None) -> Floats:
    """Of the first layer's output channels. `top`: the channels' largest values as they were at first."""
    layer = link.first
    before = scaled[layer.node].largest_made()
    behind = np.zeros(layer.channels)
    for reader, channels in link.readers:
        own = scaled[reader.node].largest_read()
        np.maximum.at(behind, channels, own / max(float(own.max(initial=0.0)), 1e-30))
    largest = max(float(before.max(initial=0.0)), 1e-30)
    some = (before > 0) & (behind > 0)
    s = np.ones(layer.channels)
    s[some] = np.sqrt(behind[some] / (before[some] / largest))
    if top is None:
        s /= np.exp(np.mean(np.log(s)))  # a factor of all changes nothing
    most = np.full(layer.channels, MOST)
    if top is not None:
        most = np.minimum(most, np.where(top > 0, layer.clamp[1] / (MARGIN * np.maximum(top, 1e-30)), MOST))
    s = np.clip(s * total, LEAST, most) / total
    if top is not None:
        s[MARGIN * top >= layer.clamp[1]] = 1.0
    return s
