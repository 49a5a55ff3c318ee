"""Jobs before they have bits: what a lowering decides, and nothing that an address or a stream would change.

Tensors are numbered: those of the graph by their value index, temporaries behind them. Where each lies is decided once
all jobs are known; a job speaks of (tensor, byte offset).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError
from npulab.program.types import Choice
from npulab.targets.vivante.caching import Caching, Image
from npulab.targets.vivante.coefficients_v7 import Kernels, Order, Weights
from npulab.targets.vivante.nn import POOLING_FIRST_PIXEL, POOLING_NONE, NNDescriptor
from npulab.targets.vivante.tiling import Tiling
from npulab.targets.vivante.tp import TPDescriptor


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor, and a byte offset in it."""

    tensor: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Box:
    """Extents of an image as the engine sees it, and the pitch of its rows (bytes) and planes (rows)."""

    x: int
    y: int
    z: int
    x_stride: int = 0
    y_stride: int = 0

    @property
    def row(self) -> int:
        return self.x_stride or self.x

    @property
    def rows(self) -> int:
        return self.y_stride or self.y

    @property
    def plane(self) -> int:
        """Bytes from one plane to the next."""
        return self.row * self.rows


@dataclass(frozen=True, slots=True, eq=False)
class NNJob:
    """One convolution for the NN engine.

    scale       in_scale * weight_scale / out_scale, as float32 arithmetic leaves it.
    bias        (out_c) int64, in steps of in_scale * weight_scale, before the input zero point is folded in.
    last_word   what follows the last weight instead of the plane's offset (the second operand's weight of an addition).
    taps        multiplications that the model asks for, for an output; 0: as many as a kernel has weights.
    again       rows of the output that another job has computed already.
    tiling      tiles and superblocks, where something better than the tiler's own was found.
    image       whether the input tile gets SRAM (caching.py).
    tile_extent output (x, y) that the tiler is told; the reference driver exchanges them on images that are not square.
    """

    role: str
    nodes: tuple[int, ...]
    source: Place
    result: Place
    input: Box
    output: Box
    kernel_x: int
    kernel_y: int
    offset_x: int
    offset_y: int
    first_pixel: bool
    stride: int
    relu: bool
    in_zp: int
    out_zp: int
    weight_zp: int
    scale: float
    weights: Weights
    bias: NDArray[np.int64]
    order: Order
    split: bool
    tile_extent: tuple[int, int]
    tile_kernel: tuple[int, int]
    last_word: int | None = None
    zero_runs: bool = True
    taps: int = 0
    again: int = 0
    tiling: Tiling | None = None
    image: Image = "driver"

    @property
    def engine_macs(self) -> int:
        """Multiply-accumulates that the model asks for; zeros that lowering put in do not count."""
        w = self.weights.values
        taps = self.taps or int(np.prod(w.shape[1:]))
        return int(w.shape[0]) * taps * self.output.x * (self.output.y - self.again)

    def kernels(self, cores: int, superblocks: int) -> Kernels:
        """The streams' content: biases with the input zero point folded in, and each kernel's output offset."""
        w = self.weights
        values = w.values.reshape(w.out_c, -1)
        total = values.sum(axis=1, dtype=np.int64) - values.shape[1] * self.weight_zp
        outside = w.in_c * self.kernel_taps - values.shape[1]
        if outside and w.filler != self.weight_zp:
            total += outside * (w.filler - self.weight_zp)
        offsets = np.arange(w.out_c, dtype=np.int64) * self.output.plane
        if self.last_word is not None:
            offsets = np.array([self.last_word], np.int64)
        return Kernels(w, self.order, self.split, self.weight_zp, self.bias - total * self.in_zp, offsets,
                       self.output.plane, cores, superblocks)

    @property
    def kernel_taps(self) -> int:
        return int(self.weights.values.shape[2] * self.weights.values.shape[3])

    def descriptor(self, source: int, result: int, coefficients: int, tiling: Tiling, caching: Caching,
                   cores: int) -> NNDescriptor:
        """The 34 words, given the three addresses."""
        multiplier, shift = requantization(self.scale)
        doubled = 2 if self.first_pixel else 1
        per_core = -(-self.output.z // cores)
        return NNDescriptor(
            kernel_x=self.kernel_x, kernel_y=self.kernel_y, kernel_z=self.input.z,
            kernels_per_core=-(-per_core // tiling.superblocks),
            pooling=POOLING_FIRST_PIXEL if self.first_pixel else POOLING_NONE,
            pooling_xy_size=0 if self.first_pixel else 1,
            in_x_size=self.input.x, in_y_size=self.input.y, in_x_stride=self.input.row, in_y_stride=self.input.rows,
            in_x_offset=self.offset_x, in_y_offset=self.offset_y, relu=int(self.relu),
            out_x_size=self.output.x * doubled, out_y_size=self.output.y * doubled, out_z_size=self.output.z,
            out_x_stride=self.output.row, out_y_stride=self.output.rows,
            out_tile_x=tiling.tile_x, out_tile_y=tiling.tile_y,
            kernel_address=coefficients, in_image_address=source, out_image_address=result,
            image_caching_mode=caching.image_mode, kernel_caching_mode=caching.kernel_mode,
            kernel_pattern_msb=caching.pattern_msb, kernel_pattern=caching.pattern,
            kernel_cache_start=caching.kernel_start, kernel_cache_end=caching.kernel_end,
            image_cache_start=caching.image_start, image_cache_end=caching.image_end,
            in_border_const=self.in_zp, coef_zero_point=self.weight_zp, out_zero_point=self.out_zp,
            post_multiplier=multiplier, post_shift=shift,
        )


@dataclass(frozen=True, slots=True)
class Share:
    """One TP core's descriptor: byte offsets into the job's input and output, and the fields that are not default."""

    source: int
    result: int
    fields: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TPJob:
    """One layout job for the TP engine, cut over its cores; with `table`, a function of each element too."""

    role: str
    nodes: tuple[int, ...]
    source: Place
    result: Place
    shares: tuple[Share, ...]
    pad: bool = False
    table: bytes = b""

    def descriptors(self, source: int, result: int, table: int = 0) -> list[TPDescriptor]:
        """Each core's 31 words, given the addresses of the job's input, its output and its table."""
        last = len(self.shares) - 1
        return [
            TPDescriptor(**s.fields, in_image_base_address=source + s.source, out_image_base_address=result + s.result,
                         alu_load_pwl_lut_address=table, no_flush=int(i < last))
            for i, s in enumerate(self.shares)
        ]


Job = NNJob | TPJob


def requantization(scale: float) -> tuple[int, int]:
    """(multiplier, shift) such that accumulators times scale is acc * (2**15 + multiplier) >> shift.

    The multiplier keeps the top 15 fraction bits of the float32 scale, the rest is cut off (v7).
    Source: NN notes 6.5, checked against the vendor's self-test vector.
    """
    bits = int(np.float32(scale).view(np.uint32))
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    shift = 142 - exponent
    if not 0 <= shift <= 127:
        raise CapacityError(f"a requantization scale of {scale:g} does not fit the engine", want="2**-112 .. 2**15",
                            source="NN notes, section 6.5")
    return fraction >> 8, shift


@dataclass(frozen=True, slots=True)
class Buffer:
    """A range of NPU memory for tensors. `size` is what its largest user needs, in bytes.

    `on_chip`: in AXI SRAM. All regions share that; nothing in it lives from one to the next.
    """

    name: str
    size: int
    on_chip: bool = False


@dataclass(frozen=True, slots=True)
class Border:
    """A tensor that crosses between host and NPU: model layout, at (tensor, offset); `flip` for int8."""

    value: int
    place: Place
    size: int
    flip: bool


@dataclass(frozen=True, slots=True)
class Region:
    """The jobs of one submission, what is uploaded before it, and what is downloaded after."""

    nodes: tuple[int, ...]
    jobs: tuple[Job, ...]
    uploads: tuple[Border, ...]
    downloads: tuple[Border, ...]
    buffers: tuple[Buffer, ...]
    homes: Mapping[int, tuple[int, int]]
    """tensor -> (buffer number, byte offset)."""
    choices: tuple[Choice, ...] = ()
    """What the search chose."""
