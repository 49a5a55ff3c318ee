"""A TFLite file being made from another dialect: tensors with quantization, operators with what they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers.tflite import read_tflite
from npulab.ir import Graph, Quantization
from npulab.ir.types import packed

VERSIONS = {
    "int8": {
        "BATCH_MATMUL": 2, "DEQUANTIZE": 2, "GATHER": 2, "LEAKY_RELU": 2, "LOGISTIC": 2, "MUL": 2, "RELU": 2,
        "RELU6": 2, "RESIZE_BILINEAR": 2, "RESIZE_NEAREST_NEIGHBOR": 2, "SLICE": 2, "STRIDED_SLICE": 2, "SUB": 2,
        "TANH": 2, "TRANSPOSE": 2, "TRANSPOSE_CONV": 3, "REDUCE_MAX": 2, "MAXIMUM": 2, "MINIMUM": 2, "ADD": 2,
        "BROADCAST_TO": 2, "GELU": 2, "MIRROR_PAD": 2, "REDUCE_MIN": 2, "ABS": 2, "EXP": 2,
    },
    "int16": {
        "CONV_2D": 4, "DEPTHWISE_CONV_2D": 5, "FULLY_CONNECTED": 7, "TRANSPOSE_CONV": 3, "BATCH_MATMUL": 3, "ADD": 3,
        "SUB": 5, "MUL": 4, "AVERAGE_POOL_2D": 3, "MAX_POOL_2D": 3, "MEAN": 3, "REDUCE_MAX": 3, "REDUCE_MIN": 3,
        "MAXIMUM": 4, "MINIMUM": 4, "LOGISTIC": 3, "TANH": 3, "SOFTMAX": 3, "LEAKY_RELU": 2, "RELU": 3, "RELU6": 3,
        "CONCATENATION": 3, "PAD": 3, "PADV2": 3, "MIRROR_PAD": 3, "SLICE": 4, "STRIDED_SLICE": 2, "GATHER": 4,
        "GATHER_ND": 3, "SPLIT": 4, "SPLIT_V": 2, "TRANSPOSE": 5, "BROADCAST_TO": 3, "RESIZE_BILINEAR": 4,
        "RESIZE_NEAREST_NEIGHBOR": 4, "QUANTIZE": 2, "DEQUANTIZE": 3, "ABS": 3,
    },
    "int4": {"CONV_2D": 7, "DEPTHWISE_CONV_2D": 6, "FULLY_CONNECTED": 10},
    "int2": {"FULLY_CONNECTED": 14},
}
"""Operator versions that take such tensors, the widest first; others as ModelBuilder has them. Source: LiteRT's
op_version.cc, except DEPTHWISE_CONV_2D on int4: it says 7, and the reference kernels that take it are registered to 6.
"""
SMALL = {"int4": 4, "int2": 2}
"""Element types that are stored several a byte."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor of the file: stored shape, element type by TFLite's name in small letters, quantization."""

    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None

    @property
    def is_integer(self) -> bool:
        """8 or 16 bits that stand for real numbers."""
        return self.quantization is not None and self.dtype in ("int8", "uint8", "int16")


class TFLiteFile:
    """Tensors and operators so far. `origin` is the name that operators get from here on."""

    def __init__(self, name: str) -> None:
        self.builder = ModelBuilder(name)
        self.specs: list[Spec] = []
        self.origins: list[str] = []
        self.origin = ""
        self._owners: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._shared: dict[tuple[object, ...], int] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: str, quantization: Quantization | None = None,
               data: NDArray[Any] | None = None) -> int:
        q = quantization
        spec = Spec(tuple(int(n) for n in shape), dtype, q)
        self.specs.append(spec)
        unused = self._unused(name)
        self._owners[unused] = len(self.specs) - 1
        return self.builder.tensor(
            unused, spec.shape, dtype, data=data, scales=q.scales if q else None,
            zero_points=q.zero_points if q else None, axis=q.axis if q else 0)

    def _unused(self, name: str) -> str:
        found, k = name, 1
        while found in self._owners:
            k = self._last[name] = max(k, self._last.get(name, 1)) + 1
            found = f"{name}_{k}"
        return found

    def renamed(self, tensor: int, name: str) -> None:
        """The tensor under the name that a graph's input or output has in the source; whoever had it, loses it."""
        other = self._owners.get(name)
        if other is not None and other != tensor:
            self.builder.tensors[other]["name"] = unused = self._unused(name)
            self._owners[unused] = other
        self.builder.tensors[tensor]["name"] = name
        self._owners[name] = tensor

    def constant(self, name: str, array: NDArray[Any], quantization: Quantization | None = None,
                 dtype: str | None = None) -> int:
        """A constant; equal small ones are there once. `dtype` "int4" or "int2" packs the elements."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        dtype = dtype or array.dtype.name
        key = (array.dtype.str, array.shape, array.tobytes(), quantization, dtype) if array.size <= 64 else None
        if key and key in self._shared:
            return self._shared[key]
        data = np.frombuffer(packed(array, SMALL[dtype]), np.uint8) if dtype in SMALL else array
        made = self.tensor(name, array.shape, dtype, quantization, data)
        if key:
            self._shared[key] = made
        return made

    def numbers(self, *values: int) -> int:
        """A vector of int32: axes, shapes, permutations."""
        return self.constant("numbers", np.array(values, np.int32))

    def op(self, name: str, inputs: Sequence[int], outputs: Sequence[int], version: int | None = None,
           **options: Any) -> None:
        types = {self.specs[v].dtype for v in (*inputs, *outputs) if v >= 0}
        if name == "BROADCAST_TO" or "uint8" in types:  # version 1 of BROADCAST_TO was taken back
            types.add("int8")
        version = max([version or 0, *(own[name] for t, own in VERSIONS.items() if t in types and name in own)]) or None
        if name == "FULLY_CONNECTED" and {"int16", "int4"} <= types:
            version = 13
        if name in ("ADD", "SUB") and "int16" in types:
            options["pot_scale_int16"] = False  # scales are any numbers
        self.builder.op(name, inputs, outputs, version=version, **options)
        self.origins.append(self.origin)

    def make(self, name: str, inputs: Sequence[int], spec: Spec, label: str = "", version: int | None = None,
             **options: Any) -> int:
        """An operator with one new output."""
        out = self.tensor(label or f"{self.origin or name}_out", spec.shape, spec.dtype, spec.quantization)
        self.op(name, inputs, [out], version, **options)
        return out

    def graph(self, name: str, inputs: Sequence[int], outputs: Sequence[int]) -> Graph:
        """The file as a Graph, its operators under the names of what they came from."""
        read = read_tflite(memoryview(self.builder.build(inputs, outputs)), name)
        return replace(read, nodes=tuple(replace(n, name=o) for n, o in zip(read.nodes, self.origins, strict=True)))
