"""RepVGG: Making VGG-style ConvNets Great Again (Ding et al., arXiv:2101.03697), as A2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.zoo.builder import Net

EPSILON = 1e-5
WIDTHS = (64, 96, 192, 384, 1408)
"""Table 2 and A2's multipliers a = 1.5, b = 2.75: min(64, 64 a), 64 a, 128 a, 256 a, 512 b."""
DEPTHS = (1, 2, 4, 14, 1)
BRANCH_SCALE = {3: 0.95, 1: 0.95, 0: 0.2}
"""Of the 3x3, the 1x1 and the identity branch. What passes by identity is positive and not halved by the ReLU: its part
is small, or 22 blocks would let the signal grow."""
BIAS = 0.1

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """scale * (x - mean) / sqrt(variance + EPSILON) + shift, a channel."""

    scale: Floats
    shift: Floats
    mean: Floats
    variance: Floats


@dataclass(frozen=True, slots=True)
class Branch:
    """A convolution without bias, or the identity where `weights` is None, then a batch normalization."""

    weights: Floats | None
    norm: BatchNorm


def repvgg_a2(net: Net, size: int, classes: int) -> None:
    """As it is deployed: one convolution with bias and ReLU a block, equal to the branches of the same seed."""
    _network(net, size, classes, train=False)


def repvgg_a2_train(net: Net, size: int, classes: int) -> None:
    """As it trains: a 3x3 and a 1x1 branch a block, and the identity where the shape stays."""
    _network(net, size, classes, train=True)


def fuse(branches: tuple[Branch, ...], channels: int) -> tuple[Floats, Floats]:
    """(weights O,I,3,3; bias O) of the one convolution that equals the sum of the branches: section 3.3 of the paper.

    `channels`: of the input, for the identity.
    """
    weights, bias = np.zeros(1), np.zeros(1)
    for b in branches:
        kernel = np.eye(channels)[:, :, None, None] if b.weights is None else b.weights.astype(np.float64)
        border = (3 - kernel.shape[2]) // 2
        kernel = np.pad(kernel, ((0, 0), (0, 0), (border, border), (border, border)))
        slope = b.norm.scale / np.sqrt(b.norm.variance.astype(np.float64) + EPSILON)
        weights = weights + kernel * slope[:, None, None, None]
        bias = bias + b.norm.shift - b.norm.mean * slope
    return weights.astype(np.float32), bias.astype(np.float32)


def _network(net: Net, size: int, classes: int, train: bool) -> None:
    x = net.input("input", 1, 3, size, size)
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        for i in range(depth):
            stride, name = (1 if i else 2), f"stage{stage}/{i}"
            branches = _draw(net, net.shapes[x][1], width, stride)
            y = _branches(net, x, branches, stride, name) if train else net.conv_of(
                x, *fuse(branches, net.shapes[x][1]), stride, 1, 1, f"{name}/conv")
            x = net.node("Relu", [y], net.shapes[y], f"{name}/relu")
    x = net.flatten(net.global_pool(x, name="pool"), name="flatten")
    net.output(net.linear(x, classes, name="classifier"), "output")


def _draw(net: Net, channels: int, out: int, stride: int) -> tuple[Branch, ...]:
    sizes = (3, 1, 0) if channels == out and stride == 1 else (3, 1)
    return tuple(Branch(net.normal((out, channels, k, k), (channels * k * k)**-0.5) if k else None,
                        _draw_norm(net, out, BRANCH_SCALE[k])) for k in sizes)


def _draw_norm(net: Net, channels: int, scale: float) -> BatchNorm:
    return BatchNorm(net.normal((channels,), 0.1 * scale, scale), net.normal((channels,), BIAS),
                     net.normal((channels,), BIAS), 0.75 + 0.5 * net.rng.random(channels, np.float32))


def _branches(net: Net, x: str, branches: tuple[Branch, ...], stride: int, name: str) -> str:
    total = ""
    for b in branches:
        branch = f"{name}/identity" if b.weights is None else f"{name}/{b.weights.shape[2]}x{b.weights.shape[2]}"
        y = x if b.weights is None else net.conv_of(x, b.weights, None, stride, 1, b.weights.shape[2] // 2,
                                                    f"{branch}/conv")
        parts = {"scale": b.norm.scale, "shift": b.norm.shift, "mean": b.norm.mean, "variance": b.norm.variance}
        y = net.node("BatchNormalization", [y, *(net.constant(f"{branch}/norm.{k}", v) for k, v in parts.items())],
                     net.shapes[y], f"{branch}/norm", epsilon=EPSILON)
        total = net.add(total, y, name=f"{branch}/add") if total else y
    return total
