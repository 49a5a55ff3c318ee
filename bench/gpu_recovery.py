"""Simulated GPUs and what the analysis finds of them: `python bench/gpu_recovery.py [MACHINES] [FIRST_SEED]`.

Draws machines by seed (200 unless told otherwise), concludes from their times alone, and compares with what they are
made of: warp width, register file, banks and lines exact, cache sizes within one line, the rest within 3 %. Prints one
line a kind of quantity, then every miss and every refusal. Takes minutes on two cores; exit status 1 if any is missed.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from npulab.gpu.analysis import conclude
from npulab.gpu.simulated import Hidden, Simulated, random_hidden, truth

EXACT = {"warp width", "register file", "resident threads", "local memory banks"}
WITHIN = 0.03
MACHINES = 200


@dataclass(frozen=True)
class Row:
    """error: relative; for sizes in lines. right: within what is asked for. covered: the interval has the truth; None
    if there is none."""

    seed: int
    name: str
    want: float
    got: float | None
    error: float
    right: bool
    covered: bool | None
    why: str


def compare(hidden: Hidden, seed: int, quick: bool = False) -> Iterator[Row]:
    """Every quantity that the machine has, and every one that it was said to have and has not."""
    found = {q.name: q for q in conclude(Simulated(hidden, seed), quick=quick)}
    known = truth(hidden)
    for name, want in known.items():
        if name == "lowest clock":  # how far it fell depends on how long the experiments lasted
            continue
        q = found.pop(name, None)
        if q is None or q.value is None:
            yield Row(seed, name, want, None, 0.0, False, None, q.why if q else "not among the findings")
            continue
        error = abs(q.value / want - 1)
        if name in EXACT or name.endswith(" line"):
            right = q.value == want
        elif name.endswith(" size"):
            error = abs(q.value - want) / known[name[:2] + " line"]
            right = error <= 1
        else:
            right = error <= WITHIN
        yield Row(seed, name, want, q.value, error, right,
                  q.interval[0] <= want <= q.interval[1] if q.interval else None, q.why)
    for name, q in found.items():
        if q.value is not None and name[:2] in ("L1", "L2", "L3", "L4"):
            yield Row(seed, name, 0.0, q.value, 1.0, False, None, "the machine has no such level")


def kind(name: str) -> str:
    """Names of the same kind together: all rates, all latencies of operations, all shapes of a bandwidth."""
    for end in ("rate", "latency"):
        if name.endswith(end) and name[0] != "L" and not name.startswith("memory"):
            return f"operation {end}"
    base, _, shape = name.partition(", ")
    if shape.startswith("vectors"):
        return f"operation {base.rpartition(' ')[2]}, vectors"
    return f"{base}, shapes" if "bytes a" in shape or "stride" in shape else name.replace(
        " to device", "").replace(" from device", "")


def _machine(seed: int) -> list[Row]:
    return list(compare(random_hidden(seed), seed))


def main() -> int:
    machines = int(sys.argv[1]) if len(sys.argv) > 1 else MACHINES
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    rows: dict[str, list[Row]] = defaultdict(list)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for done, found in enumerate(pool.map(_machine, range(first, first + machines)), 1):
            for row in found:
                rows[kind(row.name)].append(row)
            if done % 20 == 0:
                print(f"{done} of {machines}", file=sys.stderr)
    print(f"{'quantity':36} {'there':>6} {'right':>6} {'refused':>8} {'wrong':>6} {'worst':>12} {'in interval':>12}")
    for name, of in rows.items():
        got = [r for r in of if r.got is not None]
        worst = max((r.error for r in got), default=0.0)
        covered = [r.covered for r in got if r.covered is not None]
        error = f"{worst:.2f} lines" if name.endswith(" size") else f"{worst:.2%}"
        print(f"{name:36} {len(of):6} {sum(r.right for r in of):6} {len(of) - len(got):8} "
              f"{sum(not r.right for r in got):6} {error:>12} "
              + (f"{sum(covered) / len(covered):12.0%}" if covered else ""))
    missed = [r for of in rows.values() for r in of if not r.right]
    machines_missed = len({r.seed for r in missed})
    print(f"\n{machines - machines_missed} of {machines} machines wholly recovered")
    for r in sorted(missed, key=lambda r: (r.seed, r.name)):
        print(f"seed {r.seed} {r.name}: want {r.want:.6g}, "
              + (f"refused: {r.why}" if r.got is None else f"got {r.got:.6g} ({r.why})"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
