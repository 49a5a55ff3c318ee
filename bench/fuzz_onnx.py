"""Damage ONNX files in many ways; load, check and patch them: each must be answered or refused, soon, in little memory.

    python bench/fuzz_onnx.py --cases 20000 --seed 1
    python bench/fuzz_onnx.py --cases 500 --patch MODEL.onnx ...

Without files it damages models that it builds itself. Cases run in child processes with a bound on their memory, many
to a child; one that dies of it, or of the time bound, is a defect. Prints a count per outcome, the slowest case and the
most memory. Files that show a defect are kept in the folder of `--keep`, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from npulab.errors import InvariantError, ModelError, NpulabError, UsageError
from npulab.importers import load
from npulab.targets.facts.board import boards, find_board
from npulab.targets.facts.outlook import outlook

MEMORY = 3 << 30
"""Bytes of address space of a child."""
SECONDS = 10
"""Of one case."""
CHUNK = 250
"""Cases of a child."""
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)
"""That go wrong as lengths, extents, types or indices."""


def built() -> list[bytes]:
    """Small networks with most parts of the format."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, *dims: int) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    def branch(op: str) -> object:
        return helper.make_graph([helper.make_node(op, ["p"], ["r"])], op, [], [value("r", 1, 4, 4, 4)])

    constants = {"w": np.ones((4, 3, 3, 3), np.float32), "b": np.zeros(4, np.float32), "k": np.array(2.0, np.float32),
                 "s": np.array([1, -1]), "z": np.array([1.0, 1, 2, 2], np.float32), "c": np.array(True)}
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["a"]),
        helper.make_node("Conv", ["a", "w", "b"], ["h"], kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Sigmoid", ["h"], ["g"]), helper.make_node("Mul", ["h", "g"], ["p"]),
        helper.make_node("If", ["c"], ["q"], then_branch=branch("Neg"), else_branch=branch("Abs")),
        helper.make_node("Concat", ["q", "g"], ["j"], axis=1),
        helper.make_node("Resize", ["j", "", "z"], ["u"], mode="nearest"),
        helper.make_node("Reshape", ["u", "s"], ["f"]), helper.make_node("Softmax", ["f"], ["y"], axis=1),
    ]
    graph = helper.make_graph(nodes, "seed", [value("x", 1, 3, 8, 8)], [value("y", 1, 512)],
                              [numpy_helper.from_array(v, k) for k, v in constants.items()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return [made.SerializeToString()]


def damage(seeds: list[bytes], rng: random.Random) -> bytes:
    """A seed after 1 to 8 changes: flipped bits, extreme varints, bytes taken out, put in, copied, a cut."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 8))):
        if len(data) < 16:
            break
        at, kind = rng.randrange(3, len(data)), rng.randrange(24)
        if kind < 12:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 18:
            data[at] = rng.randrange(256)
        elif kind < 20:
            n, number = rng.randrange(1, 4), rng.choice(NUMBERS)
            out = bytearray()
            while number > 0x7F:
                out.append(number & 0x7F | 0x80)
                number >>= 7
            data[at : at + n] = [*out, number]
        elif kind < 21:
            del data[at : at + rng.randrange(1, 9)]
        elif kind < 23:
            start = rng.randrange(len(data))
            data[at:at] = data[start : start + rng.randrange(1, 64)]
        else:
            del data[at:]
    return bytes(data)


def outcome(data: bytes, board: str, patch: bool) -> str:
    """How the case ended, in few words; any other exception goes through."""
    try:
        graph = load(data)
    except (ModelError, UsageError) as e:
        return f"{type(e).__name__}: {' '.join(w for w in e.message.split() if w[0] not in chr(39) + '(')[:60]}"
    ended = "checked"
    try:
        outlook(graph, find_board(board), "int8")
        if patch and graph.format == "onnx":
            from npulab.passes.pipeline import patched

            patched(graph)
            ended = "checked and patched"
    except InvariantError:
        raise  # by its own definition a defect
    except NpulabError as e:
        return f"read, then {type(e).__name__}"
    return ended


def child(cases: range, seeds: list[bytes], seed: int, patch: bool, write: int) -> None:
    """Run cases; a line of JSON before and after each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    names = list(boards())
    with os.fdopen(write, "w") as out:
        for case in cases:
            data = damage(seeds, random.Random(f"{seed} {case}"))
            out.write(json.dumps({"case": case}) + "\n")
            out.flush()
            signal.alarm(4 * SECONDS)
            began = time.process_time()
            try:
                ended = outcome(data, names[case % len(names)], patch)
            except Exception as e:
                ended = f"DEFECT {type(e).__name__}"
                traceback.print_exc()
            signal.alarm(0)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            seconds = time.process_time() - began
            out.write(json.dumps({"case": case, "ended": ended, "seconds": seconds, "mib": peak}) + "\n")
            out.flush()


def forked(cases: range, seeds: list[bytes], seed: int, patch: bool) -> list[dict[str, object]]:
    """Results of the cases; a child that dies is replaced for those behind the case it died of."""
    found: list[dict[str, object]] = []
    while cases:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            child(cases, seeds, seed, patch, write)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as f:
            lines = [json.loads(line) for line in f]
        _, status = os.waitpid(pid, 0)
        done = [line for line in lines if "ended" in line]
        found += done
        if not os.WIFSIGNALED(status):
            return found
        last = lines[-1]["case"] if lines else cases[0]
        found.append({"case": last, "ended": f"DEFECT signal {os.WTERMSIG(status)}", "seconds": 0.0, "mib": 0.0})
        cases = range(last + 1, cases.stop)
    return found


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="models to damage; without any, models made here")
    parser.add_argument("--cases", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patch", action="store_true", help="run the passes too, on what can be read")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-defects"), help="folder for files that show a defect")
    arguments = parser.parse_args()

    seeds = [path.read_bytes() for path in arguments.files] or built()
    boards()
    outcome(seeds[0], "rk3588", arguments.patch)  # imports, before the forks
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    slowest, most, defects = (0.0, -1), 0.0, 0
    for start in range(0, arguments.cases, CHUNK):
        cases = range(start, min(start + CHUNK, arguments.cases))
        for r in forked(cases, seeds, arguments.seed, arguments.patch):
            ended, case, seconds = str(r["ended"]), int(str(r["case"])), float(str(r["seconds"]))
            counts[ended] += 1
            slowest, most = max(slowest, (seconds, case)), max(most, float(str(r["mib"])))
            if ended.startswith("DEFECT"):
                defects += 1
                arguments.keep.mkdir(exist_ok=True)
                (arguments.keep / f"seed{arguments.seed}-case{case}.onnx").write_bytes(
                    damage(seeds, random.Random(f"{arguments.seed} {case}")))
    for text, count in counts.most_common():
        print(f"{count:9d}  {text}")
    print(f"{arguments.cases} cases in {time.perf_counter() - began:.1f} s; slowest {slowest[0]:.2f} s "
          f"(case {slowest[1]}); most memory {most:.0f} MiB; {defects} defects")
    return 1 if defects or slowest[0] > SECONDS else 0


if __name__ == "__main__":
    sys.exit(main())
