"""A network under a device's ceilings as a picture: one HTML page with an inline SVG, and a sketch of characters.

Both axes are logarithmic: operations a byte against operations a second. Layers lie on the roof, because their floor is
what the roof allows; how large a point is says how long it takes.
"""

from __future__ import annotations

import math

from npulab.cli.printing import amount, clean
from npulab.gpu.ceilings import COMPUTE, Ceiling
from npulab.report.figures import data, quantity
from npulab.report.shell import document, e, section
from npulab.rooflines import Floor, Roofline, by_bound

DASHES = {"measured": "", "stated": "9 4", "assumed": "2 4"}
"""How a line is drawn by what stands behind its number."""
LABELS = 6
"""Layers that bear their name."""
LETTER = 6.8
"""Width of a letter, nearly."""
Box = tuple[float, float, float, float]
"""What text or a point covers: left, top, right, bottom."""


def rate(value: float, unit: str) -> str:
    """7.68e10 op/s -> '76.8 Gop/s'. Four digits."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.99995:
            return f"{value / size:.4g} {letter}{unit}"
    return f"{value:.4g} {unit}"


def seconds(value: float | None) -> str:
    """Three digits; a dash where no floor is known."""
    return "-" if value is None else quantity(float(f"{value:.3g}"), "s")


def percent(share: float) -> str:
    """0.994 -> '99 %'; what is less than one and not nothing says so."""
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def hidden(found: Roofline) -> str:
    """Why operators are not listed."""
    return ("they show the same bytes under another shape" if found.everything else
            "they multiply nothing and are taken as part of their neighbours")


def page(found: Roofline) -> str:
    """The page. Equal rooflines give equal pages."""
    return document(f"{found.model} on {found.device.name}", (
        _header(found), _picture(found), _ceilings(found), _layers(found), _notes(found)))


def _header(found: Roofline) -> str:
    whole, size = found.whole, sum(x.bytes for x in found.layers)
    bounds = ", ".join(f"{r} {percent(s / (found.seconds or 1))}" for r, s in by_bound(found).items())
    as_ = found.numbers if found.forced else "the file has them"
    tiles = (("operations", amount(whole.operations), f"two a multiply-add, {len(found.layers)} layers"),
             ("bytes", data(float(f"{size:.3g}")), f"of all layers, as {as_}"),
             ("intensity", f"{whole.operations / size:.3g} op/B" if size else "-", "operations a byte of all layers"),
             ("network in one piece", seconds(whole.seconds), "no tensor between layers leaves the chip; "
              f"{data(float(f'{whole.bytes:.3g}'))}, bound by {whole.bound or 'nothing known'}"))
    cells = "".join(f"<div><dt>{e(name)}</dt><dd><b>{e(value)}</b><small>{e(more)}</small></dd></div>"
                    for name, value, more in tiles)
    return (f"<header><h1>{e(found.model)} on {e(found.device.title)}</h1>"
            '<p class="sub">how fast it can be at most, layer by layer, and what decides it</p>'
            f'<div class="head"><p class="total"><b>{e(seconds(found.seconds))}</b><small>at least, bound by '
            f'{e(bounds or "nothing known")}</small></p><dl class="tiles">{cells}</dl></div></header>')


# the picture


class _Plane:
    """Log-log coordinates. `left` .. `bottom` is the rectangle that the data's range fills."""

    def __init__(self, found: Roofline, left: float, right: float, top: float, bottom: float) -> None:
        self.points = [(x, x.intensity, x.operations / x.seconds) for x in found.layers
                       if x.operations and x.intensity is not None and x.seconds]
        peak, at = found.peak, found.memory()
        memories = [c for c in found.ceilings if c.resource != COMPUTE]
        ridges = [peak.value / c.value for c in memories] if peak else []
        xs = [*(p[1] for p in self.points), *ridges] or [1.0]
        ys = [*(p[2] for p in self.points), *(c.value for c in found.ceilings if c.resource == COMPUTE)]
        if not ys and at is not None:
            ys = [found.ceilings[at].value]
        self.x0, self.x1 = math.log10(min(xs)) - 0.5, math.log10(max(xs)) + 0.6
        self.y0, self.y1 = math.log10(min(ys)) - 0.5, math.log10(max(ys)) + 0.35
        if at is not None and peak is not None:  # the slope shows for a decade at least
            self.y0 = min(self.y0, math.log10(peak.value) - 1.3)
        self.left, self.right, self.top, self.bottom = left, right, top, bottom

    def x(self, v: float) -> float:
        return self.left + (self.right - self.left) * (math.log10(v) - self.x0) / (self.x1 - self.x0)

    def y(self, v: float) -> float:
        return self.bottom - (self.bottom - self.top) * (math.log10(v) - self.y0) / (self.y1 - self.y0)

    @property
    def angle(self) -> float:
        """Of a line of constant bandwidth, in degrees, upwards."""
        return math.degrees(math.atan2((self.bottom - self.top) / (self.y1 - self.y0),
                                       (self.right - self.left) / (self.x1 - self.x0)))


def _picture(found: Roofline) -> str:
    p = _Plane(found, 66.0, 886.0, 18.0, 392.0)
    shapes = _grid(p)
    taken: list[Box] = []
    for i, c in enumerate(found.ceilings):
        shapes += _line(p, found, i, c, taken)
    dots, names = _points(p, found, taken)
    kinds = "".join(f'<li><svg width="34" height="10" style="display:inline-block;margin-right:6px"><path class="roof" '
                    f'd="M0 6H34" stroke-dasharray="{dash}"/></svg>{standing}</li>'
                    for standing, dash in DASHES.items() if any(c.standing == standing for c in found.ceilings))
    used = dict.fromkeys(x.bound for x, _, _ in p.points)
    kinds += "".join(f'<li><i class="{_class(b)}"></i>bound by {e(b)}</li>' for b in used)
    lead = ("Each layer at the speed that its floor allows; the larger a point, the longer it takes. Slopes are "
            "memories, levels are rates of multiply-adds. A thin line limits nothing: a higher figure of the same is "
            "known.")
    if not p.points:
        lead = "No layer has both operations and a floor, so there is no point to show."
    x, y = (p.left + p.right) / 2, (p.top + p.bottom) / 2
    return section("roofline", "Roofline", lead, (
        f'<ul class="key">{kinds}</ul><div class="scroll" tabindex="0"><svg class="roofline" role="img" '
        f'viewBox="0 0 900 440" aria-label="roofline of {len(p.points)} layers">{"".join(shapes)}{"".join(dots)}'
        f'{"".join(names)}<text class="axis" x="{x}" y="{p.bottom + 38}">operations per byte</text>'
        f'<text class="axis" transform="translate(14 {y}) rotate(-90)">operations per second</text>'
        "</svg></div>"))


def _class(bound: str) -> str:
    return {COMPUTE: "t-macs", "DRAM": "t-weights", "": "t-none"}.get(bound, "t-sram")


def _grid(p: _Plane) -> list[str]:
    shapes = []
    for k in range(math.ceil(p.x0), math.floor(p.x1) + 1):
        x = p.x(10.0**k)
        shapes.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{p.top}" y2="{p.bottom}"/>'
                      f'<text class="tick" x="{x:.1f}" y="{p.bottom + 18}">{e(amount(10.0**k))}</text>')
    for k in range(math.ceil(p.y0), math.floor(p.y1) + 1):
        y = p.y(10.0**k)
        shapes.append(f'<line class="grid" x1="{p.left}" x2="{p.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                      f'<text class="tick end" x="{p.left - 8}" y="{y + 4:.1f}">{e(rate(10.0**k, "").strip())}</text>')
    return shapes


def _line(p: _Plane, found: Roofline, i: int, c: Ceiling, taken: list[Box]) -> list[str]:
    """A ceiling as a line, as far as it is a limit, with value, standing, and its row in the table of sources."""
    told = f"{c.name}: {rate(c.value, c.unit)}, {c.standing}; {c.source}" + (f"; {c.note}" if c.note else "")
    name = f"{c.name} {rate(c.value, c.unit)}, {c.standing} [{i + 1}]"
    style = f'stroke-dasharray="{DASHES[c.standing]}"' + ("" if i in found.limits else ' style="stroke-width:1"')
    peak = found.peak
    if c.resource == COMPUTE:
        memory = found.memory()
        start = c.value / found.ceilings[memory].value if memory is not None else 10.0**p.x0
        x, y = p.x(max(start, 10.0**p.x0)), p.y(c.value)
        path, text, base, turn = f"M{x:.1f} {y:.1f}H{p.right}", p.right - 4, y - 16, ""
        taken.append((text - LETTER * len(name), base - 12, text, base + 4))
        anchor = "end"
    else:
        x_end = min(10.0**p.x1, 10.0**p.y1 / c.value, peak.value / c.value if peak else math.inf)
        x_start = max(10.0**p.x0, 10.0**p.y0 / c.value)
        if x_end <= x_start:
            return []
        path = f"M{p.x(x_start):.1f} {p.y(x_start * c.value):.1f}L{p.x(x_end):.1f} {p.y(x_end * c.value):.1f}"
        text, base = p.x(x_start) + 10, p.y(x_start * c.value) - 20
        turn = f' transform="rotate({-p.angle:.2f} {text:.1f} {base:.1f})"'
        anchor = "start"
        run = LETTER * len(name) * math.cos(math.radians(p.angle))
        rise = LETTER * len(name) * math.sin(math.radians(p.angle))
        steps = max(1, int(run // 24))
        taken += [(text + run * k / steps, base - rise * (k + 1) / steps - 8, text + run * (k + 1) / steps,
                   base - rise * k / steps + 6) for k in range(steps)]
    return [f'<path class="roof" d="{path}" {style}><title>{e(told)}</title></path>',
            f'<text class="roofname" text-anchor="{anchor}" x="{text:.1f}" y="{base:.1f}"{turn}>{e(name)}</text>']


def _points(p: _Plane, found: Roofline, taken: list[Box]
            ) -> tuple[list[str], list[str]]:
    order = sorted(p.points, key=lambda point: -(point[0].seconds or 0.0))
    longest = max((x.seconds or 0.0 for x, _, _ in order), default=1.0)
    dots, names = [], []
    shown: set[tuple[object, ...]] = set()
    for x, intensity, speed in order:
        radius = 3 + 8 * math.sqrt((x.seconds or 0.0) / longest)
        told = (f"{_name(x)}, {x.layer.label}: {amount(x.operations)} operations, {data(x.bytes)}, {intensity:.3g} "
                f"op/B; at least {seconds(x.seconds)}, bound by {x.bound}; {100 * found.share(x):.1f} % of all")
        dots.append(f'<circle class="{_class(x.bound)}" cx="{p.x(intensity):.1f}" cy="{p.y(speed):.1f}" '
                    f'r="{radius:.1f}"><title>{e(told)}</title></circle>')
        taken.append((p.x(intensity) - radius, p.y(speed) - radius, p.x(intensity) + radius, p.y(speed) + radius))
    for x, intensity, speed in order:
        alike = (x.layer.label, x.layer.in_size, x.layer.in_channels, x.layer.out_channels)
        if alike not in shown and len(shown) < LABELS:
            shown.add(alike)
            names += _label(f"{x.layer.label}, {x.layer.in_channels}>{x.layer.out_channels}", p, p.x(intensity),
                            p.y(speed), taken)
    return dots, sorted(names)  # lines first: text covers them


def _label(text: str, p: _Plane, x: float, y: float, taken: list[Box]) -> list[str]:
    """A layer's label below its point, in the first free row, with a line to the point; none if all are taken."""
    text = clean(text if len(text) <= 28 else text[:27] + "…")
    wide = LETTER * len(text)
    for row in range(1, 12):
        base = y + 14 + 17 * row
        left = max(p.left + 4, min(x + 3, p.right - wide))
        box = (left, base - 12, left + wide, base + 4)
        if base < p.bottom - 4 and all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken):
            taken.append(box)
            return [f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 4:.1f}" y2="{base:.1f}"/>',
                    f'<text class="name" x="{left:.1f}" y="{base:.1f}">{e(text)}</text>']
    return []


# the tables


def _ceilings(found: Roofline) -> str:
    rows = "".join(
        f'<tr><td class="n">{i + 1}</td><td>{e(c.name)}</td><td class="n">{e(rate(c.value, c.unit))}</td>'
        f'<td><span class="state {c.standing}">{c.standing}</span></td><td class="n">{e(seconds(found.at(i)))}</td>'
        f'<td class="n">{_ridge(found, i)}</td><td>{"yes" if i in found.limits else "no"}</td>'
        f"<td>{e(c.source)}{'<br>' if c.note else ''}<small>{e(c.note)}</small></td></tr>"
        for i, c in enumerate(found.ceilings))
    head = "".join(f'<th scope="col"{" class=n" if n else ""}>{name}</th>' for name, n in (
        ("", 1), ("ceiling", 0), ("at most", 1), ("standing", 0), ("all layers", 1), ("ridge, op/B", 1), ("limits", 0),
        ("source", 0)))
    sizes = "; ".join(f"{e(name)}: {float(f'{n / 1024:.3g}'):g} kB" for name, n in found.device.sizes.items())
    sized = f'<p class="note">Sizes (kB of 1024 bytes): {sizes}</p>' if sizes else ""
    return section("ceilings", "Ceilings", (
        "What stands behind each number. Ridge: operations a byte from which on computing takes longer than memory."),
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        + sized)


def _ridge(found: Roofline, i: int) -> str:
    ridge = found.ridge(i)
    return "" if ridge is None else f"{ridge:.4g}"


def _layers(found: Roofline) -> str:
    heads: list[tuple[str, bool]] = [("", True), ("layer", False), ("name", False), ("channels", False), ("ops", True),
                                     ("weights", True), ("input", True), ("output", True), ("op/B", True),
                                     *((f"{c.name},\n{c.standing}", True) for c in found.ceilings), ("floor", True),
                                     ("bound", False), ("share", True)]
    head = "".join(f'<th scope="col"{" class=n" if n else ""}><button type="button">'
                   f"{'<br>'.join(map(e, name.split(chr(10))))}</button></th>" for name, n in heads)
    lines = []
    for i, x in enumerate(found.layers):
        numbers = ((amount(x.operations), x.operations), (data(x.weights), x.weights), (data(x.inputs), x.inputs),
                   (data(x.outputs), x.outputs),
                   ("" if x.intensity is None else f"{x.intensity:.3g}", x.intensity or 0.0),
                   *((seconds(t), t) for t in x.floors), (seconds(x.seconds), x.seconds or 0.0))
        cells = "".join(f'<td class="n" data-v="{v:.9g}">{e(text)}</td>' for text, v in numbers)
        share = found.share(x)
        lines.append(f'<tr><td class="n" data-v="{i}">{i + 1}</td><td>{e(x.layer.label)}</td><td>{e(_name(x))}</td>'
                     f"<td>{x.layer.in_channels}&gt;{x.layer.out_channels}</td>{cells}"
                     f'<td><i class="{_class(x.bound)}"></i>{e(x.bound)}</td>'
                     f'<td class="n" data-v="{share:.9g}">{100 * share:.1f} %</td></tr>')
    lead = ("Weights, input and output cross each memory once; times are those at each ceiling alone, and the longest "
            "of those that limit is the floor.")
    return section("layers", "Layers", lead, (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>'
        f'{"".join(lines)}</tbody></table></div>'))


def _notes(found: Roofline) -> str:
    items = [*found.notes, *(f"{x.name} is not used: {x.why}" for x in found.device.left_out)]
    if found.hidden:
        items.append(f"{found.hidden} operators are not listed: {hidden(found)}")
    items += ["biases are not counted", "multiply-adds are those of the direct algorithm: Winograd's does a 3x3 "
              "convolution with fewer, and then compute's floor is lower", "a floor is no prediction: caches that are "
              "too small, small groups and other instructions all make it longer"]
    return section("notes", "What to keep in mind", "", "<ul>" + "".join(f"<li>{e(i)}</li>" for i in items) + "</ul>")


def _name(x: Floor) -> str:
    return x.layer.name if len(x.layer.name) <= 40 else "…" + x.layer.name[-39:]


# the sketch


WIDE, HIGH = 66, 13


def sketch(found: Roofline) -> list[str]:
    """The roof and the layers in characters, at most 80 wide: '/' and '-' the roof, 'o' a layer, '@' several.

    Empty where there are no layers to show.
    """
    p = _Plane(found, 0.0, WIDE - 1.0, 0.0, HIGH - 1.0)
    if not p.points:
        return []
    rows = [[" "] * WIDE for _ in range(HIGH)]
    peak, at = found.peak, found.memory()
    before: int | None = None
    for column in range(WIDE):
        v = 10 ** (p.x0 + (p.x1 - p.x0) * column / (WIDE - 1))
        slope = v * found.ceilings[at].value if at is not None else math.inf
        top = min(slope, peak.value if peak else math.inf)
        row = round(p.y(top))
        level = peak is not None and slope >= peak.value
        end = row + 1 if before is None else max(row + 1, min(before, HIGH))  # a steep slope has no gaps
        for r in range(row, end):
            if 0 <= r < HIGH:
                rows[r][column] = "-" if level else "/"
        before = row
    for _, intensity, speed in p.points:
        r, column = round(p.y(speed)), round(p.x(intensity))
        rows[r][column] = "@" if rows[r][column] in "o@" else "o"
    ticks = {round(p.y(10.0**k)): rate(10.0**k, "").strip() for k in range(math.ceil(p.y0), math.floor(p.y1) + 1)}
    out = [f"{ticks.get(i, ''):>7} |{''.join(row)}".rstrip() for i, row in enumerate(rows)]
    axis = [" "] * (WIDE + 4)
    for k in range(math.ceil(p.x0), math.floor(p.x1) + 1):
        text = amount(10.0**k)
        start = min(max(0, round(p.x(10.0**k)) - len(text) // 2), len(axis) - len(text))
        if all(c == " " for c in axis[max(0, start - 1) : start + len(text) + 1]):
            axis[start : start + len(text)] = text
    return ["   op/s", *out, f"{'':8}+{'-' * WIDE} op/B", (" " * 9 + "".join(axis)).rstrip()]

