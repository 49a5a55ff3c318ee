"""What kernels do to a result on its way to memory, as OpenCL C: activations, loads and stores of vectors.

A V is a float or a vector of floats; numbers in memory (N) are float or half.
"""

from __future__ import annotations

from npulab.errors import InvariantError
from npulab.gpu.compute.types import Activation, Number

_FORMS: dict[Activation, str] = {
    "none": "{x}",
    "relu": "max({x}, ({v})(0.0f))",
    "relu6": "clamp({x}, ({v})(0.0f), ({v})(6.0f))",
    "sigmoid": "(({v})(1.0f) / (({v})(1.0f) + exp(-{x})))",
    "silu": "({x} / (({v})(1.0f) + exp(-{x})))",
    "hardsigmoid": "(clamp({x} + ({v})(3.0f), ({v})(0.0f), ({v})(6.0f)) / ({v})(6.0f))",
    "hardswish": "({x} * clamp({x} + ({v})(3.0f), ({v})(0.0f), ({v})(6.0f)) / ({v})(6.0f))",
    "tanh": "tanh({x})",
    "gelu": "({x} * ({v})(0.5f) * erfc({x} * ({v})(-0.70710678f)))",
    "leaky": "select({x} * ({v})({slope}), {x}, {x} >= ({v})(0.0f))",
}


def activation(kind: Activation, x: str, vector: str, slope: float = 0.01) -> str:
    """OpenCL C expression of what `kind` makes of the variable named `x`, of the type `vector` ("float", "float4"...).

        silu = x / (1 + e^-x)              hardsigmoid = clamp(x + 3, 0, 6) / 6, ONNX's with alpha 1/6
        hardswish = x hardsigmoid(x)       gelu = x erfc(-x / sqrt 2) / 2, not the approximation by tanh

    Within 1e-6 of the value; gelu within 1e-6 |x|, and results below 1e-37 may be 0.
    """
    if kind not in _FORMS:
        raise InvariantError(f"there is no activation '{kind}'", want=", ".join(_FORMS))
    return _FORMS[kind].format(x=x, v=vector, slope=literal(slope))


def literal(value: float) -> str:
    """A float's exact value, rounded to float32 by the compiler."""
    return f"{float(value)!r}f"


def vector_type(width: int) -> str:
    return "float" if width == 1 else f"float{width}"


def prelude(number: Number, width: int) -> str:
    """Types N, V and functions on them: one(p, i), many(p), put(v, p), and their kin for the first `left` of a
    vector: some(p, left), put_some(v, p, left); floats(p) of float32 whatever N is."""
    if number not in ("float32", "float16"):
        raise InvariantError(f"these kernels have no {number}")
    half, w = number == "float16", "" if width == 1 else str(width)
    if half:
        one, many, put = "vload_half(i, p)", f"vload_half{w}(0, p)", f"vstore_half{w}(v, 0, p)"
    elif width == 1:
        one, many, put = "p[i]", "*p", "*p = v"
    else:
        one, many, put = "p[i]", f"vload{w}(0, p)", f"vstore{w}(v, 0, p)"
    spread = "*t = v" if width == 1 else f"vstore{w}(v, 0, t)"
    gather = "*t" if width == 1 else f"vload{w}(0, t)"
    keep = "vstore_half(t[i], i, p)" if half else "p[i] = t[i]"
    return f"""typedef {"half" if half else "float"} N;
typedef {vector_type(width)} V;
#define W {width}
inline float one(__global const N *p, int i) {{ return {one}; }}
inline V many(__global const N *p) {{ return {many}; }}
inline void put(V v, __global N *p) {{ {put}; }}
inline V floats(__global const float *p) {{ return {"*p" if width == 1 else f"vload{w}(0, p)"}; }}
__attribute__((noinline)) V some(__global const N *p, int left) {{
    if (left >= W) return many(p);
    float t[W];
    for (int i = 0; i < W; i++) t[i] = i < left ? one(p, i) : 0.0f;
    return {gather};
}}
__attribute__((noinline)) void put_some(V v, __global N *p, int left) {{
    if (left >= W) {{ put(v, p); return; }}
    float t[W];
    {spread};
    for (int i = 0; i < left; i++) {keep};
}}
"""
