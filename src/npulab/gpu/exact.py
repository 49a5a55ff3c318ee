"""What the chains of `kernels.chain` compute, in whole numbers, without going through their steps."""

from __future__ import annotations

from npulab.gpu.kernels import STEPS
from npulab.gpu.types import Element, Operation

WORD = 1 << 32
HALF_MOST = 2048
"""From which on half + 1 is half again: ties go to even (IEEE 754, 11 bits of significand)."""
FLOAT_MOST = 1 << 24
OPERANDS: dict[tuple[bool, Operation], tuple[float, float]] = {
    (True, "fma"): (1, 1), (True, "mul"): (2, 0.5), (True, "add"): (1, 0), (True, "special"): (1, 1),
    (False, "fma"): (1664525, 1013904223),
}
"""a and b of a chain, by whether it is of floats. Of integers: multiplier and increment of a linear congruential
generator (Press et al., Numerical Recipes, chapter 7)."""


def operands(operation: Operation, element: Element) -> tuple[float, float]:
    """a and b that `chained` is right for."""
    return OPERANDS[element.startswith("float"), operation]


def chained(operation: Operation, element: Element, start: int, turns: int) -> float:
    """One element of a chain that begins with `start`, behind `turns` turns of the loop."""
    a, b = operands(operation, element)
    if element.startswith("float"):
        if operation in ("mul", "special"):
            return 1.0
        most = HALF_MOST if element == "float16" else FLOAT_MOST
        return float(min(start + turns * STEPS // (1 if operation == "fma" else 2), most))
    return congruential(int(a), int(b), start, turns * STEPS)


def congruential(a: int, b: int, x: int, times: int) -> int:
    """x behind x = a x + b modulo 2**32, so many times over."""
    made, plus = 1, 0
    while times:
        if times & 1:
            made, plus = made * a % WORD, (plus * a + b) % WORD
        a, b = a * a % WORD, (b * a + b) % WORD
        times >>= 1
    return (made * x + plus) % WORD
