"""How long a program takes: counts of work, read off its command words, descriptors and streams, times speeds.

Two steps, kept apart. `count` walks the words as the front end does and says what each job does: multiplier cycles,
bytes from each memory, elements through the TP cores. It knows no time. `Speeds` turns counts into nanoseconds, by the
law of `npulab.profiling.types`: inside a job everything overlaps, the slowest resource decides, starting it comes on
top; jobs follow each other (the open driver leaves parallel jobs off).

What a job does, and where that is known from (project's NN notes, sections 5, 6.4 and 12):

- A tile of the output is computed superblock by superblock; each reads the tile's input and its share of the kernels.
  So input bytes are those of the tiles with their borders, times superblocks, unless the image cache keeps the tile;
  coefficient bytes are the streams, times tiles, unless the kernel cache keeps them.
- A core takes its kernels one after the other. For each it steps through a tile's rows, as many at once as share the 64
  lanes, and spends two cycles on six taps of two rows (a 3x3 kernel: two cycles a channel), or one on six channels of a
  1x1 kernel. Inferred, not measured.
- A weight that stands in the stream costs its slot. One that a zero run stands for costs `zero_cost` of a slot: fitted,
  since the published times leave no room for full slots, and the chip's peak leaves none for faster ones.
"""

from __future__ import annotations

import struct
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files

import msgspec

from npulab.errors import ModelError
from npulab.importers import load
from npulab.profiling.host import HostWork, host_work
from npulab.profiling.types import Constant, Span, State, Term, Unit
from npulab.program.law import Memory
from npulab.program.types import HostStep, Job, NpuStep, Program, Transfer
from npulab.targets.target import Prediction, Timing
from npulab.targets.vivante.chips import AXI_SRAM_ADDRESS, LANES, MULTIPLIERS, Chip
from npulab.targets.vivante.fp21 import TABLE_BYTES
from npulab.targets.vivante.machine.frontend import FrontEnd
from npulab.targets.vivante.nn import (
    CACHE_FULL,
    CACHE_NONE,
    POOLING_FIRST_PIXEL,
    NNDescriptor,
)
from npulab.targets.vivante.nn import DESCRIPTOR_BYTES as NN_BYTES
from npulab.targets.vivante.tiling import align, cdiv, interleave
from npulab.targets.vivante.tp import DESCRIPTOR_BYTES as TP_BYTES
from npulab.targets.vivante.tp import TPDescriptor

WORDS_MAX = 1 << 22


@dataclass(frozen=True, slots=True)
class Counts:
    """What one span does, without a time.

    cycles     of the NN cores, side by side, if every weight took its slot.
    symbols    in the coefficient streams, of `weights` weights that they stand for.
    elements   through the busiest TP core.
    launches   descriptors that the front end starts.
    copied     bytes that the CPU copies to or from NPU memory.
    submits    kernel calls.
    """

    unit: Unit
    name: str
    nodes: tuple[int, ...] = ()
    step: int = 0
    job: int | None = None
    cycles: int = 0
    symbols: int = 0
    weights: int = 0
    elements: int = 0
    launches: int = 0
    copied: int = 0
    submits: int = 0
    host: HostWork | None = None
    macs: int = 0
    macs_useful: int = 0
    waste: Mapping[str, int] = field(default_factory=dict)
    dram: Mapping[str, int] = field(default_factory=dict)
    sram: Mapping[str, int] = field(default_factory=dict)
    touched: Mapping[str, int] = field(default_factory=dict)


# counts


def count(program: Program, chip: Chip) -> list[Counts]:
    """Every span of the program, in the order in which it runs.

    Raises: ModelError if a stream does not start the jobs that the program lists, or a descriptor makes no sense.
    """
    memory = Memory(program.sections)
    out: list[Counts] = []
    for i, step in enumerate(program.steps):
        if isinstance(step, HostStep):
            out += _host_step(step, i)
            continue
        out += [_transfer(t, i, "upload") for t in step.uploads]
        out += [_job(memory, job, starts, i, chip) for job, starts in _started(step, i)]
        out.append(Counts("submit", "submission", step=i, submits=1))
        out += [_transfer(t, i, "download") for t in step.downloads]
    return out


def _transfer(t: Transfer, step: int, name: str) -> Counts:
    return Counts("transfer", name, step=step, copied=t.size, touched={"copied": t.size})


def _host_step(step: HostStep, i: int) -> Iterator[Counts]:
    graph = load(step.model)
    for number, node in zip(step.nodes, graph.nodes, strict=True):
        shapes = [graph.values[v].shape for v in (node.inputs[:1] + node.outputs[:1]) if v >= 0]
        yield Counts("host", " -> ".join("x".join(map(str, s)) for s in shapes), (number,), i,
                     host=host_work(graph, node))


def _started(step: NpuStep, i: int) -> Iterator[tuple[Job, list[tuple[str, int]]]]:
    """The step's jobs with the (unit, descriptor address) that the front end starts for each."""
    starts: list[tuple[str, int]] = []
    front = FrontEnd(lambda a: starts.append(("nn", a)), lambda a: starts.append(("tp", a)))
    faults = front.run(step.words, WORDS_MAX)
    listed = [(job.kind, a) for job in step.jobs for a in job.descriptors]
    if faults or starts != listed:
        raise ModelError(f"the stream of step {i} does not start the jobs that the program lists",
                         got=str(faults[0]) if faults else f"{len(starts)} jobs", want=f"{len(listed)} jobs")
    at = 0
    for job in step.jobs:
        yield job, starts[at : at + len(job.descriptors)]
        at += len(job.descriptors)


def _job(memory: Memory, job: Job, starts: Sequence[tuple[str, int]], step: int, chip: Chip) -> Counts:
    if job.kind == "nn":
        d = NNDescriptor.decode(_words(memory.content(starts[0][1], NN_BYTES)))
        streams = Streams.read(memory, d, chip, job.coefficients)
        return replace(count_nn(d, streams, chip, job.macs), nodes=job.nodes, step=step, job=job.index)
    shares = [TPDescriptor.decode(_words(memory.content(a, TP_BYTES))) for _, a in starts]
    found = count_tp(shares, chip)
    return replace(found, name=f"{job.role} {found.name}", nodes=job.nodes, step=step, job=job.index)


def _words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)


@dataclass(frozen=True, slots=True)
class Streams:
    """What a job's coefficient buffer says about itself. `size` in bytes, header included."""

    size: int
    symbols: int
    weights: int
    run_bits: int = 0

    @classmethod
    def read(cls, memory: Memory, d: NNDescriptor, chip: Chip, where: tuple[int, int] | None) -> Streams:
        """Symbols from the length of each core's stream: every one has the same width, all else has a known size."""
        if where is None:
            raise ModelError("an NN job has no coefficients")
        header = align(4 * chip.nn_cores, 64)
        data = memory.content(*where)
        volume = d.kernel_x * d.kernel_y * d.kernel_z
        symbols = weights = run_bits = 0
        at = header
        for core in range(chip.nn_cores):
            size = int.from_bytes(data[4 * core : 4 * core + 4], "little")
            if not size:
                continue
            run_bits, kernels = data[at], int.from_bytes(data[at + 1 : at + 3], "little")
            own = max(0, 8 * size - 24 - 64 * kernels) // (8 + run_bits)
            symbols += min(own, kernels * volume)
            weights += kernels * volume
            at += size
        return cls(len(data), symbols, weights, run_bits)


def count_nn(d: NNDescriptor, streams: Streams, chip: Chip, macs_useful: int) -> Counts:
    """One convolution. `macs_useful` is what the source operator asks for."""
    if not (d.out_tile_x and d.out_tile_y and d.kernel_x and d.kernel_y and d.out_z_size and d.kernels_per_core):
        raise ModelError("an NN descriptor has an extent of zero", got=repr(d)[:200])
    step = 2 if d.pooling == POOLING_FIRST_PIXEL else 1
    wide = _Axis.of(d.out_x_size, d.out_tile_x, d.in_x_size, d.kernel_x, d.in_x_offset, step)
    high = _Axis.of(d.out_y_size, d.out_tile_y, d.in_y_size, d.kernel_y, d.in_y_offset, step)
    tiles = wide.tiles * high.tiles
    per_core = cdiv(d.out_z_size, chip.nn_cores)
    superblocks = cdiv(per_core, d.kernels_per_core)
    out_bytes = cdiv(d.out_x_size, step) * cdiv(d.out_y_size, step) * d.out_z_size

    # Memory traffic.
    tile_input = wide.read * high.read * d.kernel_z
    dram: dict[str, int] = {}
    sram: dict[str, int] = {}
    kept = _kernels_kept(d, streams.size)
    dram["weights"] = streams.size + (tiles - 1) * int(streams.size * (1 - kept))
    if kept:
        sram["weights"] = int(streams.size * kept) * (tiles + 1)
    reads = tile_input * superblocks
    side = "sram" if _on_chip(d.in_image_address, chip) else "dram"
    image_kept = 0.0
    if d.image_caching_mode != CACHE_NONE and side == "dram":
        tile_bytes = min(d.out_tile_x + d.kernel_x - 1, d.in_x_size) * min(d.out_tile_y + d.kernel_y - 1, d.in_y_size)
        image_kept = min(1.0, max(0, d.image_cache_end - d.image_cache_start) / max(1, tile_bytes * d.kernel_z))
    if side == "sram":
        sram["input"] = reads
    else:
        dram["input"] = tile_input + int((reads - tile_input) * (1 - image_kept))
        if image_kept:
            sram["input"] = int(tile_input * image_kept) * (superblocks + 1)
    (sram if _on_chip(d.out_image_address, chip) else dram)["output"] = out_bytes

    # Cycles: for each kernel of a core, groups of rows that share the lanes, times cycles for one row group.
    il = interleave(d.out_tile_x, d.kernel_y)
    groups = wide.tiles * high.groups(il)
    if d.kernel_x == d.kernel_y == 1:
        taps = cdiv(d.kernel_z, MULTIPLIERS)
    else:
        taps = d.kernel_z * cdiv(d.kernel_x, 2) * cdiv(d.kernel_y, 3)
    cycles = per_core * groups * taps

    # Multipliers: what they do, and what is wasted, by cause.
    volume, pixels = d.kernel_x * d.kernel_y * d.kernel_z, d.out_x_size * d.out_y_size
    slots = cycles * chip.nn_cores * LANES * MULTIPLIERS
    dense = d.out_z_size * volume * pixels
    useful = min(macs_useful, dense)
    cores = (per_core * chip.nn_cores - d.out_z_size) * volume * pixels
    taps_idle = max(0, taps * MULTIPLIERS - volume) * per_core * chip.nn_cores * pixels
    waste = {"lowering": dense - useful, "cores": cores, "slots": taps_idle,
             "lanes": slots - dense - cores - taps_idle}
    out_x, out_y = cdiv(d.out_x_size, step), cdiv(d.out_y_size, step)
    return Counts(
        "nn", f"{d.in_y_size}x{d.in_x_size}x{d.kernel_z} -> {out_y}x{out_x}x{d.out_z_size}, {d.kernel_y}x{d.kernel_x}",
        cycles=cycles, symbols=streams.symbols, weights=streams.weights, launches=1, macs=slots, macs_useful=useful,
        waste=waste, dram=dram, sram=sram,
        touched={"weights": streams.size, "input": wide.touched * high.touched * d.kernel_z, "output": out_bytes},
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of a job: how many tiles, input positions they read in all, and distinct ones."""

    tiles: int
    read: int
    touched: int
    out: int
    tile: int

    @classmethod
    def of(cls, out: int, tile: int, size: int, kernel: int, offset: int, step: int) -> _Axis:
        tiles = cdiv(out, tile)
        reach = tile + kernel - 1
        # Tiles that read nothing outside the image are all alike; the few others are gone through.
        first = min(tiles, max(0, cdiv(-offset, tile)))
        last = max(first, min(tiles if out % tile == 0 else tiles - 1, (size - offset - reach) // tile + 1))
        read = (last - first) * reach
        for t in (*range(first), *range(last, tiles)):
            end = min((t + 1) * tile, out) + kernel - 1 + offset
            read += max(0, min(end, size) - max(t * tile + offset, 0))
        needed = (cdiv(out, step) - 1) * step + kernel  # of the pixels that are kept
        touched = max(0, min(needed + offset, size) - max(offset, 0))
        return cls(tiles, read, touched, out, tile)

    def groups(self, il: int) -> int:
        """Groups of `il` rows, over all tiles."""
        full, rest = divmod(self.out, self.tile)
        return full * cdiv(self.tile, il) + cdiv(rest, il)


def _kernels_kept(d: NNDescriptor, size: int) -> float:
    """The share of the coefficients that stays in SRAM from tile to tile. Partial caching's pattern is inferred."""
    if d.kernel_caching_mode == CACHE_NONE:
        return 0.0
    if d.kernel_caching_mode == CACHE_FULL:
        return 1.0
    length = d.kernel_pattern_msb + 1
    marked = (d.kernel_pattern & (1 << length) - 1).bit_count() / length
    window = max(0, d.kernel_cache_end - d.kernel_cache_start) / max(1, size)
    return min(marked, window, 1.0)


def _on_chip(address: int, chip: Chip) -> bool:
    return AXI_SRAM_ADDRESS <= address < AXI_SRAM_ADDRESS + chip.axi_sram


def count_tp(shares: Sequence[TPDescriptor], chip: Chip) -> Counts:
    """One TP job: a descriptor a core, side by side."""
    longest = 0
    dram = {"weights": 0, "input": 0, "output": 0}
    sram = {"input": 0, "output": 0}
    touched = {"weights": 0, "input": 0, "output": 0}
    for d in shares:
        if d.alu_pwl_enable:  # each share loads its table
            dram["weights"] += TABLE_BYTES
            touched["weights"] += TABLE_BYTES
        deep = d.in_image_z_size
        seen_x = min(d.in_window_x_end + 1, d.in_image_x_size) - max(d.in_window_x_start, 0)
        seen_y = min(d.in_window_y_end + 1, d.in_image_y_size) - max(d.in_window_y_start, 0)
        read = max(0, seen_x) * max(0, seen_y) * deep
        written = (_walked(d.in_window_x_end - d.in_window_x_start + 1, d.in_tile_x_size, d.in_tile_x_inc)
                   * _walked(d.in_window_y_end - d.in_window_y_start + 1, d.in_tile_y_size, d.in_tile_y_inc)
                   * (deep + d.in_window_z_start_overfetch + d.in_window_z_end_overfetch))
        longest = max(longest, written)
        for where, address, size in (("input", d.in_image_base_address, read),
                                     ("output", d.out_image_base_address, written)):
            (sram if _on_chip(address, chip) else dram)[where] += size
            touched[where] += size
    return Counts("tp", f"{sum(touched.values())} B", elements=longest, launches=len(shares),
                  dram={k: v for k, v in dram.items() if v}, sram={k: v for k, v in sram.items() if v},
                  touched={k: v for k, v in touched.items() if v})


def _walked(extent: int, size: int, step: int) -> int:
    """Elements that tiles of `size`, one every `step`, have along an extent."""
    if extent <= 0 or not step:
        return 0
    whole = max(0, (extent - size) // step + 1) if extent >= size else 0
    tiles = cdiv(extent, step)
    return whole * size + sum(min(size, extent - t * step) for t in range(whole, tiles))


# speeds


@dataclass(frozen=True, slots=True)
class Calibration:
    """The fitted constants, read from calibration.toml. `rows` are the published latencies they were fitted to."""

    dram_bandwidth: float
    zero_cost: float
    rows: tuple[str, ...]
    spread: float


@cache
def calibration() -> Calibration:
    found = tomllib.loads((files("npulab.targets.vivante") / "calibration.toml").read_text())
    fitted = found["fitted"]
    return Calibration(fitted["dram_bandwidth"], fitted["zero_cost"],
                       tuple(found["fit"]["rows"]), found["interval"]["spread"])


@dataclass(frozen=True, slots=True)
class Speeds:
    """Everything that turns counts into time. `given` are the names of what a user has set."""

    chip: Chip
    dram_bandwidth: float
    zero_cost: float
    clock: float
    spread: float
    given: frozenset[str] = frozenset()

    @classmethod
    def of(cls, chip: Chip, settings: Mapping[str, float] | None = None) -> Speeds:
        """A chip's speeds; `settings` may replace "dram_bandwidth" (B/s) and "clock" (Hz)."""
        fitted = calibration()
        settings = settings or {}
        return cls(chip, settings.get("dram_bandwidth", fitted.dram_bandwidth), fitted.zero_cost,
                   settings.get("clock", chip.clock), fitted.spread, frozenset(settings))

    @property
    def sram_bandwidth(self) -> float:
        return self.chip.sram_width * self.clock

    @property
    def peak_macs(self) -> float:
        return self.chip.nn_cores * LANES * MULTIPLIERS * self.clock

    def terms(self, c: Counts) -> dict[Term, int]:
        """Nanoseconds that each resource alone needs for a span; zeros left out."""
        density = min(1.0, c.symbols / c.weights) if c.weights else 1.0
        cycles = c.cycles * (self.zero_cost + (1 - self.zero_cost) * density)
        dram = c.dram.get
        seconds: dict[Term, float] = {
            "macs": cycles / self.clock,
            "weights": dram("weights", 0) / self.dram_bandwidth,
            "activations": (dram("input", 0) + dram("output", 0)) / self.dram_bandwidth,
            "sram": sum(c.sram.values()) / self.sram_bandwidth,
            "tp": c.elements / (self.chip.tp_rate * self.clock),
            "launch": c.launches * self.chip.launch_seconds + c.submits * self.chip.submit_seconds,
            "host": c.host.seconds(self.chip.host) if c.host else 0.0,
            "transfer": c.copied / self.chip.copy_bandwidth,
        }
        return {name: round(s * 1e9) for name, s in seconds.items() if s > 0}

    def span(self, c: Counts) -> Span:
        return Span(c.unit, c.name, c.nodes, c.step, c.job, self.terms(c), c.macs, c.macs_useful, c.waste, c.dram,
                    c.sram, c.touched)

    def interval(self, spans: Sequence[Span]) -> tuple[int, int]:
        """Where the total is expected (ns): engines within `spread` of the model, CPU work within a factor of two."""
        from npulab.profiling.host import SPREAD

        engines = sum(s.ns for s in spans if s.unit in ("nn", "tp"))
        others = sum(s.ns for s in spans) - engines
        return round(engines * (1 - self.spread) + others / SPREAD), \
            round(engines * (1 + self.spread) + others * SPREAD)

    def constants(self) -> tuple[Constant, ...]:
        """Every number behind the times."""
        chip = self.chip

        def one(name: str, value: float, unit: str, state: State, source: str) -> Constant:
            return Constant(name, value, unit, "set" if name in self.given else state,
                            "given by the user" if name in self.given else source)

        fitted = f"fitted to {', '.join(calibration().rows)}"
        return (
            one("dram_bandwidth", self.dram_bandwidth, "B/s", "fitted", fitted),
            one("zero_cost", self.zero_cost, "slots", "fitted", fitted),
            one("clock", self.clock, "Hz", "inferred", chip.clock_source),
            one("nn_cores", chip.nn_cores, "", "stated", "Mesa's hardware database"),
            one("sram", chip.vip_sram, "B", "stated", "Mesa's hardware database"),
            one("sram_bandwidth", self.sram_bandwidth, "B/s", "stated",
                f"Mesa's hardware database: VIP SRAM is {chip.sram_width} B wide; at the clock"),
            one("macs_per_cycle", self.peak_macs / self.clock, "MAC", "inferred", "cores x 64 lanes x 6 multipliers"),
            one("tp_rate", chip.tp_rate, "elements/cycle", "assumed", "one element a cycle and TP core"),
            one("launch_seconds", chip.launch_seconds, "s", "assumed", "the published times do not tell it apart"),
            one("submit_seconds", chip.submit_seconds, "s", "assumed", "kernel call, flush and interrupt"),
            one("copy_bandwidth", chip.copy_bandwidth, "B/s", "assumed", "CPU copies to and from NPU memory"),
            *chip.host.constants(),
        )



WITNESS = "modelled: {0} constants fitted to {1} published latencies of the open driver; no board was asked"


def timing(program: Program, speeds: Speeds) -> Timing:
    """The program's time on a chip of these speeds. Raises ModelError like `count`."""
    spans = tuple(speeds.span(c) for c in count(program, speeds.chip))
    return Timing(spans, speeds.interval(spans), speeds.peak_macs, speeds.constants(), speeds.chip.host.name,
                  WITNESS.format(2, len(calibration().rows)))


# the published rows that programs of ours stand for


@cache
def _ladder() -> dict[str, list[Counts]]:
    return msgspec.json.decode((files("npulab.targets.vivante") / "ladder.json").read_bytes(),
                               type=dict[str, list[Counts]])


def predict(row: str, speeds: Speeds) -> Prediction | None:
    """The modelled time of a published row, from the counts of its program that `scripts/calibrate.py` recorded."""
    counts = _ladder().get(row)
    if counts is None:
        return None
    spans = [speeds.span(c) for c in counts]
    low, high = speeds.interval(spans)
    return Prediction(sum(s.ns for s in spans) / 1e6, (low / 1e6, high / 1e6),
                      "fit" if row in calibration().rows else "test")
