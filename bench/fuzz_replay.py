"""Damaged replay cases: `python bench/fuzz_replay.py [--cases N] [--seed S] [FOLDER]`.

Every case changes a recorded one: bytes of the archive, entries of its index, command words, descriptor words or
coefficient bytes. It must be refused with a typed error, or run to its end, or stop at a fault, under small limits on
work. Anything else, and anything slow, is printed with its number. FOLDER holds recorded cases (default: the
developers' shared folder).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from npulab.errors import NpulabError
from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.machine import Limits
from npulab.targets.vivante.replay import replay

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden" / "vivante" / "tiny"
NUMBERS = (0, 1, 2, 7, 63, 64, 255, 4095, 8191, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFC0, 0xFFFFFFFF)
WORK = Limits(macs=200_000_000, elements=20_000_000, weights=4_000_000)
SLOW = 5.0
LARGEST = 120_000
"""Bytes of an archive that is taken: larger ones only take longer to damage."""

Members = dict[str, bytes]


def members(path: Path) -> Members:
    """What a replay on an A311D reads."""
    with zipfile.ZipFile(path) as z:
        return {i.filename: z.read(i) for i in z.infolist() if i.filename.startswith(("a311d/", "ref"))}


def change_words(case: Members, rng: random.Random) -> None:
    """Command words, descriptors or coefficients."""
    index = json.loads(case["a311d/index.json"])
    places: list[tuple[str, int, int]] = []
    for s, submit in enumerate(index["submits"]):
        places.append((f"a311d/{submit['file']}", 0, submit["stream_size"]))
        for op in index["subgraphs"][s - 1]["hw_ops"] if s else []:
            for va in [op["nn_va"]] if "nn_va" in op else op.get("tp_va", []):
                places += [(f"a311d/mem-{s}-{int(va, 16):x}.bin", 0, 136)] * 6
            if "coef_va" in op:
                name = f"a311d/mem-{s}-{int(op['coef_va'], 16):x}.bin"
                places += [(name, 0, 32), (name, 64, op["coef_used"]), (name, 64, 80)]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        name, low, high = rng.choice(places)
        if name not in case or high - low < 4:
            continue
        data = bytearray(case[name])
        at = rng.randrange(low // 4, min(high, len(data)) // 4) * 4
        word = struct.unpack_from("<I", data, at)[0]
        field = rng.randrange(32)
        word = rng.choice((word ^ 1 << rng.randrange(32), rng.choice(NUMBERS), rng.randrange(1 << 32), word + 64,
                           word & ~(0xFF << field) | rng.randrange(256) << field)) & 0xFFFFFFFF
        struct.pack_into("<I", data, at, word)
        case[name] = bytes(data)


def change_index(case: Members, rng: random.Random) -> None:
    """Another value somewhere in the index, or one gone."""
    index: Any = json.loads(case["a311d/index.json"])
    at = index
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.95:
            at = at[key]
            continue
        break
    if rng.random() < 0.2:
        del at[key]
    else:
        at[key] = rng.choice((None, -1, 0, 1 << 40, "", "0xffffffff", "-1", [], {}, 1.5, at[key], [at[key]] * 3))
    case["a311d/index.json"] = json.dumps(index).encode()


def change_members(case: Members, rng: random.Random) -> None:
    """A member shorter, longer, empty, gone, or under another name."""
    name = rng.choice(list(case))
    data = case.pop(name)
    match rng.randrange(4):
        case 0:
            case[name] = data[: rng.randrange(len(data) + 1)]
        case 1:
            case[name] = data + bytes(rng.randrange(1, 8192))
        case 2:
            case[rng.choice(list(case) or [name])] = data
        case 3:
            case[f"a311d/mem-{rng.randrange(3)}-{rng.randrange(1 << 32):x}.bin"] = data


def damaged(source: Members, rng: random.Random) -> bytes:
    """The archive of a changed case."""
    case = dict(source)
    kind = rng.choice((change_words, change_words, change_words, change_index, change_members, None))
    if kind:
        kind(case, rng)
    with tempfile.TemporaryFile() as f:
        with zipfile.ZipFile(f, "w") as z:
            for name, data in case.items():
                z.writestr(name, data)
        f.seek(0)
        out = bytearray(f.read())
    if kind is None:
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(len(out) - 4000, len(out)) if rng.random() < 0.7 else rng.randrange(len(out))
            out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def one(data: bytes) -> str:
    """What becomes of one archive."""
    with tempfile.NamedTemporaryFile(suffix=".zip") as f:
        f.write(data)
        f.flush()
        try:
            result = replay(f.name, A311D, WORK)
        except NpulabError as e:
            return f"refused ({type(e).__name__})"
    return f"fault: {result.faults[0].split(': ')[1]}" if result.faults else "ran"


def run(folder: Path, cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(how often each outcome, a line for each outcome that must not be)."""
    paths = [p for p in sorted(folder.glob("*.zip")) if p.stat().st_size <= LARGEST]
    sources: dict[Path, Members] = {}
    found: Counter[str] = Counter()
    bad = []
    for case in range(cases):
        rng = random.Random(f"{seed}:{case}")
        path = rng.choice(paths)
        source = sources.setdefault(path, members(path))
        if not any(name.endswith(".cmd.bin") for name in source):
            continue  # nothing was delegated
        data = damaged(source, rng)
        start = time.perf_counter()
        try:
            result = one(data)
        except Exception as e:
            result = f"CRASH: {type(e).__name__}"
            bad.append(f"case {case} ({path.stem}): {type(e).__name__}: {e}")
        took = time.perf_counter() - start
        if took > SLOW:
            bad.append(f"case {case} ({path.stem}): took {took:.1f} s")
        found[result] += 1
    return found, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=FOLDER, type=Path)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    begin = time.perf_counter()
    found, bad = run(a.folder, a.cases, a.seed)
    for result, n in found.most_common():
        print(f"{n:8}  {result}")
    print(*bad, sep="\n", end="\n" if bad else "")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{time.perf_counter() - begin:.0f} s, peak memory {peak:.0f} MB; {len(bad)} bad")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
