"""Resize by whole factors, and by any, as operators that more chips have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.ir import Node
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import (
    Pair,
    add,
    add_blocks,
    add_concat,
    add_conv,
    add_pad,
    add_reshape,
    attributes,
    floats,
    image,
    is_float,
    nodes,
    opset,
    text,
)

MATRIX_MAX = 1 << 22
"""Elements of an interpolation matrix."""
FACTOR_MAX = 16
"""Of an upscaling that becomes weights or copies."""


@dataclass(frozen=True, slots=True)
class Resize:
    """A Resize of height and width of a float32 image. `matrices` give each output row (column) from the input's."""

    node: Node
    name: str
    linear: bool
    asymmetric: bool
    shape: tuple[int, int, int, int]
    out: Pair
    matrices: tuple[NDArray[np.float64], NDArray[np.float64]]

    @property
    def factor(self) -> Pair | None:
        """Of rows and columns, if both are whole."""
        (h, w), out = self.shape[2:], self.out
        return (out[0] // h, out[1] // w) if out[0] % h == 0 and out[1] % w == 0 else None

    def repeats(self) -> Pair | None:
        """The factor, where each pixel becomes a block of itself, of at most 16 by 16."""
        f = self.factor
        if f is None or self.linear:
            return None
        if max(f) > FACTOR_MAX:
            return None
        alike = all(np.array_equal(m, np.repeat(np.eye(m.shape[1]), k, axis=0))
                    for m, k in zip(self.matrices, f, strict=True))
        return f if alike else None

    def phases(self) -> tuple[int, NDArray[np.float64]] | None:
        """(factor, weights [phase, row above, own, below]) of linear interpolation that is the same for every block
        over the image with its outermost rows and columns once more. None where it is not (align_corners)."""
        f = self.factor
        if f is None or f[0] != f[1] or not 2 <= f[0] <= FACTOR_MAX or not self.linear:
            return None
        weights = None
        for m in self.matrices:
            size = m.shape[1]
            own = np.zeros((f[0], 3))
            steps = np.arange(f[0])
            where = steps / f[0] if self.asymmetric else (steps + 0.5) / f[0] - 0.5
            for p in range(f[0]):
                low = int(np.floor(where[p]))
                own[p, low + 1] += 1 - (where[p] - low)
                if low + 2 < 3:
                    own[p, low + 2] += where[p] - low
            wide = np.zeros((size * f[0], size))
            for y in range(size * f[0]):
                for k in range(3):
                    wide[y, min(max(y // f[0] + k - 1, 0), size - 1)] += own[y % f[0], k]
            if not np.allclose(wide, m, atol=1e-7):
                return None
            weights = own
        return (f[0], weights) if weights is not None else None


def resize(r: Rewrite, n: Node) -> Resize | None:
    """The node as a Resize of fixed sizes, nearest or linear; None for others."""
    shape, out = image(r, n.inputs[0]), image(r, n.outputs[0])
    a = attributes(n)
    mode = text(n, "mode", "nearest")
    if shape is None or out is None or shape[:2] != out[:2] or mode not in ("nearest", "linear") \
            or not is_float(r, n.inputs[0]) or a.get("antialias") or a.get("axes") is not None \
            or text(n, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    upsample = n.op.name == "Upsample" or (opset(r) < 11)
    coordinates = "asymmetric" if upsample else text(n, "coordinate_transformation_mode", "half_pixel")
    nearest = "floor" if upsample else text(n, "nearest_mode", "round_prefer_floor")
    scales = floats(r, n.inputs[-1 if upsample else 2]) if len(n.inputs) > (1 if upsample else 2) else None
    if upsample and scales is None and "scales" in a:
        scales = np.array(a["scales"], np.float32)  # opset 7
    if scales is not None and scales.shape != (4,):
        scales = None
    found = []
    for i in (2, 3):
        scale = float(scales[i]) if scales is not None else out[i] / shape[i]
        m = matrix(shape[i], out[i], scale, coordinates, mode == "linear", nearest)
        if m is None:
            return None
        found.append(m)
    return Resize(n, n.name or "resize", mode == "linear", coordinates == "asymmetric", shape, out[2:],
                  (found[0], found[1]))


def matrix(size: int, out: int, scale: float, coordinates: str, linear: bool,
           nearest: str) -> NDArray[np.float64] | None:
    """[out, size]: what each result takes of each input, by the formulas of ONNX's Resize."""
    if size * out > MATRIX_MAX:
        return None
    y = np.arange(out, dtype=np.float64)
    match coordinates:
        case "half_pixel":
            x = (y + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            x = (y + 0.5) / scale - 0.5 if out > 1 else y * 0
        case "asymmetric":
            x = y / scale
        case "align_corners":
            x = y * (size - 1) / (out - 1) if out > 1 else y * 0
        case _:
            return None
    m = np.zeros((out, size))
    rows = np.arange(out)
    if linear:
        x = np.clip(x, 0, size - 1)
        low = np.floor(x).astype(int)
        high = np.minimum(low + 1, size - 1)
        np.add.at(m, (rows, low), 1 - (x - low))
        np.add.at(m, (rows, high), x - low)
        return m
    match nearest:
        case "round_prefer_floor":
            at = np.ceil(x - 0.5)
        case "round_prefer_ceil":
            at = np.floor(x + 0.5)
        case "floor":
            at = np.floor(x)
        case "ceil":
            at = np.ceil(x)
        case _:
            return None
    m[rows, np.clip(at, 0, size - 1).astype(int)] = 1
    return m


def to_transposed(r: Rewrite) -> list[str]:
    """A Resize by a whole factor, nearest or linear, is a depthwise transposed convolution with that stride: with ones
    (3x3, one row and column of them zeros, for a factor of 2), or with the weights of linear interpolation over the
    image with its outermost rows and columns once more. Not for align_corners, whose weights differ from place to
    place."""
    done = []
    for n in nodes(r, "Resize", "Upsample"):
        z = resize(r, n)
        if z is None:
            continue
        channels, f, linear = z.shape[1], z.repeats(), z.phases()
        data = n.inputs[0]
        a: dict[str, Any] = {"group": channels}
        if f is not None and max(f) > 1:
            kernel = np.ones(f, np.float32)
            if f == (2, 2):
                kernel = np.pad(kernel, ((1, 0), (1, 0)))
                a |= {"pads": (1, 1, 1, 1), "output_padding": (1, 1)}
            a["strides"] = f
        elif linear is not None:
            s, weights = linear
            data = add_pad(r, n, f"{z.name}_edge", data, (1, 1, 1, 1), "edge")
            line = weights[:, ::-1].T.reshape(-1)  # the tap of row q + u for phase p is p + s (1 - u), u = -1, 0, 1
            kernel = np.outer(line, line).astype(np.float32)
            a |= {"strides": (s, s), "pads": (2 * s,) * 4}
        else:
            continue
        a["kernel_shape"] = kernel.shape
        wide = np.broadcast_to(kernel, (channels, 1, *kernel.shape))
        r.substitute(n.outputs[0], add(r, n, z.name, "ConvTranspose", (
            data, r.add_constant(f"{z.name}_weights", wide)), a, shape=(*z.shape[:2], *z.out)))
        done.append(f"{z.name}: a depthwise transposed convolution of {kernel.shape[0]}x{kernel.shape[1]}")
    return done


def to_depth(r: Rewrite) -> list[str]:
    """A Resize by a whole factor, the same both ways, is DepthToSpace: of the image joined to itself for each pixel of
    a block where it is nearest; of a depthwise 3x3 convolution over the image with its outermost rows and columns once
    more where it is linear. Not for align_corners."""
    done = []
    for n in nodes(r, "Resize", "Upsample"):
        z = resize(r, n)
        if z is None:
            continue
        f, linear = z.repeats(), z.phases()
        if f is not None and f[0] == f[1] > 1:
            data = add_concat(r, n, f"{z.name}_copies", [n.inputs[0]] * (f[0] * f[0]), 1)
            r.substitute(n.outputs[0], add_blocks(r, n, z.name, data, f[0], to_space=True))
            done.append(f"{z.name}: {f[0] * f[0]} copies as channels, then pixels")
        elif linear is not None and opset(r) >= 11:
            s, weights = linear
            channels = z.shape[1]
            data = add_pad(r, n, f"{z.name}_edge", n.inputs[0], (1, 1, 1, 1), "edge")
            kernels = np.einsum("py,qx->pqyx", weights, weights).reshape(s * s, 1, 3, 3).astype(np.float32)
            data = add_conv(r, n, z.name, data, np.tile(kernels, (channels, 1, 1, 1)), groups=channels)
            r.substitute(n.outputs[0], add_blocks(r, n, f"{z.name}_pixels", data, s, to_space=True, by_channel=True))
            done.append(f"{z.name}: a depthwise convolution with {s * s} times the channels, then pixels")
    return done


def to_expand(r: Rewrite) -> list[str]:
    """A Resize to the nearest that repeats every pixel is a Reshape to six axes, an Expand and a Reshape."""
    done = []
    for n in nodes(r, "Resize", "Upsample"):
        z = resize(r, n)
        f = z.repeats() if z is not None else None
        if z is None or f is None:
            continue
        count, c, h, w = z.shape
        value = add_reshape(r, n, f"{z.name}_six", n.inputs[0], (count, c, h, 1, w, 1))
        wide = (count, c, h, f[0], w, f[1])
        value = add(r, n, f"{z.name}_repeat", "Expand", (value, r.add_constant(
            f"{z.name}_to", np.array(wide, np.int64))), shape=wide)
        r.substitute(n.outputs[0], add_reshape(r, n, f"{z.name}_four", value, (count, c, *z.out)))
        done.append(f"{z.name}: Reshape, Expand, Reshape")
    return done


def to_matmul(r: Rewrite) -> list[str]:
    """A Resize of height and width by any factor, nearest or linear, align_corners among them, is a multiplication with
    a constant matrix from the left and one from the right."""
    done = []
    for n in nodes(r, "Resize", "Upsample"):
        z = resize(r, n)
        if z is None:
            continue
        left, right = (m.astype(np.float32) for m in z.matrices)
        value = n.inputs[0]
        if z.out[1] != z.shape[3] or not np.array_equal(right, np.eye(len(right))):
            value = add(r, n, f"{z.name}_columns", "MatMul", (value, r.add_constant(
                f"{z.name}_right", np.ascontiguousarray(right.T))), shape=(*z.shape[:3], z.out[1]))
        value = add(r, n, f"{z.name}_rows", "MatMul", (r.add_constant(f"{z.name}_left", left), value), like=value,
                      shape=(*z.shape[:2], *z.out))
        r.substitute(n.outputs[0], value)
        done.append(f"{z.name}: from {z.shape[2]}x{z.shape[3]} to {z.out[0]}x{z.out[1]} by matrices")
    return done


TRANSPOSED = Pass("resize-to-transposed", to_transposed, always=False)
DEPTH = Pass("resize-to-depth", to_depth, always=False)
EXPAND = Pass("resize-to-expand", to_expand, always=False)
MATMUL = Pass("resize-to-matmul", to_matmul, always=False)
