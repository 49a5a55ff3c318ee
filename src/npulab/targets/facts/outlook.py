"""What a board makes of a network, as a word, a sentence to act on, a cost and advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from npulab.ir import Graph
from npulab.targets.facts.advice import SHOWN, Advice, Case, for_board
from npulab.targets.facts.board import ASSUMED, Board, Check
from npulab.targets.facts.costs import Cost, cost
from npulab.targets.facts.survey import Survey, survey

NAME = 60
"""Characters of an operator's name that a sentence has."""
STATES = ("all", "tail", "quantize", "limit", "host", "unknown", "refused", "none")
"""Best first. all: every operator runs on the NPU.       tail: all but what follows the last convolutions.
quantize: more, once floats are given another type.       limit: every operator, but the whole network breaks a rule.
host: the CPU takes the others over.                      unknown: of some nothing published says.
refused: the vendor's tool takes not all of it.           none: the NPU takes nothing."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a board makes of a graph. `assume`: the type floats were taken for; `quantized`: the check after `dtype` has
    been given to them, where that puts more on the NPU."""

    board: Board
    check: Check
    assume: str
    cost: Cost
    advice: tuple[Advice, ...]
    state: str
    verdict: str
    dtype: str = ""
    quantized: Check | None = None

    @property
    def best(self) -> Check:
        """The check to compare boards by."""
        return self.quantized or self.check


def outlook(graph: Graph, board: Board, assume: str = "", model: str = "MODEL") -> Outlook:
    """The outlook for `board`. `model` is what commands call the file. Raises UsageError for an unknown `assume`."""
    check = board.check(graph, assume)
    known = survey(graph)
    dtype = "" if assume else _wanted_type(check)
    quantized = board.check(graph, dtype) if dtype else None
    if quantized is not None and quantized.count("npu") <= check.count("npu"):
        dtype, quantized = "", None
    case = Case(known, frozenset(_off(quantized or check)), board.name, model, assume or dtype, board,
                 quantized or check)
    advice = tuple(for_board(case, check, dtype))
    price = cost(graph, quantized or check, board.facts, assume or dtype)
    state = _state(known, check, quantized)
    return Outlook(board, check, assume, price, advice, state, _verdict(graph, check, quantized, dtype, state, advice),
                   dtype, quantized)


def best_first(found: Iterable[Outlook]) -> list[Outlook]:
    """By state, then by what is left off the NPU."""
    return sorted(found, key=lambda o: (STATES.index(o.state), len(o.best.findings) - o.best.count("npu"),
                                        o.best.count("refused"), -(o.best.npu_percent or 0), o.check.board))


def _off(check: Check) -> set[int]:
    return {f.node for f in check.findings if f.where != "npu"}


def _wanted_type(check: Check) -> str:
    """The element type that most nodes off the NPU are asked to be quantized to."""
    asked = Counter(r.remedy.split()[2] for f in check.findings for r in f.reasons
                    if r.remedy.startswith("quantize to "))
    return next((t for t, _ in asked.most_common() if t in ASSUMED), "")


def _state(known: Survey, check: Check, quantized: Check | None) -> str:
    off = _off(check)
    if not off and check.findings:
        return "limit" if check.graph else "all"
    if quantized is not None:
        return "quantize"
    if check.count("npu") and off <= known.tail:
        return "tail"
    if check.count("refused"):
        return "refused" if check.count("npu") else "none"
    if check.count("unknown"):
        return "unknown"
    return "host" if check.count("npu") else "none"


# the sentence


def _verdict(graph: Graph, check: Check, quantized: Check | None, dtype: str, state: str,
             advice: tuple[Advice, ...]) -> str:
    total, percent = len(check.findings), check.npu_percent
    text = f"{check.board}: {check.count('npu')} of {total} operators of {graph.name} run on the NPU"
    text += f", {percent:.1f} % of the multiplications" if percent is not None else ""
    text += f", in {check.partitions} {'region' if check.partitions == 1 else 'regions'}" if check.partitions else ""
    tail = next((a for a in advice if a.kind == "tail"), None)
    if quantized is not None:
        left = total - quantized.count("npu")
        text += f"; quantized to {dtype}, {quantized.count('npu')} of {total}"
        if not left:
            return f"{text}: quantize it, and all of it runs."
        if tail is not None and _off(quantized) <= set(tail.nodes):
            return f"{text}. The {left} others are in one tail behind the last convolutions, to be {_cut(tail)}."
        return f"{text}; then {others(quantized)}. `--as {dtype}` says why."
    if state == "limit":
        return f"{text}; but {check.graph[0]}"
    if state == "tail" and tail is not None:
        left = total - check.count("npu")
        return (f"{text}; {others(check)}: {'this is' if left == 1 else 'these are'} one tail behind the last "
                f"convolutions. With it {_cut(tail)} all of the rest runs on the NPU.")
    if rest := others(check):
        first = Counter(r.remedy for f in check.findings if f.where != "npu" for r in f.reasons if r.remedy)
        todo = "".join(f" Most of them want: {remedy}." for remedy, n in first.most_common(1) if n > 1)
        return f"{text}; {rest}.{todo}"
    return f"{text}: all of it."


def _cut(a: Advice) -> str:
    return f"cut off ({a.command})" if a.command else "cut off"


def others(check: Check) -> str:
    """'6 on the host: 3 Split, 3 Concat; 2 refused: Loop, If'."""
    words = (("host", "on the host"), ("refused", "refused"), ("unknown", "unknown, as nothing published says"))
    return "; ".join(f"{check.count(where)} {text}: {kinds(check, where)}" for where, text in words
                     if check.count(where))


def kinds(check: Check, where: str) -> str:
    """'4 Expand, Where, 3 more kinds'."""
    counts = Counter(f.op[:NAME] for f in check.findings if f.where == where).most_common()
    shown = [f"{n} {op}" if n > 1 else op for op, n in counts[:SHOWN]]
    return ", ".join(shown + ([f"{len(counts) - SHOWN} more kinds"] if len(counts) > SHOWN else []))
