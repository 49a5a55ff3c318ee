"""The plan `best`: npulab's own lowering, right for every operator that the rules let through.

What it does otherwise than the reference driver, and why:

- Padding is what the model says, in x and y apart, from the offsets or from the space-to-depth job; that driver's
  offsets are wrong at small and odd sizes (H5) and its reshuffles on images that are not square (H3).
- RELU6 is a clamp for any output range: the output is stored moved up, so that 6.0 lands on 255, where the engine
  saturates. Readers take the moved zero point; whoever leaves the NPU moves it back.
- int8 weights are moved into the engine's unsigned domain (H8).
- A tensor is transposed once, however many read it, and only if someone reads it in that layout.
- Averages run on the NPU. Over the whole image: in NHWC order the pixels are channels, and the average is a 1x1
  convolution with one output. Over windows: a depthwise convolution with equal weights.
- Tensors that are never needed at the same time share memory.

H1, H2, ... are hazards of the project's NN notes, section 13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npulab.errors import InvariantError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import (
    Activation,
    Add,
    Concat,
    Conv2D,
    DepthwiseConv2D,
    Elementwise,
    FullyConnected,
    Mean,
    Pad,
    Pool2D,
    Reshape,
    Split,
)
from npulab.plan import memory
from npulab.plan.memory import Lifetime
from npulab.plan.partition import Part
from npulab.profiling.host import host_work
from npulab.program.types import Choice
from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.coefficients_v7 import Order, Weights
from npulab.targets.vivante.fuse import scaling_transposes
from npulab.targets.vivante.jobs import (
    Border,
    Box,
    Buffer,
    Job,
    NNJob,
    Place,
    Region,
    Share,
    TPJob,
    requantization,
)
from npulab.targets.vivante.layout import (
    dealt,
    from_planar,
    pad_planes,
    rescale_bytes,
    space_to_depth,
    through_table,
    to_planar,
)
from npulab.targets.vivante.on_chip import Tensors, arrange
from npulab.targets.vivante.reference import (
    WeightedSum,
    bias_of,
    conv_scale,
    grown,
    reference_sum,
    scale_of,
    space_to_depth_weights,
    unsigned_zero_point,
)
from npulab.targets.vivante.search import Search
from npulab.targets.vivante.tables import Function
from npulab.targets.vivante.tiling import align, cdiv

ADDITION_ROW = 128
"""Bytes of a row in an addition; also the alignment of its second operand."""
ROWS_MAX = 8184
"""Rows of one job: 13 bits, less the border that a kernel may look at."""
SHARE_LEAST = 8192
"""Elements of a TP core's share of a transpose: 10 us of work for 5 us of starting it, by the timing model."""
ALIGNMENT = 64
"""Of every tensor in memory, in bytes."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory: its number, and the zero point its bytes are stored with."""

    tensor: int
    zero_point: int


def extents(value: Value) -> tuple[int, int, int]:
    """(height, width, channels); tensors of other ranks than four are one pixel."""
    if len(value.shape) == 4:
        return value.shape[1], value.shape[2], value.shape[3]
    return 1, 1, value.elements


def same_pads(size: int, stride: int, reach: int) -> int:
    """Pixels that SAME padding puts before an axis, for a kernel that covers `reach` pixels."""
    return max((cdiv(size, stride) - 1) * stride + reach - size, 0) // 2


def convolution_pads(graph: Graph, node: Node) -> tuple[int, int]:
    """(top, left) padding of a convolution node, in pixels."""
    op = node.op
    assert isinstance(op, Conv2D | DepthwiseConv2D)
    if op.padding == "valid":
        return 0, 0
    h, w, _ = extents(graph.values[node.inputs[0]])
    _, ky, kx, _ = graph.values[node.inputs[1]].shape
    reach_y, reach_x = (ky - 1) * op.dilation[0] + 1, (kx - 1) * op.dilation[1] + 1
    return same_pads(h, op.stride[0], reach_y), same_pads(w, op.stride[1], reach_x)


class _Lowering:
    """One region on its way to jobs."""

    def __init__(self, graph: Graph, part: Part, chip: Chip, keep_all: bool, search: Search | None) -> None:
        self.graph, self.part, self.chip, self.search = graph, part, chip, search
        self.features = search.options.features if search else frozenset[str]()
        self.choices: list[Choice] = []
        self.kept = [v for n in part.nodes for v in n.outputs] if keep_all else list(part.outputs)
        self.jobs: list[Job] = []
        self.sizes: list[int] = []
        self.parents: dict[int, tuple[int, int]] = {}
        self.planar: dict[int, Held] = {}
        self.linear: dict[int, Held] = {}
        self.uploads: dict[int, Border] = {}

    def shares(self, elements: int) -> int:
        """TP cores for a job of that many elements; a share of a few would only be started for nothing."""
        return max(1, min(self.chip.tp_cores, elements // SHARE_LEAST))

    def cores(self, elements: int) -> int:
        """TP cores for a transpose, which the driver never cuts."""
        return self.shares(elements) if "tp-split" in self.features else 1

    # tensors and their two layouts

    def tensor(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def is_one_layout(self, v: int) -> bool:
        """Planes and NHWC are the same bytes: one channel, or one pixel."""
        h, w, c = extents(self.graph.values[v])
        return c == 1 or h * w == 1

    def as_linear(self, v: int, node: Node, model_zero_point: bool = True) -> Held:
        """Value `v` in NHWC order. With `model_zero_point` its bytes are what the model says."""
        value = self.graph.values[v]
        zero_point = unsigned_zero_point(value)
        if v not in self.linear and v not in self.planar:
            held = Held(self.tensor(value.elements), zero_point)
            self.uploads[v] = Border(v, Place(held.tensor), value.elements, value.dtype is DType.INT8)
            self.linear[v] = held
        held_linear = self.linear.get(v) or (self.planar[v] if self.is_one_layout(v) else None)
        if held_linear is None:
            h, w, c = extents(value)
            planes = self.planar[v]
            held_linear = Held(self.tensor(value.elements), zero_point)
            shares = from_planar(h, w, c, planes.zero_point, self.cores(value.elements))
            shares = tuple(replace(s, fields={**s.fields, "out_zp": zero_point}) for s in shares)
            self.jobs.append(TPJob("detranspose", (node.index,), Place(planes.tensor), Place(held_linear.tensor),
                                   shares))
        if model_zero_point and held_linear.zero_point != zero_point:
            held_linear = self.moved(held_linear, value.elements, zero_point, node)
        self.linear[v] = held_linear
        return held_linear

    def as_planar(self, v: int, node: Node) -> Held:
        """Value `v` in planes, with whatever zero point it is stored."""
        if v in self.planar:
            return self.planar[v]
        value = self.graph.values[v]
        held = self.as_linear(v, node, model_zero_point=False)
        if not self.is_one_layout(v):
            h, w, c = extents(value)
            planes = Held(self.tensor(value.elements), held.zero_point)
            self.jobs.append(TPJob("transpose", (node.index,), Place(held.tensor), Place(planes.tensor),
                                   to_planar(h, w, c, held.zero_point, self.cores(value.elements))))
            held = planes
        self.planar[v] = held
        return held

    def moved(self, held: Held, size: int, zero_point: int, node: Node, ratio: float = 1.0) -> Held:
        """A copy of `size` bytes with another zero point, and times `ratio`."""
        out = Held(self.tensor(size), zero_point)
        self.rescale(held, Place(out.tensor), size, zero_point, ratio, node)
        return out

    def rescale(self, held: Held, to: Place, size: int, zero_point: int, ratio: float, node: Node) -> None:
        multiplier, shift = requantization(ratio)
        shares = tuple(
            Share(first + s.source, first + s.result, s.fields)
            for first, count in dealt(size, self.shares(size))
            for s in rescale_bytes(count, held.zero_point, zero_point, multiplier, shift - 15))
        self.jobs.append(TPJob("rescale", (node.index,), Place(held.tensor), to, shares))

    # operators

    def node(self, node: Node) -> None:
        match node.op:
            case Conv2D() | DepthwiseConv2D():
                self.convolution(node)
            case Add():
                self.addition(node)
            case Concat():
                self.concatenation(node)
            case Split():
                self.split(node)
            case Pad():
                self.pad(node)
            case FullyConnected():
                self.fully_connected(node)
            case Pool2D() | Mean():
                self.average(node)
            case Elementwise():
                self.function(node)
            case Reshape():
                self.linear[node.outputs[0]] = self.as_linear(node.inputs[0], node)
            case _:
                raise InvariantError(f"{node} reached plan best without a lowering")

    def convolution(self, node: Node) -> None:
        op = node.op
        assert isinstance(op, Conv2D | DepthwiseConv2D)
        out = self.graph.values[node.outputs[0]]
        source = self.as_planar(node.inputs[0], node)
        self.planar[out.index] = Held(self.tensor(out.elements), self.stored_zero_point(op.activation, out))
        _, ky, kx, _ = self.graph.values[node.inputs[1]].shape
        usual = op.stride[0] == 2 and (isinstance(op, DepthwiseConv2D) or ky == kx == 1)
        jobs = self.strided(node, source, usual)
        if op.stride[0] == 2 and self.search and "stride-2" in self.features:
            other = self.strided(node, source, not usual)
            saved = self.cost(jobs) - self.cost(other)
            if saved > 0:
                texts = "space-to-depth before a dense kernel", "every other pixel of a full convolution"
                self.choices.append(Choice(node.index, texts[not usual], texts[usual], saved, "stride-2", "inferred"))
                jobs = other
        self.jobs += jobs

    def cost(self, jobs: list[Job]) -> int:
        """Nanoseconds of jobs in the variants that the search gives them."""
        assert self.search is not None
        return sum(self.search.cost(job) for job in self.search.improve(jobs)[0])

    def strided(self, node: Node, source: Held, first_pixel: bool) -> list[Job]:
        """A convolution's jobs. With stride 2 either all pixels are computed and the `first_pixel` of four is kept, or
        space-to-depth comes first."""
        op = node.op
        assert isinstance(op, Conv2D | DepthwiseConv2D)
        values = self.graph.values
        kernel, out = values[node.inputs[1]], values[node.outputs[0]]
        h, w, in_c = extents(values[node.inputs[0]])
        out_h, out_w, out_c = extents(out)
        asked = self.weights(node, in_c)
        weights = dilated(asked, op.dilation)
        _, _, ky, kx = weights.values.shape
        pad_y, pad_x = convolution_pads(self.graph, node)
        image = Box(w, h, in_c)
        jobs: list[Job] = []
        if op.stride[0] == 2 and not first_pixel:
            weights = space_to_depth_weights(weights)
            _, _, ky, kx = weights.values.shape
            deep_y, deep_x = out_h + ky - 1, out_w + kx - 1
            deep = self.tensor(deep_y * deep_x * 4 * in_c)
            shares = space_to_depth(h, w, in_c, deep_y, deep_x, pad_y, pad_x, source.zero_point, self.chip.tp_cores)
            jobs.append(TPJob("reshuffle", (node.index,), Place(source.tensor), Place(deep), shares))
            source, image, pad_y, pad_x = Held(deep, source.zero_point), Box(deep_x, deep_y, 4 * in_c), 0, 0
        if ky == kx == 1 and weights.in_c == 1:
            weights = grown(weights, 2, 2)  # as the reference driver does: a 1x1 kernel on one channel is not taken
        jobs.append(self.convolved(
            node, "depthwise" if isinstance(op, DepthwiseConv2D) else "convolution", source, self.planar[out.index],
            image, Box(out_w, out_h, out_c), weights, conv_scale(values[node.inputs[0]], scale_of(kernel), out),
            activation=op.activation, offset=(-pad_y, -pad_x), first_pixel=first_pixel, stride=op.stride[0],
            taps=asked.values[0].size,
        ))
        return jobs

    def weights(self, node: Node, in_c: int) -> Weights:
        """A convolution's kernels in the unsigned domain, each with the channels it really reads."""
        tensor = self.graph.values[node.inputs[1]]
        w = tensor.array().view(np.uint8)
        if tensor.dtype is DType.INT8:
            w = w ^ np.uint8(0x80)
        zero = unsigned_zero_point(tensor)
        out_c, _, _, per_group = w.shape
        if isinstance(node.op, DepthwiseConv2D):
            out_c = w.shape[3]
            first = np.arange(out_c, dtype=np.int64) // (out_c // in_c)
            return Weights(w[0].transpose(2, 0, 1)[:, None], first, in_c, zero)
        groups = in_c // per_group
        first = np.arange(out_c, dtype=np.int64) // (out_c // groups) * per_group
        return Weights(w.transpose(0, 3, 1, 2), first, in_c, zero)

    def convolved(self, node: Node, role: str, source: Held, result: Held, image: Box, out: Box, weights: Weights,
                  scale: float, *, activation: Activation, offset: tuple[int, int] = (0, 0), first_pixel: bool = False,
                  stride: int = 1, taps: int = 0) -> NNJob:
        _, _, ky, kx = weights.values.shape
        order: Order = "pointwise" if kx == ky == 1 else "spatial" if weights.in_c > 1 else "single"
        doubled = 2 if first_pixel else 1
        return NNJob(
            role=role, nodes=(node.index,), source=Place(source.tensor), result=Place(result.tensor), input=image,
            output=out, kernel_x=kx, kernel_y=ky, offset_x=offset[1], offset_y=offset[0], first_pixel=first_pixel,
            stride=stride, relu=activation in ("relu", "relu6"), in_zp=source.zero_point, out_zp=result.zero_point,
            weight_zp=weights.filler, scale=scale, weights=weights, bias=bias_of(self.graph, node, weights.out_c),
            order=order, split=kx > 3, tile_extent=(out.x * doubled, out.y * doubled), tile_kernel=(kx, ky),
            zero_runs=order != "pointwise", taps=taps,
        )

    @staticmethod
    def stored_zero_point(activation: Activation, out: Value) -> int:
        """The zero point to store an output with: its own, or moved up so that 6.0 becomes 255."""
        zero_point = unsigned_zero_point(out)
        if activation != "relu6":
            return zero_point
        six = zero_point + int(np.round(np.float32(6.0) / scale_of(out)))
        return zero_point + max(0, 255 - six)

    def addition(self, node: Node) -> None:
        op = node.op
        assert isinstance(op, Add)
        values = self.graph.values
        a, b = (values[v] for v in node.inputs)
        out = values[node.outputs[0]]
        uploaded = all(v in self.linear or v not in self.planar for v in node.inputs)
        linear = uploaded or self.is_one_layout(a.index)
        held = [self.as_linear(v, node, False) if linear else self.as_planar(v, node) for v in node.inputs]
        size = a.elements
        pair = self.tensor(align(size, ADDITION_ROW) + size)
        slots = [Place(pair), Place(pair, align(size, ADDITION_ROW))]
        for i, slot in enumerate(slots):
            held[i] = self.put(held[i], slot, size, node)
        result = Held(self.tensor(size), self.stored_zero_point(op.activation, out))
        (self.linear if linear else self.planar)[out.index] = result
        sum_of = weighted_sum(a, b, out, held[0].zero_point, held[1].zero_point)
        rows = align(size, ADDITION_ROW) // ADDITION_ROW
        kernel = Weights(np.array([sum_of.first, 0, 0, 0], np.uint8).reshape(1, 1, 2, 2), np.zeros(1, np.int64), 1, 0)
        whole = size // ADDITION_ROW
        pieces = [(r, ADDITION_ROW, min(ROWS_MAX, whole - r)) for r in range(0, whole, ROWS_MAX)]
        if size % ADDITION_ROW:
            pieces.append((whole, size % ADDITION_ROW, 1))
        for row, x, y in pieces:
            self.jobs.append(NNJob(
                role="addition", nodes=(node.index,), source=Place(pair, row * ADDITION_ROW),
                result=Place(result.tensor, row * ADDITION_ROW), input=Box(x, y, 2, ADDITION_ROW, rows),
                output=Box(x, y, 1, ADDITION_ROW, y), kernel_x=2, kernel_y=2, offset_x=0, offset_y=0, first_pixel=False,
                stride=1, relu=op.activation in ("relu", "relu6"), in_zp=held[0].zero_point, out_zp=result.zero_point,
                weight_zp=0, scale=conv_scale(a, sum_of.weight_scale, out), weights=kernel,
                bias=np.array([sum_of.bias], np.int64), order="single", split=False, tile_extent=(x, y),
                tile_kernel=(2, 2), last_word=sum_of.second, zero_runs=False,
            ))

    def put(self, held: Held, slot: Place, size: int, node: Node) -> Held:
        """Make `held` live at `slot` of a larger tensor: by placing it there, or by a copy if it has a place."""
        if held.tensor in self.parents:
            self.rescale(held, slot, size, held.zero_point, 1.0, node)
        else:
            self.parents[held.tensor] = slot.tensor, slot.offset
        return held

    def concatenation(self, node: Node) -> None:
        values = self.graph.values
        op, out = node.op, values[node.outputs[0]]
        assert isinstance(op, Concat)
        planar = len(out.shape) == 4 and op.axis % 4 == 3
        zero_point = unsigned_zero_point(out)
        whole = Held(self.tensor(out.elements), zero_point)
        offset = 0
        placed: set[int] = set()
        for v in node.inputs:
            part = values[v]
            held = self.as_planar(v, node) if planar else self.as_linear(v, node, model_zero_point=False)
            slot = Place(whole.tensor, offset)
            fits = part.quantization is not None and out.quantization is not None
            fits = fits and scale_of(part) == scale_of(out) and held.zero_point == zero_point
            if fits and v not in placed:
                self.put(held, slot, part.elements, node)
                placed.add(v)
            else:
                self.rescale(held, slot, part.elements, zero_point, float(scale_of(part) / scale_of(out)), node)
            offset += part.elements
        (self.planar if planar else self.linear)[out.index] = whole

    def split(self, node: Node) -> None:
        held = self.as_planar(node.inputs[1], node)
        offset = 0
        for v in node.outputs:
            piece = Held(self.tensor(self.graph.values[v].elements), held.zero_point)
            self.parents[piece.tensor] = held.tensor, offset
            self.planar[v] = piece
            offset += self.graph.values[v].elements

    def pad(self, node: Node) -> None:
        values = self.graph.values
        data, out = values[node.inputs[0]], values[node.outputs[0]]
        h, w, c = extents(data)
        pads = values[node.inputs[1]].array().astype(np.int64)
        before, after = (int(pads[1, 0]), int(pads[2, 0])), (int(pads[1, 1]), int(pads[2, 1]))
        held = self.as_planar(data.index, node)
        result = Held(self.tensor(out.elements), unsigned_zero_point(out))
        shares = pad_planes(h, w, c, before, after, held.zero_point, result.zero_point,
                            self.shares(out.elements))
        multiplier, shift = requantization(float(scale_of(data) / scale_of(out)))
        scaled = {"alu_output_post_multiplier": multiplier, "alu_output_postshift": shift - 15}
        shares = tuple(replace(s, fields={**s.fields, **scaled}) for s in shares)
        self.planar[out.index] = result
        self.jobs.append(TPJob("pad", (node.index,), Place(held.tensor), Place(result.tensor), shares, pad=True))

    def fully_connected(self, node: Node) -> None:
        op = node.op
        assert isinstance(op, FullyConnected)
        values = self.graph.values
        data, tensor, out = values[node.inputs[0]], values[node.inputs[1]], values[node.outputs[0]]
        source = self.as_linear(data.index, node, model_zero_point=False)
        w = tensor.array().view(np.uint8)
        if tensor.dtype is DType.INT8:
            w = w ^ np.uint8(0x80)
        m, n = w.shape
        result = Held(self.tensor(m), self.stored_zero_point(op.activation, out))
        self.linear[out.index] = result

        def over(k: int) -> list[Job]:
            """The inputs as an image of k by k pixels, under one kernel of that size."""
            weights = Weights(w.reshape(m, n // k**2, k, k), np.zeros(m, np.int64), n // k**2,
                              unsigned_zero_point(tensor))
            if n == 1:
                weights = grown(weights, 2, 2)
            return [self.convolved(
                node, "fully_connected", source, result, Box(k, k, n // k**2), Box(1, 1, m), weights,
                conv_scale(data, scale_of(tensor), out), activation=op.activation)]

        jobs = over(1)
        larger = [k for k in range(2, self.chip.kernel_max + 1) if n % k**2 == 0 and n > k**2]
        if self.search and larger:  # whose streams may have zero runs
            saved, k = max((self.cost(jobs) - self.cost(over(k)), k) for k in larger)
            if saved > 0:
                self.choices.append(Choice(node.index, f"a kernel of {k}x{k} with zero runs", "a 1x1 kernel", saved,
                                           state="witnessed" if k <= 5 else "inferred"))
                jobs = over(k)
        self.jobs += jobs

    def window_average(self, node: Node, op: Pool2D) -> None:
        """Averages over windows without padding: a depthwise convolution with equal weights."""
        values = self.graph.values
        data, out = values[node.inputs[0]], values[node.outputs[0]]
        h, w, c = extents(data)
        out_h, out_w, _ = extents(out)
        ky, kx = op.window
        source = self.as_planar(data.index, node)
        weight, scale = average_weight(ky * kx, float(scale_of(data)) / float(scale_of(out)))
        weights = Weights(np.full((c, 1, ky, kx), weight, np.uint8), np.arange(c, dtype=np.int64), c, 0)
        if ky == kx == c == 1:
            weights = grown(weights, 2, 2)
        result = Held(self.tensor(out.elements), self.stored_zero_point(op.activation, out))
        self.planar[out.index] = result
        self.jobs.append(self.convolved(
            node, "average", source, result, Box(w, h, c), Box(out_w, out_h, c), weights, scale,
            activation=op.activation, first_pixel=op.stride[0] == 2, stride=op.stride[0]))

    def function(self, node: Node) -> None:
        op = node.op
        assert isinstance(op, Elementwise)
        values = self.graph.values
        data, out = values[node.inputs[0]], values[node.outputs[0]]
        linear = data.index in self.linear or data.index not in self.planar or self.is_one_layout(data.index)
        source = self.as_linear(data.index, node, False) if linear else self.as_planar(data.index, node)
        result = Held(self.tensor(out.elements), unsigned_zero_point(out))
        (self.linear if linear else self.planar)[out.index] = result
        table = Function.of(op, float(scale_of(data)), float(scale_of(out)))
        multiplier, shift = requantization(table.ratio)
        shares = through_table(data.shape, source.zero_point, result.zero_point, multiplier, shift - 15,
                               self.shares(data.elements))
        self.jobs.append(TPJob("table", (node.index,), Place(source.tensor), Place(result.tensor), shares,
                               pad=op.name in ("RELU", "ABS"), table=table.words))

    def average(self, node: Node) -> None:
        values = self.graph.values
        data, out = values[node.inputs[0]], values[node.outputs[0]]
        h, w, c = extents(data)
        op = node.op
        if isinstance(op, Pool2D) and (op.window != (h, w) or op.activation != "none" or out.elements != c):
            self.window_average(node, op)
            return
        pixels = h * w
        source = self.as_linear(data.index, node, model_zero_point=False)
        result = Held(self.tensor(c), unsigned_zero_point(out))
        self.linear[out.index] = result
        if pixels == 1:
            ratio = float(scale_of(data) / scale_of(out))
            self.rescale(source, Place(result.tensor), c, result.zero_point, ratio, node)
            return
        weight, scale = average_weight(pixels, float(scale_of(data)) / float(scale_of(out)))
        weights = Weights(np.full((1, pixels, 1, 1), weight, np.uint8), np.zeros(1, np.int64), pixels, 0)
        x = next(d for d in range(min(c, self.chip.tile_x_max), 0, -1) if c % d == 0)
        if c // x > ROWS_MAX:
            x = next(d for d in range(cdiv(c, ROWS_MAX), c + 1) if c % d == 0)
        job_node = replace(node, inputs=node.inputs[:1])  # a MEAN's axes are no bias
        self.jobs.append(self.convolved(
            job_node, "average", source, result, Box(x, c // x, pixels), Box(x, c // x, 1), weights, scale,
            activation="none"))

    # memory

    def home(self, tensor: int) -> tuple[int, int]:
        """(root tensor, byte offset in it)."""
        offset = 0
        while tensor in self.parents:
            tensor, base = self.parents[tensor]
            offset += base
        return tensor, offset

    def extent(self, tensor: int) -> tuple[int, int, int]:
        """(root tensor, first byte in it, end)."""
        root, offset = self.home(tensor)
        return root, offset, offset + self.sizes[tensor]

    def lifetimes(self, jobs: Sequence[Job], sizes: Sequence[int], downloads: list[Border]) -> dict[int, Lifetime]:
        """Root tensor -> its size, and the first and last job that needs it; -1 and len(jobs) are the host's turns."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}

        def touch(tensor: int, when: int) -> None:
            root, _ = self.home(tensor)
            first[root] = min(first.get(root, when), when)
            last[root] = max(last.get(root, when), when)

        for u in self.uploads.values():
            touch(u.place.tensor, -1)
        for when, job in enumerate(jobs):
            touch(job.source.tensor, when)
            touch(job.result.tensor, when)
        for d in downloads:
            touch(d.place.tensor, len(jobs))
        extents = dict.fromkeys(first, 0)
        for tensor, size in enumerate(sizes):
            root, offset = self.home(tensor)
            if root in extents:
                extents[root] = max(extents[root], offset + size)
        return {root: Lifetime(extents[root], first[root], last[root]) for root in extents}

    def on_chip(self, downloads: list[Border], search: Search) -> tuple[Mapping[int, int], tuple[Choice, ...]]:
        """Root tensor -> offset in on-chip SRAM, of those there. May reorder jobs, and cut groups into stripes."""
        borders = {b.place.tensor for b in (*self.uploads.values(), *downloads)}
        fixed = {self.home(t)[0] for t in borders}
        found = arrange(self.jobs, self.sizes, Tensors(
            lambda tensor: self.home(tensor)[0], self.extent,
            lambda jobs, sizes: self.lifetimes(jobs, sizes, downloads), fixed,
            fixed | self.parents.keys() | {root for root, _ in self.parents.values()},
        ), search, self.chip.axi_sram, ALIGNMENT, "cascade" in self.features)
        self.jobs, self.sizes = found.jobs, found.sizes
        return found.resident, found.choices

    def place(self, downloads: list[Border],
              resident: Mapping[int, int]) -> tuple[tuple[Buffer, ...], dict[int, tuple[int, int]]]:
        """One arena for all tensors but the residents; those whose lives do not meet share bytes."""
        lives = self.lifetimes(self.jobs, self.sizes, downloads)
        rest = [r for r in lives if r not in resident]
        placed = memory.place([lives[r] for r in rest], ALIGNMENT)
        at = {r: (0, offset) for r, offset in zip(rest, placed.offsets, strict=True)}
        at |= {r: (1, offset) for r, offset in resident.items()}
        buffers = [Buffer("tensors", max(placed.peak, 1))]
        if resident:
            end = max(offset + lives[r].size for r, offset in resident.items())
            buffers.append(Buffer("on-chip tensors", end, on_chip=True))
        homes = {}
        for tensor in range(len(self.sizes)):
            root, offset = self.home(tensor)
            if root in at:
                homes[tensor] = at[root][0], at[root][1] + offset
        return tuple(buffers), homes


def lower(graph: Graph, part: Part, chip: Chip, keep_all: bool = False, search: Search | None = None) -> Region:
    """The jobs, buffers and transfers of one region. `keep_all` downloads what every node computes.

    `search` replaces jobs by cheaper ones that compute the same, as far as its options allow.
    """
    work = _Lowering(graph, part, chip, keep_all, search)
    for node in part.nodes:
        work.node(node)
    downloads = []
    for v in work.kept:
        value = graph.values[v]
        held = work.as_linear(v, graph.producer[v])
        downloads.append(Border(v, Place(held.tensor), value.elements, value.dtype is DType.INT8))
    needed = {b.place.tensor for b in (*work.uploads.values(), *downloads)}
    needed |= work.parents.keys() | {whole for whole, _ in work.parents.values()}
    work.jobs = scaling_transposes(work.jobs, needed)
    choices: tuple[Choice, ...] = ()
    resident: Mapping[int, int] = {}
    if search:
        work.jobs, found = search.improve(work.jobs)
        tables = [_as_table(graph, job, search) for job in work.jobs if isinstance(job, TPJob) and job.table]
        choices = (*found, *work.choices, *(c for c in tables if c.saved_ns > 0))
    if search and work.features & {"axi-sram", "cascade"}:
        resident, more = work.on_chip(downloads, search)
        choices += more
    buffers, homes = work.place(downloads, resident)
    return Region(tuple(n.index for n in part.nodes), tuple(work.jobs), tuple(work.uploads.values()),
                  tuple(downloads), buffers, homes, choices)


def _as_table(graph: Graph, job: TPJob, search: Search) -> Choice:
    """What a function of one number saves on the NPU."""
    node = graph.nodes[job.nodes[0]]
    host_ns = round(1e9 * host_work(graph, node).seconds(search.speeds.chip.host))
    return Choice(node.index, f"{node.op.name} as a table", "on the host", host_ns - search.cost(job), "tp-table",
                  "inferred")


def dilated(weights: Weights, dilation: tuple[int, int]) -> Weights:
    """The kernels with dilation written out as filler between the taps."""
    if dilation == (1, 1):
        return weights
    out_c, channels, ky, kx = weights.values.shape
    dy, dx = dilation
    values = np.full((out_c, channels, (ky - 1) * dy + 1, (kx - 1) * dx + 1), weights.filler, np.uint8)
    values[:, :, ::dy, ::dx] = weights.values
    return replace(weights, values=values)


def weighted_sum(a: Value, b: Value, out: Value, zero_a: int, zero_b: int) -> WeightedSum:
    """The two bytes to multiply the operands with, so that no sum is rounded more than one step off.

    The reference driver's pair where its error stays below three quarters of an output step; otherwise the pair whose
    ratio comes nearest to that of the scales.
    """
    scale_a, scale_b, scale_out = (float(scale_of(v)) for v in (a, b, out))
    ratio = scale_b / scale_a
    theirs = reference_sum(scale_of(a), scale_of(b), zero_a, zero_b)
    unit = float(theirs.weight_scale)
    worst = 255 * scale_a / scale_out * (abs(theirs.first * unit - 1) + abs(theirs.second * unit - ratio))
    if worst <= 0.75:
        return theirs
    larger = np.arange(1, 256)
    smaller = np.rint(larger * min(ratio, 1 / ratio))
    best = int(np.argmin(np.abs(smaller / larger - min(ratio, 1 / ratio))))
    big, small = int(larger[best]), int(smaller[best])
    first, second, unit = (big, small, 1.0 / big) if ratio <= 1 else (small, big, ratio / big)
    return WeightedSum(first, second, np.float32(unit), -second * zero_b)


def average_weight(pixels: int, ratio: float) -> tuple[int, float]:
    """(weight byte, scale) whose product, as the engine cuts it to 16 bits, is nearest above ratio / pixels.

    From above, so that a tie rounds up as TFLite rounds it; nearest, so that nothing else does.
    """
    want = ratio / pixels
    candidates = []
    for weight in range(1, 256):
        exponent = int(np.floor(np.log2(want / weight)))
        mantissa = int(np.ceil(want / weight / 2.0**exponent * 2**15))
        scale = float(np.float32(mantissa * 2.0 ** (exponent - 15)))
        candidates.append((weight * scale - want, weight, scale))
    _, weight, scale = min(c for c in candidates if c[0] >= 0)
    return weight, scale
