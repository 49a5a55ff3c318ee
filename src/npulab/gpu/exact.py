"""What the chains of `kernels.chain` compute, in whole numbers, without going through their steps."""

from __future__ import annotations

from npulab.gpu.kernels import STEPS
from npulab.gpu.types import Element, Operation

WORD = 1 << 32
UNITS = 1 << 30
"""Each odd number to this power is 1 modulo 2**32 (Gauss, Disquisitiones arithmeticae, 90)."""
HALF_MOST = 2048
"""From which on half + 1 is half again: ties go to even (IEEE 754, 11 bits of significand)."""
FLOAT_MOST = 1 << 24
OPERANDS: dict[tuple[bool, Operation], tuple[float, float]] = {
    (True, "fma"): (1, 1), (True, "mul"): (2, 0.5), (True, "add"): (1, 0), (True, "special"): (1, 1),
    (False, "fma"): (1664525, 1013904223), (False, "mul"): (0, 0), (False, "add"): (0, 0),
}
"""a and b of a chain, by whether it is of floats. Of integers: multiplier and increment of a linear congruential
generator (Press et al., Numerical Recipes, chapter 7); products and sums are of two numbers in turn, and a is what the
unknown that they begin with is multiplied by."""


DOTTED = (0x9D53C12F, 1013904223)
"""a and b of a chain of dot products of bytes."""


def operands(operation: Operation, element: Element) -> tuple[float, float]:
    """a and b that `chained` is right for."""
    if element in ("int8x4", "char4"):
        return DOTTED
    return OPERANDS[element.startswith("float"), operation]


def chained(operation: Operation, element: Element, start: int, turns: int) -> float:
    """One element of a chain that begins with `start`, behind `turns` turns of the loop."""
    a, b = operands(operation, element)
    if element.startswith("float"):
        if operation in ("mul", "special"):
            return 1.0
        most = HALF_MOST if element == "float16" else FLOAT_MOST
        return float(min(start + turns * STEPS // (1 if operation == "fma" else 2), most))
    if element in ("int8x4", "char4"):
        return dotted(int(a), int(b), start, turns * STEPS)
    if operation in ("mul", "add"):
        first, second = (fibonacci(turns * STEPS + i) for i in (1, 2))
        if operation == "add":
            return (start * first ^ start * second) % WORD
        return pow(2 * start + 1, first % UNITS, WORD) ^ pow(2 * start + 1, second % UNITS, WORD)
    return congruential(int(a), int(b), start, turns * STEPS)


def fibonacci(n: int) -> int:
    """The sum of the two before it, 0 and 1 the first, modulo 2**32. F(2k) = F(k) (2 F(k + 1) - F(k)),
    F(2k + 1) = F(k)**2 + F(k + 1)**2."""
    now, next_ = 0, 1
    for bit in f"{n:b}":
        now, next_ = now * (2 * next_ - now) % WORD, (now * now + next_ * next_) % WORD
        if bit == "1":
            now, next_ = next_, (now + next_) % WORD
    return now


def dotted(a: int, b: int, x: int, times: int) -> int:
    """x behind x = dot(bytes of x, bytes of a) + b, so many times over. No more than 4 * 255**2 + 1 numbers follow b:
    they come round soon."""
    weights = [a >> s & 255 for s in (0, 8, 16, 24)]
    seen: dict[int, int] = {}
    orbit: list[int] = []
    for i in range(times):
        if x in seen:
            first = seen[x]
            return orbit[first + (times - first) % (i - first)]
        seen[x] = i
        orbit.append(x)
        x = (sum((x >> s & 255) * w for s, w in zip((0, 8, 16, 24), weights, strict=True)) + b) % WORD
    return x


def congruential(a: int, b: int, x: int, times: int) -> int:
    """x behind x = a x + b modulo 2**32, so many times over."""
    made, plus = 1, 0
    while times:
        if times & 1:
            made, plus = made * a % WORD, (plus * a + b) % WORD
        a, b = a * a % WORD, (b * a + b) % WORD
        times >>= 1
    return (made * x + plus) % WORD
