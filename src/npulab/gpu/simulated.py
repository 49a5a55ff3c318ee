"""A GPU of known parts that does the experiments of a Bench: ground truth for the analysis.

`Hidden` says what it is made of, `Simulated` times experiments on it, `random_hidden` draws one. The times follow from
the parts (hit rates of a random chase, waves of resident threads, the slowest of latency and issue, bank conflicts);
then the clock falls as the device heats, repetitions scatter, some are disturbed, and the timer ticks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from npulab.errors import UnsupportedError
from npulab.gpu.types import OPERATIONS_A_STEP, Element, Identity, Limits, Operation, Order, Timing, Way

REPETITIONS = 9
CHASE_LOADS = 1 << 14
STREAMED = 1 << 22  # bytes
STEPS = 4096  # of a chain
ENOUGH = 2e-3  # seconds: a kernel's loop turns until it takes so long
KERNEL_START = 1.5e-6  # seconds between a kernel's first and last moment that are not its work


@dataclass(frozen=True, slots=True)
class Cache:
    """One level. size, line: bytes. latency: cycles of the core. bandwidth: bytes a cycle, of the whole device: of a
    level that each core has for itself, of all together. ways: lines of a set, of least recent use; 0: any line goes
    anywhere.

    narrow  shares of the bandwidth that loads of 4 and of 8 bytes reach; None: in the first level, whose queue a narrow
            load takes a place of as well as a wide one, a quarter and half, in the others all of it.
    sector  bytes of a line that come at least where less of it is asked for; 0: all of it.
    """

    size: int
    line: int
    latency: float
    bandwidth: float
    replacement: Literal["lru", "random"] = "lru"
    ways: int = 0
    narrow: tuple[float, float] | None = None
    sector: int = 0


@dataclass(frozen=True, slots=True)
class Translation:
    """Buffer of `entries` translated pages of `page` bytes, of least recent use; another takes `cost` cycles."""

    entries: int
    page: int
    cost: float


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a simulated GPU is made of.

    register_file, register_grain  bytes a core; registers a thread are given in multiples of the grain.
    rates       scalar operations a cycle and core; float16 reaches it with vectors of two, alone half of it.
    vectors     shares of a rate that vectors of 4, 8 and 16 reach.
    latencies   cycles from an operation to the next of its chain; of a vector at least what the units take for it.
    local_banks words (4 bytes) a cycle of a core's local memory.
    memory_*    DRAM: seconds of a load, the way through the caches (their last latency) with it, bytes a second; writes
                reach `write_share` of the reads' bandwidth.
    launch, barrier, transfer_*  seconds; transfers take transfer_start and then bytes a second.
    tick        of the timer, seconds. jitter: relative, standard deviation. outliers: share of disturbed repetitions.
    throttle_*  busy seconds until the clock begins to fall, how long it falls, and the share of it that remains.
    memory_throttles  whether DRAM slows with the cores.
    translation  of addresses, where it costs.
    image_share  of the first cache's bandwidth that reads of images reach, of 16 bytes a texel and along rows.
    image_texels, image_orders  shares of that which texels of 4 and 8 bytes reach, and neighbours in columns and tiles.
    local_wide, constant_wide   how many times what words reach loads of 8 and 16 bytes do.
    constant_spread  constant memory gives a word a lane and cycle where all read the same, this share of it where each
                 reads another.
    map_cost     seconds, whatever the size: host and device share memory.
    """

    warp: int
    cores: int
    max_threads: int
    register_file: int
    register_grain: int
    caches: tuple[Cache, ...]
    clock: float
    rates: Mapping[tuple[Operation, Element], float]
    latencies: Mapping[tuple[Operation, Element], float]
    local_banks: int
    memory_latency: float
    memory_bandwidth: float
    write_share: float
    launch: float
    barrier: float
    transfer_start: float
    transfer_bandwidth: float
    group_max: int = 256
    buffer_max: int = 1 << 30
    tick: float = 1e-9
    jitter: float = 0.0
    outliers: float = 0.0
    throttle_after: float = math.inf
    throttle_over: float = 0.5
    throttle_to: float = 1.0
    memory_throttles: bool = False
    translation: Translation | None = None
    image_share: float = 1.0
    vectors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    image_texels: tuple[float, float] = (0.25, 0.5)
    image_orders: tuple[float, float] = (1.0, 1.0)
    local_wide: tuple[float, float] = (1.0, 1.0)
    constant_wide: tuple[float, float] = (1.0, 1.0)
    constant_spread: float = 1.0
    map_cost: float = 10e-6


def hit_rate(lines: float, capacity: float, places: float, replacement: str, piece: float = math.inf) -> float:
    """Hits of a steady chase through `lines` cache lines, `places` pointers in each, all in one random cycle, in a
    fully associative cache of `capacity` lines.

    A place's line was last touched a share u of the cycle ago, P(u > v) = (1 - v)^(places - 1). LRU still has it if
    fewer than `capacity` other lines were touched since, each one with probability 1 - (1 - u)^places. Random
    replacement still has it if none of the misses since threw it out, each one with probability 1 / capacity.

    piece: lines of which all places come before those of others: the first of a line's in a turn comes a whole cycle
    after its last, the others follow within the piece, P(share of the piece > v) = (1 - v)^places.
    """
    if lines <= capacity:
        return 1.0
    if piece < lines:
        again = (places - 1) / places
        if replacement == "lru":
            return again * min(1.0, capacity / piece)
        low, high = 0.0, 1.0
        for _ in range(60):
            m = (low + high) / 2
            kept = (1 - again) * math.exp(-m * places * lines / capacity) + again * _survival(
                m * places * piece / capacity, places + 1)
            low, high = (m, high) if 1 - kept > m else (low, m)
        return 1 - (low + high) / 2
    if replacement == "lru":
        return float(1 - (1 - capacity / lines) ** ((places - 1) / places))
    low, high = 0.0, 1.0  # of the miss rate m = 1 - survival(m); m = 0 is the other solution
    for _ in range(60):
        m = (low + high) / 2
        low, high = (m, high) if 1 - _survival(places * lines / capacity * m, places) > m else (low, m)
    return 1 - (low + high) / 2


def hits(cache: Cache, count: int, stride: int, piece: float = math.inf) -> float:
    """Hits of a chase through `count` places, `stride` bytes apart, in pieces of `piece` bytes."""
    places = max(1, cache.line // stride)
    lines = math.ceil(count / places)
    lines_a_piece = max(1.0, piece / max(stride, cache.line))
    if not cache.ways:
        return hit_rate(lines, cache.size // cache.line, places, cache.replacement, lines_a_piece)
    sets = cache.size // cache.line // cache.ways
    used = sets // math.gcd(sets, max(1, stride // cache.line))  # the lines of one set are a multiple of sets apart
    each, more = divmod(lines, used)

    def of(k: int) -> float:
        return hit_rate(k, cache.ways, places, "lru", lines_a_piece / used) if k else 1.0

    return (more * (each + 1) * of(each + 1) + (used - more) * each * of(each)) / lines


def streamed(h: Hidden, footprint: int, stride: int, width: int, way: Way) -> tuple[float, float]:
    """Seconds of a byte in the caches and in DRAM, side by side; each fetches lines, caches sectors of them, of which
    wide strides waste some. Strides wider than a line leave some lines out, and a cache keeps the more of the others.
    """
    read = {"read": 1.0, "write": 0.0, "copy": 0.5}[way]
    cost = read + (1 - read) / h.write_share
    missed, core = 1.0, 0.0
    for c in h.caches:
        waste = max(1.0, min(stride, (c.sector or c.line) / width))
        shares = c.narrow or ((0.25, 0.5) if c is h.caches[0] else (1.0, 1.0))
        narrow = {4: shares[0], 8: shares[1]}.get(width, 1.0)
        core = max(core, missed * waste / narrow * cost / c.bandwidth / h.clock)
        apart = max(c.line, stride * width)
        lines = footprint / apart
        kept = hits(c, math.ceil(lines), apart) if c.ways else hit_rate(lines, c.size / c.line, 1, c.replacement)
        missed = min(missed, 1 - kept)  # each group reads all of it
    waste = max(1.0, min(stride, h.caches[-1].line / width))
    return core, missed * waste * cost / h.memory_bandwidth


def _wide(times: tuple[float, float], width: int) -> float:
    return {8: times[0], 16: times[1]}.get(width, 1.0)


def _vector_rate(h: Hidden, operation: Operation, element: Element, width: int) -> float:
    """Operations a cycle and core by vectors of a width."""
    share = {4: h.vectors[0], 8: h.vectors[1], 16: h.vectors[2]}.get(width, 1.0)
    return h.rates[operation, element] * share / (2 if element == "float16" and width == 1 else 1)


def _image_share(h: Hidden, texel: int, order: Order) -> float:
    """Of the first cache's bandwidth."""
    texels = {4: h.image_texels[0], 8: h.image_texels[1]}.get(texel, 1.0)
    return h.image_share * texels * {"columns": h.image_orders[0], "tiles": h.image_orders[1]}.get(order, 1.0)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)


def _survival(evictions: float, places: float) -> float:
    """E[exp(-evictions u)] over the share u of a cycle since the line's last touch."""
    if places == 1:
        return math.exp(-evictions)
    # with v = (1 - u)^(places - 1), uniform in 0..1
    u = 1 - ((_NODES + 1) / 2) ** (1 / (places - 1))
    return float((_WEIGHTS / 2 * np.exp(-evictions * u)).sum())


class Simulated:
    """A Bench on a machine that is known. The same seed and the same calls give the same times."""

    def __init__(self, hidden: Hidden, seed: int = 0) -> None:
        self._h = hidden
        self._random = np.random.default_rng(seed)
        self._busy = 0.0

    @property
    def identity(self) -> Identity:
        return Identity("simulated", "npulab", "simulated GPU", "npulab", "1", "1")

    @property
    def limits(self) -> Limits:
        h = self._h
        return Limits(h.cores, h.group_max, h.local_banks * 1024, h.buffer_max, frozenset(e for _, e in h.rates))

    def chase(self, footprint: int, stride: int) -> Timing:
        return Simulated.chase_pieces(self, footprint, stride, 1 << 40)

    def chase_pieces(self, footprint: int, stride: int, piece: int) -> Timing:
        h, n = self._h, max(1, footprint // stride)
        known, cycles = 0.0, 0.0
        for c in h.caches:
            now = max(known, hits(c, n, stride, piece))
            cycles += (now - known) * c.latency
            known = now
        if t := h.translation:
            pages = min(n, math.ceil(footprint / t.page))
            visits = n / pages  # of a page, one after the other if pieces are smaller
            together = max(1.0, min(visits, piece / stride))
            pieces = max(1.0, visits / together) if piece <= t.page else visits
            again = hit_rate(pages, t.entries, pieces, "lru", math.inf if piece <= t.page else piece / t.page)
            cycles += t.cost * (1 - again) / (together if piece <= t.page else 1)
        through = h.caches[-1].latency / h.clock  # a load on its way to DRAM and back passes the caches
        core, memory = cycles / h.clock + (1 - known) * through, (1 - known) * (h.memory_latency - through)
        self._busy += n * (core + memory)  # all places once before the clock starts
        return self._timing(core * CHASE_LOADS, {"loads": CHASE_LOADS}, memory=memory * CHASE_LOADS)

    def stream(self, footprint: int, stride: int, width: int, way: Way) -> Timing:
        core, memory = streamed(self._h, footprint, stride, width, way)
        return self._timing(core * STREAMED, {"bytes": STREAMED}, least=memory * STREAMED)

    def chain(self, operation: Operation, element: Element, width: int, chains: int, threads: int) -> Timing:
        h, what = self._h, (operation, element)
        if what not in h.rates:
            raise UnsupportedError(f"The device has no {operation} of {element}")
        each = chains * width * OPERATIONS_A_STEP[element]
        rate = _vector_rate(h, operation, element, width)
        warps = math.ceil(math.ceil(threads / h.warp) / h.cores)
        cycles, most = 0.0, h.max_threads // h.warp
        while warps > 0:
            cycles += STEPS * max(h.latencies[what], min(warps, most) * h.warp * each / rate)
            warps -= most
        return self._timing(cycles / h.clock, {"operations": STEPS * each * threads})

    def diverge(self, period: int) -> Timing:
        h = self._h
        both = 1 if period % h.warp == 0 else 2 if h.warp % period == 0 else 1 + math.gcd(period, h.warp) / h.warp
        warps = h.group_max / h.warp
        cycles = STEPS * both * max(h.latencies["fma", "float32"],
                                    warps * h.warp / h.rates["fma", "float32"])
        return self._timing(cycles / h.clock, {"operations": STEPS * h.group_max * h.cores})

    def hold(self, registers: int, threads: int) -> Timing:
        h = self._h
        given = math.ceil(registers / h.register_grain) * h.register_grain * 4 * h.warp
        most = min(h.max_threads // h.warp, h.register_file // given)
        if not most:
            raise UnsupportedError(f"The device has no {registers} registers for a thread")
        waves = math.ceil(math.ceil(math.ceil(threads / h.warp) / h.cores) / most)
        return self._timing(0.0, {"operations": 2048.0 * threads}, memory=2048 * waves * h.memory_latency)

    def local(self, stride: int, width: int = 4) -> Timing:
        h = self._h
        at_once = min(h.warp, h.local_banks)
        conflicts = max(1, at_once * math.gcd(stride, h.local_banks) / h.local_banks)
        cycles = STEPS * h.group_max / at_once * conflicts / _wide(h.local_wide, width)
        return self._timing(cycles / h.clock, {"loads": STEPS * h.group_max})

    def local_write(self, stride: int, width: int = 4) -> Timing:
        t = self.local(stride, width)
        return replace(t, work={"stores": t.work["loads"]})

    def image(self, footprint: int, texel: int = 16, order: Order = "rows") -> Timing:
        h, size = self._h, 1 << 22
        t = self.stream(footprint, 1, 16, "read")
        core = size / (_image_share(h, texel, order) * h.caches[0].bandwidth) / h.clock
        return t if footprint > h.caches[0].size else self._timing(core, {"bytes": size})

    def constant(self, spread: bool, width: int = 4) -> Timing:
        h = self._h
        cycles = STEPS * h.group_max / h.warp / (h.constant_spread if spread else 1.0) / _wide(h.constant_wide, width)
        return self._timing(cycles / h.clock, {"bytes": 4.0 * STEPS * h.group_max * h.cores})

    def map(self, size: int) -> Timing:
        return self._timing(0.0, {"bytes": size}, host=self._h.map_cost)

    def launch(self) -> Timing:
        return self._timing(0.0, {}, host=self._h.launch)

    def barrier(self) -> Timing:
        return self._timing(STEPS * self._h.barrier, {"barriers": STEPS})

    def transfer(self, size: int, to_device: bool) -> Timing:
        h = self._h
        return self._timing(0.0, {"bytes": size}, host=h.transfer_start + size / h.transfer_bandwidth)

    def _timing(self, core: float, work: dict[str, float], memory: float = 0.0, least: float = 0.0,
                host: float = 0.0) -> Timing:
        """Repetitions of `core` seconds at full clock, then `memory` seconds; `least`: DRAM's seconds beside the
        core's, the longer counts; `host`: seconds that no clock of the device changes."""
        h, seconds = self._h, []
        turns = 1 if host else math.ceil(ENOUGH / max(core + memory, least))
        core, memory, least = core * turns, memory * turns, least * turns
        for _ in range(REPETITIONS):
            fallen = min(1.0, max(0.0, (self._busy - h.throttle_after) / h.throttle_over))
            slow = 1 / (1 - fallen * (1 - h.throttle_to))
            slow_memory = slow if h.memory_throttles else 1.0
            took = host or max(core * slow + memory * slow_memory, least * slow_memory) + KERNEL_START
            took *= math.exp(h.jitter * self._random.standard_normal())
            if self._random.random() < h.outliers:
                took *= 1.1 + self._random.exponential(0.7)
            self._busy += took
            phase = self._random.random()
            seconds.append((math.floor(phase + took / h.tick) - math.floor(phase)) * h.tick)
        return Timing(tuple(seconds), {name: count * turns for name, count in work.items()} if not host else work)


def random_hidden(seed: int) -> Hidden:
    """A plausible GPU, from a phone's to a data centre's.

    A level is at least four times the one before, eight times if that replaces at random: otherwise no footprint misses
    the one and hits the other. What a buffer of translations reaches is no cache's size: two rises at one footprint are
    one, and where pages are small no chase tells what of it is whose.
    """
    r = np.random.default_rng(seed)

    def pick(*of: Any) -> Any:
        return of[int(r.integers(len(of)))]

    def between(low: float, high: float) -> float:
        return float(math.exp(r.uniform(math.log(low), math.log(high))))

    scale = pick("phone", "desktop", "centre")
    cores = {"phone": pick(1, 2, 3, 4, 6, 8, 10, 16), "desktop": pick(8, 10, 16, 20, 28, 40, 46, 64),
             "centre": pick(56, 80, 108, 110, 132)}[scale]
    warp = pick(8, 16, 32, 64, 128)
    clock = between(0.5e9, 1.2e9) if scale == "phone" else between(1e9, 2.6e9)
    lanes = max(pick(8, 16, 32, 64, 128), warp // 8)
    rates: dict[tuple[Operation, Element], float] = {}
    simple: tuple[Operation, ...] = ("fma", "mul", "add")
    for o in simple:
        rates[o, "float32"] = lanes
        rates[o, "int32"] = lanes * (pick(0.25, 0.5, 1.0) if o != "add" else 1.0)
    rates["special", "float32"] = lanes * pick(0.125, 0.25)
    if r.random() < 0.8:
        for o in simple:
            rates[o, "float16"] = 2 * lanes
        rates["special", "float16"] = rates["special", "float32"]
    if r.random() < 0.6:
        rates["fma", "int8x4"] = 4 * lanes * pick(0.5, 1.0)
    latencies = {}  # a step of a chain is never shorter than its warp's issue
    for what, rate in rates.items():
        each = OPERATIONS_A_STEP[what[1]]
        latencies[what] = max(float(r.integers(3, 9)) * (3 if what[0] == "special" else 1),
                              warp * each / rate * (2 if what[1] == "float16" else 1))
    line = pick(32, 64, 64, 128)
    size = {"phone": pick(4, 8, 16, 24, 32, 64), "desktop": pick(16, 24, 32, 48, 64, 96, 128),
            "centre": pick(16, 24, 32, 64, 128, 192)}[scale] << 10
    latency = between(20, 120)
    ladder = [k << n for n in range(16, 27) for k in (4, 5, 6, 7)]  # 256 KiB, 320 KiB, 384 KiB, 448 KiB, 512 KiB...
    top = {"phone": 4 << 20, "desktop": 32 << 20, "centre": 96 << 20}[scale]
    levels = [Cache(size, line, latency, cores * pick(32, 64, 128))]
    for _ in range(int(r.integers(0, 3))):
        last = levels[-1]
        sizes = [s for s in ladder if 4 * last.size <= s <= top]
        if not sizes:
            break
        levels.append(Cache(int(r.choice(sizes)), min(256, last.line * pick(1, 1, 2)),
                            last.latency * between(1.5, 3.5), last.bandwidth * between(0.25, 0.6)))
    for i, c in enumerate(levels):
        if r.random() < 0.4 and (i + 1 == len(levels) or levels[i + 1].size >= 8 * c.size):
            levels[i] = replace(c, replacement="random")
    last = levels[-1]
    throttles = r.random() < 0.4
    thread_bytes = pick(64, 128, 256)  # of registers, when the core is full
    max_threads = warp * pick(8, 12, 16, 24, 32) if warp > 16 else warp * pick(16, 24, 32, 48, 64)
    made = Hidden(
        warp=warp, cores=cores, max_threads=max_threads, register_file=max_threads * thread_bytes,
        register_grain=pick(1, 2, 4, 8, 16), caches=tuple(levels), clock=clock, rates=rates, latencies=latencies,
        local_banks=pick(16, 32, 64), memory_latency=last.latency / clock * between(1.5, 3.5),
        memory_bandwidth=last.bandwidth * clock * between(0.15, 0.6), write_share=between(0.5, 1),
        launch=between(4e-6, 120e-6), barrier=between(20, 200) / clock, transfer_start=between(5e-6, 60e-6),
        transfer_bandwidth=between(2e9, 50e9), group_max=pick(256, 512, 1024), buffer_max=1 << 30,
        tick=pick(1e-9, 32e-9, 52e-9, 1e-6), jitter=between(0.002, 0.02), outliers=float(r.uniform(0, 0.06)),
        throttle_after=between(0.5, 40) if throttles else math.inf, throttle_over=pick(0.01, 0.5, 5.0),
        throttle_to=float(r.uniform(0.5, 0.95)), memory_throttles=bool(r.random() < 0.5))
    for i, c in enumerate(levels):  # after all else, so that machines of a seed stay what they were
        sets = [w for w in (2, 4, 8, 12, 16) if c.size % (c.line * w) == 0
                and (c.size // c.line // w).bit_count() == 1]
        if c.replacement == "lru" and sets and r.random() < 0.5:
            levels[i] = replace(c, ways=pick(*sets))
    translation = Translation(pick(16, 32, 64, 512), pick(1 << 12, 1 << 16, 1 << 21), between(20, 200)) \
        if r.random() < 0.4 else None
    while translation and translation.entries * translation.page in [c.size for c in levels]:
        translation = replace(translation, entries=2 * translation.entries)
    made = replace(made, translation=translation, image_share=float(r.uniform(0.3, 1)),
                   constant_spread=1 / pick(1, 2, 8, 32), map_cost=between(3e-6, 50e-6))
    for i, c in enumerate(levels):
        eight = float(r.uniform(0.4, 1))
        four = eight * float(r.uniform(0.4, 1))
        levels[i] = replace(c, narrow=(four, eight) if i == 0 or r.random() < 0.3 else None,
                            sector=pick(0, 32) if c.line > 32 and i + 1 < len(levels) else 0)
    most = max(1.0, 64 / warp)  # no core hands out more than 256 bytes a cycle
    return replace(made, caches=tuple(levels), image_texels=(pick(0.25, 0.5, 1.0), pick(0.5, 1.0)),
                   image_orders=(float(r.uniform(0.1, 1)), float(r.uniform(0.5, 1))),
                   local_wide=(pick(1.0, 2.0), pick(1.0, 2.0, 4.0)),
                   constant_wide=(min(pick(1.0, 2.0), most), min(pick(1.0, 4.0), most)),
                   vectors=(pick(1.0, 0.8), pick(1.0, 0.5), pick(1.0, 0.6, 0.25)))


def truth(h: Hidden) -> dict[str, float]:
    """What the analysis must say of it, in its names and units."""
    known: dict[str, float] = {
        "warp width": h.warp, "register file": h.register_file, "resident threads": h.max_threads,
        "local memory banks": h.local_banks,
        "local memory bandwidth": 4 * min(h.warp, h.local_banks) * h.clock / 1e9,
        "launch cost": h.launch, "barrier cost": h.barrier,
        "memory latency": h.memory_latency, "memory bandwidth": h.memory_bandwidth / 1e9,
        "memory write bandwidth": h.memory_bandwidth * h.write_share / 1e9,
        "memory copy bandwidth": h.memory_bandwidth / (0.5 + 0.5 / h.write_share) / 1e9,
        "lowest clock": h.throttle_to,
    }
    for way in ("to", "from"):
        known[f"transfer {way} device cost"] = h.transfer_start
        known[f"transfer {way} device bandwidth"] = h.transfer_bandwidth / 1e9
    at_once = min(h.warp, h.local_banks)
    for name, unit in (("local memory bandwidth", "load"), ("local memory write bandwidth", "store")):
        known[name] = known["local memory bandwidth"]
        for s in (2, 4, 8, 16, 32):
            conflicts = max(1, at_once * math.gcd(s, h.local_banks) / h.local_banks)
            known[f"{name}, stride {s}"] = known[name] / conflicts
        for width in (8, 16):
            known[f"{name}, {width} bytes a {unit}"] = known[name] * _wide(h.local_wide, width)
    known["constant bandwidth"] = 4 * h.cores * h.warp * h.clock / 1e9
    for width in (8, 16):
        known[f"constant bandwidth, {width} bytes a load"] = known["constant bandwidth"] * _wide(h.constant_wide, width)
    known["constant bandwidth, spread"] = known["constant bandwidth"] * h.constant_spread
    first = h.caches[0].bandwidth * h.clock / 1e9
    known["image bandwidth"] = h.image_share * first
    known["image bandwidth, 4 bytes a texel"] = _image_share(h, 4, "rows") * first
    known["image bandwidth, 8 bytes a texel"] = _image_share(h, 8, "rows") * first
    known["image bandwidth, columns"] = _image_share(h, 16, "columns") * first
    known["image bandwidth, tiles of 4x4"] = _image_share(h, 16, "tiles") * first
    known["map cost"] = h.map_cost
    known["fma against mul float32"] = h.rates["fma", "float32"] / h.rates["mul", "float32"]
    shapes = ((4, 1), (8, 1), (4, 2), (4, 4), (4, 8), (4, 16))
    ways: tuple[tuple[Way, str, str], ...] = (("read", "", "load"), ("write", " write", "store"))

    def shaped(unit: str, width: int, stride: int) -> str:
        return f", {width} bytes a {unit}" + (f", stride {stride}" if stride > 1 else "")

    for width, stride in shapes:
        for way, named, unit in (*ways, *((("copy", " copy", "load"),) if stride == 1 else ())):
            known[f"memory{named} bandwidth{shaped(unit, width, stride)}"] = 1e-9 / max(
                streamed(h, 1 << 30, stride, width, way))
            for i, c in enumerate(h.caches if way != "copy" else (), 1):
                if i == 1 or stride * width <= h.caches[i - 2].line:  # else lines are left out
                    known[f"L{i}{named} bandwidth{shaped(unit, width, stride)}"] = 1e-9 / max(
                        streamed(h, int(0.75 * c.size), stride, width, way))
    for (operation, element), rate in h.rates.items():
        known[f"{operation} {element} rate"] = rate * h.cores * h.clock
        known[f"{operation} {element} latency"] = h.latencies[operation, element] / h.clock
        for width in (1, 2, 4, 8, 16):
            reached, each = _vector_rate(h, operation, element, width), width * OPERATIONS_A_STEP[element]
            known[f"{operation} {element} rate, vectors of {width}"] = reached * h.cores * h.clock
            if width > 1:
                known[f"{operation} {element} latency, vectors of {width}"] = max(
                    h.latencies[operation, element], h.warp * each / reached) / h.clock
    for i, c in enumerate(h.caches, 1):
        known[f"L{i} size"], known[f"L{i} line"] = c.size, c.line
        known[f"L{i} latency"], known[f"L{i} bandwidth"] = c.latency / h.clock, c.bandwidth * h.clock / 1e9
        known[f"L{i} write bandwidth"] = known[f"L{i} bandwidth"] * h.write_share
    return known
