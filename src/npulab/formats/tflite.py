"""The TFLite schema, read once from the table beside this file, and which options each operator has."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from npulab.formats.flatbuffer import Schema

IDENTIFIER = b"TFL3"
"""Bytes 4..7 of every file."""
VERSION = 3
"""Model.version of every file since 2017."""

_SHARED_OPTIONS = {
    "AVERAGE_POOL_2D": "Pool2DOptions", "MAX_POOL_2D": "Pool2DOptions", "L2_POOL_2D": "Pool2DOptions",
    "L2_NORMALIZATION": "L2NormOptions", "UNIDIRECTIONAL_SEQUENCE_RNN": "SequenceRNNOptions",
    "MAXIMUM": "MaximumMinimumOptions", "MINIMUM": "MaximumMinimumOptions",
    "MEAN": "ReducerOptions", "SUM": "ReducerOptions", "REDUCE_ALL": "ReducerOptions", "REDUCE_ANY": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions", "REDUCE_MIN": "ReducerOptions", "REDUCE_PROD": "ReducerOptions",
    "CONV_3D_TRANSPOSE": "Conv3DOptions", "MULTINOMIAL": "RandomOptions", "RANDOM_UNIFORM": "RandomOptions",
    "RANDOM_STANDARD_NORMAL": "RandomOptions",
}
"""Operators whose options are not named after them. Source: TensorFlow's flatbuffer_conversions.cc."""


@cache
def schema() -> Schema:
    """Tables and enums of the format."""
    return Schema.parse(files("npulab.formats").joinpath("tflite_schema.txt").read_text("utf-8"))


@cache
def _options_by_plain_name() -> dict[str, tuple[str, str]]:
    members = {}
    for union, enum in (("builtin_options", "BuiltinOptions"), ("builtin_options_2", "BuiltinOptions2")):
        for member in schema().enums[enum]:
            members[member.removesuffix("Options").lower()] = (union, member)
    return members


def options_of(operator: str) -> tuple[str, str] | None:
    """(field of Operator, table) where a builtin operator keeps its options, or None if it has no such table.

    >>> options_of("CONV_2D"), options_of("DILATE"), options_of("RELU")
    (('builtin_options', 'Conv2DOptions'), ('builtin_options_2', 'DilateOptions'), None)
    """
    if member := _SHARED_OPTIONS.get(operator):
        return "builtin_options", member
    plain = operator.replace("_", "").lower()
    return _options_by_plain_name().get(plain)
