"""What one turn does, by what more turns do more; and whether it is what was asked."""

from __future__ import annotations

from collections.abc import Mapping

from npulab.gpu.counting.mix import MACHINE, TEXELS, Asked, Counted, Follow, Mix, NotRead

TURNS = (8, 16, 32)
"""Followed: the more of the last over the second must be twice the more of that over the first."""
STATED = "work as the source states"
PROVEN = "each load proven by where the chase ends"
"""In place of STATED, of loads each of whose addresses is what the one before gave."""
DIVIDED = "a ratio of times of one code, in which its work divides out"
"""In place of STATED, of findings that hold no amount of work."""
UNREAD = ", not read from compiled code: "
"""Between one of these and the reason."""
PRODUCTS = "products of integers"
"""Of any width."""
PADDED = (2.0, 4.0)
"""Lanes of a vector register for one or two that are needed."""


def of_a_turn(follow: Follow, items: int, code: str) -> Counted:
    """Of one work item, from code that `follow` goes through for `items` of them."""
    try:
        few, more, most = (follow(n) for n in TURNS)
    except NotRead as e:
        return Counted(None, code, why=str(e))
    mix: Mix = {}
    uneven = {}
    for kind in sorted({*few, *more, *most}):
        first = (more.get(kind, 0.0) - few.get(kind, 0.0)) / (TURNS[1] - TURNS[0])
        second = (most.get(kind, 0.0) - more.get(kind, 0.0)) / (TURNS[2] - TURNS[1])
        if abs(first - second) > 1e-9 * max(1.0, abs(first)):
            uneven[kind] = (f"{first / items:.4g} a turn from {TURNS[0]} to {TURNS[1]} turns, {second / items:.4g} "
                            f"from there to {TURNS[2]}")
        elif first:
            mix[kind] = first / items
    if "masked" in mix or "masked" in uneven:
        return Counted(None, code, why="lanes of vectors are switched off by masks")
    if products := sum(n for kind, n in mix.items() if kind.startswith(("mul int", "fma int"))):
        mix[PRODUCTS] = products
    if "mul int32" in mix:  # a multiply-add takes two instructions
        mix["fma int32"] = mix.get("fma int32", 0.0) + min(mix["mul int32"], mix.get("add int32", mix["mul int32"]
                                                           if "add int32" in uneven else 0.0))
    for number in ("float32", "float16"):
        if roots := sum(mix.get(f"{kind} {number}", 0.0) for kind in ("sqrt", "rsqrt")):
            mix[f"special {number}"] = roots
    return Counted(mix, code, uneven)


def objection(counted: Counted, asked: Asked) -> str:
    """What is wrong with the compiled code, "" if nothing is or it was not read.

    More than was asked is wrong, too, but for lanes of vectors that nothing needs: two floats in a register of four,
    and where `asked` says how much more there may be.
    """
    if counted.mix is None or counted.mix.get("calls"):
        return ""
    mix, besides = _with_texels(counted.mix, asked), {} if counted.code == MACHINE else asked.besides
    for kind, want in (*asked.kinds.items(), *besides.items()):
        if kind in counted.uneven:
            return f"the compiled loop does not do the same {kind} in each turn: {counted.uneven[kind]}"
        have = mix.get(kind, 0.0)
        if have == want or _padding(asked, have / want):
            continue
        seen = ", ".join(f"{n:g} {k}" for k, n in sorted(counted.mix.items())) or "nothing"
        return (f"the compiled loop has {have:g} {kind} a turn, not {want:g}: {_reason(kind, have, want)} (it has "
                f"{seen})")
    for way in ("load", "store") if asked.each else ():
        moved, times = mix.get(f"{way} bytes", 0.0), mix.get(f"{way}s", 0.0)
        if f"{way} bytes" in asked.kinds and moved != asked.each * times:
            put = "put several together" if moved > asked.each * times else "made several of one"
            return (f"the compiled loop moves {moved:g} bytes in {times:g} {way}s a turn, not {asked.each} in each: "
                    f"the compiler {put}")
    return ""


def work(counted: Counted, asked: Asked) -> float:
    """Of a turn and work item, in the unit of `asked`; as the source states where the code was not read."""
    have = {} if counted.mix is None or counted.mix.get("calls") else _with_texels(counted.mix, asked)
    return sum(want if _padding(asked, have.get(kind, want) / want) else have.get(kind, want)
               for kind, want in asked.kinds.items()) / asked.unit


def _with_texels(mix: Mapping[str, float], asked: Asked) -> Mapping[str, float]:
    """With what reads of images load, as it is stored."""
    if TEXELS not in mix:
        return mix
    read = asked.texel * mix[TEXELS] if asked.texel else mix["texel bytes"]
    return {**mix, "load bytes": mix.get("load bytes", 0.0) + read}


def _padding(asked: Asked, ratio: float) -> bool:
    return (asked.pads and ratio in PADDED) or 1 < ratio <= asked.most


def source(counted: Counted) -> str:
    """Where work is counted, for a Timing."""
    if counted.mix is None:
        return STATED + UNREAD + counted.why
    if counted.mix.get("calls"):
        return f"{STATED}{UNREAD}it calls functions of another library"
    return f"work counted in {counted.code}"


def _reason(kind: str, have: float, want: float) -> str:
    load = kind == "load bytes"
    if have > want:
        return "the compiler made more of it than was asked for"
    if kind == "store bytes":
        return "stores were left out as dead"
    if not have:
        return "loads were taken out of the loop" if load else "the loop was folded, or is dead"
    return "loads were taken out of the loop or shared" if load else "the compiler put steps together or left some out"
