"""What every page has around its parts: one file that asks the network for nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from npulab.cli.printing import clean


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page. Equal parts give equal pages."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return "\n".join([
        '<!doctype html>', '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">', '<link rel="icon" href="data:,">',
        f"<title>{e(title)}</title>", f"<style>\n{_part('page.css')}</style>", "</head>", "<body>", "<main>",
        *(p for p in parts if p), "</main>", f"<script>\n{_part('page.js')}</script>", "</body>", "</html>", ""])


def e(text: object) -> str:
    """Text for a page or an attribute: markup and control characters are shown, not obeyed."""
    plain = str(text)
    return html.escape(plain if plain.isprintable() else clean(plain))


def section(name: str, title: str, lead: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n<p class="lead">{lead}</p>\n{body}\n</section>'


@cache
def _part(name: str) -> str:
    return files("npulab.report").joinpath(name).read_text()
