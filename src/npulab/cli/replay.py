"""`npulab replay`: execute the recorded streams of a real driver on the virtual NPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    case: Annotated[Path, typer.Argument(help="A recorded case (.zip).", metavar="CASE.zip")],
    npu: Annotated[str, typer.Option(help="The NPU whose recording to execute.")] = "a311d",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Execute recorded command streams on the virtual NPU and compare with the reference."""
    from npulab.targets.target import find_target

    result = find_target(npu).replay(case)
    if json:
        import json as encoder

        print(encoder.dumps({"max_abs_diff": result.max_abs_diff, "mismatched": result.mismatched,
                             "elements": result.elements, "faults": list(result.faults)}))
    else:
        print(f"{case.name} on {npu}: {result.jobs} descriptors executed")
        for o in result.outputs:
            print(f"  subgraph {o.subgraph} tensor {o.tensor}: largest difference {o.max_abs_diff}, "
                  f"{o.mismatched} of {o.elements} elements differ")
        for fault in result.faults:
            print(f"  fault: {fault}")
    return 4 if result.faults else 0
