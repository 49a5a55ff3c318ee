"""Random operands for `vela_operators.py`: feature maps, parameters, weights and biases, some of which break rules."""

from __future__ import annotations

from typing import Any

import numpy as np

from npulab.exporters.tflite_builder import ModelBuilder

Shape = tuple[int, ...]
ACTIVATIONS = ("NONE", "NONE", "NONE", "RELU", "RELU6", "RELU_N1_TO_1", "TANH", "SIGN_BIT")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")


class Operands:
    """What operators are made of, drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.model = ModelBuilder("one")
        self.inputs: list[int] = []
        self.dtype = self.pick(*["int8"] * 10, *["uint8"] * 3, *["int16"] * 3, "int32", "float32")
        self.odd = self.chance(0.35)  # tensors that break rules for all operators
        self.same = self.chance(0.6)  # one scale and zero point for all

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    # tensors

    def tensor(self, shape: Shape, dtype: str = "", data: Any = None, scale: float | None = None, zero: int = 0,
               scales: int = 0, axis: int = 0) -> int:
        options: dict[str, Any] = {}
        if scales:
            options = {"scales": [0.01 + 0.001 * i for i in range(scales)], "axis": axis}
        elif scale is not None:
            options = {"scale": scale, "zero_point": zero}
        return self.model.tensor(f"t{len(self.model.tensors)}", shape, dtype or self.dtype, data=data, **options)

    def data(self, shape: Shape, dtype: str = "", scale: float = 0.0, zero: int | None = None) -> int:
        """A feature map. An open first size is stored as 1, as converters do and as Vela takes it."""
        dtype = dtype or self.dtype
        if dtype not in INTEGERS:
            return self.tensor(shape, dtype)
        scale = scale or (0.1 if self.same else self.pick(0.1, 0.05))
        if zero is None:
            zero = 3 if not self.same and dtype in ("int8", "uint8") and self.chance(0.5) else 0
        if self.odd and self.chance(0.3):
            match self.pick("plain", "axis", "zero point", "dynamic first", "dynamic"):
                case "plain":
                    return self.tensor(shape, dtype)
                case "axis" if shape and 1 < shape[-1] < 100:
                    return self.tensor(shape, dtype, scales=shape[-1], axis=len(shape) - 1)
                case "zero point":
                    zero = self.pick(-5, 5, 100)
                case "dynamic first" | "dynamic" as which if shape and (which == "dynamic" or shape[0] == 1):
                    v = self.tensor(shape, dtype, scale=scale, zero=zero)
                    place = 0 if which == "dynamic first" else len(shape) - 1
                    self.model.tensors[v]["shape_signature"] = [-1 if i == place else n for i, n in enumerate(shape)]
                    return v
        return self.tensor(shape, dtype, scale=scale, zero=zero)

    def given(self, *shape: int, dtype: str = "", **rest: Any) -> int:
        v = self.data(shape, dtype, **rest)
        self.inputs.append(v)
        return v

    def result(self, *shape: int, dtype: str = "", **rest: Any) -> list[int]:
        dtype = dtype or (self.pick(*INTEGERS) if self.dtype in INTEGERS and self.chance(0.08) else self.dtype)
        return [self.data(shape, dtype, **rest)]

    def numbers(self, *values: Any, shape: Shape | None = None, dtype: str = "int32", computed: float = 0.04) -> int:
        """A parameter: a constant, now and then a computed one."""
        values_ = np.array(values, dtype).reshape((len(values),) if shape is None else shape)
        if self.chance(computed):
            v = self.tensor(values_.shape, dtype)
            self.inputs.append(v)
            return v
        return self.tensor(values_.shape, dtype, values_)

    def image(self) -> tuple[int, int, int, int]:
        return (self.pick(1, 1, 1, 1, 2), self.pick(1, 7, 16, 33), self.pick(1, 7, 16, 33), self.pick(1, 3, 8, 24))

    def shape(self) -> Shape:
        """Of any rank."""
        if self.chance(0.6):
            return self.image()
        return tuple(self.pick(1, 2, 5, 12) for _ in range(self.pick(0, 1, 2, 2, 3, 3, 5, 6)))

    def weights(self, shape: Shape, out: int, axis: int) -> tuple[int, str]:
        """Constant weights and their type."""
        usual = "float32" if self.dtype == "float32" else "uint8" if self.dtype == "uint8" else "int8"
        dtype = self.pick("int8", "uint8", "int16") if self.chance(0.08) else usual
        top = 127 if self.chance(0.2) or (len(shape) == 4 and shape[1] == 17) else 3
        content = self.rng.integers(top * 9 // 10, top + 1, shape).astype(dtype)
        if self.chance(0.05):
            v = self.tensor(shape, dtype, scale=0.01)
            self.inputs.append(v)
            return v, dtype
        if dtype == "int8" and out > 1 and self.chance(0.4):
            return self.tensor(shape, dtype, content, scales=out, axis=axis), dtype
        plain = dtype == "float32" or self.chance(0.03)
        return self.tensor(shape, dtype, content, scale=None if plain else 0.01), dtype

    def bias(self, count: int) -> list[int]:
        if self.chance(0.25):
            return []
        usual = "float32" if self.dtype == "float32" else "int64" if self.dtype == "int16" else "int32"
        dtype = self.pick("int16", "int64", "int32", "int8") if self.chance(0.12) else usual
        most = self.pick(1 << 39, 1 << 40, 1 << 45) if dtype == "int64" and self.chance(0.3) else 100
        content = np.full(count, most).astype(dtype)
        if self.chance(0.05):
            v = self.tensor((count,), dtype, scale=0.001)
            self.inputs.append(v)
            return [v]
        return [self.tensor((count,), dtype, content, scale=None if dtype == "float32" else 0.001)]

    def fused(self) -> str:
        return str(self.pick(*ACTIVATIONS))
