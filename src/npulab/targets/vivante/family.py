"""The Vivante NPUs as targets: check, compile, device."""

from __future__ import annotations

import os
from dataclasses import dataclass

from npulab.errors import CapacityError, InvariantError
from npulab.exporters.tflite import cut
from npulab.ir import Graph, Node
from npulab.plan.partition import Part, fewest_regions, partition
from npulab.plan.types import Reason, Verdict
from npulab.program.types import HostNode, HostStep, Program
from npulab.runtime.device import Device
from npulab.runtime.replay import ReplayResult
from npulab.targets.target import PlanName
from npulab.targets.vivante import best, constraints, reference
from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.encode import EncodeOptions, encode
from npulab.targets.vivante.jobs import Region

COMPUTES = ("CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "FULLY_CONNECTED", "AVERAGE_POOL_2D", "MEAN")
"""Operators worth a transfer. A region of others alone only moves bytes, which the host does where they are."""


@dataclass(frozen=True, slots=True)
class VivanteTarget:
    """One chip of the family."""

    chip: Chip

    @property
    def name(self) -> str:
        return self.chip.name

    @property
    def title(self) -> str:
        return self.chip.title

    def support_table(self) -> list[tuple[str, str, str]]:
        return constraints.support_table()

    def check(self, graph: Graph, plan: PlanName) -> list[Verdict]:
        return self._divide(graph, plan)[1]

    def compile(self, graph: Graph, plan: PlanName, keep_all: bool = False) -> Program:
        """`keep_all` (plan best only) downloads every tensor the NPU computes, to look at layers one by one."""
        parts, verdicts = self._divide(graph, plan)
        steps: list[Region | HostStep] = []
        for part in parts:
            if not part.on_npu:
                nodes = tuple(n.index for n in part.nodes)
                steps.append(HostStep(nodes, part.inputs, part.outputs,
                                      cut(graph, nodes, part.inputs, part.outputs)))
            elif plan == "reference":
                steps.append(reference.lower(graph, part, self.chip))
            else:
                steps.append(best.lower(graph, part, self.chip, keep_all))
        host = [HostNode(v.node, v.op, tuple(str(r) for r in v.reasons)) for v in verdicts if v.where == "host"]
        try:
            return encode(graph, self.name, plan, self.chip, steps, host,
                          EncodeOptions(optimal_zero_runs=plan == "best"))
        except InvariantError as e:  # a descriptor field, which names its bits and its source
            advice = {"try_": "--plan best"} if plan == "reference" else {}
            raise CapacityError(f"'{graph.name}' does not fit the engine: {e.message}", **e.facts, **advice) from e

    def device(self) -> Device:
        from npulab.targets.vivante.machine import VirtualNPU

        return VirtualNPU(self.chip)

    def replay(self, case: str | os.PathLike[str]) -> ReplayResult:
        from npulab.targets.vivante.replay import replay

        return replay(case, self.chip)

    def disassemble(self, program: Program) -> str:
        from npulab.targets.vivante.disassemble import disassemble

        return disassemble(program)

    def _divide(self, graph: Graph, plan: PlanName) -> tuple[list[Part], list[Verdict]]:
        why = {n.index: constraints.reasons(graph, n, self.chip, plan) for n in graph.nodes}

        def on_npu(node: Node) -> bool:
            return not why[node.index]

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
