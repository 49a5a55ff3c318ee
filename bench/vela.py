"""The facts of Ethos-U against Arm's compiler: `python bench/vela.py VELA [MODELS_DIR] [--count N] [--seed N]`.

VELA is the `vela` program of the package ethos-u-vela (5.2.0 is what the facts describe), installed in an environment
of its own. Every 8-bit model of MODELS_DIR and N generated models of one operator each (`vela_operators.py`) are
compiled; where Vela puts the operators is compared with the verdicts of the described board. Of models, operators that
Vela made part of others, and does not list, are not compared. What makes Vela fail agrees if the verdict is host: such
an operator has to stay off its input. Prints the share that agrees, by operator where it is not all, and each
disagreement with its reason. `--record FILE` keeps the places of generated models, which tests/test_agreement.py reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vela_operators import One

from npulab.importers import load
from npulab.ir import DType, Graph
from npulab.targets.facts.board import find_board

ACCELERATORS = {"ethos_u55": "ethos-u55-128", "ethos_u65": "ethos-u65-256", "ethos_u85": "ethos-u85-256"}
WORKER = Path(__file__).with_name("vela_worker.py")
WORKERS = 2
PLACES = {"n": "npu", "h": "host", "f": "fails"}
"""Letters of a record."""


class Row(NamedTuple):
    """A verdict. `theirs`: npu, host or fails; `ours`: npu or host; `why`: our reasons, or Vela's as it failed."""

    model: str
    operator: str
    theirs: str
    ours: str
    why: str

    @property
    def agrees(self) -> bool:
        return self.ours == ("npu" if self.theirs == "npu" else "host")


def answers(vela: str, accelerator: str, paths: list[Path], listed: bool) -> list[list]:
    """What the worker says of each file, in order."""
    python = Path(vela).with_name("python")

    def part(mine: list[Path]) -> list[list]:
        lines = "".join(json.dumps([str(p), accelerator, listed]) + "\n" for p in mine)
        done = subprocess.run([python, WORKER], input=lines, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(part, [paths[i::WORKERS] for i in range(WORKERS)]))
    return [parts[i % WORKERS][i // WORKERS] for i in range(len(paths))]


def rows(board: str, path: Path, answer: list, whole: bool) -> Iterable[Row]:
    """Of a model of one operator, one verdict: host if anything of it is. Of a `whole` model, of what Vela lists."""
    status, on_host, _, places, said = answer
    graph = load(path)
    for node, finding in zip(graph.nodes, find_board(board).check(graph).findings, strict=True):
        ours = "npu" if finding.where == "npu" else "host"
        theirs = "fails" if status else _place(graph, node.outputs, places) if whole else "host" if on_host else "npu"
        if theirs:
            why = "; ".join(f"{r.rule} {r.found}" for r in (*finding.reasons, *finding.undecided))
            yield Row(path.stem, node.op.name, theirs, ours, (why or " ".join(said.split()))[-200:])


def _place(graph: Graph, outputs: tuple[int, ...], places: dict[str, str]) -> str | None:
    return next((places[graph.values[v].name] for v in outputs if graph.values[v].name in places), None)


def report(title: str, found: list[Row]) -> None:
    total, right = Counter(r.operator for r in found), Counter(r.operator for r in found if r.agrees)
    agree, fails = sum(right.values()), sum(r.theirs == "fails" for r in found)
    print(f"{title}: {agree} of {len(found)} verdicts agree ({100 * agree / max(len(found), 1):.2f} %); Vela takes "
          f"{sum(r.theirs == 'npu' for r in found)} and failed on {fails}; {len(total)} operators")
    for name, count in sorted(total.items()):
        print(f"  {name}: {right[name]} of {count}")
    for r in found:
        if not r.agrees:
            print(f"  {r.model} {r.operator}: vela {r.theirs}, npulab {r.ours}. {r.why}")
    sys.stdout.flush()


def record(path: Path, vela: str, board: str, seed: int, files: list[bytes], found: list[Row]) -> None:
    """A small file: a letter and a checksum of the model for each seed, one behind the other."""
    version = subprocess.run([vela, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    letters = {place: letter for letter, place in PLACES.items()}
    path.write_text(json.dumps({
        "vela": version, "board": board, "accelerator": ACCELERATORS[board], "first": seed * 1_000_000,
        "places": "".join(letters[r.theirs] for r in found),
        "models": f"{zlib.crc32(b''.join(files)):08x}"}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vela")
    parser.add_argument("models", nargs="?", type=Path)
    parser.add_argument("--board", choices=ACCELERATORS, default="ethos_u55")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, metavar="FILE")
    given = parser.parse_args()
    accelerator = ACCELERATORS[given.board]
    models = sorted(given.models.rglob("*.tflite")) if given.models else []
    models = [f for f in models if any(v.dtype in (DType.INT8, DType.UINT8) for v in load(f).values)]
    if models:
        report("models", [r for path, answer in zip(models, answers(given.vela, accelerator, models, True), strict=True)
                          for r in rows(given.board, path, answer, True)])
    with tempfile.TemporaryDirectory() as folder:
        files = [One(given.seed * 1_000_000 + i).build() for i in range(given.count)]
        ones = [Path(folder) / f"{given.seed * 1_000_000 + i}.tflite" for i in range(given.count)]
        for path, data in zip(ones, files, strict=True):
            path.write_bytes(data)
        found = [r for path, answer in zip(ones, answers(given.vela, accelerator, ones, False), strict=True)
                 for r in rows(given.board, path, answer, False)]
        report("generated operators", found)
    if given.record:
        record(given.record, given.vela, given.board, given.seed, files, found)


if __name__ == "__main__":
    main()
