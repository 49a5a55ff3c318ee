"""What every report of a Profile shows: parts that add up, rows worth showing, busy times of each resource."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from npulab.profiling.join import by_bound, charged
from npulab.profiling.types import TERMS, Constant, Decision, Profile, Row, Span, Term

ENOUGH = Fraction(95, 100)
"""Share of the time that a report's first rows make."""

SHORT: Mapping[str, str] = {
    "macs": "MACs", "weights": "weights", "activations": "activ.", "sram": "SRAM", "tp": "TP", "launch": "launch",
    "host": "host", "transfer": "copies", "none": "",
}
"""Names of bounds for columns of seven characters; BOUND_NAMES has the long ones."""

PLACES: Mapping[str, str] = {"none": "", "transfer": "copy", "submit": "call"}
"""Shorter names of where a row runs."""

CAUSES: Mapping[str, str] = {
    "lowering": "zeros of padded kernels", "lanes": "idle lanes", "cores": "idle cores", "slots": "idle multipliers",
}
"""What multiplier slots are spent on, other than what operators ask for."""

LANES: Mapping[str, tuple[Term, ...]] = {
    "NN cores": ("macs",), "TP cores": ("tp",), "DRAM": ("weights", "activations"), "SRAM": ("sram",),
    "launch": ("launch",), "host CPU": ("host",), "copies": ("transfer",),
}
"""Resources, and the terms that keep each busy."""


@dataclass(frozen=True, slots=True)
class Busy:
    """A resource at work: `ns` nanoseconds from `start`, counted from the start of the inference."""

    lane: str
    term: Term
    start: int
    ns: int
    span: Span


def row_parts(profile: Profile) -> list[dict[Term, int]]:
    """For each row, its nanoseconds by the resource that costs them. They add up to the row's."""
    spans: dict[int, list[Span]] = {}
    for s in profile.spans:
        if s.nodes:
            spans.setdefault(s.nodes[0], []).append(s)
    return [_row_parts(r, spans.get(r.node, []) if r.node is not None else []) for r in profile.rows]


def _row_parts(row: Row, spans: Iterable[Span]) -> dict[Term, int]:
    parts = total(charged(s.terms) for s in spans)
    if sum(parts.values()) == row.ns:
        return parts
    parts = charged(row.terms)  # spans that several rows share: the row's own terms say how it goes, nearly
    if missing := row.ns - sum(parts.values()):
        term = max(parts, key=lambda t: parts[t], default=TERMS[0])
        parts[term] = max(0, parts.get(term, 0) + missing)
    return parts


def by_cost(profile: Profile) -> dict[Term, int]:
    """Term -> nanoseconds that it costs, largest first. They add up to the program's."""
    return by_bound(profile)


def total(parts: Iterable[Mapping[Term, int]]) -> dict[Term, int]:
    out: dict[Term, int] = {}
    for part in parts:
        for t, ns in part.items():
            out[t] = out.get(t, 0) + ns
    return {t: out[t] for t in TERMS if t in out}


def first_rows(profile: Profile, share: Fraction = ENOUGH) -> set[int]:
    """Positions of the fewest rows that make `share` of the time."""
    order = sorted(range(len(profile.rows)), key=lambda i: -profile.rows[i].ns)
    wanted, found, chosen = share * sum(r.ns for r in profile.rows), 0, set()
    for i in order:
        if found >= wanted:
            break
        chosen.add(i)
        found += profile.rows[i].ns
    return chosen


def apportion(parts: Sequence[int], whole: int) -> list[int]:
    """`parts` as whole numbers in the same proportions whose sum is `whole`; largest remainders are rounded up."""
    of = sum(parts)
    if not of:
        return [0] * len(parts)
    out = [p * whole // of for p in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (-(parts[i] * whole % of), i))
    for i in by_remainder[: whole - sum(out)]:
        out[i] += 1
    return out


def busy(profile: Profile) -> Iterator[Busy]:
    """When each resource works. A span starts with its launch; then what overlaps, the DRAM one tensor after the other;
    then what is done in turn."""
    lanes = {t: name for name, terms in LANES.items() for t in terms}
    now = 0
    for s in profile.spans:
        launch, host = s.terms.get("launch", 0), s.terms.get("host", 0)
        body = now + launch
        tail = now + s.ns - host - s.terms.get("transfer", 0)
        starts: dict[Term, int] = {"launch": now, "activations": body + s.terms.get("weights", 0), "host": tail,
                                   "transfer": tail + host}
        for t in TERMS:
            if ns := s.terms.get(t, 0):
                yield Busy(lanes[t], t, starts.get(t, body), ns, s)
        now += s.ns


def find_constant(profile: Profile, name: str) -> Constant | None:
    return next((c for c in profile.constants if c.name == name), None)


def asked_options(profile: Profile) -> list[str]:
    """Options that are not the plan's own, but for what-ifs, as a person would say them: 'no-zero-runs'."""
    changed = {c.name for c in set_by_user(profile)}
    return [k if v == "on" else f"{k} {v}" for k, v in profile.options.items() if k not in changed]


def grouped(decisions: Iterable[Decision]) -> list[tuple[list[int], Decision, int]]:
    """Decisions of the same kind: (nodes, one of them, ns that all of them save), largest first."""
    found: dict[tuple[str, str, str, str], list[Decision]] = {}
    for d in decisions:
        found.setdefault((d.choice, d.instead, d.feature, d.state), []).append(d)
    groups = [(sorted({d.node for d in ds}), ds[0], sum(d.saved_ns for d in ds)) for ds in found.values()]
    return sorted(groups, key=lambda g: -g[2])


def behind(constant: Constant) -> str:
    """What stands behind a number: its state and source, said once."""
    again = constant.source.startswith(constant.state)
    return constant.source if again else f"{constant.state}: {constant.source}" if constant.source else constant.state


def set_by_user(profile: Profile) -> list[Constant]:
    """The what-ifs of this profile."""
    return [c for c in profile.constants if c.state == "set"]


def wasted(useful: int, macs: int) -> float | None:
    """Share of the multiply-accumulates that no operator asks for; None if there are none at all."""
    return 1 - useful / macs if macs else None


def waste_by_cause(profile: Profile) -> dict[str, int]:
    """Multiplier slots spent for nothing, by cause, largest first."""
    out: dict[str, int] = {}
    for r in profile.rows:
        for cause, n in r.waste.items():
            out[CAUSES.get(cause, cause)] = out.get(CAUSES.get(cause, cause), 0) + n
    return {c: n for c, n in sorted(out.items(), key=lambda item: -item[1]) if n}


def ms(ns: int, digits: int = 3) -> str:
    """1234567 -> '1.235'; no unit. Rounded half up, on whole numbers."""
    step = 10 ** (6 - digits)
    n = (ns + step // 2) // step
    return f"{n // 10**digits}.{n % 10**digits:0{digits}}" if digits else str(n)


def printed(parts: Sequence[int], digits: int) -> list[str]:
    """`parts` (ns) as milliseconds that add up, as printed, to their sum as printed."""
    step = 10 ** (6 - digits)
    return [ms(n * step, digits) for n in apportion(parts, (sum(parts) + step // 2) // step)]


def digits_for(ns: int) -> int:
    """Decimals of a millisecond that fit six characters for times up to this one."""
    return max(0, min(3, 5 - len(str(ns // 1_000_000))))


def quantity(value: float, unit: str) -> str:
    """4e9 B/s -> '4 GB/s'; 5.5e-6 s -> '5.5 us'; a pure number as it is."""
    if not unit or value == 0:
        return f"{value:g} {unit}".rstrip()
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))
    if unit not in ("s", "B/s", "Hz", "MAC/s", "B"):
        return f"{value:g} {unit}"
    size, letter = next((s for s in scales if abs(value) >= s[0] * 0.99995), scales[-1])
    if unit == "s" and size > 1:
        size, letter = 1.0, ""
    return f"{value / size:.4g} {letter}{unit}"


def data(n: float) -> str:
    """Bytes -> '5.2 MB'."""
    return quantity(n, "B")
