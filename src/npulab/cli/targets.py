"""npulab targets: the NPUs known, and what each takes."""

from __future__ import annotations

from typing import Annotated

import typer

from npulab.cli.options import Json


def targets(
    name: Annotated[str | None, typer.Argument(help="Print what this target takes.", show_default=False)] = None,
    boards: Annotated[bool, typer.Option("--boards", help="List the described boards, for npulab check.")] = False,
    json: Json = False,
) -> None:
    """List the targets, or every rule of one of them."""
    from npulab.cli.printing import say, table, write_json
    from npulab.targets.target import all_targets, find_target

    if boards:
        _boards(json)
        return
    if name is None:
        known = sorted(all_targets().items())
        if json:
            write_json({"targets": [{"name": n, "title": t.title} for n, t in known]})
        else:
            table(["target", "chip+"], [(n, t.title) for n, t in known])
        return
    target = find_target(name)
    rules = target.support_table()
    if json:
        write_json({"name": target.name, "title": target.title,
                    "rules": [{"operator": o, "rule": r, "source": s} for o, r, s in rules]})
        return
    say(f"{target.name}: {target.title}")
    before = None
    for operator, rule, source in rules:
        if operator != before:
            say()
            say(operator)
        before = operator
        say(f"  -  {rule} ({source})")


def _boards(json: bool) -> None:
    from npulab.cli.printing import say, table, write_json
    from npulab.targets.facts.board import boards

    known = boards()
    if json:
        write_json({"boards": [{"name": n, "title": b.title, "vendor": b.facts.vendor, "boards": list(b.facts.boards)}
                               for n, b in known.items()]})
        return
    table(["board", "chip+", "found on+"], [(n, b.title, ", ".join(b.facts.boards)) for n, b in known.items()])
    say()
    say("Described by what their vendors publish: npulab check says what they take. It compiles for: npulab targets.")
