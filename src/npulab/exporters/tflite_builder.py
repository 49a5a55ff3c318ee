"""Write a TFLite model from code: tensors, then operators, then `build`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.formats.flatbuffer import pack
from npulab.formats.tflite import IDENTIFIER, schema

_OPTIONS = {
    "CONV_2D": "Conv2DOptions", "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions", "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions", "MEAN": "ReducerOptions", "PADV2": "PadV2Options",
}
"""Operators whose options are not named after them."""

_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "ADD": 2, "CONCATENATION": 2, "SPLIT": 2,
             "AVERAGE_POOL_2D": 2, "MAX_POOL_2D": 2, "MEAN": 2, "PAD": 2, "PADV2": 2, "SOFTMAX": 2, "QUANTIZE": 2}
"""Operator versions that take int8 (TensorFlow's register.cc)."""


class ModelBuilder:
    """One subgraph. Tensors and operators are numbered in the order they are made."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: list[dict[str, Any]] = []
        self.operators: list[dict[str, Any]] = []
        self.codes: dict[tuple[int, str, int], int] = {}
        self.buffers: list[dict[str, Any]] = [{}]

    def tensor(self, name: str, shape: Sequence[int], dtype: str, *, scale: float | None = None,
               zero_point: int | None = None, data: NDArray[Any] | None = None, scales: Sequence[float] | None = None,
               zero_points: Sequence[int] | None = None, axis: int = 0) -> int:
        """A tensor of `dtype` ("uint8", "int32", ...); constant where there is `data`. Returns its index."""
        tensor: dict[str, Any] = {"name": name, "shape": list(shape), "type": dtype.upper(), "buffer": 0}
        if scale is not None:
            scales, zero_points = [scale], [zero_point or 0]
        if scales is not None:
            tensor["quantization"] = {"scale": list(scales), "zero_point": list(zero_points or [0] * len(scales)),
                                      "quantized_dimension": axis}
        if data is not None:
            tensor["buffer"] = len(self.buffers)
            self.buffers.append({"data": np.ascontiguousarray(data).tobytes()})
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def op(self, name: str, inputs: Sequence[int], outputs: Sequence[int], **options: Any) -> None:
        """A builtin operator; options by the names of the schema, enums as their text."""
        table = _OPTIONS.get(name) or "".join(part.capitalize() for part in name.split("_")) + "Options"
        code = self._code(schema().enums["BuiltinOperator"][name], "", _VERSIONS.get(name, 1))
        operator: dict[str, Any] = {"opcode_index": code, "inputs": list(inputs), "outputs": list(outputs)}
        if table in schema().enums["BuiltinOptions"]:
            operator["builtin_options"] = (table, options)
        self.operators.append(operator)

    def custom(self, code: str, inputs: Sequence[int], outputs: Sequence[int], options: bytes = b"") -> None:
        """A custom operator by its code."""
        index = self._code(schema().enums["BuiltinOperator"]["CUSTOM"], code, 1)
        self.operators.append({"opcode_index": index, "inputs": list(inputs), "outputs": list(outputs),
                               "custom_options": options})

    def _code(self, builtin: int, custom: str, version: int) -> int:
        return self.codes.setdefault((builtin, custom, version), len(self.codes))

    def build(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file."""
        codes = []
        for builtin, custom, version in self.codes:
            code: dict[str, Any] = {"deprecated_builtin_code": min(builtin, 127), "builtin_code": builtin,
                                    "version": version}
            codes.append(code | ({"custom_code": custom} if custom else {}))
        subgraph = {"tensors": self.tensors, "inputs": list(inputs), "outputs": list(outputs),
                    "operators": self.operators, "name": "main"}
        return pack(schema(), "Model", {"version": 3, "description": self.name, "operator_codes": codes,
                                        "subgraphs": [subgraph], "buffers": self.buffers}, IDENTIFIER)
