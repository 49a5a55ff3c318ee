"""Normalization of the input into the convolutions that read it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from npulab.ir import Node
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import Convolution, add, add_pad, attributes, convolution, floats, image, nodes

STEPS = ("Sub", "Add", "Mul", "Div")
Affine = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Scale and shift of each channel."""


def fold(r: Rewrite) -> list[str]:
    """Additions and multiplications of an image with constants, one for all or one a channel, that only convolutions
    read become part of their weights and bias. Padding is zeros of the normalized image: where a convolution pads, the
    scale alone is folded, and what is left of the steps is one Add."""
    done = []
    for n, convs in _normalized(r):
        source, (scale, shift), steps = _chain(r, n)
        padded = any(any(c.pads) for c in convs) and bool(np.any(shift))
        if padded and (steps < 2 or not scale.all()):
            continue
        name = n.name or "normalization"
        if padded:
            source = add(r, n, f"{name}_shift", "Add", (source, r.add_constant(
                f"{name}_by", (shift / scale).astype(np.float32).reshape(1, -1, 1, 1))), like=n.outputs[0])
        for c in convs:
            _fold_into(r, c, source, scale, np.zeros_like(shift) if padded else shift)
        done.append(_told(name, steps, convs) + (", the scale only: one Add stays" if padded else ""))
    return done


def to_pad(r: Rewrite) -> list[str]:
    """Additions and multiplications of an image with constants that come to the same for all channels, before
    convolutions that all pad alike, become part of their weights and bias, and their padding a Pad with the number that
    normalizes to zero."""
    done = []
    for n, convs in _normalized(r):
        source, (scale, shift), steps = _chain(r, n)
        if not scale.all() or len({c.pads for c in convs}) > 1 or not any(convs[0].pads) \
                or np.ptp(shift / scale) > 0 or not shift.any():
            continue
        name = n.name or "normalization"
        data = add_pad(r, n, f"{name}_pad", source, convs[0].pads, fill=-float(shift[0] / scale[0]))
        for c in convs:
            _fold_into(r, c, data, scale, shift)
            changed = r.maker(c.node.outputs[0])
            assert changed is not None
            r.change(changed, attributes={k: v for k, v in attributes(changed).items() if k != "auto_pad"} | {
                "pads": (0, 0, 0, 0)})
        done.append(_told(name, steps, convs) + f", padded with {-shift[0] / scale[0]:.6g} before")
    return done


def _normalized(r: Rewrite) -> Iterator[tuple[Node, list[Convolution]]]:
    """The last of such steps, and the convolutions that read it and nothing else does."""
    for n in nodes(r, *STEPS):
        if _step(r, n) is None or any(_step(r, reader) is not None for reader in r.readers(n.outputs[0])):
            continue
        found = [convolution(r, reader) for reader in r.readers(n.outputs[0])]
        convs = [c for c in found if c is not None and c.data == n.outputs[0]]
        if convs and len(convs) == len(found) and n.outputs[0] not in r.outputs:
            yield n, convs


def _told(name: str, steps: int, convs: list[Convolution]) -> str:
    return f"{name}: {steps} step{'s' if steps > 1 else ''} in {len(convs)} convolution{'s' if len(convs) > 1 else ''}"


def _step(r: Rewrite, n: Node) -> tuple[int, Affine] | None:
    """(what it reads, scale and shift) of an addition or multiplication with a constant."""
    if getattr(n.op, "domain", "x") or n.op.name not in STEPS or len(n.inputs) != 2:
        return None
    for i, data in enumerate(n.inputs):
        constant, shape = floats(r, n.inputs[1 - i]), image(r, data)
        if constant is None or shape is None or constant.ndim > 4 or r.values[data].is_constant:
            continue
        full = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
        if full.shape not in ((1, 1, 1, 1), (1, shape[1], 1, 1)):
            continue
        number = np.broadcast_to(full.reshape(-1), shape[1]).astype(np.float64)
        one, zero = np.ones(shape[1]), np.zeros(shape[1])
        match n.op.name:
            case "Add":
                return data, (one, number)
            case "Mul":
                return data, (number, zero)
            case "Sub":
                return data, (one, -number) if i == 0 else (-one, number)
            case _ if i == 0 and number.all():
                return data, (1 / number, zero)
    return None


def _chain(r: Rewrite, last: Node) -> tuple[int, Affine, int]:
    """(what the first step reads, scale and shift of all, steps) of the steps that end with `last`."""
    found = _step(r, last)
    assert found is not None
    value, (scale, shift), steps = *found, 1
    while (maker := r.maker(value, *STEPS)) is not None and r.only_reader(value) is not None \
            and (before := _step(r, maker)) is not None:
        value, steps = before[0], steps + 1
        scale, shift = scale * before[1][0], shift + scale * before[1][1]
    return value, (scale, shift), steps


def _fold_into(r: Rewrite, c: Convolution, source: int, scale: NDArray[np.float64],
               shift: NDArray[np.float64]) -> None:
    groups, (out_c, depth) = c.groups, c.weights.shape[:2]
    w = c.weights.astype(np.float64).reshape(groups, out_c // groups, depth, *c.kernel)
    scaled = w * scale.reshape(groups, 1, depth, 1, 1)
    extra = np.einsum("goiyx,gi->go", w, shift.reshape(groups, depth)).reshape(-1)
    own = floats(r, c.bias)
    bias = extra + (0 if own is None else own)
    inputs = [source, r.add_constant(f"{c.name}_weights", scaled.reshape(c.weights.shape).astype(np.float32))]
    if own is not None or extra.any():
        inputs.append(r.add_constant(f"{c.name}_bias", bias.astype(np.float32)))
    r.change(c.node, inputs=inputs, attributes=attributes(c.node))


PASS = Pass("fold-normalization", fold)
PAD = Pass("normalization-to-pad", to_pad, always=False)
