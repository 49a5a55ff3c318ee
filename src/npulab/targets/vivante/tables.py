"""Functions of one number as tables of the TP engine, for activations and for how well they come out.

What the driver of Mesa 26 does for LOGISTIC, RELU and ABS (TP notes 2.5): the table's input is a byte less the zero
point; its output, times one multiplier, plus the zero point, is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from npulab.ir.ops import Elementwise
from npulab.targets.vivante.fp21 import F64, TABLE_ENTRIES, fp21_bits, fp21_value, interpolated

STEPS_OFF = 0.75
"""Output steps that a result may be off the function's exact value: a step more than rounding would be noticed."""

HOMOGENEOUS = ("ABS", "LEAKY_RELU", "RELU")
"""Functions with f(ax) = a f(x) for a > 0: their table does not depend on scales, as that driver writes it."""


def exact(op: Elementwise, x: F64) -> F64:
    """The function itself."""
    with np.errstate(over="ignore"):
        functions: dict[str, Callable[[], F64]] = {
            "ABS": lambda: np.abs(x),
            "ELU": lambda: np.where(x < 0, np.expm1(np.minimum(x, 0)), x),
            "HARD_SWISH": lambda: x * np.clip(x + 3, 0, 6) / 6,
            "LEAKY_RELU": lambda: np.where(x < 0, op.alpha * x, x),
            "LOGISTIC": lambda: 1 / (1 + np.exp(-x)),
            "RELU": lambda: np.maximum(x, 0),
            "RELU6": lambda: np.clip(x, 0, 6),
            "RELU_N1_TO_1": lambda: np.clip(x, -1, 1),
            "TANH": lambda: np.tanh(x),
        }
        return functions[op.name]()


@dataclass(frozen=True, slots=True)
class Function:
    """A table, and the factors around it: result = table(byte - in_zp) * ratio + out_zp.

    words  1024 little-endian words.    ratio  as the engine has it, with 15 fraction bits.
    """

    words: bytes
    ratio: float

    @classmethod
    def of(cls, op: Elementwise, in_scale: float, out_scale: float) -> Function:
        unit = 1.0 if op.name in HOMOGENEOUS else in_scale
        keys = fp21_value(np.arange(TABLE_ENTRIES) << 11)
        words = fp21_bits(exact(op, keys * unit)).astype("<u4").tobytes()
        return cls(words, _rounded(in_scale / out_scale if op.name in HOMOGENEOUS else 1 / out_scale))

    def results(self, in_zp: int, out_zp: int) -> F64:
        """What becomes of each of the 256 bytes, before rounding and saturation."""
        table = fp21_value(np.frombuffer(self.words, "<u4").astype(np.int64))
        out: F64 = interpolated(table, np.arange(256.0) - in_zp) * self.ratio + out_zp
        return out


def _rounded(ratio: float) -> float:
    """The nearest number with 15 fraction bits; ties to even, as that driver has it."""
    exponent = np.floor(np.log2(ratio))
    return float(np.rint(ratio / 2.0**exponent * 2**15) / 2**15 * 2.0**exponent)


def steps_off(op: Elementwise, in_scale: float, out_scale: float, in_zp: int, out_zp: int) -> float:
    """The most that the table's result for any byte is off the exact one, in output steps, before rounding."""
    want = exact(op, (np.arange(256.0) - in_zp) * in_scale) / out_scale + out_zp
    got = Function.of(op, in_scale, out_scale).results(in_zp, out_zp)
    return float(np.max(np.abs(np.clip(np.rint(got), 0, 255) - np.clip(want, 0, 255))))
