"""What a product, a convolution or attention is in float64, and how far a right kernel can be from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.compute import winograd
from npulab.gpu.compute.problems import Attention, Convolution, Product
from npulab.gpu.compute.tiles import Choice, Winograd
from npulab.reference import requantize

Array = NDArray[np.float64]
_UNIT = 2.0 ** -24
"""Largest relative error of rounding to float32."""
_HALF = 2.0 ** -11
_SHORT = (1 + 2.0 ** -10) ** 4 - 1
"""Of the sizes of four products that are added up as halves, by four roundings one after the other: each is within
2**-10 of the result, to the nearest or towards zero (OpenCL 3.0 Extensions, cl_khr_fp16: a device has one of the two),
and so is a rounding to float32 and then to halves, as of fused multiply-adds that are emulated: 2**-11 + 2**-23."""
_NORMAL = 2.0 ** -14
"""The smallest half that is none of those that may count as zero (CL_FP_DENORM is not asked for)."""
_STEEPEST = 1.5
"""Of the activations, hardswish's at 3."""


def activated(kind: str, x: Array, slope: float = 0.01) -> Array:
    """In float64; what the kinds are: `activations.activation`."""
    match kind:
        case "relu":
            return np.maximum(x, 0)
        case "relu6":
            return np.clip(x, 0, 6)
        case "sigmoid":
            return np.asarray(1 / (1 + np.exp(-x)))
        case "silu":
            return np.asarray(x / (1 + np.exp(-x)))
        case "hardsigmoid":
            return np.asarray(np.clip(x + 3, 0, 6) / 6)
        case "hardswish":
            return np.asarray(x * np.clip(x + 3, 0, 6) / 6)
        case "tanh":
            return np.asarray(np.tanh(x))
        case "gelu":
            return np.asarray(x * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2)) / 2)
        case "leaky":
            return np.where(x >= 0, x, slope * x)
    return x


def product(what: Product, a: NDArray[Any], b: NDArray[Any], bias: NDArray[Any] | None = None,
            residual: NDArray[Any] | None = None, halves: bool = False) -> tuple[Array, Array]:
    """The result, and for each of its numbers how far a kernel that adds in any order may be from it. halves: that adds
    four products at a time as halves."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    right = right.swapaxes(-1, -2) if what.transposed else right
    sums, sizes = left @ right * what.scale, np.abs(left) @ np.abs(right) * abs(what.scale)
    short = short_sums(sizes, what.inner, what.scale, left, right) if halves else 0.0
    return _ended(what, sums, sizes, what.inner, bias, residual, short)


def convolution(what: Convolution, x: NDArray[Any], weights: NDArray[Any], bias: NDArray[Any] | None = None,
                residual: NDArray[Any] | None = None, choice: Choice | None = None, halves: bool = False
                ) -> tuple[Array, Array]:
    """x: NHWC, weights: OHWI. The result and the bound on errors: larger of Winograd's algorithm and of halves."""
    top, left, bottom, right = what.pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    w = weights.astype(np.float64)
    (height, width), groups, inner = what.out, what.groups, what.channels // what.groups
    sums = np.zeros((what.batch, height, width, what.filters))
    sizes = np.zeros_like(sums)
    each = what.filters // groups
    for ky in range(what.kernel[0]):
        for kx in range(what.kernel[1]):
            y0, x0 = ky * what.dilations[0], kx * what.dilations[1]
            part = padded[:, y0: y0 + (height - 1) * what.strides[0] + 1: what.strides[0],
                          x0: x0 + (width - 1) * what.strides[1] + 1: what.strides[1]]
            for g in range(groups):
                a = part[..., g * inner: (g + 1) * inner]
                b = w[g * each: (g + 1) * each, ky, kx].T
                sums[..., g * each: (g + 1) * each] += a @ b
                sizes[..., g * each: (g + 1) * each] += np.abs(a) @ np.abs(b)
    terms = inner * math.prod(what.kernel)
    if isinstance(choice, Winograd):
        sizes = np.full_like(sizes, _amplified(choice.size) * inner * float(np.abs(padded).max(initial=0))
                             * float(np.abs(w).max(initial=0)))
        terms = inner + 4 * (choice.size + 2)
    short = short_sums(sizes, terms, 1.0, padded, w) if halves else 0.0
    return _ended(what, sums, sizes, terms, bias, residual, short)


def short_sums(sizes: Array, terms: int, scale: float, *operands: Array) -> Array:
    """How much more sums are off by whose products are added up as halves, four at a time or fewer.

    Of `sizes`, the sums of the products' sizes, `_SHORT`: each goes through four roundings at most. And with each of
    `terms` a multiply-add may take a factor for zero (what is lost is at most that times the largest number), and its
    result; what follows rounds that, too. Sizes of four products must add up to less than 65504.
    """
    largest = max(float(np.abs(x).max(initial=0)) for x in operands)
    return _SHORT * sizes + (1 + _SHORT) * terms * abs(scale) * _NORMAL * (1 + largest)


def integer_convolution(what: Convolution, x: NDArray[Any], weights: NDArray[Any], bias: NDArray[Any] | None,
                        zero_in: int, multipliers: Sequence[int], shifts: Sequence[int], zero_out: int,
                        low: int = -128, high: int = 127) -> tuple[Array, Array]:
    """TFLite's bytes, and zeros: nothing else is right. Sums are exact in float64, and wrap."""
    sums, _ = convolution(what, x.astype(np.int64) - zero_in, weights, bias)
    found = requantize.multiply(requantize.wrapped(sums.astype(np.int64)), np.array(multipliers), np.array(shifts))
    return np.clip(found + zero_out, low, high).astype(np.float64), np.zeros(found.shape)


def attention(what: Attention, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], halves: bool = False
              ) -> tuple[Array, Array]:
    """The result and the bound on errors, batch by batch. halves: scores are off by what `short_sums` says,
    exponentials by as much twice (it and their sum); they are rounded to halves and added up with V by fours, where
    each key may count as zero."""
    each = [_attention(what, a.astype(np.float64), b.astype(np.float64), c.astype(np.float64), halves)
            for a, b, c in zip(q, k, v, strict=True)]
    want, bound = (np.stack(x) for x in zip(*each, strict=True))
    if what.number == "float16":
        bound = bound + _HALF * (np.abs(want) + bound) + 2.0 ** -25
    return want, bound


def _attention(what: Attention, q: Array, k: Array, v: Array, halves: bool) -> tuple[Array, Array]:
    """A score is off by n terms' roundings, and so is the largest; exp by 5 units, sums by one a key, twice."""
    scores, sizes = q @ k.T * what.scale, np.abs(q) @ np.abs(k).T * abs(what.scale)
    if what.causal:
        scores = np.where(np.arange(what.keys) <= np.arange(what.queries)[:, None], scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    total = shares.sum(-1, keepdims=True)
    want, size = shares @ v / total, shares @ np.abs(v) / total
    bound = size * (4 * (what.depth + 3) * _UNIT * sizes.max(-1, keepdims=True) + (2 * what.keys + 20) * _UNIT)
    if halves:
        score = short_sums(sizes, what.depth, what.scale, q, k).max(-1, keepdims=True)
        wider = np.exp(2 * score) * (1 + 2.0 ** -10) ** 5
        zero = what.keys * 2.0 ** -14 * (1 + 2 * max(1.0, float(np.abs(v).max()))) / total
        bound = (size + bound) * wider - size + zero * wider
    return want, bound


def integer_attention(what: Attention, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scales: Sequence[float],
                      zeros: Sequence[int], scale_out: float, zero_out: int, steps: int, tile: int = 4
                      ) -> tuple[Array, Array]:
    """The output before it is rounded, but within -128..127, and how far the bytes of a kernel may be from it, the last
    rounding included. steps: of a share of 1. tile: keys, at least, but for the last tile.

    With A = exp(s - M) <= 1, of all a query's keys, a kernel's weight of a key is steps A, but for
      - half a step of its tile's largest, which is no more than half a step; a number below half a step becomes 0;
      - the exponentials that it is a product of, one for each tile and three more: 4e-7 and four roundings each, and
        of their arguments, M - s together, a part of 8 roundings (Vulkan's exp is off by 4 roundings of its argument).
    If weights W have errors E, the mean of values V is off by S E (V - mean) / S (W + E). Sums over tiles are floats.
    """
    (q, k, v), unit = (x.astype(np.int64) - z for x, z in zip((q, k, v), zeros, strict=True)), _UNIT
    scores = (q @ k.swapaxes(-1, -2)) * (scales[0] * scales[1] * what.scale)
    if what.causal:
        scores = np.where(np.arange(what.keys) <= np.arange(what.queries)[:, None], scores, -np.inf)
    below = scores.max(-1, keepdims=True) - scores
    weights = steps * np.exp(-below)
    mean = weights @ v / weights.sum(-1, keepdims=True)
    tiles = -(-what.keys // tile)
    part = (tiles + 3) * (4e-7 + 4 * unit) + 8 * unit * np.where(weights > 0, below, 0)
    errors = np.minimum(0.5, weights) * (1 + part) + weights * part
    apart = np.stack([np.stack([e @ np.abs(v[b] - m) for e, m in zip(errors[b], mean[b], strict=True)])
                      for b in range(len(v))])  # one query at a time: all of them are gigabytes
    off = apart / (weights - errors).sum(-1, keepdims=True) + (4 * tiles + 12) * unit * 255
    gain = scales[2] / scale_out
    return np.clip(mean * gain + zero_out, -128, 127), 0.5 + gain * off + 8 * unit * (255 * gain + 256)


def _amplified(size: int) -> float:
    """How many times the largest |d| |g| the numbers can be whose sum is one output."""
    a, g, b = (np.abs(np.array(m, np.float64)) for m in winograd.matrices(size))
    once = float((a * g.sum(1) * b.sum(1)).sum(1).max())
    return once * once


def _ended(what: Product | Convolution, sums: Array, sizes: Array, terms: int, bias: NDArray[Any] | None,
           residual: NDArray[Any] | None, short: Array | float) -> tuple[Array, Array]:
    """Sums of n terms are within (n + 3) units of the sum of sizes, in any order; a fused multiply-add rounds once.
    short: what sums of few products are off by before they are added, as halves.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, 3.1.
    """
    for more in (bias, residual):
        if more is not None:
            sums, sizes = sums + more, sizes + np.abs(more)
    bound = (terms + 3) * _UNIT * (sizes + short) + short
    result = activated(what.activation, sums, what.slope)
    if what.activation != "none":
        bound = max(_STEEPEST, abs(what.slope)) * bound + 1e-6 * np.maximum(np.abs(sums), np.abs(result))
    if what.number == "float16":
        bound = bound + _HALF * (np.abs(result) + bound) + 2.0 ** -25
    return result, bound + 1e-37
