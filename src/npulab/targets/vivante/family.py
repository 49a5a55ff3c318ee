"""The Vivante NPUs as targets: check, compile, device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from npulab.errors import CapacityError, InvariantError, UnsupportedError, UsageError
from npulab.exporters.tflite import cut
from npulab.ir import Graph, Node
from npulab.ir.ops import Concat, Elementwise, Mean, Pool2D, Reshape
from npulab.plan.partition import Part, fewest_regions, partition
from npulab.plan.types import Reason, Verdict
from npulab.program.types import HostNode, HostStep, Program
from npulab.quantization.types import Rules
from npulab.runtime.device import Device
from npulab.runtime.replay import ReplayResult
from npulab.targets.target import PlanName, PlanOptions, Prediction, Settings, Timing
from npulab.targets.vivante import best, constraints, quantization, reference, timing
from npulab.targets.vivante.chips import Chip, varied
from npulab.targets.vivante.encode import encode
from npulab.targets.vivante.jobs import Region
from npulab.targets.vivante.options import FEATURES, EncodeOptions
from npulab.targets.vivante.search import Search
from npulab.targets.vivante.search_log import SearchLog

DEFAULT = PlanOptions()
SMALL = 1 << 15
"""Elements from which averages and functions take the host longer than any detour over the NPU (80 us, modelled)."""



def _moves_bytes(graph: Graph, node: Node) -> bool:
    """Whether an operator is cheap everywhere, so that a transfer for it is not: tables, and joins not by channels."""
    if isinstance(node.op, Concat):
        shape = graph.values[node.outputs[0]].shape
        return not (len(shape) == 4 and node.op.axis % 4 == 3)
    return isinstance(node.op, Elementwise)


def _made_by(graph: Graph, node: Node, wanted: Callable[[Node], bool]) -> bool:
    """Whether all that `node` reads was computed by nodes that are `wanted`, which reshapes hand on."""
    for v in node.inputs:
        maker = graph.producer.get(v)
        while maker is not None and isinstance(maker.op, Reshape) and wanted(maker):
            v = maker.inputs[0]
            maker = graph.producer.get(v)
        if maker is None or not wanted(maker):
            return False
    return True


COMPUTES = ("CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "FULLY_CONNECTED", "AVERAGE_POOL_2D", "MEAN")
"""Operators worth a transfer. A region of others alone only moves bytes, which the host does where they are."""


@dataclass(frozen=True, slots=True)
class VivanteTarget:
    """One chip of the family."""

    chip: Chip
    settings: Settings = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.chip.name

    @property
    def title(self) -> str:
        return self.chip.title

    def support_table(self) -> list[tuple[str, str, str]]:
        return constraints.support_table()

    def rules(self) -> Rules:
        return quantization.rules(self.chip)

    @property
    def features(self) -> Mapping[str, str]:
        return FEATURES

    def with_settings(self, settings: Settings) -> VivanteTarget:
        return VivanteTarget(varied(self.chip, settings), {**self.settings, **settings})

    def check(self, graph: Graph, plan: PlanName, options: PlanOptions = DEFAULT) -> list[Verdict]:
        self._check_request(graph, plan, options)
        verdicts = self._divide(graph, plan, options)[1]
        return self._placed(graph, plan, options, verdicts)[1]

    def compile(self, graph: Graph, plan: PlanName, keep_all: bool = False, options: PlanOptions = DEFAULT) -> Program:
        """`keep_all` (plan best only) downloads every tensor the NPU computes, to look at layers one by one."""
        self._check_request(graph, plan, options)
        parts, verdicts = self._divide(graph, plan, options)
        if keep_all:
            return self._compile(graph, plan, options, parts, verdicts, keep_all)
        return self._placed(graph, plan, options, verdicts)[0] or self._compile(graph, plan, options, parts, verdicts)

    def _placed(self, graph: Graph, plan: PlanName, options: PlanOptions,
                verdicts: list[Verdict]) -> tuple[Program | None, list[Verdict]]:
        """The fastest placement, if there is a question: small averages and functions on the NPU, or on the host."""
        small = [n for n, v in zip(graph.nodes, verdicts, strict=True) if v.where == "npu"
                 and isinstance(n.op, Pool2D | Mean | Elementwise) and graph.values[n.inputs[0]].elements < SMALL]
        if plan == "reference" or not small:
            return None, verdicts
        functions = frozenset(n.index for n in small if isinstance(n.op, Elementwise))
        averages = frozenset(n.index for n in small) - functions
        placements = []
        for host in dict.fromkeys((frozenset[int](), averages, functions, averages | functions)):
            parts, found = self._divide(graph, plan, options, host)
            program = self._compile(graph, plan, options, parts, found)
            placements.append((sum(s.ns for s in self.timing(program).spans), program, found))
        return min(placements, key=lambda p: p[0])[1:]

    def _compile(self, graph: Graph, plan: PlanName, options: PlanOptions, parts: list[Part], verdicts: list[Verdict],
                 keep_all: bool = False) -> Program:
        how = EncodeOptions(plan == "best", options.zero_runs, options.kernel_cache, options.image_cache,
                            options.features)
        search = Search(timing.Speeds.of(self.chip, self.settings), how,
                        SearchLog(options.search_log) if options.search_log else None)
        host = [HostNode(v.node, v.op, tuple(str(r) for r in v.reasons)) for v in verdicts if v.where == "host"]
        try:
            steps = [self._step(graph, plan, options, part, search, keep_all) for part in parts]
            program = encode(graph, self.name, plan, self.chip, steps, host, how)
        except InvariantError as e:  # a descriptor field, which names its bits and its source
            advice = {"try_": "--plan best"} if plan == "reference" else {}
            raise CapacityError(f"'{graph.name}' does not fit the engine: {e.message}", **e.facts, **advice) from e
        choices = tuple(c for s in steps if isinstance(s, Region) for c in s.choices)
        return msgspec.structs.replace(program, options=options.as_text(), choices=choices)

    def _step(self, graph: Graph, plan: PlanName, options: PlanOptions, part: Part, search: Search,
              keep_all: bool) -> Region | HostStep:
        if not part.on_npu:
            nodes = tuple(n.index for n in part.nodes)
            return HostStep(nodes, part.inputs, part.outputs, cut(graph, nodes, part.inputs, part.outputs))
        if plan == "reference":
            return reference.lower(graph, part, self.chip, mended=options.channels != "any")
        return best.lower(graph, part, self.chip, keep_all, search)

    def _check_request(self, graph: Graph, plan: PlanName, options: PlanOptions) -> None:
        if graph.format != "tflite":
            raise UnsupportedError(f"'{graph.name}' is an {graph.format.upper()} model, and {self.name} compiles "
                                   "TFLite models so far", try_="convert it to TFLite")
        unknown = sorted(options.features - FEATURES.keys())
        if unknown:
            raise UsageError(f"{self.name} has no feature '{unknown[0]}'", want=", ".join(sorted(FEATURES)) or "none")
        if options.features and plan == "reference":
            raise UsageError("plan reference does what the open driver does; features are for plan best",
                             got=", ".join(sorted(options.features)))

    def timing(self, program: Program) -> Timing:
        return timing.timing(program, timing.Speeds.of(self.chip, self.settings))

    def predict(self, row: str) -> Prediction | None:
        return timing.predict(row, timing.Speeds.of(self.chip, self.settings))

    def device(self) -> Device:
        from npulab.targets.vivante.machine import VirtualNPU

        return VirtualNPU(self.chip)

    def replay(self, case: str | os.PathLike[str]) -> ReplayResult:
        from npulab.targets.vivante.replay import replay

        return replay(case, self.chip)

    def disassemble(self, program: Program) -> str:
        from npulab.targets.vivante.disassemble import disassemble

        return disassemble(program)

    def _divide(self, graph: Graph, plan: PlanName, options: PlanOptions = DEFAULT,
                host: frozenset[int] = frozenset()) -> tuple[list[Part], list[Verdict]]:
        why = {n.index: constraints.reasons(graph, n, self.chip, plan, options.features) for n in graph.nodes}
        for i in host:
            why[i] += (Reason("What the host does sooner is left to it.", "a small tensor, by the timing model",
                              "npulab"),)
        if options.channels == "multiple-of-cores":
            for n in graph.nodes:
                why[n.index] += constraints.uneven_channels(graph, n, self.chip)

        def on_npu(node: Node) -> bool:
            return not why[node.index]

        for n in graph.nodes if plan == "best" else ():
            if on_npu(n) and _moves_bytes(graph, n) and not _made_by(graph, n, on_npu):
                why[n.index] = (Reason("What joins tensors, or changes byte for byte, does so where they are made.",
                                       f"{n.op.name} of what the host has", "npulab"),)
        if plan == "reference":
            parts = partition(graph, on_npu)
        else:
            parts = fewest_regions(graph, on_npu)
            idle = [p for p in parts if p.on_npu and not any(n.op.name in COMPUTES for n in p.nodes)]
            if idle:
                for n in (n for p in idle for n in p.nodes):
                    why[n.index] = (Reason("A region that computes nothing is left where its data are.",
                                           n.op.name, "npulab"),)
                parts = fewest_regions(graph, on_npu)
        return parts, [Verdict(n.index, n.op.name, "host" if why[n.index] else "npu", why[n.index])
                       for n in graph.nodes]
