"""Patch every network of a folder and of the zoo for every described board, with the certificate of each.

    python bench/patches.py ../shared/models/float
    python bench/patches.py ../shared/models/float --only vit-tiny,yolov8n --boards rk3588,hailo8

A line is one network and one board: nodes off the NPU before and after, CPU seconds of `patched`, seconds of the
certificate, MiB of memory at most, the largest error of any output as a share of its largest value, and the passes that
the board needed. "Before" is the network with its constants folded, as every converter folds them: a check takes what
is computed from constants for data. Boards that get the same network share its certificate. The exit status is 1 if
anything raised, an error is above 1e-5, a patch leaves more off than there was, or takes longer than --limit seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from npulab import api, zoo
from npulab.exporters.onnx import to_onnx
from npulab.ir import Graph
from npulab.passes import constants
from npulab.passes.certificate import TOLERANCE, compared
from npulab.passes.pipeline import PASSES, patched, post_of, run
from npulab.patching import as_quantized, off_npu
from npulab.targets.facts.board import Board, boards

SIZES = {"yolov5s": 96, "yolov8n": 96, "ssdlite": 96}
"""Pixels of zoo networks; 64 of the others."""
ROW = "{:17.17s} {:>4d} {:>4d} {:>6.2f} {:>5.1f} {:>5d} {:>8.1e} {:s}"
HEAD = f"{'board':17s} {'off':>4s} {'then':>4s} {'CPU-s':>6s} {'cert':>5s} {'MiB':>5s} {'error':>8s} the board's passes"
ALWAYS = {p.name for p in PASSES if p.always}


@dataclass
class Result:
    pairs: int = 0
    defects: int = 0
    before: int = 0
    after: int = 0
    whole_before: int = 0
    whole: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    peak: int = 0

    def __iadd__(self, other: Result) -> Result:
        for name in ("pairs", "defects", "before", "after", "whole_before", "whole", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.slowest, self.peak = max(self.slowest, other.slowest), max(self.peak, other.peak)
        return self


def networks(folder: Path | None) -> Iterator[tuple[str, str]]:
    """(name, where): files, and topologies of the zoo."""
    if folder:
        yield from ((p.stem, str(p)) for p in sorted(folder.rglob("*.onnx")))
    yield from ((t, "") for t in zoo.topologies())


def forget_peak() -> None:
    """Let the peak of memory begin anew, where Linux allows that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of memory that this process had at most since then."""
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def network(name: str, where: str, chosen: dict[str, Board], limit: float) -> Result:
    """Every board of one network, printed."""
    graph = api.load(where or zoo.build(name, SIZES.get(name, 64)))
    if any(graph.values[v].dynamic_axes for v in graph.inputs):
        graph = api.load(where, {f"{graph.values[v].name}.{a}": (192 if a == 3 else 48) for v in graph.inputs
                                 for a in graph.values[v].dynamic_axes})
    print(f"\n{name}: {len(graph.nodes)} nodes, {len(graph.source) >> 20} MiB\n{HEAD}", flush=True)
    certificates: dict[str, float] = {}
    folded = run(graph, [constants.PASS])[0]
    total = Result()
    for board in chosen.values():
        forget_peak()
        try:
            one = pair(graph, folded, board, certificates)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            total += Result(pairs=1, defects=1)
            continue
        one.defects += one.seconds > limit
        total += one
    totals(name, total)
    return total


def pair(graph: Graph, folded: Graph, board: Board, certificates: dict[str, float]) -> Result:
    kind = as_quantized(board, graph)
    before = len(off_npu(board.check(folded, kind)))
    newest = board.facts.facts.get("onnx_opset")
    opset = newest.value if newest is not None and isinstance(newest.value, int) else None
    began = time.process_time()
    after, changes = patched(graph, (), lambda g: off_npu(board.check(g, kind)), opset)
    seconds = time.process_time() - began
    left = len(off_npu(board.check(after, kind)))
    began = time.perf_counter()
    key = hashlib.sha256(to_onnx(after)).hexdigest()
    if key not in certificates:
        found = compared(graph, after, post=post_of(graph, after, changes))
        certificates[key] = max(a.relative for a in found)
    certificate = time.perf_counter() - began
    error, memory = certificates[key], peak()
    passes = ", ".join(dict.fromkeys(c.name for c in changes if c.name not in ALWAYS))
    print(ROW.format(board.name, before, left, seconds, certificate, memory >> 20, error, passes), flush=True)
    return Result(1, int(error > TOLERANCE) + int(left > before), before, left, int(not before), int(not left), seconds,
                  seconds, memory)


def totals(name: str, r: Result) -> None:
    print(f"{name}: {r.pairs} boards, {r.defects} defects; off {r.before} -> {r.after}; whole on the NPU "
          f"{r.whole_before} -> {r.whole};\n  CPU-s {r.seconds:.1f} in all, {r.slowest:.2f} at most; "
          f"{r.peak >> 20} MiB at most", flush=True)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="networks, in folders of it too")
    parser.add_argument("--only", metavar="NAMES", help="these networks, with commas between")
    parser.add_argument("--boards", metavar="NAMES", help="these boards, with commas between")
    parser.add_argument("--limit", type=float, default=30.0, metavar="SECONDS")
    arguments = parser.parse_args()

    only = arguments.only.split(",") if arguments.only else None
    chosen = {n: b for n, b in boards().items() if not arguments.boards or n in arguments.boards.split(",")}
    total = Result()
    began = time.perf_counter()
    for name, where in networks(arguments.folder):
        if only is None or name in only:
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # one process a network: its memory is its own
                total += pool.apply(network, (name, where, chosen, arguments.limit))
    print()
    totals("all", total)
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if total.defects else 0


if __name__ == "__main__":
    sys.exit(main())
