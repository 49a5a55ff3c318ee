"""PTX followed through: integers and predicates computed, what is computed on data counted. NVIDIA's OpenCL gives it as
a program's binary; the driver compiles it once more, and what it does then is not seen.

Source: NVIDIA, Parallel Thread Execution ISA, 8.x, chapters 9 (instructions) and 10 (special registers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from npulab.gpu.counting.mix import OWN, SUMS, TEXELS, Argument, Counted, Mix, NotRead, add
from npulab.gpu.counting.turns import of_a_turn

CODE = "PTX"
Known = int | None
KINDS = {"f32": "float32", "f64": "float64", "f16": "float16", "f16x2": "float16", "s32": "int32", "u32": "int32",
         "b32": "int32", "s64": "int64", "u64": "int64", "s16": "int16", "u16": "int16"}
COMPUTES = {"fma": "fma", "mad": "fma", "add": "add", "sub": "add", "mul": "mul", "div": "div", "sqrt": "sqrt",
            "rsqrt": "rsqrt", "rcp": "rcp"}
BITS = re.compile(r"[subf](\d+)|pred")
MEMORY = ("global", "shared", "const", "generic")


@dataclass(frozen=True, slots=True)
class Line:
    """guard: the predicate's name, "" if there is none; `when` it has this value.     parts: of the opcode."""

    guard: str
    when: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]


def is_ptx(binary: bytes) -> bool:
    return re.search(rb"^\s*\.version\s", binary[:4096], re.M) is not None and b".entry" in binary


def count(binary: bytes, kernel: str, size: Sequence[int], group: Sequence[int], arguments: Sequence[Argument],
          turns: int) -> Counted:
    """A turn of a kernel's loop, in each work item: of the group's first, middle and last. Argument number `turns` is
    how often the loop turns."""
    try:
        lines, labels, parameters = parse(binary.decode("utf-8", "replace").rstrip("\0"), kernel)
    except NotRead as e:
        return Counted(None, CODE, why=str(e))
    items = sorted({0, group[0] // 2, group[0] - 1})

    def follow(many: int) -> Mix:
        out: Mix = {}
        known = {name: int.from_bytes(a, "little") if isinstance(a, bytes) else None
                 for name, a in zip(parameters, arguments, strict=False)}
        known[parameters[turns]] = many
        for item in items:
            add(out, _follow(lines, labels, {**known, **_special(item, size, group)}))
        return out

    if turns >= len(parameters):
        return Counted(None, CODE, why=f"{kernel} has {len(parameters)} parameters")
    return of_a_turn(follow, len(items), CODE)


def parse(text: str, kernel: str) -> tuple[list[Line], dict[str, int], list[str]]:
    """(instructions, labels -> the next one's index, names of parameters) of an entry. Raises: NotRead."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    m = re.search(rf"\.entry\s+{re.escape(kernel)}\s*\((.*?)\)[^{{;]*\{{", text, re.S)
    if not m:
        raise NotRead(f"the PTX has no entry {kernel}")
    parameters = [re.findall(r"[\w$%]+", re.sub(r"\[\d+\]", "", p))[-1] for p in m[1].split(",") if p.strip()]
    depth, end = 1, m.end()
    while depth and end < len(text):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    lines: list[Line] = []
    labels: dict[str, int] = {}
    # braces of operands stay, those of scopes are on lines of their own
    body = re.sub(r"^\s*[{}]\s*$", "", text[m.end():end - 1], flags=re.M)
    for statement in re.split(r";|(?<=:)\s", body):
        statement = statement.strip().lstrip("{").strip() if statement.strip().startswith("{ ") else statement.strip()
        if label := re.match(r"([\w$]+):$", statement):
            labels[label[1]] = len(lines)
            continue
        found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
        if not found:
            continue  # a directive
        operands = tuple(o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s][^,]*", found[4]))
        lines.append(Line(found[2] or "", not found[1], tuple(found[3].split(".")), operands))
    return lines, labels, parameters


def _special(item: int, size: Sequence[int], group: Sequence[int]) -> dict[str, Known]:
    out: dict[str, Known] = {"WARP_SZ": 32}
    for axis, n, whole, local in zip("xyz", (item, 0, 0), (*size, 1, 1), (*group, 1, 1), strict=False):
        out |= {f"%tid.{axis}": n, f"%ntid.{axis}": local, f"%ctaid.{axis}": 0, f"%nctaid.{axis}": whole // local}
    return out | {f"%envreg{i}": 0 for i in range(32)}  # NVIDIA's OpenCL: offsets of the launch


def _follow(lines: Sequence[Line], labels: Mapping[str, int], values: dict[str, Known]) -> Mix:
    done = [0] * len(lines)
    sums = [line.operands[0] if "add int32" in kinds(line) else "" for line in lines]
    at = steps = known = 0
    while at < len(lines):
        line = lines[at]
        steps += 1
        if steps > OWN:
            raise NotRead(f"more than {OWN} instructions")
        taken = True
        if line.guard:
            guard = values.get(line.guard)
            if guard is None:
                if line.parts[0] in ("bra", "ret", "exit"):
                    raise NotRead(f"where the code goes hangs on data: {'.'.join(line.parts)} {line.operands}")
                if line.operands:
                    values[line.operands[0]] = None
                taken = False
                done[at] += 1
            else:
                taken = bool(guard) == line.when
        at += 1
        if not taken:
            continue
        done[at - 1] += 1
        name = line.parts[0]
        if name in ("ret", "exit"):
            break
        if name == "bra":
            if line.operands[0] not in labels:
                raise NotRead(f"there is no label {line.operands[0]}")
            at = labels[line.operands[0]]
        elif name == "brx":
            raise NotRead("a branch by a table")
        else:
            _step(line, values)
            known += sums[at - 1] != "" and values.get(sums[at - 1]) is not None
    out: Mix = {SUMS: -known}
    for line, times in zip(lines, done, strict=True):
        if times:
            add(out, kinds(line), times)
    add(out, {SUMS: out.get("add int32", 0.0)})
    return out


def kinds(line: Line) -> Mix:
    """What an instruction computes, loads and stores."""
    name, kind = line.parts[0], line.parts[-1]
    if name in ("dp4a", "dp2a"):
        return {"fma int8": 4 if name == "dp4a" else 2}
    if name in ("ld", "ldu", "st"):
        space = next((p for p in line.parts if p in ("param", "local", *MEMORY)), "generic")
        if space == "param":
            return {}
        lanes = next((int(p[1:]) for p in line.parts if p in ("v2", "v4", "v8")), 1)
        way = "spill" if space == "local" else "store" if name == "st" else "load"
        moved = {f"{way} bytes": lanes * _bits(kind) / 8}
        return moved if way == "spill" else {**moved, f"{way}s": 1}
    if name in ("tex", "suld"):  # the type of what is read, before that of the coordinates
        found = [p for p in line.parts if BITS.fullmatch(p)]
        lanes = next((int(p[1:]) for p in line.parts if p in ("v2", "v4")), 1)
        return {"texel bytes": lanes * _bits(found[0]) / 8, TEXELS: 1} if found else {}
    if name == "bar" or name == "barrier":
        return {"barriers": 1}
    if name == "call":
        return {"calls": 1}
    if name in COMPUTES and kind in KINDS:
        if "wide" in line.parts or "hi" in line.parts:
            return {f"{COMPUTES[name]} {KINDS[kind]} wide": 1}
        return {f"{COMPUTES[name]} {KINDS[kind]}": 2 if kind == "f16x2" else 1}
    return {}


def _bits(kind: str) -> int:
    m = BITS.fullmatch(kind)
    return int(m[1]) if m and m[1] else 32


def _step(line: Line, values: dict[str, Known]) -> None:
    """Integers and predicates; what else is written is not known."""
    name, parts, operands = line.parts[0], line.parts, line.operands
    if not operands or name in ("st", "bar", "barrier", "red"):
        return
    target, kind = operands[0], parts[-1]

    def value(operand: str) -> Known:
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return int(operand.rstrip("U"), 0)
        return values.get(operand)

    if target.startswith("{"):
        for each in target.strip("{}").split(","):
            values[each.strip()] = None
        return
    if name == "ld" and "param" in parts:
        m = re.fullmatch(r"\[\s*([\w$%]+)\s*(?:\+\s*0)?\]", operands[1])
        values[target] = values.get(m[1]) if m else None
        return
    if name == "setp":
        _compare(parts, target, [value(o) for o in operands[1:]], values)
        return
    inputs = [value(o) for o in operands[1:]]
    if name in ("mov", "cvta") and inputs:
        values[target] = inputs[0]
        return
    if name == "selp" and len(inputs) == 3:
        values[target] = inputs[0] if inputs[2] else inputs[1] if inputs[2] is not None else None
        return
    compute = SCALARS.get(name)
    signed, bits = kind.startswith("s"), 1 if kind == "pred" else _bits(kind)
    if compute is None or kind[0] == "f" or any(v is None for v in inputs) or (name == "cvt" and len(parts) < 3):
        values[target] = None
        return
    if name == "cvt":
        source, to = kind, parts[-2]
        result = as_signed(inputs[0] or 0, _bits(source), source[0] == "s")
        values[target] = None if to[0] == "f" else result & ((1 << _bits(to)) - 1)
        return
    wide = "wide" in parts
    whole = compute([as_signed(v or 0, bits, signed) for v in inputs])
    if whole is None:
        values[target] = None
        return
    values[target] = (whole >> bits if "hi" in parts else whole) & ((1 << (2 * bits if wide else bits)) - 1)


def as_signed(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (value >> (bits - 1) << bits) if signed else value


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b}
SCALARS: dict[str, Callable[[list[int]], int | None]] = {
    "add": lambda v: v[0] + v[1], "sub": lambda v: v[0] - v[1], "mul": lambda v: v[0] * v[1],
    "mad": lambda v: v[0] * v[1] + v[2], "shl": lambda v: v[0] << min(v[1], 64), "shr": lambda v: v[0] >> min(v[1], 64),
    "and": lambda v: v[0] & v[1], "or": lambda v: v[0] | v[1], "xor": lambda v: v[0] ^ v[1], "not": lambda v: ~v[0],
    "neg": lambda v: -v[0], "min": min, "max": max, "abs": lambda v: abs(v[0]), "cvt": lambda v: v[0],
    "div": lambda v: int(abs(v[0]) // abs(v[1]) * (1 if v[0] * v[1] >= 0 else -1)) if v[1] else None,
    "rem": lambda v: abs(v[0]) % abs(v[1]) * (1 if v[0] >= 0 else -1) if v[1] else None}


def _compare(parts: Sequence[str], target: str, inputs: Sequence[Known], values: dict[str, Known]) -> None:
    compare, kind = COMPARE.get(parts[1]), parts[-1]
    names = target.split("|")
    if compare is None or len(parts) > 3 or kind[0] == "f" or len(inputs) != 2 or None in inputs:
        for name in names:
            values[name] = None
        return
    a, b = (as_signed(v or 0, _bits(kind), kind[0] == "s") for v in inputs)
    values[names[0]] = int(compare(a, b))
    if len(names) > 1:
        values[names[1]] = 1 - int(compare(a, b))
