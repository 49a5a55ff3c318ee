"""A Profile as one page of HTML: charts and tables in one file, which asks the network for nothing.

Every string that comes from a profile is escaped: names of operators and models come from files of strangers. The page
is whole without scripts; its own small one sorts the table, zooms the timeline and shows what the pointer is on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from npulab.cli.printing import amount, clean, ranges
from npulab.profiling.join import gains
from npulab.profiling.types import BOUND_NAMES, Profile, Row, Term
from npulab.report.figures import (
    LANES,
    PLACES,
    SHORT,
    apportion,
    asked_options,
    busy,
    by_cost,
    data,
    digits_for,
    find_constant,
    grouped,
    ms,
    printed,
    quantity,
    row_parts,
    set_by_user,
    waste_by_cause,
    wasted,
)
from npulab.report.shell import document, e, section

BARS = 20
"""Rows with a bar of their own at once; the others are behind a click."""
LABELS = 8
"""Points of the roofline that bear a name."""


def to_html(profile: Profile) -> str:
    """The page. Equal profiles give equal pages."""
    title = f"{profile.model} on {profile.target}: {ms(profile.total_ns, digits_for(profile.total_ns))} ms"
    parts = (_header(profile), _costs(profile), _bars(profile), _timeline(profile), _roofline(profile), _table(profile),
             _decisions(profile), _constants(profile), _assumptions(profile))
    return document(title, parts)


def _share(ns: int, of: int) -> str:
    return f"{100 * ns / of:.1f} %" if of else "0 %"


def _name(row: Row) -> str:
    return f"{'' if row.node is None else f'{row.node} '}{row.op}{f' of {row.origin}' if row.origin else ''}"


def _key(terms: Iterable[str]) -> str:
    items = "".join(f'<li><i class="t-{t}"></i>{e(BOUND_NAMES[t])}</li>' for t in terms)
    return f'<ul class="key">{items}</ul>'


def _header(profile: Profile) -> str:
    low, high = profile.interval_ns
    whole, digits = profile.total_ns, digits_for(profile.total_ns)
    chips = [f'<span class="chip">{e(o)}</span>' for o in asked_options(profile)]
    chips += [f'<span class="chip set">what if {e(c.name)} = {e(quantity(c.value, c.unit))}</span>'
              for c in set_by_user(profile)]
    bandwidth = find_constant(profile, "dram_bandwidth")
    rate = quantity(profile.dram_bytes / (whole * 1e-9), "B/s") if whole else "0 B/s"
    useful, macs = sum(r.macs_useful for r in profile.rows), sum(r.macs for r in profile.rows)
    host = sum(r.ns for r in profile.rows if "host" in r.unit.split("+"))
    counts = [sum(r.node is not None and keep(r.unit) for r in profile.rows)
              for keep in (lambda u: "nn" in u or "tp" in u, lambda u: u == "host")]
    tiles = [
        ("DRAM traffic", data(profile.dram_bytes), f"{rate} on average"
         + (f" of {quantity(bandwidth.value, bandwidth.unit)}" if bandwidth else "")),
        ("Useful MACs", amount(useful),
         f"in {amount(macs)} multiplier slots, {100 * (wasted(useful, macs) or 0):.0f} % of them for nothing"),
        ("Operators", f"{counts[0]} NPU, {counts[1]} host", f"the host takes {_share(host, whole)} of the time"),
    ]
    cells = "".join(f"<div><dt>{e(n)}</dt><dd><b>{e(v)}</b><small>{e(more)}</small></dd></div>" for n, v, more in tiles)
    return (f'<header>\n<h1>{e(profile.model)}</h1>\n<p class="sub">{e(profile.title)}, plan {e(profile.plan)} '
            f'{" ".join(chips)}</p>\n<div class="head"><p class="total"><b id="total">{ms(whole, digits)} ms</b>'
            f"<small>expected between {ms(low, digits)} and {ms(high, digits)} ms</small></p>\n"
            f'<dl class="tiles">{cells}</dl></div>\n<p class="witness">{e(profile.witness)}</p>\n</header>')


def _costs(profile: Profile) -> str:
    cost, saved, whole = by_cost(profile), gains(profile), profile.total_ns
    if not cost:
        return ""
    digits = digits_for(whole)
    terms = [*cost, *(t for t, ns in saved.items() if ns and t not in cost)]
    shares = {t: f"{n / 10:.1f} %" for t, n in zip(cost, apportion(list(cost.values()), 1000), strict=True)}
    segments = "".join(f'<i class="t-{t}" style="width:{100 * ns / whole:.3f}%" title="{e(BOUND_NAMES[t])}: '
                       f'{ms(ns, digits)} ms, {shares[t]}"></i>' for t, ns in cost.items())
    times = dict(zip(cost, printed(list(cost.values()), digits), strict=True))
    lines = "".join(
        f'<tr><th scope="row"><i class="t-{t}"></i>{e(BOUND_NAMES[t])}</th><td>{times.get(t, "")}</td>'
        f'<td>{shares.get(t, "")}</td><td>{ms(saved.get(t, 0), digits)}</td></tr>' for t in terms)
    first = next(iter(cost))
    lead = (f"The largest part, {shares[first]}, goes to <b>{e(BOUND_NAMES[first])}</b>; if that cost "
            f"nothing, the inference would take {ms(whole - saved.get(first, 0), digits)} ms.")
    return section("costs", "What it waits for", lead, (
        f'<div class="bar big">{segments}</div>\n<div class="scroll"><table class="plain costs"><thead><tr>'
        '<th scope="col">resource</th><th scope="col">costs ms</th><th scope="col">share</th>'
        f'<th scope="col">saves ms if free</th></tr></thead><tbody>{lines}</tbody></table></div>'))


def _bars(profile: Profile) -> str:
    parts = row_parts(profile)
    order = sorted((i for i, r in enumerate(profile.rows) if r.ns), key=lambda i: -profile.rows[i].ns)
    if not order:
        return ""
    whole, digits, longest = profile.total_ns, digits_for(profile.total_ns), profile.rows[order[0]].ns
    lines = [_bar(profile.rows[i], parts[i], longest, whole) for i in order]
    body = f'<ol class="bars">{"".join(lines[:BARS])}</ol>'
    if rest := order[BARS:]:
        ns = sum(profile.rows[i].ns for i in rest)
        body += (f"<details><summary>{len(rest)} more, {ms(ns, digits)} ms together ({_share(ns, whole)})"
                 f'</summary><ol class="bars">{"".join(lines[BARS:])}</ol></details>')
    used = [t for t in by_cost(profile) if any(t in p for p in parts)]
    lead = "Operators by time, longest first; the colour is what each waits for."
    return section("layers", "Where the time goes", lead, _key(used) + body)


def _bar(row: Row, parts: Mapping[Term, int], longest: int, whole: int) -> str:
    digits = digits_for(whole)
    segments = "".join(f'<i class="t-{t}" style="width:{100 * ns / longest:.2f}%"></i>' for t, ns in parts.items())
    told = ", ".join(f"{BOUND_NAMES[t]} {ms(ns, digits)} ms" for t, ns in parts.items())
    return (f'<li title="{e(_name(row))}, {e(row.shape)}: {e(told)}"><span class="what"><b>{e(_name(row))}</b> '
            f'<small>{e(row.shape)}</small></span><span class="bar">{segments}</span>'
            f'<span class="num">{ms(row.ns, digits)} <small>{_share(row.ns, whole)}</small></span></li>')


def _timeline(profile: Profile) -> str:
    whole, digits = profile.total_ns, digits_for(profile.total_ns)
    if not whole:
        return ""
    ops = {r.node: r.op for r in profile.rows}
    active = list(busy(profile))
    lanes = [lane for lane in LANES if any(b.lane == lane for b in active)]
    height, top = 26, 22
    at = {lane: top + height * (i + 1) for i, lane in enumerate(lanes)}
    shapes: list[str] = []
    for ns in _ticks(whole):
        x = 100 * ns / whole
        shapes.append(f'<line class="grid" x1="{x:.3f}%" x2="{x:.3f}%" y1="16" y2="{top + height * (len(lanes) + 1)}"/>'
                      f'<text class="tick" x="{x:.3f}%" y="11">{ns / 1e6:g}</text>')
    now = 0
    for i, s in enumerate(profile.spans):
        width = 100 * s.ns / whole
        label = str(s.nodes[0]) if s.nodes else ""
        told = f"{label} {ops.get(s.nodes[0], '')}" if s.nodes else "no operator"
        shapes.append(f'<rect class="op{i % 2}" x="{100 * now / whole:.3f}%" width="{width:.3f}%" y="{top + 3}" '
                      f'height="{height - 6}"><title>{e(told)}, {e(s.name)}: {ms(s.ns, digits)} ms from '
                      f"{ms(now, digits)} ms</title></rect>")
        if label and width > 1.8:
            small = " small" if width < 6 else ""
            shapes.append(f'<text class="in{small}" x="{100 * now / whole + width / 2:.3f}%" y="{top + 17}">{label}'
                          "</text>")
        now += s.ns
    shapes += [f'<rect class="t-{b.term}" x="{100 * b.start / whole:.3f}%" width="{100 * b.ns / whole:.3f}%" '
               f'y="{at[b.lane] + 3}" height="{height - 6}"><title>{e(BOUND_NAMES[b.term])}: {ms(b.ns, digits)} ms '
               f"from {ms(b.start, digits)} ms, {e(b.span.name)}</title></rect>" for b in active]
    tall = top + height * (len(lanes) + 1) + 4
    labels = "".join(f'<li style="top:{top + height * i}px">{e(n)}</li>' for i, n in enumerate(["operator", *lanes]))
    busy_ns = {lane: sum(b.ns for b in active if b.lane == lane) for lane in lanes}
    spoken = "; ".join(f"{lane} busy {_share(ns, whole)} of the time" for lane, ns in busy_ns.items())
    lead = ("When each resource works, in ms from the start. What overlaps within a job is drawn side by side; the "
            "longest sets the time.")
    return section("timeline", "Timeline", lead, (
        f'<p class="zoom" hidden><button type="button" data-by="0.5">zoom out</button> '
        f'<button type="button" data-by="2">zoom in</button></p>\n'
        f'<div class="lanes"><ul style="height:{tall}px">{labels}</ul><div class="scroll" tabindex="0">'
        f'<svg id="lanes" role="img" aria-label="{e(spoken)}" width="100%" height="{tall}">{"".join(shapes)}</svg>'
        "</div></div>"
        f'<p class="note">{e(spoken)}.</p>'))


def _ticks(whole: int, most: int = 10) -> Iterator[int]:
    """Round times up to `whole`, at most so many and one."""
    step = next(m * 10**k for k in range(19) for m in (1, 2, 5) if whole // (m * 10**k) <= most)
    yield from range(0, whole + 1, step)


def _roofline(profile: Profile) -> str:
    points = [(r.macs_useful / r.dram_bytes, r.macs_useful / (r.ns * 1e-9), r) for r in profile.rows
              if r.macs_useful and r.dram_bytes and r.ns]
    bandwidth = find_constant(profile, "dram_bandwidth")
    if not points or not bandwidth or profile.peak_macs <= 0 or bandwidth.value <= 0:
        return ""
    peak, slope = profile.peak_macs, bandwidth.value
    digits, ridge = digits_for(profile.total_ns), peak / slope
    x0, x1 = _decades([ridge, *(p[0] for p in points)])
    y0, y1 = _decades([peak, *(p[1] for p in points)])
    left, right, top, bottom = 64, 880, 16, 396

    def x(v: float) -> float:
        return left + (right - left) * (math.log10(v) - x0) / (x1 - x0)

    def y(v: float) -> float:
        return bottom - (bottom - top) * (math.log10(v) - y0) / (y1 - y0)

    shapes = []
    for k in range(math.ceil(x0), math.floor(x1) + 1):
        shapes.append(f'<line class="grid" x1="{x(10.0**k):.1f}" x2="{x(10.0**k):.1f}" y1="{top}" y2="{bottom}"/>'
                      f'<text class="tick" x="{x(10.0**k):.1f}" y="{bottom + 18}">{e(amount(10.0**k))}</text>')
    for k in range(math.ceil(y0), math.floor(y1) + 1):
        named = quantity(10.0**k, "MAC/s").removesuffix("MAC/s")
        shapes.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(10.0**k):.1f}" y2="{y(10.0**k):.1f}"/>'
                      f'<text class="tick end" x="{left - 8}" y="{y(10.0**k) + 4:.1f}">{e(named)}</text>')
    start = max(10.0**x0, 10.0**y0 / slope)
    angle = -math.degrees(math.atan2((bottom - top) / (y1 - y0), (right - left) / (x1 - x0)))
    middle = start * (ridge / start) ** 0.2  # few points lie there
    shapes += [
        f'<path class="roof" d="M{x(start):.1f} {y(start * slope):.1f}L{x(ridge):.1f} {y(peak):.1f}H{right}"/>',
        f'<text class="roofname" text-anchor="end" x="{right - 4}" y="{y(peak) - 7:.1f}">NN cores: '
        f'{e(quantity(peak, "MAC/s"))}</text>',
        f'<text class="roofname" text-anchor="middle" transform="translate({x(middle):.1f} '
        f'{y(middle * slope) - 16:.1f}) rotate({angle:.2f})">DRAM: {e(quantity(slope, bandwidth.unit))}</text>',
    ]
    points.sort(key=lambda p: -p[2].ns)
    longest = points[0][2].ns
    radii = [3 + 9 * math.sqrt(r.ns / longest) for _, _, r in points]
    taken = [(x(a) - size, y(b) - size, x(a) + size, y(b) + size)
             for (a, b, _), size in zip(points[:LABELS], radii, strict=False)]
    taken.append((x(middle) - 70, y(middle * slope) - 50, x(middle) + 70, y(middle * slope)))
    dots, names = [], []
    for i, ((a, b, r), radius) in enumerate(zip(points, radii, strict=True)):
        told = (f"{_name(r)}, {r.shape}: {ms(r.ns, digits)} ms; {amount(a)} MACs a byte, {quantity(b, 'MAC/s')}, "
                f"{100 * r.utilisation:.0f} % of the peak")
        dots.append(f'<circle class="t-{e(r.bound)}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{radius:.1f}">'
                    f"<title>{e(told)}</title></circle>")
        if i < LABELS and (name := _place(clean(_name(r)), x(a), y(b), radius, right, taken)):
            names.append(name)
    used = dict.fromkeys(r.bound for _, _, r in points if r.bound in BOUND_NAMES)
    lead = ("Each operator of the NN cores: useful multiply-accumulates a byte of DRAM traffic, and how many it does "
            "in a second. The larger, the longer it takes. The lines are what DRAM and the cores allow.")
    return section("roofline", "Roofline", lead, _key(used) + (
        f'<div class="scroll" tabindex="0"><svg class="roofline" role="img" viewBox="0 0 900 440" '
        f'aria-label="roofline of {len(points)} operators">{"".join(shapes)}{"".join(dots)}{"".join(names)}'
        f'<text class="axis" x="{(left + right) / 2}" y="{bottom + 38}">useful MACs per byte of DRAM traffic</text>'
        f'<text class="axis" transform="translate(14 {(top + bottom) / 2}) rotate(-90)">useful MACs per second</text>'
        "</svg></div>"))


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The range of these numbers in powers of ten, with room around it."""
    return math.log10(min(values)) - 0.3, math.log10(max(values)) + 0.3


def _place(name: str, x: float, y: float, radius: float, right: float,
           taken: list[tuple[float, float, float, float]]) -> str | None:
    """A label beside a point where no other label lies; None if there is no room. Adds its box to `taken`."""
    name = name if len(name) <= 24 else name[:23] + "…"
    wide = 6.6 * len(name)
    for left, base in ((x + radius + 4, y + 4), (x + radius, y + radius + 14), (x - radius - 4 - wide, y + 4),
                       (x - radius - wide, y - radius - 4)):
        box = (left, base - 11, left + wide, base + 3)
        free = all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken)
        if free and box[0] >= 66 and box[2] <= right:
            taken.append(box)
            return f'<text class="name" x="{left:.1f}" y="{base:.1f}">{e(name)}</text>'
    return None


COLUMNS = ("node", "operator", "shape", "where", "ms", "share", "bound", "MACs", "idle", "DRAM", "SRAM", "use")
TEXT_COLUMNS = frozenset({"operator", "shape", "where", "bound"})


def _table(profile: Profile) -> str:
    digits = digits_for(profile.total_ns)
    times = printed([r.ns for r in profile.rows], digits)
    shares = apportion([r.ns for r in profile.rows], 1000 if profile.total_ns else 0)
    head = "".join(f'<th scope="col"{"" if c in TEXT_COLUMNS else " class=n"}><button type="button">{c}</button></th>'
                   for c in COLUMNS)
    lines = []
    for r, time, share in zip(profile.rows, times, shares, strict=True):
        waste = wasted(r.macs_useful, r.macs)
        term = f'<i class="t-{e(r.bound)}"></i>{e(SHORT.get(r.bound, r.bound))}' if r.ns else ""
        cells: Sequence[tuple[str, float | None]] = (
            ("" if r.node is None else str(r.node), len(profile.rows) if r.node is None else r.node),
            (e(r.op), None), (e(r.shape), None), (e(PLACES.get(r.unit, r.unit)), None),
            (time, r.ns), (f"{share / 10:.1f} %", r.ns), (term, None),
            (amount(r.macs_useful) if r.macs_useful else "", r.macs_useful),
            ("" if waste is None else f"{100 * waste:.0f} %", -1 if waste is None else waste),
            (data(r.dram_bytes) if r.dram_bytes else "", r.dram_bytes),
            (data(r.sram_bytes) if r.sram_bytes else "", r.sram_bytes),
            (f"{100 * r.utilisation:.1f} %" if r.macs_useful else "", r.utilisation if r.macs_useful else -1))
        lines.append("<tr>" + "".join(f"<td>{text}</td>" if v is None else f'<td class="n" data-v="{v:.9g}">{text}</td>'
                                      for text, v in cells) + "</tr>")
    useful = sum(r.macs_useful for r in profile.rows)
    foot = "".join(f"<td{' class=n' if n else ''}>{text}</td>" for text, n in (
        ("", 1), ("all", 0), ("", 0), ("", 0), (ms(profile.total_ns, digits), 1), ("100 %", 1), ("", 0),
        (amount(useful) if useful else "", 1), ("", 1), (data(profile.dram_bytes), 1), (data(profile.sram_bytes), 1),
        ("", 1)))
    lead = ("Every operator of the model, and work of no operator below. MACs: those that the operator asks for; idle: "
            "multiplier slots of its time that do other than that; use: of the NN cores' peak.")
    return section("rows", "Operators", lead, (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody><tfoot><tr>{foot}</tr></tfoot></table></div>'))


def _decisions(profile: Profile) -> str:
    if not profile.decisions:
        return ""
    lines = "".join(
        f"<tr><td>{e(ranges(nodes))}</td><td>{e(d.choice)}{f' <small>{e(d.feature)}</small>' if d.feature else ''}</td>"
        f'<td>{e(d.instead)}</td><td class="n">{ms(saved)}</td><td>{_state(d.state)}</td></tr>'
        for nodes, d, saved in grouped(profile.decisions))
    lead = "What was chosen instead of what, and what that saves by the model."
    return section("decisions", "Decisions of the search", lead, _plain(
        ("nodes", "choice", "instead of", ">saves ms", "state"), lines))


def _plain(heads: Iterable[str], lines: str) -> str:
    cells = "".join(f'<th scope="col"{" class=n" if h[0] == ">" else ""}>{h.strip(">")}</th>' for h in heads)
    return (f'<div class="scroll"><table class="plain"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>'
            "</div>")


def _state(state: str) -> str:
    return f'<span class="state {e(state)}">{e(state)}</span>'


def _constants(profile: Profile) -> str:
    lines = "".join(
        f'<tr><td>{e(c.name)}</td><td class="n">{e(quantity(c.value, c.unit))}</td><td>{_state(c.state)}</td>'
        f"<td>{e(c.source)}</td></tr>" for c in profile.constants)
    return section("constants", "Constants", "Every number behind the times, and what stands behind it.", _plain(
        ("constant", ">value", "state", "source"), lines))


def _assumptions(profile: Profile) -> str:
    items = [f"Times: {profile.witness}.",
             "Within a job, multiply-accumulates, DRAM, on-chip SRAM and the TP cores work side by side, and the "
             "longest sets the time; weights and activations share DRAM, so they add up. Launch, host and copies come "
             "in turn."]
    if waste := waste_by_cause(profile):
        macs = sum(r.macs for r in profile.rows)
        items.append("Multiplier slots spent for nothing: " + ", ".join(
            f"{cause} {100 * n / macs:.0f} %" for cause, n in waste.items()) + ".")
    if any("host" in r.unit.split("+") for r in profile.rows):
        items.append(f"The host's times are modelled from a record of {profile.host}, a factor of two either way.")
    items += [f"Feature {name} is {state}: no recorded stream of a driver shows it."
              for name, state in profile.features.items()]
    items.append(f"Model file: SHA-256 {profile.digest}.")
    lines = "".join(f"<li>{e(i)}</li>" for i in items)
    return section("assumptions", "Assumptions", "What to keep in mind.", f"<ul>{lines}</ul>")
