"""Spans to rows: every nanosecond of a program goes to the source operator that it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from npulab.errors import ModelError
from npulab.profiling.types import TERMS, Decision, Profile, Row, Span, State, Term, span_ns
from npulab.program.types import Program
from npulab.targets.target import Settings, Timing

K = TypeVar("K", bound=str)

BESIDE_DRAM: tuple[Term, ...] = ("macs", "sram", "tp")
IN_TURN: tuple[Term, ...] = ("launch", "host", "transfer")

NO_OPERATOR = {"submit": "(submission)", "transfer": "({})"}
"""Work of no operator gets a row of its own, by what it is."""


def join(program: Program, title: str, timing: Timing, settings: Settings) -> Profile:
    """The Profile of a program: its spans, and a row for every source operator and every kind of other work."""
    groups: dict[int | str, list[Span]] = {n: [] for n in range(len(program.ops))}
    for s in timing.spans:
        if s.nodes:
            if s.nodes[0] not in groups:
                raise ModelError(f"a job names operator {s.nodes[0]}, which the program does not have")
            groups[s.nodes[0]].append(s)
        else:
            groups.setdefault(NO_OPERATOR.get(s.unit, s.unit).format(s.name), []).append(s)
    rows = tuple(_row(None if isinstance(key, str) else key, key if isinstance(key, str) else program.ops[key], spans,
                      timing.peak_macs, program.origins[key] if program.origins and isinstance(key, int) else "")
                 for key, spans in groups.items())
    named = program.options.get("features", "")
    features: dict[str, State] = {name: "inferred" for name in named.split(",") if name}
    return Profile(
        program.model, program.digest, program.target, title, program.plan,
        {**program.options, **{k: f"{v:g}" for k, v in settings.items()}}, timing.spans, rows, timing.interval_ns,
        timing.peak_macs, timing.constants, timing.witness, timing.host, features,
        tuple(Decision(c.node, c.choice, c.instead, c.saved_ns, c.feature,
                       "inferred" if c.state == "inferred" else "witnessed") for c in program.choices),
    )


def _row(node: int | None, op: str, spans: list[Span], peak: float, origin: str) -> Row:
    terms = _sum(s.terms for s in spans)
    gains = {t: sum(s.ns - span_ns(_without(s.terms, t)) for s in spans if t in s.terms) for t in TERMS if t in terms}
    ns = sum(s.ns for s in spans)
    useful = sum(s.macs_useful for s in spans)
    units = dict.fromkeys(s.unit for s in spans)
    return Row(
        node, op, _shape(spans), "+".join(units) or "none", ns, _bound(spans), terms, gains,
        sum(s.macs for s in spans), useful, _sum(s.waste for s in spans), _sum(s.dram for s in spans),
        _sum(s.sram for s in spans), useful / (peak * ns * 1e-9) if ns else 0.0, origin,
    )


def _shape(spans: Sequence[Span]) -> str:
    """What the row's longest kind of work looks like; '12 of 20x20x64 -> 20x20x64, 5x5' where it is in pieces."""
    own = [s for s in spans if s.unit == "nn"] or spans
    if not own:
        return ""
    counts = Counter(s.name for s in own)
    name = max(own, key=lambda s: s.ns * counts[s.name]).name
    return f"{counts[name]} of {name}" if counts[name] > 1 else name


def charged(terms: Mapping[Term, int]) -> dict[Term, int]:
    """Nanoseconds of a span by the resource that costs them: of what overlaps, the longest. Their sum is the span's."""
    dram: dict[Term, int] = {t: terms.get(t, 0) for t in ("weights", "activations")}
    beside: list[dict[Term, int]] = [{t: terms.get(t, 0)} for t in BESIDE_DRAM]
    longest = max((dram, *beside), key=lambda part: sum(part.values()))
    parts = longest | {t: terms.get(t, 0) for t in IN_TURN}
    return {t: parts[t] for t in TERMS if parts.get(t)}


def _bound(spans: Iterable[Span]) -> str:
    """The term that most of the time goes to."""
    cost = _sum(charged(s.terms) for s in spans)
    return max((t for t in TERMS if t in cost), key=lambda t: cost[t], default="none")


def _without(terms: Mapping[Term, int], term: Term) -> dict[Term, int]:
    return {name: ns for name, ns in terms.items() if name != term}


def _sum(parts: Iterable[Mapping[K, int]]) -> dict[K, int]:
    out: dict[K, int] = {}
    for part in parts:
        for name, n in part.items():
            out[name] = out.get(name, 0) + n
    return out


def by_bound(profile: Profile) -> dict[Term, int]:
    """Term -> nanoseconds that it costs, largest first. They add up to the program's."""
    cost = _sum(charged(s.terms) for s in profile.spans)
    return dict(sorted(cost.items(), key=lambda item: (-item[1], TERMS.index(item[0]))))


def gains(profile: Profile) -> dict[Term, int]:
    """Term -> ns that the whole program would be shorter if that resource were free."""
    return _sum(r.gains for r in profile.rows)


def as_data(profile: Profile) -> dict[str, Any]:
    """The profile for programs: what `npulab profile --json` prints. The `ms` of the nodes add up to `total_ms`."""
    return {
        "model": profile.model, "digest": profile.digest, "target": profile.target, "plan": profile.plan,
        "options": dict(profile.options), "total_ms": profile.total_ns / 1e6,
        "interval_ms": [t / 1e6 for t in profile.interval_ns], "dram_bytes": profile.dram_bytes,
        "sram_bytes": profile.sram_bytes,
        "bound": next(iter(by_bound(profile)), "none"),
        "gains_ms": {t: ns / 1e6 for t, ns in gains(profile).items()},
        "nodes": [{
            "node": r.node, "op": r.op, "origin": r.origin, "shape": r.shape, "unit": r.unit,
            "ms": r.ns / 1e6, "bound": r.bound,
            "macs": r.macs, "macs_useful": r.macs_useful, "dram_bytes": r.dram_bytes, "sram_bytes": r.sram_bytes,
            "waste": dict(r.waste), "dram": dict(r.dram), "sram": dict(r.sram), "utilisation": r.utilisation,
            "terms_ms": {t: ns / 1e6 for t, ns in r.terms.items()},
            "gains_ms": {t: ns / 1e6 for t, ns in r.gains.items()},
        } for r in profile.rows],
        "constants": [{"name": c.name, "value": c.value, "unit": c.unit, "state": c.state, "source": c.source}
                      for c in profile.constants],
        "features": dict(profile.features),
        "decisions": [{"node": d.node, "choice": d.choice, "instead": d.instead, "saved_ms": d.saved_ns / 1e6,
                       "feature": d.feature, "state": d.state} for d in profile.decisions],
        "host": profile.host, "witness": profile.witness,
    }
