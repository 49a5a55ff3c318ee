"""Arenas against the lower bound and the usual heuristic: `python bench/allocator.py [MODELS_DIR]`.

For every TFLite file below the folder two rows: the values of its graph in order, as an interpreter would hold them;
and the tensors of its NPU regions as the compiler places them, if it has any (all regions, and both divisions when it
tries two). bound: the bytes alive at the busiest time, which no arena can be below. Times are of this process.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest import mock

from npulab import api
from npulab.errors import NpulabError
from npulab.plan import memory
from npulab.plan.memory import Lifetime, greedy_by_breadth, greedy_by_size, place

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"


def graph_lives(path: Path) -> list[Lifetime]:
    """Of every value that the graph computes or is given; -1 and the number of nodes are the caller's turns."""
    graph = api.load(path)
    when = {n.index: i for i, n in enumerate(graph.nodes)}
    out = []
    for v in graph.values:
        if v.index in graph.producer or v.index in graph.inputs:
            first = when[graph.producer[v.index].index] if v.index in graph.producer else -1
            reads = [when[n.index] for n in graph.consumers.get(v.index, ())]
            last = len(graph.nodes) if v.index in graph.outputs else max([first, *reads])
            out.append(Lifetime(v.elements * (v.dtype.numpy.itemsize if v.dtype.numpy else 1), first, last))
    return out


def job_lives(path: Path) -> list[list[Lifetime]]:
    """Of the tensors of each NPU region, as the compiler asks for their places."""
    asked: dict[tuple[Lifetime, ...], None] = {}

    def record(tensors: list[Lifetime], alignment: int = 64) -> memory.Placement:
        asked[tuple(tensors)] = None
        return place(tensors, alignment)

    with mock.patch.object(memory, "place", record):
        api.compile(path)
    return [list(tensors) for tensors in asked]


def main() -> None:
    models = sorted((Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS).rglob("*.tflite"))
    print(f"{'model':<44} {'of':<5} {'tensors':>7} {'bound':>9} {'ours':>9} {'gap':>7} {'by size':>9} {'gap':>7} "
          f"{'breadth':>9} {'gap':>7} {'ms':>6}")
    rows, met, theirs = 0, 0, 0
    for path in models:
        for kind in ("graph", "jobs"):
            try:
                groups = [graph_lives(path)] if kind == "graph" else job_lives(path)
            except NpulabError as e:
                print(f"{path.stem[:44]:<44} {kind:<5} {e.message}")
                continue
            if not groups:
                continue
            start = time.process_time()
            placed = [place(g) for g in groups]
            ms = (time.process_time() - start) * 1e3
            bound, ours = sum(p.bound for p in placed), sum(p.peak for p in placed)
            size, breadth = (sum(by(g).peak for g in groups) for by in (greedy_by_size, greedy_by_breadth))
            assert bound <= ours <= min(size, breadth)
            gap, gap_size, gap_breadth = (100 * (peak - bound) / bound for peak in (ours, size, breadth))
            print(f"{path.stem[:44]:<44} {kind:<5} {sum(map(len, groups)):>7} {bound:>9} {ours:>9} {gap:>6.2f}% "
                  f"{size:>9} {gap_size:>6.2f}% {breadth:>9} {gap_breadth:>6.2f}% {ms:>6.1f}")
            rows, met, theirs = rows + 1, met + (ours == bound), theirs + (size == bound)
    print(f"at the bound: {met} of {rows} rows ({100 * met / max(rows, 1):.0f} %, figure: at least 95 %); "
          f"greedy by size {theirs}; never above it")


if __name__ == "__main__":
    main()
