"""Check every model of a folder, and ten networks of the zoo, against every board and chip: seconds of each.

    python bench/breadth.py ../shared/models
    python bench/breadth.py ../shared/models --processes   also `npulab check MODEL --all --json`, a process each

Prints the slowest single check of each model, by CPU time of this process, and where it was. The exit status is 1 if a
check raised anything or took longer than --limit seconds.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from npulab import api, zoo
from npulab.errors import NpulabError
from npulab.ir import Graph
from npulab.targets.facts.board import boards
from npulab.targets.facts.outlook import outlook
from npulab.targets.target import all_targets


def timed(graph: Graph) -> tuple[float, str, float, str, int]:
    """(seconds, board) of the slowest outlook, (seconds, chip) of the slowest chip, and checks that raised."""
    board, chip, defects = (0.0, ""), (0.0, ""), 0
    for name, b in boards().items():
        began = time.process_time()
        try:
            outlook(graph, b)
        except Exception:
            traceback.print_exc()
            defects += 1
        board = max(board, (time.process_time() - began, name))
    for name in all_targets():
        began = time.process_time()
        try:
            api.check(graph, name)
            api.profile(graph, name)
        except NpulabError:
            pass  # an answer too: it is not for this chip
        except Exception:
            traceback.print_exc()
            defects += 1
        chip = max(chip, (time.process_time() - began, name))
    return *board, *chip, defects


def process(path: Path) -> float:
    """Seconds of `npulab check PATH --all --json`, start of Python included; CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "npulab", "check", str(path), "--all", "--json"], check=False,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode not in (0, 1):
        print(done.stderr.decode()[-500:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="models, in folders of it too")
    parser.add_argument("--limit", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--processes", action="store_true", help="also the whole command, for all boards at once")
    arguments = parser.parse_args()

    files = sorted(p for p in arguments.folder.rglob("*") if p.suffix in (".onnx", ".tflite"))
    print(f"{len(boards())} boards, {len(all_targets())} chips; seconds of CPU")
    print(f"{'model':42s} {'nodes':>6s} {'board':>7s}  {'':18s} {'chip':>7s}  {'':10s}" + (
        "  --all" if arguments.processes else ""))
    worst, defects = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name in (t for t in zoo.topologies() if not t.endswith("-train")):
            path = Path(folder) / f"{name}.onnx"
            path.write_bytes(zoo.build(name))
            files.append(path)
        for path in files:
            graph = api.load(path)
            seconds, board, chip_seconds, chip, raised = timed(graph)
            worst, defects = max(worst, seconds, chip_seconds), defects + raised
            print(f"{path.stem[:42]:42s} {len(graph.nodes):6d} {seconds:7.2f}  {board:18s} {chip_seconds:7.2f}  "
                  f"{chip:10s}" + (f"{process(path):7.2f}" if arguments.processes else ""), flush=True)
    print(f"{len(files)} models; slowest {worst:.2f} s; {defects} checks raised")
    return 1 if defects or worst > arguments.limit else 0


if __name__ == "__main__":
    sys.exit(main())
