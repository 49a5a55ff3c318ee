"""The facts files: one TOML file a board, what its vendor publishes, read strictly."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import msgspec

from npulab.errors import ModelError
from npulab.program.files import read_bounded
from npulab.targets.facts.predicates import Predicate, PredicateError, compile_predicate

DATA = Path(__file__).parent / "data"
LIMIT = 1 << 20
"""Bytes that a facts file may have."""

Unlisted = Literal["host", "reject", "cut", "unknown"]
"""What the vendor's stack does with an operator that its list lacks: runs it on the CPU, refuses the model, wants it
cut off; nobody says."""
Effect = Literal["refuse", "host", "slow", "unknown"]
"""What a broken rule means: not on the NPU, as the board's policy has it; on the CPU, whatever the policy; on the NPU,
but not at its best; nobody says."""
Granularity = Literal["per-tensor", "per-channel", "per-group"]
Scalar = bool | int | float | str

DTYPE = re.compile(r"u?int\d+|float\d+(_e\dm\d(fn)?)?|bfloat16|bool|string|complex\d+")
OPERATOR = re.compile(r"[A-Z][A-Za-z0-9]*|[a-z][A-Za-z0-9_.]*:[A-Za-z0-9_.-]+")
"""A canonical name: ONNX's own, or `tflite:NAME`, or `domain:Name`."""
ID = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
TOPOLOGIES = ("shared-dram", "on-chip", "pcie", "usb", "partitioned")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """Strict: a key that is not declared is refused."""


class Source(Record, frozen=True, kw_only=True):
    """What a statement rests on. `origin`: a public address or repository; `rev`: its revision."""

    title: str
    origin: str = ""
    rev: str = ""
    licence: str = ""
    kind: str = ""
    note: str = ""


class Fact(Record, frozen=True, kw_only=True):
    """A number or property of the chip. `source`: key of Facts.sources, "" where nobody has sourced it."""

    key: str
    value: Scalar | tuple[Scalar, ...]
    unit: str = ""
    source: str = ""
    note: str = ""


class Scheme(Fact, frozen=True, kw_only=True):
    """What tools and chip take of a network of integers, one subject each (QUANTIZATION); quantization.py reads them.

    `variant`: of that chip of the family only, where it differs from what the others state.
    """

    variant: str = ""


class Rule(Record, frozen=True, kw_only=True):
    """A limit. `require` holds, or one row of `any`; with neither it is advice that nobody checks."""

    text: str
    require: str = ""
    any: tuple[str, ...] = ()
    effect: Effect = "refuse"
    source: str = ""
    remedy: str = ""

    @cached_property
    def rows(self) -> tuple[Predicate, ...]:
        """Compiled: the rule holds if one of these does; none for advice."""
        return tuple(map(compile_predicate, (self.require,) if self.require else self.any))


class WideRule(Rule, frozen=True, kw_only=True):
    """A rule about the whole graph, or about every node or tensor."""

    scope: Literal["graph", "node", "tensor"]


class OpEntry(Record, frozen=True, kw_only=True):
    """Operators that share their rules. `fuses`: what they take up for free, by canonical names."""

    names: tuple[str, ...]
    vendor: str | tuple[str, ...] = ""
    dtypes: tuple[str, ...] = ()
    weight_quant: tuple[Granularity, ...] = ()
    multicore: bool | None = None
    support: Literal["npu", "host", "preview"] = "npu"
    source: str = ""
    note: str = ""
    fuses: tuple[str, ...] = ()
    rule: tuple[Rule, ...] = ()


class Facts(Record, frozen=True, kw_only=True):
    """All of a file. `broken`: where a node goes that breaks a rule; by default where unlisted operators go."""

    id: str
    vendor: str
    name: str
    unlisted: Unlisted
    boards: tuple[str, ...] = ()
    namespace: str = ""
    unlisted_note: str = ""
    host_from_first: bool = False
    broken: Literal["host", "reject"] | None = None
    nms: Literal["built-in", "host", "cut", "unknown"] = "unknown"
    gaps: tuple[str, ...] = ()
    sources: dict[str, Source] = {}
    fact: tuple[Fact, ...] = ()
    quantization: tuple[Scheme, ...] = ()
    rule: tuple[WideRule, ...] = ()
    op: tuple[OpEntry, ...] = ()

    @cached_property
    def ops(self) -> dict[str, OpEntry]:
        """By canonical name."""
        return {name: entry for entry in self.op for name in entry.names}

    @cached_property
    def facts(self) -> dict[str, Fact]:
        """By key."""
        return {f.key: f for f in self.fact}

    def title(self, source: str) -> str:
        """A source as people read it."""
        return self.sources[source].title if source in self.sources else "no source given"


@cache
def ids() -> tuple[str, ...]:
    """The boards that the package has files of, in order."""
    return tuple(sorted(path.stem for path in DATA.glob("*.toml")))


@cache
def load_one(board: str) -> Facts:
    """The package's file of a board, one of `ids`."""
    return load(DATA / f"{board}.toml")


def load_all() -> Mapping[str, Facts]:
    """Every file of the package, by id, in order."""
    return {board: load_one(board) for board in ids()}


def load(path: str | os.PathLike[str]) -> Facts:
    """One file, checked.

    Raises: UsageError if it cannot be read; ModelError naming file, key and what is allowed.
    """
    return parse(read_bounded(path, "a description of a board", LIMIT), Path(path).stem, os.fspath(path))


def parse(data: bytes, stem: str, who: str) -> Facts:
    """The facts in the bytes of the file `who`, whose name without ending is `stem`. Raises ModelError."""
    problem = f"{who} is not a description of a board"
    try:
        facts = msgspec.toml.decode(data, type=Facts)
    except msgspec.ValidationError as e:
        got, _, place = str(e).partition(" - at ")
        place = place.strip("`") or "$"
        raise ModelError(problem, where=_where(data, place), got=got, want=_allowed(got, place)) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ModelError(problem, want="a TOML file", got=str(e) or "values too deep inside each other") from None
    for place, want, got in _faults(facts, stem):
        raise ModelError(problem, where=place, want=want, got=got)
    return facts


def _where(data: bytes, place: str) -> str:
    """msgspec's path, with the name of what it is about: `op[3].rule[0] (Conv)`."""
    if m := re.match(r"\$\.(op|fact|quantization|rule)\[(\d+)\]", place):
        items: Any = msgspec.toml.decode(data).get(m[1])
        item = items[int(m[2])] if isinstance(items, list) else {}
        label = next((item[k] for k in ("names", "key", "text") if isinstance(item, dict) and k in item), "")
        label = ", ".join(map(str, label)) if isinstance(label, list) else str(label)
        return f"{place[2:]} ({label[:60]})" if label else place[2:]
    return place.removeprefix("$.").removeprefix("$") or "top of the file"


_RECORDS: tuple[tuple[str, type[Record]], ...] = (
    (r"\$\.op\[(\d+|\.\.\.)\]\.rule\[(\d+|\.\.\.)\]", Rule), (r"\$\.op\[(\d+|\.\.\.)\]", OpEntry),
    (r"\$\.fact\[(\d+|\.\.\.)\]", Fact), (r"\$\.quantization\[(\d+|\.\.\.)\]", Scheme),
    (r"\$\.rule\[(\d+|\.\.\.)\]", WideRule), (r"\$\.sources\[[^\]]*\]", Source),
    (r"\$", Facts))


def _allowed(got: str, place: str) -> str:
    """What the format has at `place`: the keys of the record, or the words of a key."""
    record, m = next((record, m) for pattern, record in _RECORDS if (m := re.match(pattern, place)))
    key = place[m.end():].lstrip(".").split("[")[0]
    if not key:
        return f"keys {', '.join(record.__struct_fields__)}"
    if "enum" in got and (words := [w for w in _words(get_type_hints(record)[key]) if isinstance(w, str)]):
        return " or ".join(words)
    return got.partition(",")[0].lower().replace("expected", "").replace("`", "").strip()


def _words(hint: Any) -> Iterator[Any]:
    """The words of every Literal in a type."""
    for arg in get_args(hint):
        if isinstance(arg, str):
            yield arg
        else:
            yield from _words(arg)


def _faults(facts: Facts, stem: str) -> Iterator[tuple[str, str, str]]:
    """(key, what is wanted, what is there)."""
    if facts.id != stem or not ID.fullmatch(facts.id):
        yield "id", f"the file's name, {stem}: small letters, digits and _", facts.id
    known = ", ".join(facts.sources) or "none is declared"
    for place, key in _sources(facts):
        if key and key not in facts.sources:
            yield f"{place}.source", f"a source of the file: {known}", key
    keys = [f.key for f in facts.fact]
    for f in facts.fact:
        if keys.count(f.key) > 1:
            yield f"fact {f.key}", "a fact once", f"{keys.count(f.key)} times"
        if f.key == "memory_topology" and f.value not in TOPOLOGIES:
            yield f"fact {f.key}", " or ".join(TOPOLOGIES), str(f.value)
        if f.key in NUMBERS and (isinstance(f.value, bool) or not isinstance(f.value, int | float)):
            yield f"fact {f.key}", "a number", str(f.value)
    yield from _quantization_faults(facts)
    yield from _op_faults(facts)
    for place, r in _rules(facts):
        if r.require and r.any:
            yield place, "require or any", "both"
        for text in (*([r.require] if r.require else ()), *r.any):
            try:
                names = compile_predicate(text).names
            except PredicateError as e:
                yield place, "a predicate", f"{text!r}: {e}"
                continue
            graph = isinstance(r, WideRule) and r.scope == "graph"
            for name in names:
                if name not in (GRAPH_NAMES if graph else NAMES) and (graph or not name.startswith("attr_")):
                    yield place, f"names of the format{_close(name, GRAPH_NAMES if graph else NAMES)}", name


def _quantization_faults(facts: Facts) -> Iterator[tuple[str, str, str]]:
    seen: set[tuple[str, str]] = set()
    for f in facts.quantization:
        place = f"quantization {f.key}"
        if f.key not in QUANTIZATION:
            yield place, ", ".join(QUANTIZATION), f.key
            continue
        if (f.key, f.variant) in seen:
            yield place, "a subject once", "again"
        seen.add((f.key, f.variant))
        if f.variant and not ID.fullmatch(f.variant):
            yield f"{place}.variant", "a name of small letters, digits and _", f.variant
        allowed = QUANTIZATION[f.key]
        if isinstance(allowed, re.Pattern):
            for text in f.value if isinstance(f.value, tuple) else (f.value,):
                if not (isinstance(text, str) and allowed.fullmatch(text)):
                    yield place, f"texts of the form {allowed.pattern}", str(text)
        elif isinstance(allowed, tuple):
            if f.value not in allowed:
                yield place, " or ".join(map(str, allowed)), str(f.value)
        elif isinstance(f.value, bool) or not isinstance(f.value, int | float) or f.value <= 0:
            yield place, "a number above 0", str(f.value)


def _op_faults(facts: Facts) -> Iterator[tuple[str, str, str]]:
    first: dict[str, int] = {}
    for i, entry in enumerate(facts.op):
        place = f"op[{i}] ({_short(entry.names)})"
        if not entry.names:
            yield f"op[{i}]", "one operator or more in names", "none"
        for name in (*entry.names, *entry.fuses):
            if not OPERATOR.fullmatch(name):
                yield place, "an ONNX operator, or tflite:NAME", name
        for name in entry.names:
            if first.setdefault(name, i) != i or entry.names.count(name) > 1:
                yield place, "an operator once", f"{name} again, which op[{first[name]}] has"
        for dtype in entry.dtypes:
            if not DTYPE.fullmatch(dtype):
                yield f"{place}.dtypes", "element types such as int8, uint8, int16, float16, bfloat16", dtype


def _sources(facts: Facts) -> Iterator[tuple[str, str]]:
    yield from ((f"fact {f.key}", f.source) for f in facts.fact)
    yield from ((f"quantization {f.key}", f.source) for f in facts.quantization)
    yield from ((f"op[{i}] ({_short(e.names)})", e.source) for i, e in enumerate(facts.op))
    yield from ((place, r.source) for place, r in _rules(facts))


def _rules(facts: Facts) -> Iterator[tuple[str, Rule]]:
    yield from ((f"rule[{i}]", r) for i, r in enumerate(facts.rule))
    yield from ((f"op[{i}] ({_short(e.names)}).rule[{k}]", r)
                for i, e in enumerate(facts.op) for k, r in enumerate(e.rule))


def _short(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _close(name: str, known: frozenset[str]) -> str:
    found = difflib.get_close_matches(name, sorted(known), 1)
    return f", such as {found[0]}" if found else ""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


NUMBERS = frozenset({"peak_tops_int8", "sram_kib", "max_rank", "max_channels", "max_dim", "max_layers", "onnx_opset"})
"""Facts that are numbers where they are stated."""
_SCHEME = re.compile(r"u?int(2|4|8|16) a?symmetric( narrow)?( per-channel)?( power-of-two)?")
QUANTIZATION: Mapping[str, re.Pattern[str] | tuple[str | bool, ...] | None] = {
    "file": ("tflite", "onnx"),
    "import": ("yes", "no", "unknown"),
    "activations": _SCHEME, "weights": _SCHEME, "depthwise_weights": _SCHEME,
    "arithmetic": re.compile(r"[a-z0-9]+"),
    "fixed": re.compile(r"[A-Z][A-Za-z]* u?int(8|16) 1/[0-9]+ -?[0-9]+"),
    "same_scale": re.compile(r"[A-Z][A-Za-z0-9]*"),
    "float_islands": (True, False),
    "bias_bits": None, "accumulator_bits": None, "weight_sum_max": None, "requantize_below": None,
    "concat_ratio_max": None,
}
"""Subjects of a network of integers -> what may be said: a word of these, texts of this form, or a number (None).

file              the format that the tools read.     import  whether they take one that is quantized already.
activations, weights, depthwise_weights   how tensors may be stored, the default first.
arithmetic        whose rounding.                     fixed   "Operator type scale zero-point" of prescribed results.
same_scale        operators (ONNX) whose operands and results share one scale.
float_islands     whether operators may stay floats.  bias_bits, accumulator_bits   widths.
weight_sum_max    of |weight - zero point| of an output channel.
requantize_below  of input scale * weight scale / output scale.
concat_ratio_max  of an input's scale to the result's, where tensors are joined.
"""
NAMES = _set("""
    kernel_h kernel_w kernel_d stride_h stride_w stride_d stride dilation_h dilation_w dilation_d dilation
    pad_top pad_left pad_bottom pad_right padding groups multiplier channels out_channels height width
    out_height out_width rank batch shape out_shape elements axis axes dtype out_dtype weight_dtype weight_bits
    weights_constant bias_dtype inputs outputs constant_inputs same_shapes broadcast scale_h scale_w mode
    coordinate_mode align_corners half_pixel_centers perm keepdims epsilon alpha beta fused count_include_pad ceil_mode
    auto_pad zero_point quantized per_channel
    all_quantized data_per_channel results_per_channel inputs_centred same_quantization same_types static least_rank
    parameters_constant zero_points_fit least_unsigned_zero_point out_zero_point bias_constant bias_largest
    weight_sum steps steps_elsewhere same_scales in_bits out_bits weighted""")
"""What predicates about nodes and tensors may read, besides attr_NAME; properties.py computes them."""
GRAPH_NAMES = _set("nodes operators inputs outputs shape rank batch channels height width dtype quantized")
"""What predicates about graphs may read; `operators` are canonical names, from `shape` on it is the first input."""
