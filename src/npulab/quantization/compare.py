"""How far the integer network is from the float one: signal-to-noise ratios of tensors and of outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from npulab.quantization.emit import float_model, shown_model
from npulab.quantization.network import Network
from npulab.quantization.observe import Progress, in_order, runner
from npulab.quantization.types import Array, Feeds, Samples

CHUNK = 1 << 14
HELD = 1 << 21
"""Elements of tensors that are compared in one run."""
WORKERS = 2
"""Samples side by side."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Of a tensor over samples: energies of what the float network computes, and of the difference.

    dot  the sum of products of both networks' elements, for the cosine.
    """

    signal: float
    noise: float
    dot: float
    other: float

    @property
    def decibels(self) -> float:
        """Signal-to-noise ratio; 200 and more: the same."""
        if self.noise <= self.signal * 1e-20:
            return 200.0
        return float(10 * np.log10(max(self.signal, 1e-300) / self.noise))

    @property
    def cosine(self) -> float:
        both = np.sqrt(self.signal * self.other)
        return float(self.dot / both) if both else 1.0

    def __add__(self, more: Noise) -> Noise:
        return Noise(self.signal + more.signal, self.noise + more.noise, self.dot + more.dot, self.other + more.other)


SILENCE = Noise(0.0, 0.0, 0.0, 0.0)


def noise(x: Array, y: Array) -> Noise:
    """Of `y` against `x`: sums in single precision over CHUNK elements, in double precision over those."""
    a, b = (np.asarray(v, np.float32).ravel() for v in (x, y))
    total = np.zeros(4)
    for i in range(0, a.size, CHUNK):
        p, q = a[i : i + CHUNK], b[i : i + CHUNK]
        d = p - q
        total += [np.einsum("i,i", *pair) for pair in ((p, p), (d, d), (p, q), (q, q))]
    return Noise(*map(float, total))


class FirstSamples:
    """The first few of some samples."""

    def __init__(self, samples: Samples, count: int) -> None:
        self.samples = samples
        self.count = min(count, len(samples))
        self.origin = samples.origin

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return islice(iter(self.samples), self.count)


def in_parts(names: Iterable[str], sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in parts of HELD elements together at most, or of one."""
    parts: list[list[str]] = [[]]
    held = 0
    for name in names:
        if parts[-1] and held + sizes.get(name, 0) > HELD:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += sizes.get(name, 0)
    return parts


def noises(reference: bytes, other: bytes, pairs: Mapping[str, str], samples: Samples, progress: Progress | None = None,
           sizes: Mapping[str, int] | None = None) -> dict[str, Noise]:
    """Of tensors of one ONNX model against those of another, by name there -> name here. Tensors of a sample or two are
    in memory, whatever the number of samples.

    sizes  elements of tensors, where they are known: then no more of them are in memory than HELD together.
    """
    if sizes and len(parts := in_parts(pairs, sizes)) > 1:
        by_part = [noises(reference, other, {name: pairs[name] for name in part}, samples) for part in parts]
        return {name: n for part in by_part for name, n in part.items()}
    left, right = runner(reference, list(pairs)), runner(other, list(pairs.values()))
    total = dict.fromkeys(pairs, SILENCE)

    def job(feeds: Feeds) -> list[Noise]:
        return [noise(x, y) for x, y in zip(left(feeds), right(feeds), strict=True)]

    with ThreadPoolExecutor(WORKERS) as pool:
        for found in in_order(pool, job, samples, WORKERS, progress):
            for name, one in zip(pairs, found, strict=True):
                total[name] += one
    return total


def by_tensor(net: Network, samples: Samples, floats: bytes | None = None, progress: Progress | None = None
              ) -> dict[str, Noise]:
    """Of each point as later operators see it, and of the outputs, by name.

    floats  the float network's file; None: the network with the weights and biases as they are now.
    """
    model, shown = shown_model(net)
    points = [net.name(p.value) for p in net.quantized_points() if p.params]
    pairs = {name: shown[name] for name in points} | {name: name for name in map(net.name, net.graph.outputs)}
    sizes = {v.name: v.elements for v in net.graph.values}
    return noises(floats or float_model(net), model, pairs, samples, progress, sizes)
