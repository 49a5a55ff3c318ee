"""What the nodes that a board leaves off its NPU cost: tensors that cross the border, work that stays on the CPU.

Everything counted follows from shapes and verdicts. Times are said only where something published bounds them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass

from npulab.ir import Graph, Node, Value
from npulab.ir.ops import captures
from npulab.ir.types import DType
from npulab.targets.facts.board import FLOATS, Check
from npulab.targets.facts.schema import Facts

BITS = {DType.INT4: 4, DType.UINT4: 4, DType.INT2: 2, DType.BFLOAT16: 16}
ASSUMED_BITS = {"int4": 4, "int8": 8, "uint8": 8, "int16": 16, "float16": 16, "bfloat16": 16}
NO_LINK = {
    "shared-dram": "NPU and CPU read the same DRAM: a crossing costs a wait and a look at the caches, not a copy",
    "on-chip": "tensors lie in the chip's own SRAM",
    "partitioned": "the NPU has memory of its own: tensors are copied",
    "pcie": "tensors cross PCIe; the width of the link is the board's",
    "usb": "tensors cross USB",
}
"""What a crossing means, by the fact `memory_topology`."""
LINE_RATES = {"usb": (500e6, "USB 3.0: 5 Gbit/s, 8 bits in 10 of them, before any overhead (usb.org)")}
"""B/s that a link has at most, by its standard, and where that is stated. PCIe has as many as it has lanes."""


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes that run on the NPU together. Values and bytes are those that it takes from the CPU, or gives it."""

    nodes: tuple[int, ...]
    in_values: int
    in_bytes: int
    out_values: int
    out_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What the fallback of one check costs, the network's own inputs and outputs not counted.

    regions     of the NPU, in order; their bytes count the network's inputs and outputs too.
    transfers   tensors that cross because nodes are off the NPU, and their `bytes` in all.
    open        values among them whose size is not known, counted as none.
    host_macs   multiply-accumulates off the NPU.    host_elements  elements that nodes without any compute there.
    topology    the fact `memory_topology`, "" where the facts have none; `topology_source` as people read it.
    least_ms    the time the bytes take at the link's line rate; None where no standard says.
    basis       what stands behind least_ms, or what a crossing means.
    """

    regions: tuple[Region, ...]
    transfers: int
    bytes: int
    open: int
    host_macs: int
    host_elements: int
    topology: str
    topology_source: str
    least_ms: float | None
    basis: str


def cost(graph: Graph, check: Check, facts: Facts, assume: str = "") -> Cost:
    """The cost of what `check` leaves off the NPU of the board with these `facts`; floats as `assume` has them."""
    on = {f.node for f in check.findings if f.where == "npu"}
    fixed = derived(graph)
    made = {v: n.index for n in graph.nodes for v in n.outputs if v >= 0}
    epoch = epochs(graph, on)
    takes: dict[int, dict[int, None]] = {}
    gives: dict[int, dict[int, None]] = {}
    crossing: dict[tuple[int, bool], None] = {}
    own = {*graph.inputs, *graph.outputs}
    for n in graph.nodes:
        here = n.index in on
        for v in _reads(n):
            if v in fixed or graph.values[v].is_variable:
                continue
            there = made.get(v) in on if v in made else False
            if here and not there:
                takes.setdefault(epoch[n.index], {})[v] = None
            elif there and not here:
                gives.setdefault(epoch[made[v]], {})[v] = None
            if here is not there and v not in graph.inputs:
                crossing[v, here] = None
    for v in graph.outputs:
        if made.get(v) in on and v not in fixed:
            gives.setdefault(epoch[made[v]], {})[v] = None
    members: dict[int, list[int]] = {}
    for i in on:
        members.setdefault(epoch[i], []).append(i)

    def size(values: Collection[int]) -> int:
        return sum(nbytes(graph.values[v], assume) or 0 for v in values)

    found = tuple(Region(tuple(sorted(members[e])), len(takes.get(e, ())), size(takes.get(e, ())),
                         len(gives.get(e, ())), size(gives.get(e, ()))) for e in sorted(members))
    # an output that also crosses to a host node is fetched once, and is fetched anyway
    extra = [v for v, to_npu in crossing if to_npu or v not in own]
    total = size(extra)
    off = [n for n in graph.nodes if n.index not in on]
    elements = sum(max((graph.values[v].elements for v in n.outputs if v >= 0), default=0) for n in off)
    fact = facts.facts.get("memory_topology")
    topology = str(fact.value) if fact is not None else ""
    stated = (facts.title(fact.source) if fact.source else "assumed, no source states it") if fact is not None else ""
    rate = LINE_RATES.get(topology)
    return Cost(
        found, len(extra), total, sum(nbytes(graph.values[v], assume) is None for v in extra),
        check.macs - check.npu_macs, elements, topology, stated, 1e3 * total / rate[0] if rate and total else None,
        rate[1] if rate else NO_LINK.get(topology, "how NPU and CPU share memory is not stated"),
    )


def nbytes(value: Value, assume: str = "") -> int | None:
    """Bytes of a tensor, with `assume` in place of floats; None where its size is not known."""
    if not value.has_shape or any(value.dynamic_axes) or value.dtype is DType.UNKNOWN:
        return None
    bits = BITS.get(value.dtype)
    if assume and value.dtype.value in FLOATS:
        bits = ASSUMED_BITS[assume]
    if bits is None:
        if value.dtype.numpy is None:
            return None
        bits = 8 * value.dtype.numpy.itemsize
    return (value.elements * bits + 7) // 8


def epochs(graph: Graph, on: Set[int]) -> Mapping[int, int]:
    """Node -> epoch, alternating between NPU and host: nodes of one epoch run together (`board.regions`)."""
    value: dict[int, int] = {}
    found: dict[int, int] = {}
    first = next((n.index in on for n in graph.nodes if not any(v in graph.producer for v in n.inputs)), False)
    for n in graph.nodes:
        odd = (n.index in on) is not first
        e = max((value[v] for v in n.inputs if v in value), default=0)
        e += (e % 2 == 1) is not odd
        value.update((v, e) for v in n.outputs)
        found[n.index] = e
    return found


def derived(graph: Graph) -> set[int]:
    """Values that follow from constants and fixed shapes alone: a converter works them out."""
    known = {v.index for v in graph.values if v.is_constant}
    for n in graph.nodes:
        inputs = [v for v in n.inputs if v >= 0]
        if not inputs or n.op.name in ("If", "Loop", "Scan", "IF", "WHILE", "QuantizeLinear", "DequantizeLinear"):
            continue
        source = graph.values[inputs[0]]
        if all(v in known for v in inputs) or (n.op.name in ("Shape", "SHAPE", "Size", "RANK")
                                               and source.has_shape and not source.dynamic_axes):
            known.update(v for v in n.outputs if v >= 0)
    return known


def _reads(n: Node) -> list[int]:
    return [v for v in dict.fromkeys((*n.inputs, *captures(n.op))) if v >= 0]
