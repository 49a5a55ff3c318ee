"""Activations as expressions of OpenCL C, on floats or vectors of floats. Within 1e-6 of what NumPy computes in
float64, or 1e-36.

exp() of OpenCL C is exact to 3 units in the last place (4 in the embedded profile) and PoCL computes it on vectors;
its erf() goes lane by lane, ten times as slow, and 1 + erf(x) is worth nothing far below 0: gelu has its own.
"""

from __future__ import annotations

from npulab.errors import InvariantError
from npulab.gpu.compute.types import Activation

ERFC = (2.820644997e-01, 2.828570210e-01, 2.386449804e-01, 2.255410713e-01, -9.831505920e-02, 4.212688860e-01,
        -6.700152932e-01, 4.289225033e-01, -1.232519655e-01, 1.228333653e-02)
"""erfc(z) = t q(t) exp(-z z), t = 1 / (1 + z / 2), q by rising powers: fitted for z of 0 to 10, 2e-8 off at most."""


def helpers(kind: Activation, width: int) -> str:
    """Functions that activation(kind, ..., width) calls: once in a source, before its kernels."""
    if kind != "gelu":
        return ""
    v = _vector(width)
    steps = "\n    ".join(f"q = fma(q, t, ({v})({c}f));" for c in reversed(ERFC[:-1]))
    # exp(-x x / 2): the product's rounding is put back, or it would be 1e-5 of the result where x is -10
    return f"""
{v} gelu_{width}({v} x) {{
    {v} a = fmin(fabs(x), ({v})(14.0f)), t = 1.0f / fma(a, ({v})(0.353553391f), ({v})(1.0f));
    {v} q = ({v})({ERFC[-1]}f);
    {steps}
    {v} h = a * a, low = fma(a, a, -h);
    {v} c = 0.5f * t * q * (exp(-0.5f * h) * fma(low, ({v})(-0.5f), ({v})(1.0f)));
    return x <= -14.0f ? ({v})(0.0f) : x * (x < 0.0f ? c : 1.0f - c);
}}
"""


def activation(kind: Activation, x: str, width: int, slope: float = 0.01) -> str:
    """What stands for the activation of x: a variable's name (it is repeated), of `width` floats. slope: of leaky."""
    v = _vector(width)
    match kind:
        case "none":
            return x
        case "relu":
            return f"fmax({x}, ({v})(0.0f))"
        case "relu6":
            return f"fmin(fmax({x}, ({v})(0.0f)), ({v})(6.0f))"
        case "sigmoid":
            return f"(1.0f / (1.0f + exp(-{x})))"
        case "silu":
            return f"({x} / (1.0f + exp(-{x})))"
        case "hardsigmoid":
            return f"fmin(fmax(fma({x}, ({v})(0.166666667f), ({v})(0.5f)), ({v})(0.0f)), ({v})(1.0f))"
        case "hardswish":
            return f"({x} * fmin(fmax({x} + 3.0f, ({v})(0.0f)), ({v})(6.0f)) * 0.166666667f)"
        case "tanh":
            return f"tanh({x})"
        case "gelu":
            return f"gelu_{width}({x})"
        case "leaky":
            return f"fmax({x}, ({v})(0.0f)) + {_literal(slope)} * fmin({x}, ({v})(0.0f))"
    raise InvariantError(f"no activation is called {kind}")


def _vector(width: int) -> str:
    return "float" if width == 1 else f"float{width}"


def _literal(value: float) -> str:
    return f"({value!r}f)" if "e" in repr(value) or "." in repr(value) else f"({value}.0f)"
