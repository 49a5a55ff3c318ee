"""Damaged .npu files: `python bench/fuzz_npu.py [--cases N] [--seed S] [MODEL.tflite]`.

Every case changes a valid program file, half of them with a right hash afterwards. It must be refused with a typed
error or read as a lawful program, whose NPU steps then run on the virtual NPU with small limits on work: outputs, or
faults. Anything else is printed with its number. Host steps are not run: LiteRT is no sandbox (docs/security.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import resource
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import npulab
from npulab.errors import NpulabError
from npulab.program.container import PREFIX, program_bytes, read_program
from npulab.program.types import NpuStep, Program
from npulab.targets.target import find_target

SAMPLE = Path(npulab.__file__).parent / "samples" / "digits.tflite"
NUMBERS = (-1, 0, 1, 2, 63, 64, 255, 4095, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, 1 << 80)
WORK = {"macs": 200_000_000, "elements": 20_000_000, "weights": 4_000_000}
SLOW = 10.0


def signed(data: bytes) -> bytes:
    return data[:8] + hashlib.sha256(data[40:]).digest() + data[40:]


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(out))
        match rng.randrange(4):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
            case 2:
                del out[at : at + rng.randrange(1, 100)]
            case 3:
                out[at:at] = out[at : at + rng.randrange(1, 100)]
        if not out:
            return b""
    return bytes(out)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """Another number, or one leaf or branch gone, in the header; the payload stays where it belongs."""
    length = PREFIX.unpack_from(data)[3]
    start = PREFIX.size + length
    header: Any = json.loads(data[PREFIX.size : start])
    start += -start % 64
    for _ in range(rng.choice((1, 1, 2))):
        at: Any = header
        while True:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.95:
                at = at[key]
                continue
            break
        if isinstance(at[key], int) and rng.random() < 0.9:
            at[key] = rng.choice((rng.choice(NUMBERS), at[key] + rng.choice((-64, -4, -1, 1, 4, 64)), at[key] * 2))
        elif isinstance(at, list) and rng.random() < 0.5:
            at.insert(rng.randrange(len(at) + 1), at[key])
        elif isinstance(at, list) and len(at) > 1:
            del at[key]
        else:
            at[key] = rng.choice((None, "", 0, [], 1.5, "x" * 300))
    new = json.dumps(header, separators=(",", ":")).encode()
    return data[:44] + struct.pack("<I", len(new)) + new + bytes(-(PREFIX.size + len(new)) % 64) + data[start:]


def change_stream(data: bytes, rng: random.Random) -> bytes:
    """Other command words, descriptors or coefficients: the header stays right, the machine gets nonsense."""
    length = PREFIX.unpack_from(data)[3]
    start = PREFIX.size + length
    start += -start % 64
    header: Any = json.loads(data[PREFIX.size : PREFIX.size + length])
    ranges = [s["data"] for s in header["sections"] if s["data"]]
    ranges += [s["words"] for s in header["steps"] if "words" in s] * 4 + [header["init"]]
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        offset, size = rng.choice(ranges)
        at = start + offset + rng.randrange(max(1, size // 4)) * 4
        word = struct.unpack_from("<I", out, at)[0]
        word = rng.choice((word ^ 1 << rng.randrange(32), rng.choice(NUMBERS) & 0xFFFFFFFF, rng.randrange(1 << 32)))
        out[at : at + 4] = struct.pack("<I", word)
    return bytes(out)


def execute(program: Program) -> str:
    """The NPU steps on the virtual NPU, with zeros for what the host would have made."""
    device: Any = find_target(program.target).device()
    device.limits = dataclasses.replace(device.limits, **WORK)
    for s in program.sections:
        device.map(s.name, s.address, s.size, s.data)
    faults = list(device.submit(program.init)) if program.init else []
    for step in program.steps:
        if faults:
            return "faults"
        if isinstance(step, NpuStep):
            for t in step.uploads:
                device.write(t.address, np.zeros(t.size, np.uint8))
            faults = device.submit(step.words)
            if not faults:
                for t in step.downloads:
                    device.read(t.address, t.size)
    return "faults" if faults else "ran"


def one(whole: bytes, case: int, seed: int) -> str:
    rng = random.Random(f"{seed}:{case}")
    kind = rng.choice((change_bytes, change_header, change_stream))
    data = kind(whole, rng)
    if case % 2:
        data = signed(data)
    try:
        program = read_program(data)
    except NpulabError as e:
        return f"refused ({type(e).__name__})"
    if read_program(program_bytes(program)) != program:
        return "NOT THE SAME after writing and reading"
    try:
        return execute(program)
    except NpulabError as e:
        return f"refused when run ({type(e).__name__})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=SAMPLE, type=Path)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    whole = program_bytes(npulab.compile(a.model))
    print(f"{a.model.name}: {len(whole)} bytes, {a.cases} cases, seed {a.seed}")
    found: Counter[str] = Counter()
    bad = 0
    begin = time.perf_counter()
    for case in range(a.cases):
        start = time.perf_counter()
        try:
            result = one(whole, case, a.seed)
        except Exception as e:
            result = f"CRASH: {type(e).__name__}"
            print(f"case {case}: {type(e).__name__}: {e}")
        took = time.perf_counter() - start
        if took > SLOW:
            print(f"case {case}: took {took:.1f} s")
        bad += result.startswith(("CRASH", "NOT")) or took > SLOW
        found[result] += 1
    for result, n in found.most_common():
        print(f"{n:8}  {result}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{time.perf_counter() - begin:.0f} s, peak memory {peak:.0f} MB; {bad} bad")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
