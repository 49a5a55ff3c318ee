"""Write a TFLite model from code: tensors, then operators, then `build`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UsageError
from npulab.exporters.tflite import write_tflite
from npulab.formats.tflite import VERSION, options_of, schema
from npulab.ir import DType

_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "ADD": 2, "CONCATENATION": 2, "SPLIT": 2,
             "AVERAGE_POOL_2D": 2, "MAX_POOL_2D": 2, "MEAN": 2, "PAD": 2, "PADV2": 2, "SOFTMAX": 2, "QUANTIZE": 2}
"""Operator versions that take int8 (TensorFlow's register.cc)."""


class ModelBuilder:
    """A model of one subgraph. Tensors are numbered from 0 in the order they are made; operators run in that order.

    >>> model = ModelBuilder("double")
    >>> x, y = model.tensor("x", (1, 4), "float32"), model.tensor("y", (1, 4), "float32")
    >>> model.op("ADD", [x, x], [y], fused_activation_function="NONE")
    >>> model.build([x], [y])[4:8]
    b'TFL3'
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: list[dict[str, Any]] = []
        self.operators: list[dict[str, Any]] = []
        self.codes: dict[tuple[int, str, int], int] = {}
        self.buffers: list[dict[str, Any]] = [{}]

    def tensor(self, name: str, shape: Sequence[int], dtype: str, *, scale: float | None = None,
               zero_point: int | None = None, data: NDArray[Any] | None = None, scales: Sequence[float] | None = None,
               zero_points: Sequence[int] | None = None, axis: int = 0, is_variable: bool = False) -> int:
        """A tensor of `dtype` ("uint8", "int32", ...), constant where there is `data`; returns its number.

        Quantized by `scale` and `zero_point` as a whole, or by `scales` and `zero_points` (0 if left out) along `axis`.

        Raises: UsageError if `dtype` is no element type or `data` has another number of bytes than shape and type say.
        """
        if dtype.upper() not in schema().enums["TensorType"]:
            raise UsageError(f"tensor '{name}' cannot have type {dtype!r}", want=", ".join(d.value for d in DType))
        tensor: dict[str, Any] = {"name": name, "shape": [int(n) for n in shape], "type": dtype.upper(), "buffer": 0,
                                  "is_variable": is_variable}
        if scale is not None:
            scales, zero_points = [scale], [zero_point or 0]
        if scales is not None:
            tensor["quantization"] = {"scale": list(scales), "zero_point": list(zero_points or [0] * len(scales)),
                                      "quantized_dimension": axis}
        if data is not None:
            content = np.ascontiguousarray(data).tobytes()
            element = DType[dtype.upper()].numpy if dtype.upper() in DType.__members__ else None
            if element is not None and len(content) != math.prod(shape) * element.itemsize:
                raise UsageError(f"the data of tensor '{name}' has the wrong size", got=f"{len(content)} bytes",
                                 want=f"{math.prod(shape) * element.itemsize} bytes for {dtype}{list(shape)}")
            tensor["buffer"] = len(self.buffers)
            self.buffers.append({"data": content})
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def op(self, name: str, inputs: Sequence[int], outputs: Sequence[int], version: int | None = None,
           **options: Any) -> None:
        """A builtin operator, named as in the schema; an absent input is -1. Enum options are given by name.
        `version` of the operator: None for one that takes int8.

        Options left out have the schema's defaults: for a stride that is 0.

        Raises: UsageError if there is no such operator, or it has no such options.
        """
        code = schema().enums["BuiltinOperator"].get(name)
        if code is None:
            raise UsageError(f"TFLite has no operator {name!r}", try_="the names of BuiltinOperator, such as CONV_2D")
        place = options_of(name)
        if place is None and options:
            raise UsageError(f"{name} takes no options", got=", ".join(options))
        operator: dict[str, Any] = {"opcode_index": self._code(code, "", version or _VERSIONS.get(name, 1)),
                                    "inputs": list(inputs), "outputs": list(outputs)}
        if place is not None:
            union, table = place
            if unknown := options.keys() - schema().tables[table].keys():
                raise UsageError(f"{name} has no option {', '.join(sorted(unknown))}",
                                 want=", ".join(schema().tables[table]) or "none")
            operator[union] = (table, options)
        self.operators.append(operator)

    def custom(self, code: str, inputs: Sequence[int], outputs: Sequence[int], options: bytes = b"") -> None:
        """A custom operator by its code; `options` are kept as they are."""
        index = self._code(schema().enums["BuiltinOperator"]["CUSTOM"], code, 1)
        self.operators.append({"opcode_index": index, "inputs": list(inputs), "outputs": list(outputs),
                               "custom_options": options})

    def _code(self, builtin: int, custom: str, version: int) -> int:
        return self.codes.setdefault((builtin, custom, version), len(self.codes))

    def model(self, inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
        """The Model table, as `write_tflite` takes it, for what the methods above do not offer."""
        codes = [{"deprecated_builtin_code": min(builtin, 127), "builtin_code": builtin, "version": version,
                  "custom_code": custom or None} for builtin, custom, version in self.codes]
        subgraph = {"tensors": self.tensors, "inputs": list(inputs), "outputs": list(outputs),
                    "operators": self.operators, "name": "main"}
        return {"version": VERSION, "description": self.name, "operator_codes": codes, "subgraphs": [subgraph],
                "buffers": self.buffers}

    def build(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file."""
        return write_tflite(self.model(inputs, outputs))
