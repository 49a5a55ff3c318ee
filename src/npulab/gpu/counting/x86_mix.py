"""What an x86-64 instruction computes, loads and stores, in scalars. Source: as in npulab.gpu.counting.x86."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from npulab.gpu.counting.mix import Mix

FLOATS = {"ps": ("float32", 4), "ss": ("float32", 4), "pd": ("float64", 8), "sd": ("float64", 8),
          "ph": ("float16", 2), "sh": ("float16", 2)}
INTEGERS = {"b": ("int8", 1), "w": ("int16", 2), "d": ("int32", 4), "q": ("int64", 8)}
FUSED = re.compile(r"vfn?m(?:add|sub|addsub|subadd)(?:132|213|231)([ps][sdh])$")
FLOAT = re.compile(r"v?(add|sub|mul|div|sqrt|rsqrt|rsqrt14|rsqrt28|rcp|rcp14|rcp28)([ps][sdh])$")
INTEGER = re.compile(r"v?p(add|sub|mull)([bwdq])$")
DOTS = {"vpdpbusd": ("fma int8", 4), "vpdpbusds": ("fma int8", 4), "vpdpwssd": ("fma int16", 2),
        "vpmaddwd": ("mul int16", 2), "pmaddwd": ("mul int16", 2), "vpmaddubsw": ("mul int8", 4),
        "pmaddubsw": ("mul int8", 4)}  # each 32 bits
SCALARS = {"imul": "mul", "mul": "mul", "div": "div", "idiv": "div", "add": "add", "sub": "add", "lea": "add",
           "inc": "add", "dec": "add", "adc": "add", "sbb": "add", "neg": "add"}
SIZES = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}
NOT_MEMORY = ("lea", "nop", "prefetch", "clflush", "call", "jmp", "push", "pop")
READS_FIRST = ("cmp", "test", "bt", "mul", "imul", "div", "idiv", "push", "vucomis", "ucomis", "vcomis", "comis")


def kinds(i: Any, cs: Any, own: Callable[[str], bool]) -> Mix:
    """Of one instruction. `own`: whether this base register points into the thread's stack."""
    name, out = i.mnemonic, {}
    vector = max((o.size for o in i.operands if o.type == cs.X86_OP_REG and i.reg_name(o.reg)[1:3] == "mm"), default=0)
    if m := FUSED.match(name):
        out["fma " + FLOATS[m[1]][0]] = _lanes(m[1], vector)
    elif m := FLOAT.match(name):
        out[f"{KINDS.get(m[1], m[1])} {FLOATS[m[2]][0]}"] = _lanes(m[2], vector)
    elif (m := INTEGER.match(name)) and vector:
        kind, size = INTEGERS[m[2]]
        out[f"{KINDS.get(m[1], m[1])} {kind}"] = vector / size
    elif name in ("vpmuludq", "vpmuldq", "pmuludq", "pmuldq"):
        out["mul int64"] = vector / 8
    elif name in DOTS:
        out[DOTS[name][0]] = vector / 4 * DOTS[name][1]
    elif name in SCALARS and i.operands and i.operands[0].size in SIZES:
        out[f"{SCALARS[name]} {SIZES[i.operands[0].size]}"] = 1
    for k, o in enumerate(i.operands):
        if o.type == cs.X86_OP_MEM and not name.startswith(NOT_MEMORY):
            _memory(i, cs, k, o, own, vector, out)
    return out


KINDS = {"sub": "add", "mull": "mul", "rsqrt14": "rsqrt", "rsqrt28": "rsqrt", "rcp14": "rcp", "rcp28": "rcp"}


def _lanes(kind: str, vector: int) -> float:
    return 1 if kind[0] == "s" else vector / FLOATS[kind][1]


def _memory(i: Any, cs: Any, k: int, o: Any, own: Callable[[str], bool], vector: int, out: Mix) -> None:
    """A destination is stored, and loaded before unless the instruction moves; another operand is loaded."""
    base = i.reg_name(o.mem.base) if o.mem.base else ""
    if base == "rip":
        return  # a constant of the program
    gathers = "gather" in i.mnemonic or "scatter" in i.mnemonic
    size = vector if gathers else o.size
    if i.mnemonic.startswith("vbroadcast") or i.mnemonic.startswith("vpbroadcast"):
        size = o.size
    where = "spill" if not o.mem.index and own(base) else ""
    moves = "mov" in i.mnemonic or i.mnemonic.startswith(("set", "vextract", "vpextr", "extract", "pextr", "vcompress",
                                                          "vpcompress", "vpscatter", "vscatter"))
    stores = k == 0 and not i.mnemonic.startswith(READS_FIRST)
    loads = k > 0 or not stores or not moves
    places = size // (8 if i.mnemonic.endswith(("q", "pd")) else 4) if gathers else 1
    for way, does in (("load", loads), ("store", stores)):
        if does:
            kind = "spill bytes" if where else f"{way} bytes"
            out[kind] = out.get(kind, 0.0) + size
            if not where:
                out[f"{way}s"] = out.get(f"{way}s", 0.0) + places
