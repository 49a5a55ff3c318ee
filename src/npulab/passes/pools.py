"""Pools as other pools, as means and as convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import (
    Pads,
    Pair,
    add,
    add_conv,
    add_reshape,
    attributes,
    image,
    integers,
    is_float,
    nodes,
    opset,
    whole,
    window,
)

KERNEL_MAX = 64
"""Rows and columns of a convolution that averages."""
CHAIN_MAX = 32
"""Pools in a row."""


def floor(r: Rewrite) -> list[str]:
    """A max-pool that rounds its output size up is one that rounds down, with as much more padding below and right as
    its last windows stand out. One whose last window lies in padding alone stays: runtimes disagree about its size."""
    done = []
    for n in nodes(r, "MaxPool"):
        a, result = attributes(n), image(r, n.outputs[0])
        kernel = _kernel(n)
        found = window(r, n, kernel, ceil=True) if a.get("ceil_mode") and kernel and result else None
        if kernel is None or found is None or result is None:
            continue
        strides, dilations, pads, size, _ = found
        out = result[2:]
        behind = [max((out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size[i] - pads[i], pads[i + 2])
                  for i in (0, 1)]
        if any(b > (k - 1) * d for b, k, d in zip(behind, kernel, dilations, strict=True)) \
                or any((size[i] + pads[i] + behind[i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 != out[i]
                       for i in (0, 1)):
            continue
        r.change(n, attributes={k: v for k, v in a.items() if k not in ("ceil_mode", "auto_pad")} | {
            "pads": (pads[0], pads[1], behind[0], behind[1])})
        done.append(f"{n.name or 'MaxPool'}: rounded down, padded by {behind[0]} below and {behind[1]} right")
    return done


def pairs(r: Rewrite) -> list[str]:
    """A square max-pool of 3x3 or larger with stride 1 or 2 is a chain of 2x2 ones, of stride 1 but for the last:
    the largest of k numbers in a row is the largest of two in a row k - 1 times over."""
    done = []
    for n in nodes(r, "MaxPool"):
        kernel = _kernel(n)
        if not kernel or kernel[0] != kernel[1] or not 3 <= kernel[0] <= CHAIN_MAX or len(n.outputs) != 1 \
                or attributes(n).get("ceil_mode"):
            continue
        found = window(r, n, kernel)
        if found is None or found[1] != (1, 1) or found[0] not in ((1, 1), (2, 2)) or max(found[2]) >= kernel[0]:
            continue
        strides, _, pads, _, _ = found
        name, value, count = n.name or "max_pool", n.inputs[0], kernel[0] - 1
        for i in range(count):
            stage = {"kernel_shape": (2, 2), "strides": strides if i == count - 1 else (1, 1),
                     "pads": tuple(int(i < p) for p in pads)}
            if i == count - 1:
                r.change(n, inputs=(value,), attributes=stage)
            else:
                value = add(r, n, f"{name}_{i + 1}", "MaxPool", (value,), stage, shape=_pooled(r, value, stage))
        done.append(f"{name}: {kernel[0]}x{kernel[0]} is {count} of 2x2")
    return done


def _pooled(r: Rewrite, value: int, a: dict[str, Any]) -> tuple[int, ...]:
    n, c, *size = r.values[value].shape
    return (n, c, *((m + a["pads"][i] + a["pads"][i + 2] - a["kernel_shape"][i]) // a["strides"][i] + 1
                    for i, m in enumerate(size)))


def to_average(r: Rewrite) -> list[str]:
    """GlobalAveragePool is AveragePool with a window as large as the image."""
    done = []
    for n in nodes(r, "GlobalAveragePool"):
        shape = image(r, n.inputs[0])
        if shape is None:
            continue
        r.change(n, op="AveragePool", attributes={"kernel_shape": shape[2:], "strides": (1, 1)})
        done.append(f"{n.name or 'pool'}: AveragePool of {shape[2]}x{shape[3]}")
    return done


def to_global(r: Rewrite) -> list[str]:
    """The mean over height and width, and an AveragePool with a window as large as the image, are GlobalAveragePool."""
    done = []
    for n in nodes(r, "ReduceMean", "AveragePool"):
        shape, name = image(r, n.inputs[0]), n.name or "mean"
        if shape is None or not _whole(r, n, shape[2:]):
            continue
        keep = n.op.name == "AveragePool" or attributes(n).get("keepdims", 1)
        if keep:
            r.change(n, op="GlobalAveragePool", inputs=n.inputs[:1], attributes={})
        else:
            value = add(r, n, name, "GlobalAveragePool", n.inputs[:1], shape=(*shape[:2], 1, 1))
            r.substitute(n.outputs[0], add_reshape(r, n, f"{name}_two", value, shape[:2]))
        done.append(f"{name}: GlobalAveragePool")
    return done


def to_mean(r: Rewrite) -> list[str]:
    """GlobalAveragePool, and AveragePool with a window as large as the image, are the mean over height and width.
    Only by name: it is the same work, and a board's limits hold for it under either name."""
    done = []
    for n in nodes(r, "GlobalAveragePool", "AveragePool"):
        shape = image(r, n.inputs[0])
        if r.off is not None or shape is None or not _whole(r, n, shape[2:]):
            continue
        if opset(r) >= 18:
            r.change(n, op="ReduceMean", attributes={"keepdims": 1},
                     inputs=(n.inputs[0], integers(r, f"{n.name or 'mean'}_axes", (2, 3))))
        else:
            r.change(n, op="ReduceMean", attributes={"axes": (2, 3), "keepdims": 1})
        done.append(f"{n.name or 'pool'}: the mean over {shape[2]}x{shape[3]}")
    return done


def _whole(r: Rewrite, n: Node, size: Pair) -> bool:
    """Whether the node averages all rows and columns."""
    if n.op.name == "GlobalAveragePool":
        return True
    if n.op.name == "AveragePool":
        found = window(r, n, size) if _kernel(n) == size else None
        return found is not None and found[4] == (1, 1) and found[1] == (1, 1) and not any(found[2])
    if len(n.inputs) > 1:
        given = r.constant(n.inputs[1])
        return given is not None and given.size == 2 and sorted(int(v) % 4 for v in given.reshape(-1)) == [2, 3]
    return sorted(v % 4 for v in whole(n, "axes")) == [2, 3]


def _kernel(n: Node) -> Pair | None:
    """(height, width) of a pool's window, if it has these two."""
    found = whole(n, "kernel_shape")
    return (found[0], found[1]) if len(found) == 2 else None


def chain(r: Rewrite) -> list[str]:
    """The average over an image of more than NUMBER (7) rows or columns, of which both divide into factors of at most
    NUMBER, is a chain of averages over blocks as large as the factors."""
    done = []
    limit = max(r.number or 7, 2)
    for n in nodes(r, "GlobalAveragePool", "AveragePool", "ReduceMean"):
        shape = image(r, n.inputs[0])
        if shape is None or max(shape[2:]) <= limit or not _whole(r, n, shape[2:]) \
                or (n.op.name == "ReduceMean" and not attributes(n).get("keepdims", 1)):
            continue
        rows, columns = (_factors(m, limit) for m in shape[2:])
        if rows is None or columns is None:
            continue
        steps = max(len(rows), len(columns))
        sides = [(a[i] if i < len(a) else 1) for a in (rows, columns) for i in range(steps)]
        value, name = n.inputs[0], n.name or "average"
        for block in zip(sides[:steps], sides[steps:], strict=True):
            a = {"kernel_shape": block, "strides": block, "pads": (0, 0, 0, 0)}
            value = add(r, n, f"{name}_part", "AveragePool", (value,), a, shape=_pooled(r, value, a))
        r.substitute(n.outputs[0], value)
        done.append(f"{name}: {shape[2]}x{shape[3]} in {steps} steps")
    return done


def _factors(number: int, limit: int) -> list[int] | None:
    """Factors of at most `limit`, large ones first; None if there are none."""
    found = []
    while number > 1:
        factor = next((f for f in range(limit, 1, -1) if number % f == 0), 0)
        if not factor:
            return None
        found.append(factor)
        number //= factor
    return found


def to_convolution(r: Rewrite) -> list[str]:
    """The average over an image of at most 64x64, or an AveragePool that counts its padding, is a depthwise convolution
    whose weights are all one over the size of the window."""
    done = []
    for n in nodes(r, "GlobalAveragePool", "AveragePool", "ReduceMean"):
        shape, a = image(r, n.inputs[0]), attributes(n)
        if shape is None or not is_float(r, n.inputs[0]):
            continue
        strides, pads = (1, 1), (0, 0, 0, 0)
        if _whole(r, n, shape[2:]):
            kernel = shape[2:]
            if n.op.name == "ReduceMean" and not a.get("keepdims", 1):
                continue
        elif n.op.name == "AveragePool":
            small = _kernel(n)
            found = window(r, n, small) if small and not a.get("ceil_mode") else None
            if small is None or found is None or found[1] != (1, 1) \
                    or (any(found[2]) and not a.get("count_include_pad")):
                continue
            kernel, strides, pads = small, found[0], found[2]
        else:
            continue
        if max(kernel) > KERNEL_MAX:
            continue
        r.substitute(n.outputs[0], _averaging(r, n, shape[1], kernel, strides, pads))
        done.append(f"{n.name or 'pool'}: a depthwise convolution of {kernel[0]}x{kernel[1]}")
    return done


def _averaging(r: Rewrite, n: Node, channels: int, kernel: Pair, strides: Pair, pads: Pads) -> int:
    weights = np.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]), np.float32)
    return add_conv(r, n, n.name or "average", n.inputs[0], weights, strides=strides, pads=pads, groups=channels)


FLOOR = Pass("pool-floor", floor)
PAIRS = Pass("pool-pairs", pairs, always=False)
AVERAGE = Pass("global-pool-to-average", to_average, always=False)
GLOBAL = Pass("average-to-global-pool", to_global, always=False)
MEAN = Pass("average-to-mean", to_mean, always=False)
CHAIN = Pass("average-chain", chain, always=False, number=7)
CONVOLUTION = Pass("average-to-convolution", to_convolution, always=False)
