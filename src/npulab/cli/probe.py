"""npulab probe: what a GPU is made of, measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def probe(
    device: Annotated[str, typer.Option(
        "--device", metavar="N", help="Of the list that --list gives; or opencl:N, vulkan:N.")] = "0",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions, smaller buffers: minutes less.")] = False,
    trust_source: Annotated[bool, typer.Option(
        "--trust-source", help="Take work as the source states it where compiled code cannot be read. Else what rests "
        "on such work is refused.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the devices.")] = False,
    json: Annotated[Path | None, typer.Option(
        "--json", metavar="FILE", show_default=False,
        help="Write the findings here, one by one: a run that was stopped goes on from them. - for stdout.")] = None,
) -> None:
    """Measure an OpenCL or Vulkan device: rates, latencies, bandwidths, caches, registers.

    Every result is checked, and work is counted in compiled code; what speaks against a number is said, and the number
    refused.
    """
    from dataclasses import asdict

    import msgspec

    from npulab import probing
    from npulab.cli.printing import progress, say, table, write_json
    from npulab.gpu.devices import DRIVERS, devices
    from npulab.program.files import write_atomically

    if list_:
        missing: list[str] = []
        found = devices(missing)
        if json is not None:
            write_json([{"device": d.name, **asdict(d.identity)} for d in found])
            return
        if found:
            table([">device", "or", "name+", "driver+"], [
                (i, d.name, d.identity.name, f"{d.identity.platform}, {d.identity.driver}")
                for i, d in enumerate(found)])
        else:
            say(f"No device. Drivers: {DRIVERS}.")
        for fault in missing:
            say(f"{fault}.")
        return
    save = None if json is None or str(json) == "-" else json.with_name(f"{json.name}.part")
    result = probing.probe(device, quick, lambda name, share: progress(f"{share:4.0%}  {name}"), save,
                           trust_source=trust_source)
    if str(json) == "-":
        write_json(result)
        return
    if json is not None and save is not None:
        write_atomically(json, msgspec.json.format(msgspec.json.encode(result), indent=1))
        save.unlink(missing_ok=True)
    show(result)
    if json is not None:
        say(f"Wrote {json}")


def show(result: Mapping[str, Any]) -> None:
    from npulab.cli.printing import say, table
    from npulab.gpu.analysis.conclude import NOT_COUNTED, TRY

    who = result["identity"]
    say(f"{who['name']} ({who['platform']}, driver {who['driver']})")
    if who["api"] == "vulkan" and who["version"].startswith("CPU"):
        say("A CPU behind Vulkan: threads side by side in its vectors are its warps; it has no banks or register file.")
    say()
    measured = [q for q in result["quantities"] if q["status"] == "measured"]
    stated = [q for q in measured if q["why"].startswith(NOT_COUNTED)]
    table(["measured", ">value", ">95 %"], [(q["name"] + " (!)" * (q in stated), *_shown(q)) for q in measured
                                            if not SHAPED.fullmatch(q["name"]) and not VECTORS.fullmatch(q["name"])])
    for what, said, scale in (("rate", "G operations/s", 1e-9), ("latency", "ns from a step to the next", 1e9)):
        widths, rows = _by_vector(result["quantities"], stated, what, scale)
        if rows:
            say()
            say(f"{said}, vectors of so many:")
            table([what, *(f">{width}" for width in widths)], rows)
    shapes, rows = _by_shape(result["quantities"], stated)
    if rows:
        say()
        say("GB/s, 4, 8 and 16 bytes a load or store; then 4 bytes, neighbours so many words apart:")
        table(["bandwidth", *(f">{width} B" if stride == 1 else f">{stride}" for width, stride in shapes)], rows)
    if stated:
        say()
        say(f"(!) {NOT_COUNTED}: {len(stated)} of {len(measured)}. These are as true as the source's count of what it "
            "does; a compiler may have changed that.")
    refused = [q for q in result["quantities"] if q["status"] == "refused"]
    if refused:
        say()
        table(["refused+", "why+"], _together((q["name"], q["why"].partition(TRY)[0]) for q in refused))
    tries = dict.fromkeys(q["why"].partition(TRY)[2] for q in refused)
    for each in filter(None, tries):
        say()
        say(f"Where work was not counted, try {each}.")


SHAPED = re.compile(r"(?P<of>(?:L\d+|memory|local memory|constant)(?: write| copy)?) bandwidth, "
                    r"(?:(?P<width>\d+) bytes a (?:load|store)(?:, stride (?P<apart>\d+))?|stride (?P<stride>\d+))")
"""A bandwidth by width and stride: of words where only a stride is named."""
VECTORS = re.compile(r"(?P<of>\w+ \w+) (?P<what>rate|latency), vectors of (?P<width>\d+)")
"""An operation by width of its vectors."""
WORDS = re.compile(r"(?P<of>local memory|local memory write|constant) bandwidth")
"""That of words side by side."""
WOULD_BE = "; by the source's count"


def _by_shape(quantities: Iterable[Mapping[str, Any]], stated: Sequence[Mapping[str, Any]]
              ) -> tuple[list[tuple[int, int]], list[list[str]]]:
    """(bytes a load and words between neighbours, rows of what was measured of them)."""
    cells: dict[str, dict[tuple[int, int], str]] = {}
    base: dict[str, str] = {}
    marked = set()
    for q in quantities:
        value = "-" if q["value"] is None else f"{q['value']:.3g}" if q["value"] < 999.5 else f"{q['value']:.0f}"
        if m := WORDS.fullmatch(q["name"]):
            base[m["of"]] = value
        if m := SHAPED.fullmatch(q["name"]):
            cells.setdefault(m["of"], {})[int(m["width"] or 4), int(m["apart"] or m["stride"] or 1)] = value
            marked |= {m["of"]} if q in stated else set()
    for of, value in base.items():
        if of in cells:
            cells[of][4, 1] = value
    cells = {of: row for of, row in cells.items() if set(row.values()) != {"-"}}
    shapes = sorted({shape for row in cells.values() for shape in row}, key=lambda shape: shape[::-1])
    return shapes, [[of + " (!)" * (of in marked), *(row.get(shape, "") for shape in shapes)]
                    for of, row in sorted(cells.items())]


def _by_vector(quantities: Iterable[Mapping[str, Any]], stated: Sequence[Mapping[str, Any]], what: str, scale: float
               ) -> tuple[list[int], list[list[str]]]:
    """(widths, rows of what was measured of each operation)."""
    cells: dict[str, dict[int, str]] = {}
    for q in quantities:
        m = VECTORS.fullmatch(q["name"])
        if m and m["what"] == what:
            value = "-" if q["value"] is None else f"{scale * q['value']:.3g}" + " (!)" * (q in stated)
            cells.setdefault(m["of"], {})[int(m["width"])] = value
    cells = {of: row for of, row in cells.items() if set(row.values()) != {"-"}}
    widths = sorted({width for row in cells.values() for width in row})
    return widths, [[of, *(row.get(width, "") for width in widths)] for of, row in cells.items()]


def _together(refused: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Shapes of one bandwidth that were refused for the same reason in one row."""
    of: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, why in refused:
        m, v = SHAPED.fullmatch(name), VECTORS.fullmatch(name)
        key = f"{m['of']} bandwidth, shapes" if m else f"{v['of']} {v['what']}, vectors" if v else name
        of.setdefault((key, why.partition(WOULD_BE)[0] if m or v else why), []).append((name, why))
    return [rows[0] if len(rows) == 1 else (key.replace(", ", f", {len(rows)} "), why)
            for (key, why), rows in of.items()]


def _shown(q: Mapping[str, Any]) -> tuple[str, str]:
    """Value and half of the interval, with prefixes."""
    value = scaled(q["value"], q["unit"])
    if not q["interval"] or not q["value"]:
        return value, ""
    half = (q["interval"][1] - q["interval"][0]) / 2 / abs(q["value"])
    return value, f"+- {half:.1%}"


def scaled(value: float, unit: str) -> str:
    """With the prefix that a person reads: seconds as ns, us, ms; bytes as KiB, MiB; rates as G, T."""
    if unit == "s":
        steps: tuple[tuple[float, str], ...] = ((1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
    elif unit.startswith("bytes"):
        rest = unit.removeprefix("bytes")
        steps = ((2.0**20, f"MiB{rest}"), (2.0**10, f"KiB{rest}"), (1.0, unit))
    elif unit.endswith("/s") and unit != "GB/s":
        steps = ((1e12, f"T {unit}"), (1e9, f"G {unit}"), (1e6, f"M {unit}"))
    else:
        steps = ((0.0, unit),)
    size, name = next((s for s in steps if abs(value) >= s[0]), steps[-1])
    return f"{value / size if size else value:.4g} {name}"
