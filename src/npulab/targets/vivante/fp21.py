"""The TP engine's 21-bit floats, and functions as lines between 1024 of them.

Source: TP notes 2.5, from the driver of Mesa 26. That values between entries lie on a line is inferred: with steps
instead, that driver's logistic would be off by up to seven.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TABLE_ENTRIES = 1024
TABLE_BYTES = 4 * TABLE_ENTRIES
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


def fp21_value(bits: I64) -> F64:
    """What a 21-bit float means: sign 20, exponent 19:15 (bias 15), mantissa 14:0; subnormals below 2**-14."""
    exponent, mantissa = bits >> 15 & 31, bits & 0x7FFF
    normal = (1 + mantissa / 2**15) * np.exp2(exponent - 15.0)
    return np.where(bits >> 20 & 1, -1.0, 1.0) * np.where(exponent == 0, mantissa * 2.0**-29, normal)


def fp21_bits(values: F64) -> I64:
    """The nearest 21-bit float, ties to even, saturated."""
    sign = np.signbit(values).astype(np.int64) << 20
    size = np.abs(values)
    exponent = np.clip(np.floor(np.log2(np.maximum(size, 2.0**-40))), -14, 15)
    mantissa = np.rint(size / np.exp2(exponent) * 2**15).astype(np.int64)  # 2**15 and up, unless subnormal
    bits = np.where(size < 2.0**-14, np.rint(size * 2.0**29).astype(np.int64),
                    (exponent.astype(np.int64) + 14 << 15) + mantissa)
    return sign | np.minimum(bits, 0xF7FFF)


def interpolated(table: F64, v: F64) -> F64:
    """Entry (sign, exponent, top four mantissa bits), and a line to the next by the other eleven bits."""
    bits = fp21_bits(v)
    index, fraction = bits >> 11, (bits & 0x7FF) / 2**11
    after = np.minimum(index + 1, TABLE_ENTRIES - 1)
    out: F64 = table[index] + (table[after] - table[index]) * fraction
    return out
