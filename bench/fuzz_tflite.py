"""Damage TFLite files in many ways and read them: each must be read or be refused with a ModelError, soon.

    python bench/fuzz_tflite.py --cases 100000 --seed 1
    python bench/fuzz_tflite.py --then npulab.api:check --then-argument a311d MODEL.tflite ...

Without files it damages models that it builds itself. `--then MODULE:FUNCTION` calls a function with every Graph that
was read (and the text after `--then-argument`, if given); of that function, all errors of npulab's own are outcomes.
Prints a count per outcome and the slowest case. Anything else is a defect: it is printed with its traceback, its file
is kept in the folder of `--keep`, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import random
import resource
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from npulab.errors import InvariantError, ModelError, NpulabError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers.tflite import read_tflite
from npulab.ir import Graph

EXTREMES = (0, 1, 4, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)
"""Numbers that go wrong where they are offsets, lengths, shapes or indices."""
SLOW_SECONDS = 0.5


def built() -> list[bytes]:
    """Small models that have most parts of the format."""
    model = ModelBuilder("seed")
    x = model.tensor("x", (1, 8, 8, 3), "uint8", scale=0.5, zero_point=3)
    w = model.tensor("w", (4, 3, 3, 3), "int8", scales=[0.1, 0.2, 0.3, 0.4], data=np.ones((4, 3, 3, 3), np.int8))
    b = model.tensor("b", (4,), "int32", scale=0.05, zero_point=0, data=np.arange(4, dtype=np.int32))
    y = model.tensor("y", (1, 8, 8, 4), "uint8", scale=0.25, zero_point=128)
    shape = model.tensor("shape", (2,), "int32", data=np.array([1, 256], np.int32))
    flat = model.tensor("flat", (1, 256), "uint8", scale=0.25, zero_point=128)
    out = model.tensor("out", (1, 256), "uint8", scale=1 / 256, zero_point=0)
    last = model.tensor("last", (5,), "float32")
    model.op("CONV_2D", [x, w, b], [y], padding="SAME", stride_w=1, stride_h=1, fused_activation_function="RELU")
    model.op("RESHAPE", [y, shape], [flat], new_shape=[1, 256])
    model.op("SOFTMAX", [flat], [out], beta=1.0)
    model.custom("Mystery", [out, -1], [last], b"options")
    return [model.build([x], [last])]


def damage(seeds: list[bytes], rng: random.Random) -> bytes:
    """A seed after 1 to 8 changes: flipped bits, extreme or likely numbers in place of words, copied pieces, cuts."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, kind = rng.randrange(len(data)), rng.randrange(12)
        word = at - at % 4
        if kind < 3:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 6:
            data[word : word + 4] = struct.pack("<I", rng.choice(EXTREMES))[: len(data) - word]
        elif kind < 9:
            data[word : word + 4] = struct.pack("<I", rng.randrange(len(data)))[: len(data) - word]
        elif kind < 11:
            start = rng.randrange(len(data))
            piece = data[start : start + rng.randrange(1, 64)]
            data[at : at + len(piece)] = piece
        else:
            del data[max(at, 8) :]
    data[4:8] = b"TFL3"  # without it the file would be refused at once
    return bytes(data)


def outcome(data: bytes, then: Callable[[Graph], object] | None) -> str:
    """How the case ended, in few words; any other exception goes through."""
    try:
        graph = read_tflite(data, "damaged")
    except ModelError as e:
        return f"ModelError: {e.message.partition(':')[0] if e.message.startswith('the file is') else 'content'}"
    if then is None:
        return "read"
    try:
        then(graph)
    except InvariantError:
        raise  # by its own definition a defect
    except NpulabError as e:
        return f"read, then {type(e).__name__}"
    return "read, then done"


def find(name: str, argument: str | None) -> Callable[[Graph], object]:
    module, _, function = name.partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), function)
    return found if argument is None else lambda graph: found(graph, argument)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="models to damage; without any, models made here")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--then", metavar="MODULE:FUNCTION", help="called with each Graph that was read")
    parser.add_argument("--then-argument", metavar="TEXT", help="second argument of that function")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-defects"), help="folder for files that show a defect")
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    seeds = [path.read_bytes() for path in arguments.files] or built()
    then = find(arguments.then, arguments.then_argument) if arguments.then else None
    counts: Counter[str] = Counter()
    slowest = (0.0, -1)
    defects = 0
    began = time.perf_counter()
    for case in range(arguments.cases):
        data = damage(seeds, rng)
        start = time.process_time()
        try:
            ended = outcome(data, then)
        except Exception as e:
            ended = f"DEFECT {type(e).__name__}"
            if counts[ended] < 3:
                traceback.print_exc()
            defects += 1
            arguments.keep.mkdir(exist_ok=True)
            (arguments.keep / f"seed{arguments.seed}-case{case}.tflite").write_bytes(data)
        slowest = max(slowest, (time.process_time() - start, case))
        counts[ended] += 1

    for text, count in counts.most_common():
        print(f"{count:9d}  {text}")
    seconds = time.perf_counter() - began
    print(f"{arguments.cases} cases in {seconds:.1f} s; slowest {slowest[0] * 1e3:.1f} ms (case {slowest[1]}); "
          f"most memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    return 1 if defects or (then is None and slowest[0] > SLOW_SECONDS) else 0


if __name__ == "__main__":
    sys.exit(main())
