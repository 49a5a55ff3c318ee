"""How far the integer network is from the float one: signal-to-noise ratios of tensors and of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from npulab.program.pages import Buffer, Scratch, content_of
from npulab.quantization.emit import float_model, shown_model
from npulab.quantization.network import Network
from npulab.quantization.parts import apart
from npulab.quantization.sampling import taken
from npulab.quantization.types import Array, Samples

CHUNK = 1 << 14
LEAST_SQUARES = 1e-30
"""Sum of squares of a chunk down to which those of a difference are float32, too: it may be 1e-7 of the numbers."""
HELD = 256 << 20
"""Bytes of tensors that wait on disk to be compared."""


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
    """Of `y` against `x`: sums in single precision over CHUNK elements, in double precision over those, and of elements
    whose squares are no float32. What is not finite counts as the largest number, NaN as zero."""
    a, b = (np.asarray(v, np.float32).ravel() for v in (x, y))
    total = np.zeros(4)
    for i in range(0, a.size, CHUNK):
        p, q = a[i : i + CHUNK], b[i : i + CHUNK]
        found = _sums(p, q)
        if not (LEAST_SQUARES < found[0] < np.inf and np.isfinite(found).all()):
            found = _sums(*(np.nan_to_num(v).astype(np.float64) for v in (p, q)))
        total += found
    return Noise(*map(float, total))


def _sums(p: Array, q: Array) -> Array:
    """Of squares, of the difference's, of products, of the other's squares."""
    with np.errstate(over="ignore", invalid="ignore"):
        d = p - q
    return np.array([np.einsum("i,i", *pair) for pair in ((p, p), (d, d), (p, q), (q, q))], np.float64)


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


def noises(reference: Buffer, other: Buffer, pairs: Mapping[str, str], samples: Samples,
           sizes: Mapping[str, int] | None = None) -> dict[str, Noise]:
    """Of tensors of one ONNX model against those of another, by name there -> name here. The first model's tensors are
    on disk until the other's are there.

    sizes  elements of tensors, where they are known: then of no more samples at once than HELD bytes hold.
    """
    count = max(1, HELD // max(1, 4 * sum((sizes or {}).get(name, 0) for name in pairs)))
    total = dict.fromkeys(pairs, SILENCE)
    for first in range(0, len(samples), count):
        some = samples if count >= len(samples) else taken(samples, range(len(samples))[first : first + count])
        with Scratch() as scratch:
            places: dict[tuple[int, str], tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
            for i, arrays in apart(reference, list(pairs), some, _same):
                for name, x in arrays.items():
                    places[i, name] = scratch.size, x.dtype, x.shape
                    scratch.write(content_of(x))
                del arrays, x  # before the next are made
            for i, arrays in apart(other, list(pairs.values()), some, _same):
                for name, own in pairs.items():
                    if own in arrays:
                        total[name] += noise(scratch.array(*places[i, name]), arrays[own])
                del arrays
    return total


def _same(_: int, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    return arrays


def by_tensor(net: Network, samples: Samples, floats: Buffer | None = None) -> dict[str, Noise]:
    """Of each point as later operators see it, and of the outputs, by name.

    floats  the float network's file; None: the network with the weights and biases as they are now.
    """
    model, shown = shown_model(net)
    points = [net.name(p.value) for p in net.quantized_points() if p.params]
    pairs = {name: shown[name] for name in points} | {name: name for name in map(net.name, net.graph.outputs)}
    sizes = {v.name: v.elements for v in net.graph.values}
    return noises(floats or float_model(net), model, pairs, samples, sizes)
