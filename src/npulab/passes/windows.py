"""What passes on convolutions share: reading one, and writing convolutions, slices, pads and joins of any opset."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.ir import DType, Node, Value
from npulab.ir.ops import OnnxOp, captures
from npulab.passes.rewrite import Rewrite

WEIGHTS_MAX = 1 << 26
"""Elements of weights that a pass makes at most: a bound on memory for hostile files."""
Pads = tuple[int, int, int, int]
"""Rows above, columns left, rows below, columns right, as ONNX orders them."""
Pair = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """A 2-D Conv of float32 with constant weights O,I/groups,ky,kx over an image of fixed size.

    `channels` and `size` are those of the image, `out` the size of the result. `bias` is -1 if absent.
    """

    node: Node
    name: str
    weights: NDArray[np.float32]
    bias: int
    strides: Pair
    dilations: Pair
    pads: Pads
    groups: int
    batch: int
    channels: int
    size: Pair
    out: Pair

    @property
    def data(self) -> int:
        return self.node.inputs[0]

    @property
    def kernel(self) -> Pair:
        return self.weights.shape[2], self.weights.shape[3]

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels > 1

    @property
    def reach(self) -> Pair:
        """Rows and columns that the dilated kernel spans."""
        (ky, kx), (dy, dx) = self.kernel, self.dilations
        return (ky - 1) * dy + 1, (kx - 1) * dx + 1

    @property
    def large(self) -> bool:
        """Whether the dense kernel is too large to be written out."""
        return bool(self.weights.shape[0] * self.weights.shape[1] * self.reach[0] * self.reach[1] > WEIGHTS_MAX)

    def dense(self) -> NDArray[np.float32]:
        """The weights with the zeros that dilation stands for."""
        if self.dilations == (1, 1):
            return self.weights
        out = np.zeros((*self.weights.shape[:2], *self.reach), np.float32)
        out[:, :, :: self.dilations[0], :: self.dilations[1]] = self.weights
        return out


def nodes(r: Rewrite, *names: str) -> Iterator[Node]:
    """The source graph's nodes of these names that the pass should touch, as they are when their turn comes."""
    inside = captured(r)
    for i in range(len(r.source.nodes)):
        n = r.nodes[i]
        if n.op.name in names and isinstance(n.op, OnnxOp) and not n.op.domain and n.inputs and n.outputs \
                and n.inputs[0] >= 0 and min(n.outputs) >= 0 and inside.isdisjoint(n.outputs):
            n = replace(n, index=i)
            if r.wanted(n):
                yield n


def captured(r: Rewrite) -> set[int]:
    """Values that bodies of If and Loop read: they cannot be replaced."""
    return {v for n in r.nodes for v in captures(n.op)}


def attributes(n: Node) -> dict[str, Any]:
    assert isinstance(n.op, OnnxOp)
    return dict(n.op.attributes)


def whole(n: Node, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """An attribute of whole numbers; () if it is something else."""
    found: Any = attributes(n).get(name, default)
    return found if isinstance(found, tuple) and all(type(v) is int for v in found) else ()


def number(n: Node, name: str, default: int) -> int:
    """An attribute that is a whole number; -1 if it is something else."""
    found = attributes(n).get(name, default)
    return found if isinstance(found, int) else -1


def text(n: Node, name: str, default: str) -> str:
    found = attributes(n).get(name, default)
    return found.decode("ascii", "replace") if isinstance(found, bytes) else str(found)


def image(r: Rewrite, value: int) -> tuple[int, int, int, int] | None:
    """N, C, H, W of a tensor of four fixed sizes; None for others."""
    v = r.values[value] if value >= 0 else None
    if v is None or not v.has_shape or v.dynamic_axes or len(v.shape) != 4 or min(v.shape) < 1:
        return None
    n, c, h, w = v.shape
    return n, c, h, w


def floats(r: Rewrite, value: int) -> NDArray[np.float32] | None:
    """A constant's content if that is float32."""
    found = r.constant(value)
    return found.astype(np.float32, copy=False) if found is not None and found.dtype == np.float32 else None


def window(r: Rewrite, n: Node, kernel: Pair, *, ceil: bool = False) -> tuple[Pair, Pair, Pads, Pair, Pair] | None:
    """(strides, dilations, pads written out, size, size of the result) of a Conv or pool; None if it is unclear."""
    shape = image(r, n.inputs[0])
    if shape is None or len(kernel) != 2 or min(kernel) < 1:
        return None
    strides, dilations = (whole(n, k, (1, 1)) for k in ("strides", "dilations"))
    if len(strides) != 2 or len(dilations) != 2 or min(*strides, *dilations) < 1:
        return None
    size = shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto = text(n, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max((-(-m // s) - 1) * s + k - m, 0) for m, s, k in zip(size, strides, reach, strict=True)]
        first = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in totals]
        pads = (*first, *(t - f for t, f in zip(totals, first, strict=True)))
    elif auto in ("NOTSET", "VALID"):
        pads = whole(n, "pads", (0, 0, 0, 0)) if auto == "NOTSET" else (0, 0, 0, 0)
    else:
        return None
    if len(pads) != 4 or min(pads) < 0:
        return None
    out = []
    for i in (0, 1):
        room = size[i] + pads[i] + pads[i + 2] - reach[i]
        if room < 0:
            return None
        steps = -(-room // strides[i]) if ceil else room // strides[i]
        if ceil and steps * strides[i] >= size[i] + pads[i]:  # a window that would lie in the padding only
            steps -= 1
        out.append(steps + 1)
    return (strides[0], strides[1]), (dilations[0], dilations[1]), pads, size, (out[0], out[1])


def convolution(r: Rewrite, n: Node | None) -> Convolution | None:
    """The node as a Convolution, or None if it is none."""
    if n is None or not isinstance(n.op, OnnxOp) or n.op.domain or n.op.name != "Conv" or len(n.inputs) < 2 \
            or min(n.inputs[:2]) < 0 or len(n.outputs) != 1:
        return None
    weights, shape = floats(r, n.inputs[1]), image(r, n.inputs[0])
    bias = n.inputs[2] if len(n.inputs) > 2 else -1
    groups = number(n, "group", 1)
    if weights is None or weights.ndim != 4 or not weights.size or shape is None \
            or (bias >= 0 and floats(r, bias) is None) or groups < 1 or weights.shape[1] * groups != shape[1] \
            or weights.shape[0] % groups:
        return None
    found = window(r, n, (weights.shape[2], weights.shape[3]))
    if found is None:
        return None
    strides, dilations, pads, size, out = found
    return Convolution(n, n.name or "conv", weights, bias, strides, dilations, pads, groups, shape[0], shape[1], size,
                       out)


_NAMES: weakref.WeakKeyDictionary[Rewrite, set[str]] = weakref.WeakKeyDictionary()


def add(r: Rewrite, before: Node, name: str, op: str, inputs: Sequence[int],
             attributes: Mapping[str, object] | None = None, like: int | None = None,
             shape: tuple[int, ...] | None = None) -> int:
    """`Rewrite.add` under a name that no node has: what an earlier round added may be called alike."""
    taken = _NAMES.setdefault(r, set())
    if not taken:
        taken.update(n.name for n in r.nodes)
    own, k = name, 1
    while own in taken:
        k += 1
        own = f"{name}_{k}"
    out = r.add(before, own, op, inputs, attributes, like, shape)
    taken.add(r.nodes[-1].name)
    return out


def add_conv(r: Rewrite, before: Node, name: str, data: int, weights: NDArray[np.float32], bias: int = -1, *,
             strides: Pair = (1, 1), dilations: Pair = (1, 1), pads: Pads = (0, 0, 0, 0), groups: int = 1) -> int:
    """A new Conv in front of `before`; gives its output."""
    n, _, h, w = r.values[data].shape
    ky, kx = weights.shape[2:]
    out = ((h + pads[0] + pads[2] - (ky - 1) * dilations[0] - 1) // strides[0] + 1,
           (w + pads[1] + pads[3] - (kx - 1) * dilations[1] - 1) // strides[1] + 1)
    inputs = [data, r.add_constant(f"{name}_weights", weights.astype(np.float32)), *([bias] if bias >= 0 else [])]
    return add(r, before, name, "Conv", inputs, {
        "kernel_shape": (ky, kx), "strides": strides, "dilations": dilations, "pads": pads, "group": groups,
    }, shape=(n, weights.shape[0], *out))


def change_conv(r: Rewrite, c: Convolution, weights: NDArray[np.float32], *, data: int | None = None,
                bias: int | None = None, strides: Pair | None = None, dilations: Pair = (1, 1),
                pads: Pads | None = None, groups: int | None = None) -> None:
    """The node with other weights, and what else is given."""
    a = {k: v for k, v in attributes(c.node).items() if k != "auto_pad"} | {
        "kernel_shape": tuple(weights.shape[2:]), "dilations": dilations, "strides": strides or c.strides,
        "pads": c.pads if pads is None else pads, "group": c.groups if groups is None else groups}
    own = c.bias if bias is None else bias
    r.change(c.node, attributes=a, inputs=(
        c.data if data is None else data, r.add_constant(f"{c.name}_weights", weights.astype(np.float32)),
        *([own] if own >= 0 else [])))


def opset(r: Rewrite) -> int:
    """The version of ONNX's own operators."""
    assert r.source.header is not None
    return max((v for domain, v in r.source.header.opsets if domain in ("", "ai.onnx")), default=1)


def integers(r: Rewrite, name: str, numbers: Sequence[int]) -> int:
    return r.add_constant(name, np.array(numbers, np.int64))


def add_slice(r: Rewrite, before: Node, name: str, value: int, axes: Sequence[int], starts: Sequence[int],
              ends: Sequence[int], steps: Sequence[int] | None = None) -> int:
    """Part of a tensor of fixed size; steps need opset 10."""
    shape = list(r.values[value].shape)
    for k, (axis, start, end) in enumerate(zip(axes, starts, ends, strict=True)):
        shape[axis] = len(range(shape[axis])[start : end : steps[k] if steps else 1])
    if opset(r) < 10:
        return add(r, before, name, "Slice", (value,), {"axes": tuple(axes), "starts": tuple(starts),
                                                       "ends": tuple(ends)}, shape=tuple(shape))
    inputs = [value, integers(r, f"{name}_starts", starts), integers(r, f"{name}_ends", ends),
              integers(r, f"{name}_axes", axes)]
    if steps:
        inputs.append(integers(r, f"{name}_steps", steps))
    return add(r, before, name, "Slice", inputs, shape=tuple(shape))


def add_pad(r: Rewrite, before: Node, name: str, value: int, pads: Pads, mode: str = "constant",
            fill: float = 0.0) -> int:
    """Rows and columns around an image: of `fill`, or with `mode` "edge" the outermost ones again."""
    n, c, h, w = r.values[value].shape
    all_axes = (0, 0, pads[0], pads[1], 0, 0, pads[2], pads[3])
    shape = (n, c, h + pads[0] + pads[2], w + pads[1] + pads[3])
    if opset(r) < 11:
        return add(r, before, name, "Pad", (value,), {"pads": all_axes, "mode": mode, "value": fill},
                   shape=shape)
    inputs = [value, integers(r, f"{name}_pads", all_axes)]
    if fill:
        inputs.append(r.add_constant(f"{name}_fill", np.array(fill, np.float32)))
    return add(r, before, name, "Pad", inputs, {"mode": mode}, shape=shape)


def add_concat(r: Rewrite, before: Node, name: str, values: Sequence[int], axis: int) -> int:
    shape = list(r.values[values[0]].shape)
    shape[axis] = sum(r.values[v].shape[axis] for v in values)
    return add(r, before, name, "Concat", values, {"axis": axis}, shape=tuple(shape))


def add_sum(r: Rewrite, before: Node, name: str, values: Sequence[int]) -> int:
    """Additions of two at a time: few chips take Sum."""
    total = values[0]
    for i, v in enumerate(values[1:]):
        total = add(r, before, f"{name}_add_{i}" if len(values) > 2 else f"{name}_add", "Add", (total, v))
    return total


def add_reshape(r: Rewrite, before: Node, name: str, value: int, shape: Sequence[int]) -> int:
    return add(r, before, name, "Reshape", (value, integers(r, f"{name}_shape", shape)), shape=tuple(shape))


def add_split(r: Rewrite, before: Node, name: str, value: int, parts: int, axis: int = 1) -> list[int]:
    """Equal parts along an axis."""
    shape = list(r.values[value].shape)
    shape[axis] //= parts
    version = opset(r)
    inputs, a = [value], {"axis": axis}
    if version >= 18:
        a["num_outputs"] = parts
    elif version >= 13:
        inputs.append(integers(r, f"{name}_sizes", [shape[axis]] * parts))
    else:
        a["split"] = (shape[axis],) * parts  # type: ignore[assignment]
    first = add(r, before, name, "Split", inputs, a, shape=tuple(shape))
    outputs, taken = [first], {v.name for v in r.values}
    for i in range(1, parts):
        label = f"{r.values[first].name}_{i}"
        while label in taken:
            label += "_"
        r.values.append(Value(len(r.values), label, tuple(shape), r.values[value].dtype))
        outputs.append(len(r.values) - 1)
    at = len(r.nodes) - 1
    r.nodes[at] = Node(at, r.nodes[at].op, r.nodes[at].inputs, tuple(outputs), name=r.nodes[at].name)
    return outputs


def add_blocks(r: Rewrite, before: Node, name: str, value: int, block: int, *, to_space: bool,
               by_channel: bool = False) -> int:
    """DepthToSpace or SpaceToDepth. `by_channel`: DepthToSpace of channels C,block,block (CRD, from opset 11)."""
    n, c, h, w = r.values[value].shape
    if not to_space:
        return add(r, before, name, "SpaceToDepth", (value,), {"blocksize": block},
                     shape=(n, c * block * block, h // block, w // block))
    a = {"blocksize": block, **({"mode": "CRD"} if by_channel else {})}
    return add(r, before, name, "DepthToSpace", (value,), a,
                 shape=(n, c // block**2, h * block, w * block))


def is_float(r: Rewrite, value: int) -> bool:
    return r.values[value].dtype is DType.FLOAT32
