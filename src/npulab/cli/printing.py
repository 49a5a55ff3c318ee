"""Text for the terminal: tables that fit it, numbers people can read, strings that cannot steer it."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

PLAIN_WIDTH = 80


def clean(text: object) -> str:
    """Text from a file, safe to print: control characters and broken Unicode become escapes."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else c.encode("unicode_escape").decode()
                   for c in str(text))


def fail(text: str, code: int) -> int:
    """The exit code, after the error is said on stderr."""
    with contextlib.suppress(OSError):  # nobody may be listening
        print("npulab: error: " + "\n".join(clean(line) for line in text.split("\n")), file=sys.stderr, flush=True)
    return code


def say(text: str = "") -> None:
    """A line of data on stdout, wrapped to the terminal, continued under the text behind its first gap."""
    import textwrap

    width = _width()
    lead = len(text) - len(text.lstrip())
    gap = text.find("  ", lead)
    hang = len(text) - len(text[gap:].lstrip()) if 0 <= gap < 20 else lead + 2 if gap > 0 else lead
    for line in textwrap.wrap(clean(text), width, subsequent_indent=" " * hang, break_long_words=False,
                              break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True) or [""]:
        print(line)


def progress(text: str) -> None:
    """A line on stderr, for a person who waits."""
    if sys.stderr.isatty():
        print(f"npulab: {clean(text)}", file=sys.stderr)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headings. A heading that begins with '>' is aligned right; one that ends with '+' may wrap."""
    cells = [[clean_lines(c) for c in row] for row in rows]
    names = [c.strip(">+") for c in columns]
    natural = [max([len(n), *(len(line) for row in cells for line in row[i])]) for i, n in enumerate(names)]
    free = _width() - 2 * (len(columns) - 1) - sum(w for w, c in zip(natural, columns, strict=True) if c[-1] != "+")
    widths = dict(enumerate(natural))
    wrapping = sorted((i for i, c in enumerate(columns) if c[-1] == "+"), key=lambda i: natural[i])
    for k, i in enumerate(wrapping):  # narrow ones first: what they leave goes to the wide ones
        widths[i] = min(natural[i], max(12, free // (len(wrapping) - k)))
        free -= widths[i]
    for row in [[[n] for n in names], *cells]:
        wrapped = [[part for line in cell for part in _wrap(line, widths[i])] for i, cell in enumerate(row)]
        for k in range(max(len(w) for w in wrapped)):
            texts = [w[k] if k < len(w) else "" for w in wrapped]
            print("  ".join(t.rjust(widths[i]) if columns[i][0] == ">" else t.ljust(widths[i])
                            for i, t in enumerate(texts)).rstrip().replace(TIED, " "))


TIED = "\N{NO-BREAK SPACE}"


def clean_lines(text: object) -> list[str]:
    return [clean(line) for line in str(text).split("\n")]


def _wrap(line: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(line, width, break_on_hyphens=False) or [""]


def _width() -> int:
    import shutil

    return max(60, shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns) if sys.stdout.isatty() else PLAIN_WIDTH


def write_json(data: Any) -> None:
    """The verb's answer for programs. Numbers that JSON does not have become null."""
    print(json.dumps(finite(data), indent=1))


def finite(data: Any) -> Any:
    """Plain data whose numbers JSON has."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(k): finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [finite(v) for v in data]
    return data


def amount(n: float) -> str:
    """1234567 -> '1.23 M'. Three digits, no unit."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size * 0.9995:
            return f"{n / size:.3g} {letter}" if n < size * 999.5 else f"{n / size:.0f} {letter}"
    return f"{n:g}"


def listed(ops: Iterable[str]) -> str:
    """'13 CONV_2D, ADD'."""
    return ", ".join(f"{n}{TIED}{op}" if n > 1 else op for op, n in Counter(ops).items())


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> '0-2, 5'."""
    out: list[str] = []
    numbers = sorted(numbers)
    first = 0
    for i, n in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != n + 1:
            out.append(str(n) if first == i else f"{numbers[first]}-{n}")
            first = i + 1
    return ", ".join(out)
