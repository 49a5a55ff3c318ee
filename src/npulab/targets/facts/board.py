"""A described board, and what its published rules say of a model.

Rules are the vendor's own words made predicates; a verdict is what follows from them, no more. What they leave open is
reported as open: a predicate whose names have no value, an operator that a list without policy lacks.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from npulab.errors import UsageError
from npulab.ir import Graph, Node
from npulab.plan.types import Reason, Verdict
from npulab.targets.facts import names as naming
from npulab.targets.facts.compounds import compounds
from npulab.targets.facts.properties import Properties, macs, tensor_names
from npulab.targets.facts.schema import Facts, OpEntry, Rule, WideRule, ids, load_all, load_one

POLICY = {"host": "host", "reject": "refused", "cut": "refused", "unknown": "unknown"}
"""What a vendor's stack does with an operator -> where the node is."""
FOLDED = ("Constant", "Identity", "Dropout")
"""Operators that every converter removes."""
SHAPES = ("SHAPE", "RANK")
"""Operators of TFLite that ask for a shape: known beforehand, but compilers of TFLite files leave them as they are."""
MARKERS = ("QuantizeLinear", "DequantizeLinear")
"""Operators that say how ONNX data is quantized; a converter folds them into what is beside them."""
NMS = ("NonMaxSuppression", "tflite:TFLite_Detection_PostProcess")
SHOWN = 120
"""Characters of a value in a reason."""


@dataclass(frozen=True, slots=True)
class Finding(Verdict):
    """The verdict on a node. `name` is canonical (Conv), `op` the file's (CONV_2D).

    notes      it runs on the NPU, but: slowly, in another element type, as part of another operator.
    undecided  rules that may or may not be broken: what they ask for is not known.
    """

    name: str = ""
    notes: tuple[Reason, ...] = ()
    undecided: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """What a board's rules say of a model.

    findings     one a node, in order.                graph  rules about the whole model that it breaks.
    undecided    such rules that stay open.           advice  such rules that nobody can check.
    partitions   regions that run on the NPU.         macs, npu_macs  of the model, of its nodes on the NPU.
    """

    board: str
    findings: tuple[Finding, ...]
    graph: tuple[Reason, ...]
    undecided: tuple[Reason, ...]
    advice: tuple[Reason, ...]
    partitions: int
    macs: int
    npu_macs: int

    def count(self, where: str) -> int:
        """Nodes that are there: "npu", "host", "refused", "unknown"."""
        return sum(f.where == where for f in self.findings)

    @property
    def npu_percent(self) -> float | None:
        """MACs on the NPU; None of a model without any."""
        return 100 * self.npu_macs / self.macs if self.macs else None


class View:
    """A graph as rules look at it, the same for every board."""

    def __init__(self, graph: Graph, assume: str) -> None:
        self.nodes = {n.index: Properties(graph, n, assume) for n in graph.nodes}
        self.names = {i: naming.canonical(p.node, p) for i, p in self.nodes.items()}
        self.macs = {i: macs(p) for i, p in self.nodes.items()}
        self.compounds = {c.nodes[0]: c for c in compounds(graph, self.names, self.nodes)}
        self.constant = set(_constant(graph, self.nodes))


def _constant(graph: Graph, nodes: Mapping[int, Properties]) -> Iterator[int]:
    """Nodes that a converter works out beforehand: shapes of fixed size, weights that a TFLite file stores smaller."""
    known = {v.index for v in graph.values if v.is_constant}
    for n in graph.nodes:
        inputs = [v for v in n.inputs if v >= 0]
        if n.op.name in (*MARKERS, "QUANTIZE", "If", "Loop", "Scan", "IF", "WHILE") or not inputs:
            continue
        if all(v in known for v in inputs) or (n.op.name in ("Shape", "SHAPE", "Size", "RANK")
                                               and nodes[n.index].get("shape") is not None):
            known.update(n.outputs)
            yield n.index


@functools.lru_cache(maxsize=4)
def view_of(graph: Graph, assume: str) -> View:
    """The view of a graph, kept for the next board. Few are: each holds its graph in memory."""
    return View(graph, assume)


@dataclass(frozen=True, eq=False)
class Board:
    """A target that npulab describes by published facts and does not compile for."""

    facts: Facts

    @property
    def name(self) -> str:
        """Its id."""
        return self.facts.id

    @property
    def title(self) -> str:
        return self.facts.name

    def check(self, graph: Graph, assume: str = "") -> Check:
        """Where each node runs, by the published rules.

        `assume`: the element type ("int8") that the vendor's tool will have given to floating point data; "" takes the
        model as it is. Raises UsageError for a type that does not exist.
        """
        if assume and assume not in ASSUMED:
            raise UsageError(f"data cannot become '{assume}'", want=", ".join(ASSUMED))
        view = view_of(graph, assume)
        found = {n.index: self._node(graph, view, n) for n in graph.nodes}
        self._fuse(graph, view, found)
        self._fold_markers(graph, view, found)
        if self.facts.host_from_first:
            self._rest_to_host(graph, view, found)
        broken, undecided, advice = self._graph(graph, view)
        on = {i for i, f in found.items() if f.where == "npu"}
        return Check(self.facts.id, tuple(found[n.index] for n in graph.nodes), broken, undecided, advice,
                     regions(graph, on), sum(view.macs.values()), sum(view.macs[i] for i in on))

    # one node

    def _node(self, graph: Graph, view: View, node: Node) -> Finding:
        names = view.names[node.index]
        label = naming.label(names)
        name = next((n for n in names if n in self.facts.ops), None)
        stated = graph.format == "tflite" and node.op.name in SHAPES and name is not None
        if (node.index in view.constant and not stated) or (name is None and names[0] in FOLDED):
            note = Reason("A converter works out constants and drops operators that change nothing.", label, "npulab")
            return Finding(node.index, node.op.name, "npu", (), label, (note,))
        if name is None:
            return self._unlisted(node, names)
        return self._listed(graph, view.nodes[node.index], self.facts.ops[name], name)

    def _unlisted(self, node: Node, names: tuple[str, ...]) -> Finding:
        label, f = naming.label(names), self.facts
        where, remedy = POLICY[f.unlisted], ""
        if not f.op:
            rule, where = "Which operators run on the NPU is not published.", "unknown"
        else:
            rule = "The operators of the vendor's list run on the NPU."
        if f.nms != "unknown" and any(n in NMS for n in names):
            where = {"built-in": "npu", "host": "host", "cut": "refused"}[f.nms]
        if where == "refused":
            remedy = "end the network before it and compute the rest on the CPU"
        if where == "npu":
            return Finding(node.index, node.op.name, "npu", (), label)
        source = f.title(f.op[0].source) if f.op else "the vendor's public documents"
        found = f"{label} is not on it" + (f"; {f.unlisted_note.rstrip('.')}" if f.unlisted_note and f.op else "")
        reason = Reason(rule, found if f.op else label, source, remedy)
        return Finding(node.index, node.op.name, where, (reason,), label)

    def _listed(self, graph: Graph, p: Properties, entry: OpEntry, name: str) -> Finding:
        title = self.facts.title(entry.source)
        node = p.node
        if entry.support == "host":
            reason = Reason("The vendor lists it as an operator of the CPU.", name, title, "")
            return Finding(node.index, node.op.name, "host", (reason,), name)
        reasons: list[Reason] = []
        notes: list[Reason] = []
        undecided: list[Reason] = []
        if entry.support == "preview":
            notes.append(Reason("The vendor lists it as a preview.", name, title))
        self._types(p, entry, name, reasons, notes, undecided)
        to_host: list[Reason] = []
        for r in entry.rule:
            self._apply(r, p.get, title, to_host if r.effect == "host" else reasons, notes, undecided)
        self._activation(p, entry, name, undecided)
        self._wide(graph, p, reasons, notes, undecided)
        where = POLICY[self.facts.broken or self.facts.unlisted] if reasons else "host" if to_host else "npu"
        reasons += to_host
        return Finding(node.index, node.op.name, where, tuple(reasons), name, tuple(notes), tuple(undecided))

    def _wide(self, graph: Graph, p: Properties, reasons: list[Reason], notes: list[Reason],
              undecided: list[Reason]) -> None:
        """Rules about every node and every tensor. Names that do not apply leave them without effect."""
        for r, title in self._node_rules:
            open_: list[Reason] = []
            self._apply(r, p.get, title, reasons, notes, open_)
            if p.unknown & {n for row in r.rows for n in row.names}:
                undecided += open_
        if self._tensor_rules:
            values = dict.fromkeys(v for v in (*p.node.inputs, *p.node.outputs) if v >= 0)
            for v in values:
                value = graph.values[v]
                if value.is_constant or ((found := p.source(value)) is not None and found[0].is_constant):
                    continue
                find = tensor_names(graph, value, p)
                for r, title in self._tensor_rules:
                    self._apply(r, find, title, reasons, notes, [], f"tensor '{value.name[:60]}': ")
        if p.get("kernel_w") is not None:
            for r, title in self._window_rules:
                self._apply(r, p.get, title, reasons, notes, undecided)

    @cached_property
    def _tensor_rules(self) -> list[tuple[Rule, str]]:
        return [(r, self.facts.title(r.source)) for r in self.facts.rule if r.scope == "tensor" and r.rows]

    @cached_property
    def _window_rules(self) -> list[tuple[Rule, str]]:
        return [(Rule(text=text.format(fact.value), require=require.format(fact.value)), self.facts.title(fact.source))
                for key, text, require in WINDOW_LIMITS if (fact := self.facts.facts.get(key)) is not None]

    @cached_property
    def _node_rules(self) -> list[tuple[Rule, str]]:
        rules: list[tuple[Rule, str]] = [(r, self.facts.title(r.source)) for r in self.facts.rule
                                         if r.scope == "node" and r.rows]
        if (fact := self.facts.facts.get("max_rank")) is not None:
            rules.append((Rule(text=f"Tensors have at most {fact.value} dimensions.", require=f"rank <= {fact.value}"),
                          self.facts.title(fact.source)))
        return rules

    def _apply(self, r: Rule, lookup: Callable[[str], Any], title: str, reasons: list[Reason], notes: list[Reason],
               undecided: list[Reason], where: str = "") -> None:
        """Put what a rule says of a node into the list where it belongs."""
        if not r.rows:
            return
        answers = [row.decide(lookup) for row in r.rows]
        if True in answers:
            return
        broken = None not in answers
        wanted = [n for row, answer in zip(r.rows, answers, strict=True) if broken or answer is None
                  for n in row.culprits(lookup)]
        values = {n: lookup(n) for n in dict.fromkeys(wanted)}
        known = ", ".join(f"{n.removeprefix('attr_')} {_shown(v)}" for n, v in values.items() if v is not None)
        missing = ", ".join(n.removeprefix("attr_") for n, v in values.items() if v is None)
        if not broken:
            known = f"not known: {missing}" + (f" ({known})" if known else "") if missing else known
        reason = Reason(r.text, where + (known or "not known"),
                        self.facts.title(r.source) if r.source else title, r.remedy,
                        r.require or " or ".join(f"({row})" for row in r.any))
        (undecided if not broken or r.effect == "unknown" else notes if r.effect == "slow" else reasons).append(reason)

    def _types(self, p: Properties, entry: OpEntry, name: str, reasons: list[Reason], notes: list[Reason],
               undecided: list[Reason]) -> None:
        """Element types of data, and how weights are quantized."""
        dtype, weighted = p.get("dtype"), p.weights is not None
        allowed, title = entry.dtypes, self.facts.title(entry.source)
        fact = self.facts.facts.get("dtypes")
        if not allowed and fact is not None and isinstance(fact.value, tuple):
            stated = tuple(str(t) for t in fact.value)
            if weighted or (dtype in FLOATS and not any(t in FLOATS for t in stated)):
                allowed, title = stated, self.facts.title(fact.source)
        listed = ", ".join(allowed)
        rule = f"Data of {name} is {' or '.join(allowed)}."
        if allowed and dtype is None and "dtype" in p.unknown:
            undecided.append(Reason(rule, "not known: dtype", title, "", listed))
        elif allowed and dtype is not None and dtype not in allowed and not (
                p.kind in (*MARKERS, "Cast") and p.get("out_dtype") in allowed) and not self._dequantized(p, allowed):
            halves = [t for t in allowed if t in ("float16", "bfloat16")]
            own = p.data.dtype.value if p.data is not None else ""
            if halves and (dtype in ("float32", "float64") or (p.assume and own in FLOATS)):
                notes.append(Reason(rule, f"{own}, computed as {halves[0]}", title, "", listed))
            else:
                reasons.append(Reason(rule, dtype, title, _type_remedy(dtype, allowed), listed))
        quant: tuple[str, ...] = entry.weight_quant
        fact = self.facts.facts.get("weight_granularity")
        if not quant and fact is not None and isinstance(fact.value, tuple):
            quant, title = tuple(map(str, fact.value)), self.facts.title(fact.source)
        if weighted and quant and "per-channel" not in quant and p.get("per_channel"):
            reasons.append(Reason(f"Weights are quantized {' or '.join(quant)}.", "per-channel", title,
                                  f"quantize the weights {quant[0]}", ", ".join(quant)))

    def _dequantized(self, p: Properties, allowed: tuple[str, ...]) -> bool:
        """Whether a board that lists DequantizeLinear takes the type that one gives the node."""
        return p.onnx and "DequantizeLinear" in self.facts.ops and p.data is not None \
            and p.data.dtype.value in allowed and not p.assume

    def _activation(self, p: Properties, entry: OpEntry, name: str, undecided: list[Reason]) -> None:
        """A fused activation is an operator too."""
        fused = p.get("fused")
        if fused in (None, "none") or fused in entry.fuses or fused in self.facts.ops \
                or any("fused" in row.names for r in entry.rule for row in r.rows):
            return
        undecided.append(Reason("The operators of the vendor's list run on the NPU.",
                                f"{fused}, fused into {name}, is not on it", self.facts.title(entry.source),
                                "", ", ".join(entry.fuses)))

    # nodes together

    def _fuse(self, graph: Graph, view: View, found: dict[int, Finding]) -> None:
        """Operators that are not for the NPU by themselves, but as part of the one before them; those spelled out.

        A BatchNormalization of constants behind a Conv is part of it whatever the list says.
        """
        into: dict[int, Node] = {}
        for c in view.compounds.values():
            entry = self.facts.ops.get(c.name)
            if entry is None or all(found[i].where == "npu" for i in c.nodes):
                continue
            whole = self._listed(graph, view.nodes[c.first], entry, c.name)
            note = Reason(f"{c.parts} are {c.name}.", f"nodes {', '.join(map(str, c.nodes))}", "npulab")
            for i in c.nodes:
                found[i] = replace(whole, node=i, op=view.nodes[i].node.op.name, notes=(*whole.notes, note))
        for n in graph.nodes:
            names = view.names[n.index]
            if found[n.index].where == "npu":
                continue
            spelled = view.compounds.get(n.index)
            together = spelled.nodes if spelled is not None else (n.index,)
            names = (spelled.name,) if spelled is not None else names
            head = next((h for v in n.inputs if v >= 0 and (h := self._head(graph, v, together, into)) is not None
                         and found[h.index].where == "npu" and self._takes(view, h, names)), None)
            if head is None or ("BatchNormalization" in names and not _foldable(graph, view, n, head)):
                continue
            for i in together:
                into[i] = head
                note = Reason(f"{found[head.index].name} takes up what follows it.", f"part of {head}", self._title_of(
                    view, head))
                found[i] = replace(found[i], where="npu", reasons=(), notes=(*found[i].notes, note), undecided=())

    def _head(self, graph: Graph, v: int, readers: tuple[int, ...], into: Mapping[int, Node]) -> Node | None:
        """The operator that makes value `v`, or has taken up what makes it, if nobody but `readers` reads it."""
        maker = graph.producer.get(v)
        if maker is None or v in graph.outputs or any(c.index not in readers for c in graph.consumers[v]):
            return None
        return into.get(maker.index, maker)

    def _entry(self, names: tuple[str, ...]) -> OpEntry | None:
        return next((self.facts.ops[n] for n in names if n in self.facts.ops), None)

    def _takes(self, view: View, head: Node, names: Iterable[str]) -> bool:
        entry = self._entry(view.names[head.index])
        return entry is not None and ("BatchNormalization" in names or any(n in entry.fuses for n in names))

    def _title_of(self, view: View, node: Node) -> str:
        entry = self._entry(view.names[node.index])
        return self.facts.title(entry.source) if entry else "npulab"

    def _fold_markers(self, graph: Graph, view: View, found: dict[int, Finding]) -> None:
        """QuantizeLinear and DequantizeLinear go where the operators beside them are: of ONNX graphs, and of all for
        tools that read TFLite files into operators of their own. Not where the vendor's list has them on the CPU."""
        if graph.format != "onnx" and "tflite" in self.facts.namespace.lower():
            return
        marks = {i for i, names in view.names.items() if names[-1] in MARKERS
                 and ((e := self._entry(names)) is None or e.support != "host")}
        for chain in _chains(graph, marks):
            beside = {n.index for i in chain for n in _beside(graph, view.nodes[i].node)} - chain
            if not any(found[i].where == "npu" for i in beside):
                continue
            for i in chain:
                if found[i].where != "npu":
                    note = Reason("Marks of quantization become part of the operators beside them.", found[i].name,
                                  "npulab")
                    found[i] = replace(found[i], where="npu", reasons=(), undecided=(), notes=(note,))

    def _rest_to_host(self, graph: Graph, view: View, found: dict[int, Finding]) -> None:
        """One part of the graph is the NPU's: from the first operator that it takes to the next that it does not."""
        first: Finding | None = None
        begun = False
        for n in graph.nodes:
            f = found[n.index]
            begun = begun or (f.where == "npu" and n.index not in view.constant)
            if first is None:
                first = None if f.where == "npu" or not begun else f
            elif f.where == "npu" and first.where != "refused":
                reason = Reason("Everything behind the first operator that is not for the NPU runs on the CPU.",
                                f"{first.name} (node {first.node}) is before it", "the vendor's compiler")
                found[n.index] = replace(f, where=first.where, reasons=(reason,))

    # the whole graph

    def _graph(self, graph: Graph, view: View) -> tuple[tuple[Reason, ...], tuple[Reason, ...], tuple[Reason, ...]]:
        """(broken, undecided, advice)."""
        broken: list[Reason] = []
        undecided: list[Reason] = []
        advice: list[Reason] = []
        first = graph.values[graph.inputs[0]] if graph.inputs else None
        dummy = next(iter(view.nodes.values()), None)
        tensor = tensor_names(graph, first, dummy) if first is not None and dummy is not None else None

        def lookup(name: str) -> Any:
            match name:
                case "nodes":
                    return len(graph.nodes)
                case "operators":
                    return list(dict.fromkeys(naming.label(n) for n in view.names.values()))
                case "inputs" | "outputs":
                    return len(getattr(graph, name))
                case "layers":
                    return sum(p.weights is not None for p in view.nodes.values())
            return tensor(name) if tensor is not None else None

        for r in self.facts.rule:
            title = self.facts.title(r.source)
            if not r.rows:
                advice.append(Reason(r.text, "", title, r.remedy))
            elif r.scope == "graph":
                self._apply(r, lookup, title, broken, advice, undecided)
        for key, text, require in GRAPH_LIMITS:
            fact = self.facts.facts.get(key)
            if fact is not None and isinstance(fact.value, int) and not isinstance(fact.value, bool):
                r = WideRule(scope="graph", text=text.format(fact.value), require=require.format(fact.value))
                self._apply(r, lookup, self.facts.title(fact.source), broken, advice, undecided)
        fact = self.facts.facts.get("dynamic_shapes")
        if fact is not None and fact.value is False:
            for v in graph.inputs:
                axes = [a for a in graph.values[v].dynamic_axes if a]
                if axes:
                    broken.append(Reason("Shapes are fixed.", f"input '{graph.values[v].name[:60]}' is dynamic along "
                                         f"axis {', '.join(map(str, axes))}", self.facts.title(fact.source),
                                         "give the input a fixed size"))
        return tuple(broken), tuple(undecided), tuple(advice)


FLOATS = ("float64", "float32", "float16", "bfloat16")
ASSUMED = ("int8", "uint8", "int16", "int4", "float16", "bfloat16")
"""Element types that converters give to floating point data."""
WINDOW_LIMITS = (
    ("max_channels", "Layers have at most {} channels.", "channels <= {0} and out_channels <= {0}"),
    ("max_dim", "Images are at most {0} by {0}.", "height <= {0} and width <= {0}"),
)
"""Facts that limit operators with a kernel: key, rule, predicate."""
GRAPH_LIMITS = (
    ("batch", "The batch is at most {}.", "batch <= {}"),
    ("max_layers", "A network has at most {} layers with weights.", "layers <= {}"),
)


def regions(graph: Graph, on: Set[int]) -> int:
    """How many NPU regions `plan.partition.partition` makes of the nodes `on`, by index, in one walk."""
    epoch: dict[int, int] = {}  # of values; epochs alternate between the NPU and the host
    first = next((n.index in on for n in graph.nodes if not any(v in graph.producer for v in n.inputs)), False)
    taken = set()
    for n in graph.nodes:
        odd = (n.index in on) is not first
        e = max((epoch[v] for v in n.inputs if v in epoch), default=0)
        e += (e % 2 == 1) is not odd
        epoch.update((v, e) for v in n.outputs)
        if n.index in on:
            taken.add(e)
    return len(taken)


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _type_remedy(dtype: str, allowed: tuple[str, ...]) -> str:
    integers = [t for t in allowed if t in ("int8", "uint8", "int16", "int4")]
    halves = [t for t in allowed if t in FLOATS]
    if dtype in FLOATS:
        return " or ".join([f"quantize to {t}" for t in integers[:1]] + [f"convert to {t}" for t in halves[:1]])
    if dtype in ("int8", "uint8", "int16", "int4", "uint4"):
        ways = [f"quantize to {t}" for t in integers[:1]]
        return " or ".join(ways or [f"convert the float model to {t}" for t in halves[:1]])
    return ""


def _foldable(graph: Graph, view: View, node: Node, head: Node) -> bool:
    """Whether a BatchNormalization of constants becomes part of a convolution's weights, as every converter does it."""
    return "Conv" in view.names[head.index] and all(v >= 0 and graph.values[v].is_constant for v in node.inputs[1:])


def _beside(graph: Graph, node: Node) -> Iterator[Node]:
    for v in node.inputs:
        if v in graph.producer:
            yield graph.producer[v]
    for v in node.outputs:
        yield from graph.consumers.get(v, ())


def _chains(graph: Graph, marks: set[int]) -> Iterator[set[int]]:
    """Nodes of `marks` that follow each other, as sets."""
    nodes = {n.index: n for n in graph.nodes if n.index in marks}
    left = set(marks)
    for start in sorted(marks):
        if start not in left:
            continue
        left.discard(start)
        chain, queue = set(), [start]
        while queue:
            i = queue.pop()
            chain.add(i)
            for n in _beside(graph, nodes[i]):
                if n.index in left:
                    left.discard(n.index)
                    queue.append(n.index)
        yield chain


def boards() -> Mapping[str, Board]:
    """Every described board, by id, in order."""
    return {name: Board(facts) for name, facts in load_all().items()}


def find_board(name: str) -> Board:
    """The board called `name`. Raises UsageError with those that are close, or all."""
    if name not in ids():
        close = difflib.get_close_matches(name, ids(), 3, 0.5)
        raise UsageError(f"there is no board '{name[:60]}'", want=", ".join(close or ids()))
    return Board(load_one(name))
