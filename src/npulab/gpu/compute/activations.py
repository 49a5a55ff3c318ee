"""Activations as expressions of OpenCL C, on floats or vectors of floats. Within 1e-6 of what NumPy computes in
float64, or 1e-36.

exp() of OpenCL C is exact to 3 units in the last place (4 in the embedded profile) and PoCL computes it on vectors;
its erf() goes lane by lane, ten times as slow, and 1 + erf(x) is worth nothing far below 0: gelu has its own.
"""

from __future__ import annotations

from npulab.errors import InvariantError
from npulab.gpu.compute import vectors
from npulab.gpu.compute.types import Activation

ERFC = (2.820644997e-01, 2.828570210e-01, 2.386449804e-01, 2.255410713e-01, -9.831505920e-02, 4.212688860e-01,
        -6.700152932e-01, 4.289225033e-01, -1.232519655e-01, 1.228333653e-02)
"""erfc(z) = t q(t) exp(-z z), t = 1 / (1 + z / 2), q by rising powers: fitted for z of 0 to 10, 2e-8 off at most."""
_FORMS: dict[Activation, str] = {
    "none": "{x}",
    # fmax would lose NaN, and takes three instructions on x86; what max does with NaN is left open
    "relu": "({x} < ({v})(0.0f) ? ({v})(0.0f) : {x})",
    "relu6": "({x} < ({v})(0.0f) ? ({v})(0.0f) : {x} > ({v})(6.0f) ? ({v})(6.0f) : {x})",
    "sigmoid": "(({v})(1.0f) / (({v})(1.0f) + exp(-{x})))",
    "silu": "({x} / (({v})(1.0f) + exp(-{x})))",
    "hardsigmoid": "(clamp({x} + ({v})(3.0f), ({v})(0.0f), ({v})(6.0f)) / ({v})(6.0f))",
    "hardswish": "({x} * clamp({x} + ({v})(3.0f), ({v})(0.0f), ({v})(6.0f)) / ({v})(6.0f))",
    "tanh": "tanh({x})",
    "gelu": "gelu_{width}({x})",
    "leaky": "select({x} * ({v})({slope}), {x}, {x} >= ({v})(0.0f))",
}


def helpers(kind: Activation, width: int) -> str:
    """Functions that activation(kind, ..., width) calls: once in a source, before its kernels."""
    if kind != "gelu":
        return ""
    v = vectors.vector_type(width)
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
    """What stands for the activation of x: a variable's name (it is repeated), of `width` floats. slope: of leaky.

        silu = x / (1 + e^-x)              hardsigmoid = clamp(x + 3, 0, 6) / 6, ONNX's with alpha 1/6
        hardswish = x hardsigmoid(x)       gelu = x erfc(-x / sqrt 2) / 2, not the approximation by tanh
    """
    if kind not in _FORMS:
        raise InvariantError(f"there is no activation '{kind}'", want=", ".join(_FORMS))
    return _FORMS[kind].format(x=x, v=vectors.vector_type(width), width=width, slope=vectors.literal(slope))
