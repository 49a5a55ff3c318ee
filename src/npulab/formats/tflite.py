"""The TFLite schema, read once from the table beside this file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from npulab.formats.flatbuffer import Schema

IDENTIFIER = b"TFL3"


@cache
def schema() -> Schema:
    """Tables and enums of the format (facts of TensorFlow's schema.fbs; a test compares them with LiteRT's own)."""
    return Schema.parse(files("npulab.formats").joinpath("tflite_schema.txt").read_text())
