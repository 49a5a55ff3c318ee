"""npulab disasm: a program's commands and descriptors as text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npulab.cli.options import Json


def disasm(
    program_file: Annotated[Path, typer.Argument(metavar="FILE.npu", help="A compiled program.", show_default=False)],
    json: Json = False,
) -> None:
    """Print a program's commands and descriptors as text.

    Every field with its bits, and every job with the operators it comes from.
    """
    from npulab import api
    from npulab.cli.printing import clean, write_json
    from npulab.targets.target import find_target

    program = api.read_program(program_file)
    lines = [clean(line) for line in find_target(program.target).disassemble(program).splitlines()]
    if json:
        write_json({"target": program.target, "plan": program.plan, "model": program.model,
                    "digest": program.digest, "lines": lines})
    else:
        print("\n".join(lines))
