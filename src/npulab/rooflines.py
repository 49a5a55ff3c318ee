"""A network under a device's ceilings: what each layer computes and moves at least, how long that takes at least, and
what decides it.

Layers and their multiply-adds are those of `teardown`. A layer moves its weights, its input and its output once; that
much crosses every memory between DRAM and the multipliers, and more of it where a cache is too small to keep what is
used again. Operators that multiply nothing are taken as fused with their neighbours, unless asked for. A floor is no
prediction: a device cannot be faster, and usually is slower.

One multiply-add is two operations. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from npulab.errors import UnsupportedError, UsageError
from npulab.gpu.ceilings import COMPUTE, Ceiling, Ceilings, Standing, highest, published, read_result
from npulab.ir import Graph, Node
from npulab.teardown import BITS, Layer, Numbers, bits, layers, sized

if TYPE_CHECKING:
    from npulab.profiling.types import Constant
    from npulab.targets.facts.schema import Facts

_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Shape", "Constant", "Size",
          "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "SHAPE", "RANK"}
"""Operators that move no data: others read the same bytes under another shape."""
_TAKEN_UP = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "PRelu", "BatchNormalization",
             "RELU", "RELU6", "RELU_N1_TO_1", "LEAKY_RELU", "LOGISTIC", "TANH", "HARD_SWISH", "PRELU"}
"""Operators of one tensor that a layer does before it writes: what follows them says how its output is stored."""
_QUANTIZERS = ("QuantizeLinear", "QUANTIZE")
_WIDER: Mapping[Numbers, tuple[Numbers, ...]] = {"fp32": (), "fp16": ("fp32",), "int8": ("fp16", "fp32")}
"""Formats whose arithmetic can stand in where a device's rate is not known."""
_STEPS = 8


@dataclass(frozen=True, slots=True)
class Floor:
    """A layer under the ceilings.

    operations  two a multiply-add.        weights, inputs, outputs  bytes, each once.
    floors      seconds at each ceiling of Roofline.ceilings.
    seconds     the longest of those that limit; None where none applies.
    bound       the resource of that one, "" if there is none.
    """

    layer: Layer
    operations: int
    weights: int
    inputs: int
    outputs: int
    floors: tuple[float, ...]
    seconds: float | None
    bound: str

    @property
    def bytes(self) -> int:
        return self.weights + self.inputs + self.outputs

    @property
    def intensity(self) -> float | None:
        """Operations a byte; None of a layer that moves none."""
        return self.operations / self.bytes if self.bytes else None


@dataclass(frozen=True, slots=True)
class Whole:
    """The network as one piece whose intermediate tensors never leave the chip: weights, its inputs and outputs once.

    Weights that two layers share are counted for each.
    """

    operations: int
    bytes: int
    seconds: float | None
    bound: str


@dataclass(frozen=True, slots=True)
class Roofline:
    """A network's layers under a device's ceilings.

    numbers    the format that rates are of, and bytes where `forced`; else bytes are as the file has them.
    limits     positions in `ceilings` of those that decide: of each resource the highest figure.
    everything operators that multiply nothing are listed too.
    hidden     operators that are not listed.
    notes      sentences on what is missing or was taken in its place.
    """

    model: str
    device: Ceilings
    numbers: Numbers
    forced: bool
    ceilings: tuple[Ceiling, ...]
    limits: tuple[int, ...]
    layers: tuple[Floor, ...]
    whole: Whole
    everything: bool
    hidden: int
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """The sum of the layers' floors: one after the other, each fused with what follows it. None if all are open."""
        known = [x.seconds for x in self.layers if x.seconds is not None]
        return sum(known) if known else None

    def at(self, i: int) -> float:
        """Seconds of all layers at ceiling `i` alone."""
        return sum(x.floors[i] for x in self.layers)

    def ridge(self, i: int) -> float | None:
        """Operations a byte from which on computing takes longer than memory `i`; None without a rate."""
        c = self.ceilings[i]
        peak = self.peak
        return peak.value / c.value if peak is not None and c.resource != COMPUTE else None

    @property
    def peak(self) -> Ceiling | None:
        """The rate that limits."""
        return next((self.ceilings[i] for i in self.limits if self.ceilings[i].resource == COMPUTE), None)

    def memory(self) -> int | None:
        """Position of the memory that the picture is drawn for: DRAM, else the slowest; None if none is known."""
        found = [i for i in self.limits if self.ceilings[i].resource != COMPUTE]
        return min(found, key=lambda i: (self.ceilings[i].resource != "DRAM", self.ceilings[i].value), default=None)

    def share(self, x: Floor) -> float:
        """A layer's part of the sum of floors."""
        return (x.seconds or 0.0) / (self.seconds or 1.0)


def roofline(graph: Graph, device: Ceilings | str | os.PathLike[str], numbers: Numbers | None = None,
             everything: bool = False) -> Roofline:
    """The network under the ceilings of a device: `Ceilings`, or what `ceilings_of` takes.

    `numbers`: count bytes and rates as if all data had this format; None: bytes as the file has them, rates of the
    format that most of its multiply-adds are in. `everything`: operators that multiply nothing too, each by itself.

    Raises: ModelError for layers of unknown size; UnsupportedError where no ceiling of the device is known.
    """
    found = device if isinstance(device, Ceilings) else ceilings_of(device)
    notes: list[str] = []
    if numbers is not None and numbers not in BITS:
        raise UsageError(f"there is no number format '{numbers}'", want=", ".join(BITS))
    graph = sized(graph)
    own = numbers or _own(graph)
    forced = numbers is not None
    rates = {c.numbers for c in found.ceilings if c.resource == COMPUTE}
    if not forced and rates == {"int8"} and own != "int8":
        notes.append(f"counted as int8, the only format that a rate is known of; the file has {own}")
        own, forced = "int8", True
    ceilings = _chosen(found, own, notes)
    if not ceilings:
        raise UnsupportedError(f"no ceiling of {found.name} is known for {own}", want="a rate or a bandwidth",
                               got=", ".join(f"{x.name}: {x.why}" for x in found.left_out) or "none is published",
                               try_="npulab probe measures those of a device that is here")
    wanted = set(highest(ceilings))
    limits = tuple(i for i, c in enumerate(ceilings) if c in wanted)
    every = layers(graph, own if forced else None)
    shown = [(n, x) for n, x in zip(graph.nodes, every, strict=True)
             if x.macs or (everything and n.op.name not in _VIEWS)]
    rows = tuple(_floor(graph, n, x, own if forced else None, ceilings, limits) for n, x in shown)
    return Roofline(graph.name, found, own, forced, ceilings, limits, rows,
                    _whole(graph, rows, own if forced else None, ceilings, limits), everything,
                    len(every) - len(shown), tuple(notes))


def _own(graph: Graph) -> Numbers:
    """The format that most of the network's multiply-adds are in, by what they read."""
    count: Counter[Numbers] = Counter()
    for real, byte in zip(layers(graph), layers(graph, "int8"), strict=True):
        wide = 8 * (real.input_bits + real.weight_bits) / ((byte.input_bits + byte.weight_bits) or 1)
        count["fp32" if wide > 24 else "fp16" if wide > 12 else "int8"] += real.macs
    return max(count, key=lambda n: (count[n], n), default="fp32")


def _chosen(device: Ceilings, numbers: Numbers, notes: list[str]) -> tuple[Ceiling, ...]:
    """The ceilings that say something about this format; notes on those that are missing or stand in."""
    rates = {c.numbers: c for c in device.ceilings if c.resource == COMPUTE}
    compute = [c for c in device.ceilings if c.resource == COMPUTE and c.numbers == numbers]
    if not compute:
        wider = next((n for n in _WIDER[numbers] if n in rates), None)
        if wider is not None:
            compute = [replace(c, numbers=numbers, standing="assumed",
                               note=f"the rate of {wider} ({c.standing}), since none of {numbers} is known")
                       for c in device.ceilings if c.numbers == wider]
            notes.append(f"no rate of {numbers} is known; that of {wider} stands in, and {numbers} may well be faster: "
                         "floors of compute are no floors then")
        elif rates:
            others = sorted(str(n) for n in rates)
            notes.append(f"no rate of {numbers} is known, only of {', '.join(others)}: compute is left out "
                         f"(--numbers {others[0]} counts as that)")
        else:
            notes.append("no rate of multiply-adds is known: compute is left out")
    memory = [c for c in device.ceilings if c.resource != COMPUTE]
    if not any(c.resource == "DRAM" for c in memory):
        notes.append("no bandwidth of DRAM is known: it is left out, and floors may be far below")
    return (*compute, *memory)


def _floor(graph: Graph, n: Node, x: Layer, numbers: Numbers | None, ceilings: Sequence[Ceiling],
           limits: Sequence[int]) -> Floor:
    operations, weights, inputs = 2 * x.macs, ceil(x.weight_bits / 8), ceil(x.input_bits / 8)
    outputs = ceil(sum(_written(graph, v, numbers) for v in n.outputs if v >= 0) / 8)
    floors = _times(ceilings, operations, weights + inputs + outputs)
    seconds, bound = _longest(ceilings, floors, limits)
    return Floor(x, operations, weights, inputs, outputs, floors, seconds, bound)


def _times(ceilings: Iterable[Ceiling], operations: int, size: int) -> tuple[float, ...]:
    return tuple((operations if c.resource == COMPUTE else size) / c.value for c in ceilings)


def _longest(ceilings: Sequence[Ceiling], floors: Sequence[float], limits: Sequence[int]
             ) -> tuple[float | None, str]:
    """The longest floor of those that limit, and its resource; the first of equal ones."""
    applying = [i for i in limits if floors[i] > 0]
    at = max(applying, key=lambda i: floors[i], default=None)
    return (None, "") if at is None else (floors[at], ceilings[at].resource)


def _written(graph: Graph, v: int, numbers: Numbers | None) -> int:
    """Bits of an output as it is stored, behind activations and a quantizer that the layer takes up."""
    value = graph.values[v]
    for _ in range(_STEPS):
        readers = graph.consumers.get(value.index, ())
        if len(readers) != 1 or value.index in graph.outputs or len(readers[0].outputs) != 1:
            break
        op = readers[0].op.name
        if op not in _TAKEN_UP and op not in _QUANTIZERS:
            break
        value = graph.values[readers[0].outputs[0]]
        if op in _QUANTIZERS:
            break
    return bits(graph, value, numbers)


def _whole(graph: Graph, rows: Sequence[Floor], numbers: Numbers | None, ceilings: Sequence[Ceiling],
           limits: Sequence[int]) -> Whole:
    operations = sum(x.operations for x in rows)
    ends = sum(bits(graph, graph.values[v], numbers) for v in dict.fromkeys((*graph.inputs, *graph.outputs))
               if v >= 0 and graph.values[v].has_shape and not graph.values[v].is_constant)
    size = sum(x.weights for x in rows) + ceil(ends / 8)
    return Whole(operations, size, *_longest(ceilings, _times(ceilings, operations, size), limits))


# what a name stands for


def ceilings_of(device: str | os.PathLike[str]) -> Ceilings:
    """The ceilings of a name that `npulab targets` lists, or of a probe's result file.

    A chip with a timing model has that model's numbers; a described board what its facts state, or a study published.
    Raises: UsageError if it is neither; ModelError for a damaged file.
    """
    from npulab.targets.facts.board import find_board
    from npulab.targets.facts.schema import ids
    from npulab.targets.target import all_targets

    name = os.fspath(device)
    if name in published():
        return published()[name]
    targets = all_targets()
    if name in targets:
        return _of_target(name)
    if name in ids():
        return _of_board(find_board(name).facts)
    if os.path.exists(name) or name.endswith(".json"):
        return read_result(name)
    known = sorted({*targets, *ids(), *published()})
    close = difflib.get_close_matches(name, known, 3, 0.5)
    raise UsageError(f"there is no device '{name[:60]}'", want="a file of npulab probe --json, or a name that npulab "
                     f"targets or targets --boards lists: {', '.join(close or known)}")


_STANDING: Mapping[str, Standing] = {"stated": "stated", "witnessed": "stated"}
"""What stands behind a timing model's constant; the rest (inferred, fitted, assumed) is assumed."""


def _of_target(name: str) -> Ceilings:
    """From the chip's timing model: its numbers are the same for every program, so an empty one is asked."""
    from npulab.program.types import Program
    from npulab.targets.target import find_target

    chip = find_target(name)
    timing = chip.timing(Program(name, "best", "", "", (), (), (), (), (), (), (), ()))
    known = {c.name: c for c in timing.constants}
    behind = [known[k] for k in ("macs_per_cycle", "clock") if k in known]
    standing = "stated" if behind and all(c.state in _STANDING for c in behind) else "assumed"
    ceilings = [Ceiling(COMPUTE, 2 * timing.peak_macs, _STANDING.get(standing, "assumed"),
                        "timing model: " + "; ".join(f"{c.name} {_behind(c)}" for c in behind), "int8")]
    if "dram_bandwidth" in known:
        c = known["dram_bandwidth"]
        ceilings.append(Ceiling("DRAM", c.value, _STANDING.get(c.state, "assumed"),
                                "timing model: " + _behind(c)))
    return Ceilings(name, chip.title, tuple(ceilings), {"SRAM": int(known["sram"].value)} if "sram" in known else {})


def _behind(c: Constant) -> str:
    return c.source if c.source.startswith(c.state) else f"{c.state}, {c.source}"


def _of_board(facts: Facts) -> Ceilings:
    """From a described board's facts: a rate where they have one. They state no bandwidth of any memory."""
    peak = facts.facts.get("peak_tops_int8")
    ceilings: tuple[Ceiling, ...] = ()
    if peak is not None and isinstance(peak.value, int | float) and peak.value > 0:
        ceilings = (Ceiling(COMPUTE, peak.value * 1e12, "stated" if peak.source else "assumed",
                            facts.title(peak.source), "int8", peak.note),)
    return Ceilings(facts.id, facts.name, ceilings)


# plain data


def as_data(found: Roofline) -> dict[str, Any]:
    """The roofline for programs. `floors` of a layer are seconds at each entry of `ceilings`, in its order."""
    seconds = found.seconds
    total = {k: sum(getattr(x, k) for x in found.layers)
             for k in ("operations", "weights", "inputs", "outputs", "bytes")}
    return {
        "model": found.model,
        "device": {"name": found.device.name, "title": found.device.title, "sizes": dict(found.device.sizes)},
        "numbers": found.numbers, "bytes_as": found.numbers if found.forced else "file",
        "ceilings": [{
            "resource": c.resource, "numbers": c.numbers, "value": c.value, "unit": c.unit, "standing": c.standing,
            "source": c.source, "note": c.note, "interval": list(c.interval) if c.interval else None,
            "limits": i in found.limits, "seconds": found.at(i), "ridge": found.ridge(i),
        } for i, c in enumerate(found.ceilings)],
        "layers": [{
            "name": x.layer.name, "label": x.layer.label, "op": x.layer.op, "operations": x.operations,
            "weight_bytes": x.weights, "input_bytes": x.inputs, "output_bytes": x.outputs, "bytes": x.bytes,
            "intensity": x.intensity, "floors": list(x.floors), "seconds": x.seconds, "bound": x.bound,
            "share": found.share(x),
        } for x in found.layers],
        "totals": {
            "layers": len(found.layers), "operations": total["operations"], "weight_bytes": total["weights"],
            "input_bytes": total["inputs"], "output_bytes": total["outputs"], "bytes": total["bytes"],
            "intensity": total["operations"] / total["bytes"] if total["bytes"] else None, "seconds": seconds,
            "by_bound": by_bound(found), "other_operators": found.hidden,
        },
        "network": {"operations": found.whole.operations, "bytes": found.whole.bytes, "seconds": found.whole.seconds,
                    "bound": found.whole.bound},
        "left_out": [{"name": x.name, "why": x.why} for x in found.device.left_out], "notes": list(found.notes),
    }


def by_bound(found: Roofline) -> dict[str, float]:
    """Resource -> seconds of the layers that it bounds, largest first."""
    out: dict[str, float] = {}
    for x in found.layers:
        if x.seconds is not None:
            out[x.bound] = out.get(x.bound, 0.0) + x.seconds
    return dict(sorted(out.items(), key=lambda item: -item[1]))
