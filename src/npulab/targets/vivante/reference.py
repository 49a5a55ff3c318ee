"""The plan `reference`: what Mesa 25.0.7 (etnaviv with the Teflon delegate) does with a model, its defects included.

Its purpose is to be compared with that driver, byte for byte; `best` is for use. Facts: the project notes on the NN
engine (section 4 and 13) and on the TP engine and lowering (section 3). H1, H2, ... are hazards of NN section 13.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import Add, Concat, Conv2D, DepthwiseConv2D, FullyConnected, Pad, Split
from npulab.plan.partition import Part
from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.coefficients_v7 import Order, Weights
from npulab.targets.vivante.jobs import Border, Box, Buffer, Job, NNJob, Place, Region, TPJob
from npulab.targets.vivante.layout import from_planar, reference_pad, reference_reshuffle, to_planar
from npulab.targets.vivante.tiling import cdiv


def unsigned_zero_point(value: Value) -> int:
    """The zero point in the engine's unsigned domain: int8 tensors are moved up by 128."""
    zero_point = value.quantization.zero_point if value.quantization else 0
    return (zero_point + 128 if value.dtype is DType.INT8 else zero_point) & 0xFF


def raw_zero_point(value: Value) -> int:
    """The model's own zero point cut to a byte, as the driver does where it forgets the 128 (H2, H8)."""
    return (value.quantization.zero_point if value.quantization else 0) & 0xFF


def scale_of(value: Value) -> np.float32:
    return np.float32(value.quantization.scale if value.quantization else 0.0)


def dims(value: Value) -> tuple[int, int, int]:
    """(D1, D2, C) as the driver reads them: shape entries 1, 2 and 3, missing ones 0."""
    padded = (*value.shape, 0, 0, 0, 0)
    return padded[1], padded[2], padded[3]


class _Lowering:
    """One region on its way to jobs. Tensors behind the graph's own are temporaries."""

    def __init__(self, graph: Graph, part: Part, chip: Chip) -> None:
        self.graph, self.part, self.chip = graph, part, chip
        self.made = {v for n in part.nodes for v in n.outputs}
        self.read = {v for n in part.nodes for v in n.inputs if v >= 0}
        self.next = len(graph.values)
        self.jobs: list[Job] = []
        self.sizes: dict[int, int] = {}
        self.storage: list[tuple[str, tuple[int, ...]]] = []

    def temporary(self) -> int:
        self.next += 1
        return self.next - 1

    def add(self, job: Job, in_bytes: int, out_bytes: int, second: int | None = None) -> None:
        self.jobs.append(job)
        self._grow(job.source.tensor, in_bytes)
        self._grow(job.result.tensor, out_bytes)
        if second is None:
            self.storage.append(("one", (job.source.tensor, job.result.tensor)))
        else:
            self._grow(second, in_bytes)
            self.storage.append(("pair", (job.source.tensor, second, job.result.tensor)))

    def _grow(self, tensor: int, size: int) -> None:
        self.sizes[tensor] = max(self.sizes.get(tensor, 0), size)

    def to_planar(self, node: Node, value: Value) -> int:
        d1, d2, c = dims(value)
        out = self.temporary()
        size = d1 * d2 * c
        self.add(TPJob("transpose", (node.index,), Place(value.index), Place(out),
                       to_planar(d1, d2, c, unsigned_zero_point(value))), size, size)
        return out

    def planar_input(self, node: Node, value: Value) -> int:
        return value.index if value.index in self.made or dims(value)[2] == 1 else self.to_planar(node, value)

    def result(self, value: Value) -> tuple[int, bool]:
        """The tensor a job writes, and whether a detranspose must follow."""
        if value.index in self.read or dims(value)[2] == 1:
            return value.index, False
        return self.temporary(), True

    def from_planar(self, node: Node, tensor: int, value: Value) -> None:
        d1, d2, c = dims(value)
        size = d1 * d2 * c
        self.add(TPJob("detranspose", (node.index,), Place(tensor), Place(value.index),
                       from_planar(d1, d2, c, unsigned_zero_point(value))), size, size)

    def node(self, node: Node) -> None:
        match node.op:
            case Conv2D() | DepthwiseConv2D():
                self.convolution(node)
            case Add():
                self.addition(node)
            case Concat():
                self.concatenation(node)
            case Split():
                self.storage.append(("split", (node.inputs[1], *node.outputs)))
                self._grow(node.inputs[1], self.graph.values[node.inputs[1]].elements)
            case Pad():
                self.pad(node)
            case FullyConnected():
                self.fully_connected(node)
            case _:
                raise UnsupportedError(f"{node} has no lowering in plan reference")

    def convolution(self, node: Node) -> None:
        op = node.op
        assert isinstance(op, Conv2D | DepthwiseConv2D)
        values = self.graph.values
        data, kernel, out = values[node.inputs[0]], values[node.inputs[1]], values[node.outputs[0]]
        d1, d2, in_c = dims(data)
        out_d1, out_d2, out_c = dims(out)
        w = kernel.array().view(np.uint8)
        _, k1, k2, _ = w.shape
        depthwise = isinstance(op, DepthwiseConv2D)
        same, stride = op.padding == "same", op.stride[0]
        pointwise = k1 == 1 and k2 == 1
        zp = unsigned_zero_point(kernel)
        filler = (zp - 128) & 0xFF if kernel.dtype is DType.INT8 else zp
        source = self.planar_input(node, data)
        if stride > 1 and not pointwise and not (depthwise and (d1 > 5 or d1 < 3)):
            source = self.reshuffle(node, source, data, k1, same)

        first_pixel = stride > 1 and (depthwise or pointwise)
        if depthwise:
            weights = Weights(w[0].transpose(2, 0, 1)[:, None], np.arange(out_c, dtype=np.int64), in_c, filler)
            if out_c == 1 and stride == 1:
                weights = replace(weights, in_c=1)
            elif 2 < d1 < 8:
                first_pixel = False
        else:
            weights = Weights(w.transpose(0, 3, 1, 2), np.zeros(out_c, np.int64), in_c, filler)
        if pointwise and in_c == 1:
            weights = grown(weights, 2, 2)
            pointwise = False
        size1, size2 = d1, d2
        original_k1 = k1
        k1, k2 = weights.values.shape[2:]
        if stride > 1 and not first_pixel:
            weights = space_to_depth_weights(weights)
            grow = 0 if not same else 2 if original_k1 == 5 else 1
            size1, size2 = cdiv(d1, 2) + grow, cdiv(d2, 2) + grow
            k1, k2 = weights.values.shape[2:]

        swap = size2 > size1
        in_x, in_y = (size2, size1) if swap else (size1, size2)
        out_x, out_y = (out_d2, out_d1) if swap else (out_d1, out_d2)
        offset = _offset(same, stride, k1, in_x, depthwise)
        doubled = 2 if first_pixel else 1
        order, split = _order(pointwise, out_c, weights.in_c, k2, depthwise, size1)
        target, detranspose = self.result(out)
        self.add(NNJob(
            role="depthwise" if depthwise else "convolution", nodes=(node.index,), source=Place(source),
            result=Place(target), input=Box(in_x, in_y, weights.in_c), output=Box(out_x, out_y, out_c),
            kernel_x=k1, kernel_y=k2, offset_x=offset, offset_y=offset, first_pixel=first_pixel, stride=stride,
            relu=op.activation in ("relu", "relu6"), in_zp=unsigned_zero_point(data),
            out_zp=unsigned_zero_point(out), weight_zp=zp, scale=conv_scale(data, scale_of(kernel), out),
            weights=weights, bias=bias_of(self.graph, node, out_c), order=order, split=split,
            tile_extent=(out_d1 * doubled, out_d2 * doubled), tile_kernel=(k1, k2), zero_runs=not pointwise,
            taps=kernel.elements // out_c,
        ), size1 * size2 * weights.in_c, out_d1 * out_d2 * out_c)
        if detranspose:
            self.from_planar(node, target, out)

    def reshuffle(self, node: Node, source: int, data: Value, kernel: int, same: bool) -> int:
        d1, d2, c = dims(data)
        out = self.temporary()
        grow = 0 if not same else 2 if kernel == 5 else 1
        size = (cdiv(d1, 2) + grow) * (cdiv(d2, 2) + grow) * 4 * c
        shares = reference_reshuffle(d1, d2, c, kernel, same, unsigned_zero_point(data), self.chip.tp_cores)
        self.add(TPJob("reshuffle", (node.index,), Place(source), Place(out), shares), d1 * d2 * c, size)
        return out

    def addition(self, node: Node) -> None:
        values = self.graph.values
        a, b, out = values[node.inputs[0]], values[node.inputs[1]], values[node.outputs[0]]
        d1, d2, c = dims(a)
        sum_of = reference_sum(scale_of(a), scale_of(b), raw_zero_point(a), raw_zero_point(b))
        width = addition_width(d1 * d2)
        height = d1 * d2 * c // width
        in_x, in_y = (height, width) if height > width else (width, height)
        target, detranspose = self.result(out)
        kernel = np.array([sum_of.first, 0, 0, 0], np.uint8).reshape(1, 1, 2, 2)
        self.add(NNJob(
            role="addition", nodes=(node.index,), source=Place(a.index), result=Place(target),
            input=Box(in_x, in_y, 2), output=Box(in_x, in_y, 1), kernel_x=2, kernel_y=2, offset_x=0, offset_y=0,
            first_pixel=False, stride=1, relu=False, in_zp=unsigned_zero_point(a), out_zp=unsigned_zero_point(out),
            weight_zp=0, scale=conv_scale(a, sum_of.weight_scale, out),
            weights=Weights(kernel, np.zeros(1, np.int64), 1, 0), bias=np.array([sum_of.bias], np.int64),
            order="single", split=False, tile_extent=(width, height), tile_kernel=(2, 2), last_word=sum_of.second,
            zero_runs=False,
        ), d1 * d2 * c, d1 * d2 * c, second=b.index)
        if detranspose:
            self.from_planar(node, target, out)

    def concatenation(self, node: Node) -> None:
        values = self.graph.values
        inputs = list(node.inputs)
        if inputs[0] not in self.made:
            inputs = [self.to_planar(node, values[v]) for v in inputs]
        out = values[node.outputs[0]]
        target, detranspose = self.result(out)
        for tensor, v in zip(inputs, node.inputs, strict=True):
            self._grow(tensor, values[v].elements)
        self._grow(target, out.elements)
        self.storage.append(("concat", (target, *inputs)))
        if detranspose:
            self.from_planar(node, target, out)

    def pad(self, node: Node) -> None:
        values = self.graph.values
        data, out = values[node.inputs[0]], values[node.outputs[0]]
        d1, d2, c = dims(data)
        source = self.planar_input(node, data)
        target, detranspose = self.result(out)
        shares = reference_pad(d1, d2, c, raw_zero_point(data), raw_zero_point(out), self.chip.tp_cores)
        self.add(TPJob("pad", (node.index,), Place(source), Place(target), shares, pad=True), d1 * d2 * c,
                 (d1 + 2) * (d2 + 2) * c)
        if detranspose:
            self.from_planar(node, target, out)

    def fully_connected(self, node: Node) -> None:
        values = self.graph.values
        data, kernel, out = values[node.inputs[0]], values[node.inputs[1]], values[node.outputs[0]]
        w = kernel.array().view(np.uint8)
        m, n = w.shape
        x = _largest_divisor(n, 15)
        y = _largest_divisor(n // x, 15)
        z = n // (x * y)
        zp = raw_zero_point(kernel)
        weights = Weights(w.reshape(m, 1, n, 1), np.zeros(m, np.int64), 1, zp)
        order, split = _order(False, m, 1, 1, False, n)
        self.add(NNJob(
            role="fully_connected", nodes=(node.index,), source=Place(data.index), result=Place(out.index),
            input=Box(x, y, z), output=Box(1, 1, m), kernel_x=x, kernel_y=y, offset_x=0, offset_y=0,
            first_pixel=False, stride=1, relu=False, in_zp=raw_zero_point(data), out_zp=raw_zero_point(out),
            weight_zp=zp, scale=conv_scale(data, scale_of(kernel), out), weights=weights,
            bias=bias_of(self.graph, node, m), order=order, split=split, tile_extent=(1, 1), tile_kernel=(n, 1),
        ), n, m)

    def homes(self) -> tuple[tuple[Buffer, ...], dict[int, tuple[int, int]]]:
        """Buffer and offset of every tensor, as the driver walks its operations (TP notes 3.6)."""
        sizes: list[int] = []
        homes: dict[int, tuple[int, int]] = {}

        def create(tensor: int, size: int) -> None:
            if tensor in homes:
                buffer, offset = homes[tensor]
                sizes[buffer] = max(sizes[buffer], offset + size)
            else:
                homes[tensor] = len(sizes), 0
                sizes.append(size)

        def alias(tensor: int, parent: int, offset: int) -> None:
            buffer, base = homes[parent]
            homes[tensor] = buffer, base + offset
            sizes[buffer] = max(sizes[buffer], base + offset + self.sizes.get(tensor, 0))

        for kind, tensors in self.storage:
            if kind == "pair":
                first, second, _ = tensors
                create(first, 2 * self.sizes[first])
                alias(second, first, self.sizes[first])
            elif kind == "one":
                create(tensors[0], self.sizes[tensors[0]])
            else:
                create(tensors[0], self.sizes[tensors[0]])
                offset = 0
                for part in tensors[1:]:
                    alias(part, tensors[0], offset)
                    offset += self.sizes.get(part) or self.graph.values[part].elements
        for kind, tensors in self.storage:
            if kind in ("pair", "one") and tensors[-1] not in homes:
                create(tensors[-1], self.sizes[tensors[-1]])
        return tuple(Buffer(f"tensors {i}", size) for i, size in enumerate(sizes)), homes


def lower(graph: Graph, part: Part, chip: Chip, mended: bool = False) -> Region:
    """The jobs, buffers and transfers of one region.

    The driver hands out a tensor in planes when the region also reads it itself (TP notes 4.3). `mended` transposes it:
    for options that part a network where that driver never did.
    """
    work = _Lowering(graph, part, chip)
    for node in part.nodes:
        work.node(node)
    linear: dict[int, int] = {}
    for v in part.outputs:
        value = graph.values[v]
        if mended and v in work.read and v in work.made and dims(value)[2] != 1:
            linear[v] = work.temporary()
            d1, d2, c = dims(value)
            work.add(TPJob("detranspose", (graph.producer[v].index,), Place(v), Place(linear[v]),
                           from_planar(d1, d2, c, unsigned_zero_point(value))), value.elements, value.elements)
    buffers, homes = work.homes()

    def border(v: int) -> Border:
        value = graph.values[v]
        return Border(v, Place(linear.get(v, v)), value.elements, value.dtype is DType.INT8)

    return Region(tuple(n.index for n in part.nodes), tuple(work.jobs),
                  tuple(border(v) for v in part.inputs if v in homes),
                  tuple(border(v) for v in part.outputs), buffers, homes)


def bias_of(graph: Graph, node: Node, out_c: int) -> NDArray[np.int64]:
    """The node's bias as int64, zeros where it has none."""
    bias = graph.value(node, 2)
    if bias is None:
        return np.zeros(out_c, np.int64)
    return bias.array().reshape(-1).astype(np.int64)


def conv_scale(data: Value, weight_scale: np.float32, out: Value) -> float:
    """in_scale * weight_scale / out_scale in float32, step by step as the driver computes it."""
    return float(np.float32(np.float32(scale_of(data) * weight_scale) / scale_of(out)))


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """An addition as the engine computes it: first * x0 + second * x1 + bias, in steps of weight_scale * scale of x0.

    The zero point of x0 is not in the bias: it is folded in with that of every other job.
    """

    first: int
    second: int
    weight_scale: np.float32
    bias: int


def reference_sum(s0: np.float32, s1: np.float32, z0: int, z1: int) -> WeightedSum:
    """The driver's weights for two operands with these scales and zero points (NN notes 4.4)."""
    ratio = np.float32(s1 / s0)
    weight_scale = np.float32(max(float(ratio), 1.0) / 255.0)
    first = round_half_away(1.0 / float(weight_scale)) & 0xFF
    second = round_half_away(float(ratio) / float(weight_scale)) & 0xFF
    difference = np.float32(np.float32(z0 - z1) * s1)
    bias = round_half_away(float(np.float32(difference / np.float32(weight_scale * s0))))
    bias -= round_half_away(float(np.float32(ratio / weight_scale))) * z0
    return WeightedSum(first, second, weight_scale, bias)


def round_half_away(x: float) -> int:
    """C's round(): nearest, halves away from zero."""
    return int(np.copysign(np.floor(abs(x) + 0.5), x))


def addition_width(plane: int) -> int:
    """Row length of an addition: 128, 64 or 32 where they divide the plane, else its largest divisor up to 63."""
    return next((w for w in (128, 64, 32) if plane % w == 0), 0) or _largest_divisor(plane, 63)


def _largest_divisor(n: int, most: int) -> int:
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def grown(weights: Weights, ky: int, kx: int) -> Weights:
    """The kernels in a larger frame, tap (0, 0) kept in place, filler elsewhere."""
    out_c, channels, had_y, had_x = weights.values.shape
    values = np.full((out_c, channels, ky, kx), weights.filler, np.uint8)
    values[:, :, :had_y, :had_x] = weights.values
    return replace(weights, values=values)


def space_to_depth_weights(weights: Weights) -> Weights:
    """Kernels for the input that space-to-depth makes.

    Tap (2i + a, 2j + b) of channel z becomes tap (i, j) of channel 4z + 2a + b.
    """
    out_c, channels, ky, kx = weights.values.shape
    half_y, half_x = cdiv(ky, 2), cdiv(kx, 2)
    even = grown(weights, 2 * half_y, 2 * half_x).values
    phases = even.reshape(out_c, channels, half_y, 2, half_x, 2).transpose(0, 1, 3, 5, 2, 4)
    return Weights(np.ascontiguousarray(phases).reshape(out_c, channels * 4, half_y, half_x), weights.first * 4,
                   weights.in_c * 4, weights.filler)


def _offset(same: bool, stride: int, kernel_x: int, in_x: int, depthwise: bool) -> int:
    """Implicit padding as the driver computes it; wrong in corner cases (H5). `kernel_x` is that after lowering."""
    if not same or kernel_x <= 2:
        return 0
    if stride == 1:
        return -1 if kernel_x < 5 else -2
    if in_x < 5 or (depthwise and (kernel_x == 5 or in_x == 5)):
        return -1 if (in_x <= 5 and kernel_x < 5) or (in_x > 5 and kernel_x >= 5) else -2
    return 0


def _order(pointwise: bool, out_c: int, in_c: int, k2: int, depthwise: bool,
           d1: int) -> tuple[Order, bool]:
    """The driver's order of weights, and whether patches are split; H7 included."""
    if pointwise and out_c > 8:
        return "pointwise", False
    if in_c > 1:
        return "spatial", k2 > 3
    return "single", k2 > 3 and (depthwise or d1 > 64)
