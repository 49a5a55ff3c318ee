"""What `npulab quantize` did, as one page: what each method brought, how noisy each tensor is, what ranges leave out.

The page is made of the report's plain data (`quantizing.report`). Every string in it comes from files of strangers and
is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from npulab.report.shell import document, e, section

PICTURES = 12
"""Tensors whose histograms are shown at once; the noisiest."""
GOOD, POOR = 30.0, 15.0
"""Signal-to-noise ratios in decibels: above, a tensor is drawn as fine; below, as a trouble."""
NAME = 40
"""Characters of a name that there is room for."""
TOP = 60.0
"""Decibels that fill a bar: 8 bits of an even distribution give about 50."""
Data = Mapping[str, Any]


def page(found: Data) -> str:
    """The page of a report. Equal reports give equal pages."""
    title = f"{found['model']} in integers for {found['target']}"
    parts = (_header, _stages, _accuracy, _shares, _noise, _histograms, _weights, _floats)
    return document(title, (part(found) for part in parts))


def _header(found: Data) -> str:
    last = next((s["decibels"] for s in reversed(found["stages"]) if s["kept"] and s["decibels"] is not None), None)
    share = found["bytes"] / max(1, found["float_bytes"])
    seconds = sum(s["seconds"] for s in found["stages"])
    tiles = (("network", _size(found["bytes"]), f"{share:.0%} of the float network"),
             ("layers in integers", f"{found['integer_layers']} of {found['layers']}", found["title"]),
             ("samples", str(found["samples"]), found["origin"]),
             ("time", f"{seconds:.1f} s", f"recipe {found['recipe']}"), *_exact(found))
    cells = "".join(f"<div><dt>{e(name)}</dt><dd><b>{e(value)}</b><small>{e(more)}</small></dd></div>"
                    for name, value, more in tiles)
    notes = "".join(f"<li>{e(n)}</li>" for n in found["notes"])
    assumed = "".join(f"<li>assumed, not published: the chip's {e(a)}</li>" for a in found["assumed"])
    return (f"<header><h1>{e(found['model'])} in integers for {e(found['target'])}</h1>"
            f'<p class="sub">how far it is from the float network, and what was done about it</p>'
            f'<div class="head"><p class="total"><b>{_db(last)}</b><small>signal to noise at the outputs</small></p>'
            f'<dl class="tiles">{cells}</dl></div>'
            + (f"<ul class=\"note\">{notes}{assumed}</ul>" if notes or assumed else "") + "</header>")


def _exact(found: Data) -> Iterable[tuple[str, str, str]]:
    """A tile on the target's own arithmetic."""
    if found["exact"] is None:
        yield "exact integers", "not known", f"how {found['title']} rounds is not published"
    else:
        least = min((float(n["decibels"]) for n in found["exact"]["outputs"].values()), default=200.0)
        yield "exact integers", _db(least), f"outputs in the {found['exact']['arithmetic']} arithmetic"


def _stages(found: Data) -> str:
    rows, last = [], None
    for s in found["stages"]:
        db = s["decibels"]
        gain = "" if db is None or last is None else f"{db - last:+.1f} dB"
        if not s["kept"]:
            gain = f"left out ({gain})" if gain else "left out"
        bar = "" if db is None else (f'<span class="bar"><i class="t-{"macs" if s["kept"] else "none"}" '
                                     f'style="width:{_percent(db)}"></i></span>')
        told = "".join(f"<li>{e(n)}</li>" for n in s["notes"])
        paper = f"<small>{e(s['paper'])}</small>" if s["paper"] else ""
        rows.append(
            f'<tr><td>{e(s["title"])}<br>{paper}</td><td class="n">{s["seconds"]:.1f} s</td>'
            f'<td class="n">{_db(db)}</td><td class="n">{e(gain)}</td><td style="width:30%">{bar}</td></tr>'
            + (f'<tr><td colspan="5"><details><summary>{_lines(len(s["notes"]))}</summary><ul class="note">{told}</ul>'
               "</details></td></tr>" if told else ""))
        if db is not None and s["kept"]:
            last = db
    head = "".join(f'<th scope="col"{" class=n" if n else ""}>{name}</th>' for name, n in (
        ("step", 0), ("time", 1), ("outputs", 1), ("gain", 1), ("", 0)))
    return section("steps", "What each step brought", (
        "Signal-to-noise ratio of the outputs against the float network, on samples that took no part in the "
        "calibration where there are enough; where a Softmax makes them, of the first class's distances to others, in "
        "front of it. Six decibels are one bit. A search goes by the mean over the samples: what brings less than "
        "its standard error is left out."),
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>")


def _accuracy(found: Data) -> str:
    if not found.get("accuracy") and not found.get("agreement"):
        return ""
    rows = "".join(f'<tr><td>{e(a["what"])}</td><td>{e(a["metric"])}</td><td class="n">{float(a["value"]):.4f}</td>'
                   f'<td class="n">{a["samples"]}</td></tr>' for a in found.get("accuracy", ()))
    table = (f'<table><thead><tr><th>network</th><th>metric</th><th class="n">value</th><th class="n">samples</th></tr>'
             f"</thead><tbody>{rows}</tbody></table>") if rows else ""
    a = found.get("agreement")
    lead = (f"The float network's answer for <b>{a['measured']:.1%}</b> of {a['samples']} samples; "
            f"{a['expected']:.1%} was expected from the noise of eight of them.") if a else ""
    return section("accuracy", "Answers", lead, table)


SHARES = 16
"""Parts whose share of the noise is drawn."""


def _shares(found: Data) -> str:
    """Each layer and tensor alone in integers: who makes the noise at the outputs."""
    if not found.get("sensitivity"):
        return ""
    first = sorted(found["sensitivity"], key=lambda r: -float(r["share"]))
    most = max(float(first[0]["share"]), 1e-9)
    rows = "".join(
        f'<li title="{e(r["name"])}"><span class="what"><b>{e(_short(r["name"]))}</b></span><span class="bar">'
        f'<i class="t-weights" style="width:{100 * float(r["share"]) / most:.1f}%"></i></span>'
        f'<span class="n">{float(r["share"]):.1%} · {e(r["kind"])}, {r["bits"]} bits</span></li>'
        for r in first[:SHARES])
    c = found["rank_correlation"]
    how = f" A quick prediction ranks them alike (Spearman {c:.2f})." if c is not None else ""
    return section("shares", "Where the noise comes from", (
        "Each part alone in integers, the rest in floats: its share of the noise at the outputs. The first ones are "
        f"those to keep wide.{how}"), f'<ul class="bars">{rows}</ul>')


def _noise(found: Data) -> str:
    """A bar for each tensor, in the order in which they are computed."""
    rows = []
    for t in found["tensors"]:
        db = float(t["decibels"])
        term = "tp" if db >= GOOD else "activations" if db >= POOR else "weights"
        rows.append(f'<li title="{e(t["name"])}"><span class="what"><b>{e(_name(t))}</b></span>'
                    f'<span class="bar"><i class="t-{term}" style="width:{_percent(db)}"></i></span>'
                    f'<span class="n">{_db(db)} · {e(t["stored"])}</span></li>')
    return section("tensors", "Noise from input to output", (
        f"Each tensor as later layers see it. Green: {GOOD:g} dB and more; red: less than {POOR:g}. A sudden fall "
        "shows the layer to look at, to keep in floats (<code>--float</code>) or in 16 bits (<code>--wide</code>)."),
        f'<ul class="bars">{"".join(rows)}</ul>')


def _histograms(found: Data) -> str:
    shown = sorted((t for t in found["tensors"] if t.get("bars")), key=lambda t: float(t["decibels"]))
    pictures = "".join(map(_histogram, shown[:PICTURES]))
    more = "".join(map(_histogram, shown[PICTURES:]))
    more = f"<details><summary>{len(shown) - PICTURES} more</summary>{more}</details>" if more else ""
    return section("ranges", "Ranges", (
        "What the float network puts into a tensor (counts on a square-root scale), and the range that the integers "
        "hold between the lines; red is cut off. The noisiest tensors first."), pictures + more)


WIDE, HIGH = 330, 90


def _histogram(t: Data) -> str:
    low, high = min(t["bars_low"], t["low"]), max(t["bars_high"], t["high"])
    span = float(high - low) or 1.0
    bars: Sequence[int] = t["bars"]
    peak = max(bars) ** 0.5 or 1.0
    step = (t["bars_high"] - t["bars_low"]) / len(bars)

    def x(v: float) -> float:
        return WIDE * float(v - low) / span

    parts = []
    for i, n in enumerate(bars):
        if n:
            at = t["bars_low"] + i * step
            h = max(1.0, (HIGH - 6) * n**0.5 / peak)
            inside = t["low"] <= at + step / 2 <= t["high"]
            parts.append(f'<rect class="t-{"macs" if inside else "weights"}" x="{x(at):.1f}" y="{HIGH - h:.1f}" '
                         f'width="{max(0.8, x(at + step) - x(at) - 0.4):.1f}" height="{h:.1f}" fill="var(--c)"/>')
    lines = "".join(f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="0" y2="{HIGH}" stroke="var(--text)" '
                    'stroke-dasharray="3 2"/>' for v in (t["low"], t["high"]))
    told = (f'{t["seen_low"]:.3g}..{t["seen_high"]:.3g} seen, {t["low"]:.3g}..{t["high"]:.3g} held, '
            f'{100 * t["clipped"]:.2g} % cut off')
    return (f'<figure style="display:inline-block;margin:0 12px 14px 0;width:{WIDE}px"><figcaption class="note">'
            f'<b>{e(_name(t))}</b> {_db(float(t["decibels"]))}<br>{e(told)}</figcaption>'
            f'<svg viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" role="img" aria-label="{e(told)}">'
            f'{"".join(parts)}{lines}</svg></figure>')


def _weights(found: Data) -> str:
    rows: Iterable[str] = (
        f'<tr><td class="n" data-v="{i}">{i}</td><td>{e(w["layer"])}</td><td>{e(w["op"])}</td>'
        f'<td>{"x".join(map(str, w["shape"]))}</td><td>{e(w["stored"])}</td><td>{e(w["rounding"])}</td>'
        f'<td class="n" data-v="{float(w["decibels"]):.4g}">{_db(float(w["decibels"]))}</td></tr>'
        for i, w in enumerate(found["weights"]))
    head = "".join(f'<th scope="col"{" class=n" if n else ""}><button type="button">{name}</button></th>'
                   for name, n in (("", 1), ("layer", 0), ("operator", 0), ("shape", 0), ("stored", 0),
                                   ("rounding", 0), ("noise", 1)))
    return section("weights", "Weights", "Signal to noise of the weights themselves; chosen rounding trades it for "
                   "less noise in what the layer computes.",
                   f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>'
                   f'{"".join(rows)}</tbody></table></div>')


def _floats(found: Data) -> str:
    if not found["floats"]:
        return ""
    rows = "".join(f"<li><b>{e(t['name'])}</b>: {e(t['why'])}</li>" for t in found["floats"])
    return section("floats", "Tensors that stay floats", "Computed by the host, or by the chip's floating-point unit.",
                   f'<ul class="note">{rows}</ul>')


def _name(t: Data) -> str:
    """Of a tensor, by what makes it: file names of tensors may be as long as a page."""
    return _short(t["made_by"] or t["name"])


def _short(name: str) -> str:
    """The end of a name, which tells it from others, as far as there is room."""
    return name if len(name) <= NAME else f"…{name[1 - NAME:]}"


def _db(value: float | None) -> str:
    return "" if value is None else "exact" if value >= 200 else f"{value:.1f} dB"


def _lines(n: int) -> str:
    return f"{n} line" if n == 1 else f"{n} lines"


def _percent(db: float) -> str:
    return f"{100 * min(max(db, 0.6), TOP) / TOP:.1f}%"


def _size(n: int) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"
