"""What each target takes of a network of integers: specifications of file formats, and boards' published facts.

A board's facts (`[[quantization]]` in its file) stand before the specification of the file format that its tools read,
which is what it takes where its vendor says nothing else. What neither a vendor nor the format's specification states
has no entry in `Rules.sources`: it is assumed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, get_args

from npulab.errors import InvariantError, UsageError
from npulab.quantization.types import Arithmetic, Rules, Scheme
from npulab.targets.facts import schema
from npulab.targets.target import all_targets

LITERT = "LiteRT 8-bit quantization specification (ai.google.dev/edge/litert/models/quantization_spec)"
KERNELS = "LiteRT's kernels: what their Prepare functions demand (github.com/google-ai-edge/LiteRT, tflite/kernels)"
QDQ = "ONNX: QuantizeLinear and DequantizeLinear (onnx.ai/onnx/operators)"
ORT = "ONNX Runtime: quantize ONNX models (onnxruntime.ai/docs/performance/model-optimizations/quantization.html)"

FIXED_TFLITE: Mapping[tuple[str, str], tuple[float, int]] = MappingProxyType({
    **{(op, "int8"): (1 / 256, -128) for op in ("Softmax", "Sigmoid")},
    **{(op, "int8"): (1 / 128, 0) for op in ("Tanh", "LpNormalization")},
    ("LogSoftmax", "int8"): (1 / 16, 127),
    **{(op, "uint8"): (1 / 256, 0) for op in ("Softmax", "Sigmoid")},
    ("LpNormalization", "uint8"): (1 / 128, 128), ("LogSoftmax", "uint8"): (1 / 16, 255),
    **{(op, "int16"): (1 / 32768, 0) for op in ("Softmax", "Sigmoid", "Tanh")},
})
"""Scale and zero point of results, by ONNX operator and element type. int8: the specification; the others: kernels."""
SAME_TFLITE = frozenset({
    "AveragePool", "Concat", "Gather", "Max", "MaxPool", "Min", "Pad", "Reshape", "Resize", "Slice", "SpaceToDepth",
    "Squeeze", "Transpose",
    "DepthToSpace", "Expand", "Flatten", "GatherND", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Split", "Tile",
    "Unsqueeze",
})
"""Operators (ONNX) whose data keep one scale. The first two lines: the specification; the others copy bytes as well."""


def scheme(text: str) -> Scheme:
    """The scheme of a text of the facts format: "int8 symmetric narrow per-channel power-of-two"."""
    dtype, symmetry, *more = text.split()
    return Scheme(int(dtype.lstrip("uint")), not dtype.startswith("u"), symmetry == "symmetric", "narrow" in more,
                  "per-channel" in more, "power-of-two" in more)


def schemes(*texts: str) -> tuple[Scheme, ...]:
    return tuple(map(scheme, texts))


GENERIC = {
    "generic-int8": Rules(
        "generic-int8", "TFLite, int8 (or int16 data with int8 weights)", "tflite",
        schemes("int8 asymmetric", "int16 symmetric"),
        schemes("int8 symmetric narrow per-channel", "int8 symmetric narrow", "int4 symmetric narrow per-channel",
                "int4 symmetric narrow", "int2 symmetric narrow per-channel", "int2 symmetric narrow"),
        "tflite", FIXED_TFLITE, same_scale=SAME_TFLITE,
        sources={**dict.fromkeys(("activations", "weights", "bias_bits", "fixed", "same_scale"), LITERT),
                 **dict.fromkeys(("file", "arithmetic", "accumulator_bits", "float_islands"), KERNELS)}),
    "generic-onnx": Rules(
        "generic-onnx", "ONNX with QuantizeLinear and DequantizeLinear", "onnx",
        schemes("int8 asymmetric", "uint8 asymmetric", "int16 asymmetric", "uint16 asymmetric"),
        schemes("int8 symmetric per-channel", "int8 symmetric", "uint8 asymmetric", "int4 symmetric per-channel",
                "int4 symmetric", "int2 symmetric per-channel", "int2 symmetric"),
        "onnx", sources={**dict.fromkeys(("activations", "weights", "file", "float_islands"), QDQ),
                         **dict.fromkeys(("arithmetic", "bias_bits", "accumulator_bits"), ORT)}),
}
"""What the formats' own specifications say, whoever runs the file."""
BASES = {"tflite": "generic-int8", "onnx": "generic-onnx"}


@dataclass(frozen=True, slots=True)
class Entry:
    """How a network of integers gets into a target's tools.

    imports  whether they take one that is quantized already: "yes", "no" (they quantize floats themselves), "unknown".
    note     what to know about it.      concat_ratio_max  an input's scale over the result's where tensors are joined.
    sources  of these two, by field.
    """

    imports: str
    note: str = ""
    concat_ratio_max: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


def rules_of(target: str) -> Rules:
    """What a target takes: a format ("generic-int8"), a compiled chip, a described board or a chip of its family.

    Raises: UsageError with the names that are close, or all.
    """
    if target in GENERIC:
        return GENERIC[target]
    if target in variants() or target in schema.ids():
        return _of_board(target)
    compiled = all_targets()
    if target in compiled:
        return compiled[target].rules()
    close = difflib.get_close_matches(target, names(), 3, 0.5)
    raise UsageError(f"there is no target '{target[:60]}' to quantize for", want=", ".join(close or names()))


def entry_of(target: str) -> Entry:
    """How networks get into the target's tools. Raises UsageError as `rules_of` does."""
    board = board_of(target)
    if board is None:
        rules_of(target)
        return Entry("yes")
    facts = schema.load_one(board)
    stated = _stated(facts, target)
    imports, ratio = stated.get("import"), stated.get("concat_ratio_max")
    sources = {name: facts.title(f.source) for name, f in (("imports", imports), ("concat_ratio_max", ratio))
               if f is not None and f.source}
    return Entry(str(imports.value) if imports else "unknown", imports.note if imports else "",
                 float(ratio.value) if ratio is not None else None, sources)  # type: ignore[arg-type]


def board_of(target: str) -> str | None:
    """The described board that a name is of; None for formats and compiled chips."""
    return target if target in schema.ids() else variants().get(target)


@cache
def variants() -> Mapping[str, str]:
    """Chip of a family whose chips differ -> the family's board."""
    return {f.variant: board for board, facts in schema.load_all().items() for f in facts.quantization if f.variant}


@cache
def names() -> tuple[str, ...]:
    """Every name that `rules_of` takes, in order."""
    return (*GENERIC, *sorted(all_targets()), *sorted((*schema.ids(), *variants())))


def assumed(rules: Rules) -> tuple[str, ...]:
    """Fields that nothing published states, in order; limits that nobody sets are no statement."""
    silent = ("name", "title", "sources")
    return tuple(f.name for f in fields(rules) if f.name not in silent and f.name not in rules.sources
                 and getattr(rules, f.name) not in (None, (), {}, frozenset()))


def _stated(facts: schema.Facts, target: str) -> dict[str, schema.Scheme]:
    """The facts that hold for a board, or for that variant of it, by key."""
    common = {f.key: f for f in facts.quantization if not f.variant}
    return common | {f.key: f for f in facts.quantization if f.variant == target}


@cache
def _of_board(target: str) -> Rules:
    board = board_of(target)
    assert board is not None
    facts = schema.load_one(board)
    stated = _stated(facts, target)
    file: Any = stated["file"].value if "file" in stated else "onnx"
    base = GENERIC[BASES[file]]
    found: dict[str, Any] = {f.name: getattr(base, f.name) for f in fields(base)}
    # the board's file obeys its format, but neither types nor rounding nor widths of sums follow from that
    sources = {k: v for k, v in base.sources.items() if k in ("fixed", "same_scale", "bias_bits") and v == LITERT}
    found |= {"name": target, "title": facts.name + (f": {target}" if target != board else ""), "arithmetic": None}
    for key, f in stated.items():
        if key in ("import", "concat_ratio_max"):
            continue
        found[key] = _value(key, f, found[key])
        sources.pop(key, None)
        if f.source:
            sources[key] = facts.title(f.source)
    return Rules(**{**found, "sources": sources})


def _value(key: str, f: schema.Scheme, base: Any) -> Any:
    """A fact as the field of Rules that it is."""
    texts = tuple(map(str, f.value)) if isinstance(f.value, tuple) else (str(f.value),)
    match key:
        case "activations" | "weights" | "depthwise_weights":
            return schemes(*texts)
        case "fixed":
            return {**base, **dict(map(_fixed, texts))}
        case "same_scale":
            return frozenset(texts)
        case "arithmetic" if f.value not in get_args(Arithmetic):
            raise InvariantError(f"quantization fact arithmetic: {f.value} is none of {get_args(Arithmetic)}")
        case "bias_bits" | "accumulator_bits" | "weight_sum_max":
            return int(f.value)  # type: ignore[arg-type]
        case "requantize_below":
            return float(f.value)  # type: ignore[arg-type]
    return f.value


def _fixed(text: str) -> tuple[tuple[str, str], tuple[float, int]]:
    """("Sigmoid", "uint16") -> (1 / 65536, 0), of "Sigmoid uint16 1/65536 0"."""
    op, dtype, scale, zero = text.split()
    return (op, dtype), (1 / int(scale.removeprefix("1/")), int(zero))
