"""Find the cheapest way to run each job, by the timing model: pieces, tiles, and what is kept in SRAM.

Every candidate computes the same bytes; only time and traffic differ. The reference driver's own choice is always
among them, so the result is never slower than it by the model. The number of candidates of a job is bounded, they are
tried in a fixed order, and the first of equals wins: the same job gives the same answer everywhere.

What varies:

- Pieces. A depthwise layer is a dense convolution nearly all of whose weights are zero. Its channels cut into blocks,
  each a job of its own over a slice of the planes, leave only the blocks on the diagonal: n blocks do 1/n of the
  multiplications and carry 1/n of the zeros, for n times the launches.
- Tiles. Lower tiles leave room for more kernels beside them: fewer superblocks that read the input again, more borders
  and more passes over the kernels.
- Caches. SRAM goes to the input tile or to the kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from npulab.profiling.types import span_ns
from npulab.program.types import Choice
from npulab.targets.vivante.caching import Image, cache
from npulab.targets.vivante.chips import AXI_SRAM_ADDRESS
from npulab.targets.vivante.coefficients_v7 import Weights
from npulab.targets.vivante.jobs import Job, NNJob, Place, TPJob
from npulab.targets.vivante.options import EncodeOptions
from npulab.targets.vivante.search_log import Answer, SearchLog
from npulab.targets.vivante.tiling import Tiling, cdiv, interleave, tile
from npulab.targets.vivante.timing import Counts, Speeds, Streams, count_nn, count_tp

PIECES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Output channels of a piece that are tried: multiples of the cores, a little closer together than powers of two."""
IMAGES: tuple[Image, ...] = ("driver", "first", "never")
DRAM = 1 << 31
"""An address that stands for DRAM where only that matters."""
LOG_VERSION = 1
"""Counts up when the same question may get another answer."""
FINALISTS = 2
"""Piece sizes, the cheapest under default tiles, for which tiles and caches are searched."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How one job's work is done: output channels of a piece (0: whole), tiles, and what the SRAM keeps.

    `tiling` None: the tiler's own, for a job that is not searched.
    """

    piece: int
    tiling: Tiling | None
    image: Image

    def difference(self, other: Variant) -> str:
        """What is so here and not in `other`, in words."""
        out = []
        if self.piece != other.piece:
            out.append(f"pieces of {self.piece} channels" if self.piece else "one job")
        if self.tiling and other.tiling and self.tiling != other.tiling and self.piece == other.piece:
            out.append(f"tiles {self.tiling.tile_x}x{self.tiling.tile_y} in {self.tiling.superblocks} passes")
        if self.image != other.image:
            out.append({"driver": "SRAM as the driver divides it", "first": "SRAM to the input tile first",
                        "never": "no input tile in SRAM"}[self.image])
        return ", ".join(out) or "the same"


class Search:
    """Improves the jobs of a plan, and knows what a job costs. Equal jobs are looked at once."""

    def __init__(self, speeds: Speeds, options: EncodeOptions, log: SearchLog | None = None) -> None:
        self.speeds, self.options, self.log = speeds, options, log
        self._variants: dict[tuple[object, ...], tuple[Variant, Variant, int]] = {}
        self._costs: dict[tuple[object, ...], int] = {}

    def improve(self, jobs: list[Job]) -> tuple[list[Job], list[Choice]]:
        """The jobs, each convolution replaced by its cheapest variant, and what that saves."""
        out: list[Job] = []
        choices: list[Choice] = []
        for job in jobs:
            if not isinstance(job, NNJob):
                out.append(job)
                continue
            job, shorter = zero_runs_everywhere(job, self.speeds, self.options)
            choices += shorter
            key = _key(job)
            if key not in self._variants:
                self._variants[key] = self._remembered(job, key)
            chosen, default, saved = self._variants[key]
            out += realize(job, chosen, self.speeds)
            if saved > 0:
                own = _default_tiling(job, chosen.piece, self.speeds)
                t = chosen.tiling
                driver_tiles = t is None or (t.tile_x, t.tile_y) == (own.tile_x, own.tile_y)
                choices.append(Choice(job.nodes[0], chosen.difference(default), default.difference(chosen), saved,
                                      *(("", "witnessed") if driver_tiles else ("tiles", "inferred"))))
        return out, choices

    def _remembered(self, job: NNJob, key: tuple[object, ...]) -> tuple[Variant, Variant, int]:
        """The answer of `search`, from the log if it is there and makes sense, and into the log if not."""
        if self.log is None:
            return search(job, self.speeds, self.options)
        everything = repr((LOG_VERSION, key, replace(self.speeds, given=frozenset()), sorted(self.options.features),
                           replace(self.options, features=frozenset())))
        digest = hashlib.sha256(everything.encode()).hexdigest()
        answer = self.log.answers.get(digest)
        if answer is not None:
            found = Variant(answer.piece, Tiling(*answer.tile), answer.image)
            if known := confirmed(job, found, self.speeds, self.options):
                return known
        made = search(job, self.speeds, self.options)
        t = made[0].tiling
        if t is not None:
            self.log.add(Answer(digest, made[0].piece, (t.tile_x, t.tile_y, t.superblocks), made[0].image))
        return made

    def cost(self, job: Job, source_on_chip: bool = False, result_on_chip: bool = False) -> int:
        """Nanoseconds of one job as it is, with its tensors in DRAM or in on-chip SRAM."""
        places = AXI_SRAM_ADDRESS if source_on_chip else DRAM, AXI_SRAM_ADDRESS if result_on_chip else DRAM
        if isinstance(job, TPJob):
            return span_ns(self.speeds.terms(count_tp(job.descriptors(*places), self.speeds.chip)))
        key = (*_key(job), job.tiling, job.image, *places)
        if key not in self._costs:
            self._costs[key] = span_ns(self.speeds.terms(self._counts(job, *places)))
        return self._costs[key]

    def traffic(self, job: Job) -> tuple[int, int]:
        """DRAM bytes that a job reads of its input and writes of its output, if both lie there."""
        if isinstance(job, TPJob):
            dram = count_tp(job.descriptors(DRAM, DRAM), self.speeds.chip).dram
        else:
            dram = self._counts(job, DRAM, DRAM).dram
        return dram.get("input", 0), dram.get("output", 0)

    def _counts(self, job: NNJob, source: int, result: int) -> Counts:
        tiling = job.tiling or _default_tiling(job, 0, self.speeds)
        return _counts(job, tiling, job.image, self.speeds, self.options, source, result)


def zero_runs_everywhere(job: NNJob, speeds: Speeds, options: EncodeOptions) -> tuple[NNJob, list[Choice]]:
    """A 1x1 job with zero runs in its streams, if that is allowed and saves time."""
    if job.zero_runs or job.order != "pointwise" or "zero-runs-1x1" not in options.features or not options.zero_runs:
        return job, []
    plain = Variant(0, _default_tiling(job, 0, speeds), "driver")
    other = replace(job, zero_runs=True)
    saved = cost(job, plain, speeds, options) - cost(other, plain, speeds, options)
    if saved <= 0:
        return job, []
    return other, [Choice(job.nodes[0], "zero runs in 1x1 kernels", "every weight a byte", saved, "zero-runs-1x1",
                          "inferred")]


def _key(job: NNJob) -> tuple[object, ...]:
    """What the answer depends on: shapes, and how many weights are not zero."""
    used = int(np.count_nonzero(job.weights.values != job.weight_zp))
    return (job.input, job.output, job.kernel_x, job.kernel_y, job.offset_x, job.offset_y, job.first_pixel, job.stride,
            job.order, job.tile_extent, job.tile_kernel, job.zero_runs, job.weights.values.shape, used)


def search(job: NNJob, speeds: Speeds, options: EncodeOptions) -> tuple[Variant, Variant, int]:
    """(the cheapest variant, the default one, nanoseconds saved)."""
    chip = speeds.chip
    default = Variant(0, tile(*job.tile_extent, job.weights.out_c, *job.tile_kernel, job.stride, chip), "driver")
    start = cost(job, default, speeds, options)
    best = (start, default)
    sizes = [0, *(p for p in PIECES if can_cut(job) and p < job.output.z)]
    ranked = sorted(((cost(job, replace(default, piece=p, tiling=_default_tiling(job, p, speeds)), speeds, options), i)
                     for i, p in enumerate(sizes)))
    for _, i in ranked[:FINALISTS]:
        piece = sizes[i]
        one = _piece(job, 0, piece) if piece else job
        for tiling in tilings(one, speeds, "tiles" in options.features):
            for image in IMAGES if options.image_cache and tiling.superblocks > 1 else IMAGES[:1]:
                variant = Variant(piece, tiling, image)
                found = cost(job, variant, speeds, options)
                if found < best[0]:
                    best = (found, variant)
    return best[1], default, start - best[0]


def confirmed(job: NNJob, found: Variant, speeds: Speeds,
              options: EncodeOptions) -> tuple[Variant, Variant, int] | None:
    """What `search` would give if `found` is its answer; None if that is not even one of its candidates."""
    default = Variant(0, _default_tiling(job, 0, speeds), "driver")
    if found != default:
        if found.piece and not (found.piece in PIECES and can_cut(job) and found.piece < job.output.z):
            return None
        one = _piece(job, 0, found.piece) if found.piece else job
        if found.tiling not in list(tilings(one, speeds, "tiles" in options.features)):
            return None
    saved = cost(job, default, speeds, options) - cost(job, found, speeds, options)
    return (found, default, saved) if saved >= 0 else None


def _default_tiling(job: NNJob, piece: int, speeds: Speeds) -> Tiling:
    return tile(*job.tile_extent, piece or job.weights.out_c, *job.tile_kernel, job.stride, speeds.chip)


def can_cut(job: NNJob) -> bool:
    """Whether cutting the output channels cuts the input channels too: kernels look at a window of the channels."""
    w = job.weights
    return w.values.shape[1] < w.in_c and job.last_word is None and job.kernel_x * job.kernel_y > 1


def pieces(job: NNJob, size: int) -> list[NNJob]:
    """The job cut into pieces of `size` output channels, each over the input channels that its kernels look at."""
    return [_piece(job, a, min(a + size, job.weights.out_c)) for a in range(0, job.weights.out_c, size)]


def _piece(job: NNJob, a: int, b: int) -> NNJob:
    """Output channels a..b of a job."""
    w = job.weights
    low, high = int(w.first[a:b].min()), int(w.first[a:b].max()) + w.values.shape[1]
    if high - low == 1 < w.in_c:  # a job over one plane is another kind of job: give it a neighbour
        low, high = (low - 1, high) if low else (low, high + 1)
    return replace(
        job, source=Place(job.source.tensor, job.source.offset + low * job.input.plane),
        result=Place(job.result.tensor, job.result.offset + a * job.output.plane),
        input=replace(job.input, z=high - low), output=replace(job.output, z=b - a), bias=job.bias[a:b],
        weights=Weights(w.values[a:b], w.first[a:b] - low, high - low, w.filler),
    )


def realize(job: NNJob, variant: Variant, speeds: Speeds) -> list[NNJob]:
    """The jobs of a variant."""
    made = pieces(job, variant.piece) if variant.piece else [job]
    return [replace(one, tiling=_fitted(one, variant, speeds), image=variant.image) for one in made]


def _fitted(one: NNJob, variant: Variant, speeds: Speeds) -> Tiling | None:
    """The variant's tiling for a piece that may be smaller than the others."""
    t = variant.tiling
    if t is None or not variant.piece or one.weights.out_c == variant.piece:
        return t
    return replace(t, superblocks=_even(t.superblocks, one.weights.out_c, speeds))


def _even(superblocks: int, out_c: int, speeds: Speeds) -> int:
    """As many superblocks, none of them empty: each takes the same number of kernels, the last what is left."""
    per_core = cdiv(out_c, min(out_c, speeds.chip.nn_cores))
    return cdiv(per_core, cdiv(per_core, min(superblocks, per_core)))


def tilings(job: NNJob, speeds: Speeds, others: bool) -> Iterator[Tiling]:
    """Tile widths and heights that the buffers hold, the tiler's own first; `others`: not only that."""
    chip = speeds.chip
    out_x, out_y = job.tile_extent
    kx, ky = job.tile_kernel
    own = tile(out_x, out_y, job.weights.out_c, kx, ky, job.stride, chip)
    yield replace(own, superblocks=_even(own.superblocks, job.weights.out_c, speeds))
    if not others:
        return
    seen = {(own.tile_x, own.tile_y)}
    even = job.stride > 1 or job.first_pixel
    for parts in range(1, 5):
        tile_x = cdiv(out_x, parts)
        if tile_x > chip.tile_x_max or (even and tile_x % 2 and tile_x != out_x):
            continue
        il = interleave(tile_x, ky)
        most = min(chip.input_buffer_depth * il - ky + 1, il * chip.accumulation_buffer_depth, out_y)
        for rows in range(1, 9):
            tile_y = min(most, cdiv(out_y, rows))
            if even and tile_y % 2:
                tile_y -= 1
            if tile_y < 1 or (tile_x, tile_y) in seen:
                continue
            seen.add((tile_x, tile_y))
            superblocks = _superblocks(tile_y, il, job.weights.out_c, kx, speeds)
            if superblocks:
                yield Tiling(tile_x, tile_y, _even(superblocks, job.weights.out_c, speeds))


def _superblocks(tile_y: int, il: int, out_c: int, kernel_x: int, speeds: Speeds) -> int:
    """Passes over the input with tiles of this height (0: not even one kernel fits); the tiler's own formula."""
    chip = speeds.chip
    depth = chip.accumulation_buffer_depth
    per_core = cdiv(out_c, chip.nn_cores)
    kernels = min(depth * il // tile_y, depth // 3 if kernel_x == 1 else depth * il, per_core, 127)
    if kernels < 1:
        return 0
    return cdiv(per_core, kernels)


def cost(job: NNJob, variant: Variant, speeds: Speeds, options: EncodeOptions) -> int:
    """Nanoseconds of all pieces, by the timing model, with the sizes of streams estimated."""
    size = variant.piece or job.weights.out_c
    whole, rest = divmod(job.weights.out_c, size)
    some = [(_piece(job, 0, size) if variant.piece else job, whole)]
    if rest:
        some.append((_piece(job, whole * size, job.weights.out_c), 1))
    total = 0
    for one, times in some:
        tiling = _fitted(one, variant, speeds)
        assert tiling is not None
        total += times * span_ns(speeds.terms(_counts(one, tiling, variant.image, speeds, options)))
    return total


def _counts(job: NNJob, tiling: Tiling, image: Image, speeds: Speeds, options: EncodeOptions, source: int = DRAM,
            result: int = DRAM) -> Counts:
    chip = speeds.chip
    streams = estimate(job, speeds, options)
    caching = cache(streams.size, tiling, job.kernel_x, job.input.z, job.output.z, chip, kernels=options.kernel_cache,
                    image=image if options.image_cache else "never")
    d = job.descriptor(source, result, 0, tiling, caching, chip.nn_cores)
    return count_nn(d, streams, chip, job.engine_macs)


def estimate(job: NNJob, speeds: Speeds, options: EncodeOptions) -> Streams:
    """The streams' size without encoding them: weights in use, and zero runs as if zeros were evenly spread."""
    chip, w = speeds.chip, job.weights
    cores = min(w.out_c, chip.nn_cores)
    weights = cores * cdiv(w.out_c, cores) * w.in_c * job.kernel_x * job.kernel_y
    used = int(np.count_nonzero(w.values != job.weight_zp))
    fixed = cores * (24 + 64 * cdiv(w.out_c, cores))
    best = (weights * 8 + fixed, weights, 0)
    if job.zero_runs and options.zero_runs:
        for bits in range(1, chip.zero_run_bits + 1):
            symbols = used + (weights - used >> bits) if used < weights else weights
            best = min(best, (symbols * (8 + bits) + fixed, symbols, bits))
    size = 64 + cores * cdiv(cdiv(best[0], 8 * cores), 64) * 64
    return Streams(size, best[1], weights, best[2])
