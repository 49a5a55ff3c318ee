"""The network at another input size, or one of its convolutions with other channels: to ask what a size costs.

The answer is a whole new file, read back, since the host's operators are cut out of a Graph's file. Weights stay as
they are: a resized network computes something, and takes the time that one trained for the size would take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError, UsageError
from npulab.exporters.tflite import cut, write_tflite
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.formats.flatbuffer import Table
from npulab.formats.tflite import schema
from npulab.importers.tflite import read_tflite
from npulab.ir import Graph, Node, Value
from npulab.ir.ops import (
    Add,
    Concat,
    Conv2D,
    Custom,
    DepthwiseConv2D,
    Elementwise,
    FullyConnected,
    Generic,
    Mean,
    Pad,
    Pool2D,
    Reshape,
    Softmax,
    Split,
)

SIZE_MAX = 2**16 - 1
"""Rows or columns of an input image; channels of a convolution. Far beyond any engine."""

Shape = tuple[int, ...]

_SAME_SHAPE = frozenset({
    "CAST", "CEIL", "COS", "DEQUANTIZE", "EXP", "FLOOR", "GELU", "L2_NORMALIZATION", "LOCAL_RESPONSE_NORMALIZATION",
    "LOG", "LOGICAL_NOT", "LOG_SOFTMAX", "NEG", "QUANTIZE", "RELU_0_TO_1", "ROUND", "RSQRT", "SIGN", "SIN", "SQRT",
    "SQUARE",
})
_BROADCAST = frozenset({
    "ADD", "DIV", "EQUAL", "FLOOR_DIV", "FLOOR_MOD", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL", "LOGICAL_AND",
    "LOGICAL_OR", "MAXIMUM", "MINIMUM", "MUL", "NOT_EQUAL", "POW", "PRELU", "SQUARED_DIFFERENCE", "SUB",
})
_REDUCERS = frozenset({"SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ANY", "REDUCE_ALL"})


def input_size(graph: Graph) -> tuple[int, int]:
    """(height, width) of the images that the network takes.

    Raises: UnsupportedError if it takes none, or images of several sizes.
    """
    sizes = {graph.values[v].shape[1:3] for v in graph.inputs if len(graph.values[v].shape) == 4}
    if len(sizes) != 1:
        raise UnsupportedError(f"'{graph.name}' takes {'images of several sizes' if sizes else 'no image'}",
                               want="inputs of four dimensions, all of one height and width",
                               got=", ".join(str(graph.values[v]) for v in graph.inputs))
    (height, width), = sizes
    return height, width


def kept_nodes(graph: Graph) -> list[int]:
    """The nodes that `with_input_size` keeps, by Node.index: all but custom operators and what depends on them.

    What a custom operator makes of another size is not known; the resized network ends before it.
    """
    lost: set[int] = set()
    kept: list[int] = []
    for n in graph.nodes:
        if isinstance(n.op, Custom) or not lost.isdisjoint(n.inputs):
            lost.update(n.outputs)
        else:
            kept.append(n.index)
    return kept


def with_input_size(graph: Graph, height: int, width: int) -> Graph:
    """The network for images of `height` by `width`. Node i of it is node ``kept_nodes(graph)[i]`` of `graph`.

    All inputs of four dimensions are images. Shapes are inferred anew; what follows too: pooling windows that covered
    their whole image, reshapes, targets of resizing operators that are a whole multiple or part of their input, and
    slices over whole axes. If operators at the end are left out (`kept_nodes`), what they read are new outputs.

    Ranges:  height, width 1..65535.
    Raises:  UsageError outside; UnsupportedError naming the first operator that cannot follow, such as a
             FULLY_CONNECTED on a flattened image.
    """
    for name, n in (("height", height), ("width", width)):
        if not 1 <= n <= SIZE_MAX:
            raise UsageError(f"an image cannot have a {name} of {n}", want=f"1..{SIZE_MAX}")
    if graph.format != "tflite":
        raise UnsupportedError(f"'{graph.name}' cannot be resized", got=f"format {graph.format}", want="a TFLite file")
    old = input_size(graph)
    kept = kept_nodes(graph)
    if not kept:
        raise UnsupportedError(f"'{graph.name}' begins with custom operators", got=str(graph.nodes[0]),
                               want="operators that npulab knows the shapes of")
    made = {v for i in kept for v in graph.nodes[i].outputs} | set(graph.inputs)
    dropped = [n for n in graph.nodes if n.index not in set(kept)]
    outputs = [v for v in graph.outputs if v in made] if dropped else list(graph.outputs)
    outputs += [v for n in dropped for v in n.inputs if v in made]
    part = read_tflite(cut(graph, kept, graph.inputs, list(dict.fromkeys(outputs))), graph.name)
    return read_tflite(_Follow(part, old, (height, width)).file(), graph.name)


class _Follow:
    """Shapes of every value at the new size, and what must change in the file besides: constants and options."""

    def __init__(self, graph: Graph, old: Shape, new: Shape) -> None:
        self.graph, self.old, self.new = graph, old, new
        self.shapes: list[Shape] = [v.shape for v in graph.values]
        self.constants: dict[tuple[int, int], NDArray[Any]] = {}
        """(node, which input) -> its new content."""
        self.options: dict[int, dict[str, Any]] = {}
        for v in graph.inputs:
            if len(self.shapes[v]) == 4:
                n, _, _, c = self.shapes[v]
                self.shapes[v] = (n, *new, c)
        for node in graph.nodes:
            if any(v >= 0 and self.shapes[v] != graph.values[v].shape for v in node.inputs):
                try:
                    found = self._results(node)
                except (ValueError, IndexError, TypeError, ZeroDivisionError) as e:  # a file that breaks its own rules
                    raise self._cannot(node, "its inputs do not fit each other") from e
                if len(found) != len(node.outputs):
                    raise self._cannot(node, "it has another number of results than it should")
                for v, shape in zip(node.outputs, found, strict=True):
                    if min(shape, default=1) < 1:
                        raise self._cannot(node, "its input is too small", got=f"{_text(self._input(node, 0))}")
                    self.shapes[v] = shape

    def file(self) -> bytes:
        model = Table.root(schema(), "Model", self.graph.source).unpack()
        (main,) = model["subgraphs"][:1]
        tensors: list[dict[str, Any]] = main["tensors"]
        for t, value, shape in zip(tensors, self.graph.values, self.shapes, strict=True):
            if shape != value.shape:
                t["shape"] = shape
                if t.get("shape_signature"):
                    t["shape_signature"] = [-1 if i == 0 and i in value.dynamic_axes else n
                                            for i, n in enumerate(shape)]
        for (node, i), data in self.constants.items():
            operator = main["operators"][node]
            inputs = list(operator["inputs"])
            old = tensors[inputs[i]]
            inputs[i] = len(tensors)  # others may read the old one
            tensors.append({**old, "shape": data.shape, "buffer": len(model["buffers"])})
            model["buffers"].append({"data": data.tobytes()})
            operator["inputs"] = inputs
        for node, changed in self.options.items():
            member, options = main["operators"][node].get("builtin_options", (None, {}))
            if member:
                main["operators"][node]["builtin_options"] = (member, {**options, **changed})
        return write_tflite(model)

    # what the rules below ask

    def _cannot(self, node: Node, why: str, **facts: object) -> UnsupportedError:
        return UnsupportedError(f"{node} of '{self.graph.name}' cannot follow to an input of "
                                f"{self.new[0]}x{self.new[1]}: {why}", **facts)

    def _input(self, node: Node, i: int) -> Shape:
        if i >= len(node.inputs) or node.inputs[i] < 0:
            raise self._cannot(node, f"it has no input {i}")
        return self.shapes[node.inputs[i]]

    def _before(self, node: Node, i: int = 0) -> Shape:
        return self.graph.values[node.inputs[i]].shape

    def _constant(self, node: Node, i: int) -> NDArray[Any]:
        value = self.graph.value(node, i)
        if value is None or not value.is_constant:
            raise self._cannot(node, f"its input {i} is not constant")
        return value.array()

    def _image(self, node: Node) -> tuple[int, int, int, int]:
        shape = self._input(node, 0)
        if len(shape) != 4 or len(self._before(node)) != 4:
            raise self._cannot(node, "its input is no image", got=_text(shape), want="four dimensions")
        n, h, w, c = shape
        return n, h, w, c

    # one rule an operator

    def _results(self, node: Node) -> list[Shape]:
        """The shapes of the outputs, where an input has another shape than before."""
        match node.op:
            case Conv2D() | DepthwiseConv2D():
                return [self._convolution(node, node.op)]
            case Pool2D():
                return [self._pool(node, node.op)]
            case FullyConnected(_, keep_dims):
                return [self._dense(node, keep_dims)]
            case Reshape():
                return [self._reshape(node)]
            case Concat(axis, _):
                return [self._concat(node, axis)]
            case Split(pieces):
                return self._split(node, pieces)
            case Pad():
                pads = self._constant(node, 1).reshape(-1, 2).tolist()
                return [tuple(n + a + b for n, (a, b) in zip(self._input(node, 0), pads, strict=True))]
            case Mean(keep_dims):
                return [self._reduce(node, keep_dims)]
            case Softmax() | Elementwise():
                return [self._input(node, 0)]
            case Add():
                return [self._broadcast(node)]
            case Generic(name, attributes):
                return self._generic(node, name, attributes.get)
        raise self._cannot(node, "npulab does not know the shape of its result")

    def _generic(self, node: Node, name: str, option: Any) -> list[Shape]:
        if name in _SAME_SHAPE:
            return [self._input(node, 0)]
        if name in _BROADCAST:
            return [self._broadcast(node)]
        if name in _REDUCERS:
            return [self._reduce(node, bool(option("keep_dims")))]
        if name in ("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"):
            return [self._scale(node)]
        if name == "TRANSPOSE":
            return [tuple(self._input(node, 0)[i] for i in self._constant(node, 1).tolist())]
        if name == "STRIDED_SLICE":
            return [self._slice(node, option)]
        if name in ("SPACE_TO_DEPTH", "DEPTH_TO_SPACE"):
            n, h, w, c = self._image(node)
            b = max(1, int(option("block_size") or 1))
            if name == "DEPTH_TO_SPACE":
                return [(n, h * b, w * b, c // b**2)]
            if h % b or w % b:
                raise self._cannot(node, f"its image does not divide into blocks of {b}x{b}", got=f"{h}x{w}")
            return [(n, h // b, w // b, c * b**2)]
        raise self._cannot(node, "npulab does not know the shape of its result")

    def _convolution(self, node: Node, op: Conv2D | DepthwiseConv2D) -> Shape:
        n, h, w, _ = self._image(node)
        kernel = self._input(node, 1)
        reach = [(k - 1) * d + 1 for k, d in zip(kernel[1:3], op.dilation, strict=True)]
        return (n, *_extents((h, w), reach, op.stride, op.padding), self._channels(node))

    def _channels(self, node: Node) -> int:
        """A convolution's, whatever the image."""
        kernel = self._input(node, 1)
        return kernel[0] if isinstance(node.op, Conv2D) else kernel[3]

    def _pool(self, node: Node, op: Pool2D) -> Shape:
        n, h, w, c = self._image(node)
        window, stride = op.window, op.stride
        if window == self._before(node)[1:3]:
            if stride == window:
                stride = h, w
            window = h, w
            self.options[node.index] = {"filter_height": h, "filter_width": w, "stride_h": stride[0],
                                        "stride_w": stride[1]}
        return (n, *_extents((h, w), window, stride, op.padding), c)

    def _dense(self, node: Node, keep_dims: bool) -> Shape:
        shape, (m, depth) = self._input(node, 0), self._input(node, 1)
        if math.prod(shape) != math.prod(self._before(node)) and not (keep_dims and shape[-1:] == (depth,)):
            raise self._cannot(node, "its weights are made for one image size",
                               want=f"{math.prod(self._before(node))} inputs", got=math.prod(shape),
                               try_="a network that averages over the image before its FULLY_CONNECTED")
        return (*shape[:-1], m) if keep_dims else (math.prod(shape) // depth, m)

    def _reshape(self, node: Node) -> Shape:
        target = reshaped(self._before(node), self._input(node, 0), self.graph.values[node.outputs[0]].shape)
        if target is None:
            raise self._cannot(node, "which dimension follows is not clear",
                               got=f"{_text(self._before(node))} -> {_text(self.graph.values[node.outputs[0]].shape)} "
                                   f"becomes {_text(self._input(node, 0))} -> ?")
        if node.op.name == "SQUEEZE" and len([n for n in target if n != 1]) != len(
                [n for n in self._input(node, 0) if n != 1]):
            raise self._cannot(node, "the axes to squeeze are no longer 1", got=_text(self._input(node, 0)))
        if node.op.name == "RESHAPE":
            self.options[node.index] = {"new_shape": target}
            if len(node.inputs) > 1 and node.inputs[1] >= 0:
                kind = self._constant(node, 1).dtype
                self.constants[node.index, 1] = np.array(target, kind)
        return target

    def _concat(self, node: Node, axis: int) -> Shape:
        shapes = [self._input(node, i) for i in range(len(node.inputs))]
        axis %= max(1, len(shapes[0]))
        rest = {(*s[:axis], *s[axis + 1 :]) for s in shapes}
        if len(rest) > 1 or len({len(s) for s in shapes}) > 1:
            raise self._cannot(node, "its parts no longer fit together", got=", ".join(map(_text, shapes)),
                               try_=_MULTIPLES)
        return (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])

    def _split(self, node: Node, pieces: int) -> list[Shape]:
        shape = list(self._input(node, 1))
        axis = int(self._constant(node, 0).reshape(-1)[0]) % max(1, len(shape))
        if shape[axis] % max(1, pieces):
            raise self._cannot(node, f"axis {axis} does not divide into {pieces}", got=_text(tuple(shape)))
        shape[axis] //= max(1, pieces)
        return [tuple(shape)] * pieces

    def _reduce(self, node: Node, keep_dims: bool) -> Shape:
        shape = self._input(node, 0)
        axes = {int(a) % max(1, len(shape)) for a in self._constant(node, 1).reshape(-1)}
        return tuple(1 if i in axes else n for i, n in enumerate(shape) if keep_dims or i not in axes)

    def _broadcast(self, node: Node) -> Shape:
        shapes = [self._input(node, i) for i in range(len(node.inputs))]
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError:
            constant = any(v >= 0 and self.graph.values[v].is_constant for v in node.inputs)
            raise self._cannot(node, "a constant belongs to the old size" if constant else
                               "its operands no longer have one shape", got=" and ".join(map(_text, shapes)),
                               **({} if constant else {"try_": _MULTIPLES})) from None

    def _scale(self, node: Node) -> Shape:
        """A target that is a multiple or part of its input stays one; one that is the network's input size, too."""
        n, h, w, c = self._image(node)
        target = self._constant(node, 1)
        new: list[int] = []
        for to, before, now, own in zip(target.reshape(-1).tolist(), self._before(node)[1:3], (h, w),
                                        zip(self.old, self.new, strict=True), strict=True):
            if to % before == 0:
                new.append(to // before * now)
            elif before % to == 0 and now % (before // to) == 0:
                new.append(now // (before // to))
            elif to == own[0]:
                new.append(own[1])
            else:
                raise self._cannot(node, "its target is no whole multiple of its input", got=f"{before} -> {to}")
        self.constants[node.index, 1] = np.array(new, target.dtype)
        return (n, *new, c)

    def _slice(self, node: Node, option: Any) -> Shape:
        """Slices over a whole axis follow it; axes of the old length are sliced as before."""
        if option("ellipsis_mask") or option("new_axis_mask"):
            raise self._cannot(node, "it slices with an ellipsis or makes new axes")
        before, now = self._before(node), self._input(node, 0)
        begin, end, step = (self._constant(node, i).astype(np.int64).tolist() for i in (1, 2, 3))
        if not len(before) == len(begin) == len(end) == len(step):
            raise self._cannot(node, "it names fewer axes than its input has")
        out: list[int] = []
        for i, (n, m) in enumerate(zip(before, now, strict=True)):
            bit = 1 << i
            first = None if option("begin_mask") & bit else begin[i]
            last = None if option("end_mask") & bit else end[i]
            shrink = option("shrink_axis_mask") & bit
            if n != m and not shrink:
                if last is not None and last >= n:
                    last = end[i] = m
                if step[i] < 1 or not (first is None or 0 <= first < step[i]) or last not in (None, m):
                    raise self._cannot(node, f"it takes a part of axis {i}",
                                       got=f"{begin[i]}..{end[i]} of {n}, which is {m} now")
            if not shrink:
                out.append(len(range(*slice(first, last, step[i]).indices(m))))
        self.constants[node.index, 2] = np.array(end, self._constant(node, 2).dtype)
        return tuple(out)


_MULTIPLES = "a size that every stride divides, such as a multiple of 32"


def _extents(size: tuple[int, int], reach: Sequence[int], stride: tuple[int, int], padding: str) -> tuple[int, int]:
    """Output height and width of a window that reaches over `reach` pixels."""
    h, w = (-(-(n if padding == "same" else n - r + 1) // s) for n, r, s in zip(size, reach, stride, strict=True))
    return h, w


def reshaped(before: Shape, now: Shape, target: Shape) -> Shape | None:
    """What the reshape `before` -> `target` becomes when its input is `now`, or None where that is not clear.

    Elements stay in order, so the axes that changed must lie within one axis of the target, and that one follows. Where
    axes of length 1 leave a choice it is the first one behind the batch.

    >>> reshaped((1, 19, 19, 273), (1, 20, 20, 273), (1, 1083, 91))
    (1, 1200, 91)
    >>> reshaped((1, 2704, 4), (1, 3136, 4), (1, 52, 52, 4)) is None
    True
    """
    if len(before) != len(now) or math.prod(before) != math.prod(target):
        return None
    if before == target:
        return now

    def alike(i: int) -> bool:  # an axis of 1 that grew may have been any 1 of the target
        return before[i] == target[i] and (before[i] == now[i] or before[i] > 1)

    shorter = min(len(before), len(target))
    head = next((i for i in range(shorter) if not alike(i)), shorter)
    tail = next((i for i in range(shorter - head) if not alike(-1 - i)), shorter - head)
    inner, outer = slice(head, len(before) - tail), slice(head, len(target) - tail)
    changed = [i for i in range(inner.start, inner.stop) if before[i] != now[i]]
    middle = list(target[outer])
    if changed:
        left = math.prod(now[inner.start : changed[0]])
        right = math.prod(now[changed[-1] + 1 : inner.stop])
        fits = [i for i in range(len(middle))
                if left % math.prod(middle[:i]) == 0 and right % math.prod(middle[i + 1 :]) == 0]
        if not fits:
            return None
        i = fits[0]
        rest = math.prod(middle[:i]) * math.prod(middle[i + 1 :])
        middle[i] = math.prod(now[inner]) // rest
    return (*now[:head], *middle, *now[len(now) - tail :])


def with_channels(graph: Graph, node: int, outputs: int, inputs: int | None = None) -> Graph:
    """The convolution `node` (by Node.index) alone, as a network with other channels; weights repeat, or are cut off.

    `inputs` None: as many as it has. A depthwise convolution's inputs follow its outputs, which are a multiple of its
    depth multiplier.

    Ranges:  outputs, inputs 1..65535.
    Raises:  UsageError outside; UnsupportedError if the node is no convolution with constant weights, or a grouped one.
    """
    n = graph.nodes[node]
    if not isinstance(n.op, Conv2D | DepthwiseConv2D) or len(n.inputs) < 2 or not n.outputs:
        raise UnsupportedError(f"{n} of '{graph.name}' has no channels to change", want="a convolution")
    data, kernel, result = graph.values[n.inputs[0]], graph.values[n.inputs[1]], graph.values[n.outputs[0]]
    if not kernel.is_constant or len(data.shape) != 4 or len(kernel.shape) != 4:
        raise UnsupportedError(f"{n} of '{graph.name}' has computed weights, or no image", got=f"{data}, {kernel}")
    if isinstance(n.op, DepthwiseConv2D):
        depth = outputs // n.op.multiplier
        if inputs not in (None, depth) or outputs % n.op.multiplier:
            raise UsageError(f"{n} cannot have {depth if inputs is None else inputs} -> {outputs} channels",
                             want=f"outputs that are {n.op.multiplier} times the inputs")
    else:
        depth = inputs or data.shape[3]
        if kernel.shape[3] != data.shape[3]:
            raise UnsupportedError(f"{n} of '{graph.name}' is a grouped convolution", want="one group",
                                   got=f"kernels of depth {kernel.shape[3]} on {data.shape[3]} channels")
    for name, count in (("outputs", outputs), ("inputs", depth)):
        if not 1 <= count <= SIZE_MAX:
            raise UsageError(f"{n} cannot have {count} {name}", want=f"1..{SIZE_MAX}")
    b = ModelBuilder(graph.name)

    def like(value: Value, shape: Shape, axes: Sequence[int] | None = None) -> int:
        """The tensor at another shape; its content, if it has one, repeats along `axes`."""
        content: NDArray[Any] | None = None
        if axes is not None:
            content = value.array()
            for axis in axes:
                content = np.take(content, np.arange(shape[axis]) % content.shape[axis], axis)
        q = value.quantization
        if q is None:
            return b.tensor(value.name, shape, value.dtype.value, data=content)
        repeats = range(1 if q.per_tensor else shape[q.axis])
        return b.tensor(value.name, shape, value.dtype.value, data=content, axis=q.axis,
                        scales=[q.scales[i % len(q.scales)] for i in repeats],
                        zero_points=[q.zero_points[i % len(q.zero_points)] for i in repeats])

    x = like(data, (*data.shape[:3], depth))
    if isinstance(n.op, Conv2D):
        tensors = [x, like(kernel, (outputs, *kernel.shape[1:3], depth), (0, 3))]
        extra = {}
    else:
        tensors = [x, like(kernel, (*kernel.shape[:3], outputs), (3,))]
        extra = {"depth_multiplier": n.op.multiplier}
    if (bias := graph.value(n, 2)) is not None:
        if not bias.is_constant:
            raise UnsupportedError(f"{n} of '{graph.name}' has a computed bias")
        tensors.append(like(bias, (outputs,), (0,)))
    y = like(result, (*result.shape[:3], outputs))
    b.op(n.op.name, tensors, [y], padding=n.op.padding.upper(), fused_activation_function=n.op.activation.upper(),
         stride_h=n.op.stride[0], stride_w=n.op.stride[1], dilation_h_factor=n.op.dilation[0],
         dilation_w_factor=n.op.dilation[1], **extra)
    return read_tflite(b.build([x], [y]), graph.name)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
