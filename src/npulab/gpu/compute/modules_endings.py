"""Activations in SPIR-V: those of `activations`, on floats or vectors of floats.

What is asked of exp() stays within 2**126, beyond which Vulkan promises nothing of a quotient (Vulkan 1.3, appendix
"Precision and Operation of SPIR-V Instructions"); it promises exp(x) to 3 + 2 |x| units in the last place.
"""

from __future__ import annotations

from npulab.errors import UnsupportedError
from npulab.gpu.compute.activations import ERFC
from npulab.gpu.compute.types import Activation
from npulab.gpu.spirv_builder import Shader, Value

ENDINGS: tuple[Activation, ...] = ("none", "relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid", "tanh",
                                   "gelu", "leaky")
FAR = 80.0
"""exp(FAR) < 2**126. sigmoid(-FAR) is 2e-35."""


def end(s: Shader, x: Value, kind: Activation, slope: float = 0.01) -> Value:
    """activation(x), x float32. slope: of leaky. Raises: UnsupportedError if there is none of this name."""
    match kind:
        case "none":
            return x
        case "relu":
            return _clamp(s, x, 0.0)
        case "relu6":
            return _clamp(s, x, 0.0, 6.0)
        case "sigmoid":
            return _sigmoid(s, x)
        case "silu":
            return _clamp(s, x, -FAR) * _sigmoid(s, x)
        case "hardsigmoid":
            return _clamp(s, s.fma(x, s.like(1 / 6, x), s.like(0.5, x)), 0.0, 1.0)
        case "hardswish":
            return x * _clamp(s, x + 3.0, 0.0, 6.0) * (1 / 6)
        case "tanh":
            return s.like(1.0, x) - s.like(2.0, x) / (s.builtin("Exp", _clamp(s, x, -FAR / 2, FAR / 2) * 2.0) + 1.0)
        case "gelu":
            return _gelu(s, x)
        case "leaky":
            return s.fma(s.builtin("FMin", x, s.like(0.0, x)), s.like(slope, x), _clamp(s, x, 0.0))
    raise UnsupportedError(f"there is no shader with the activation {kind}", want=", ".join(ENDINGS))


def _clamp(s: Shader, x: Value, least: float, most: float | None = None) -> Value:
    found = s.builtin("FMax", x, s.like(least, x))
    return found if most is None else s.builtin("FMin", found, s.like(most, x))


def _sigmoid(s: Shader, x: Value) -> Value:
    return s.like(1.0, x) / (s.builtin("Exp", s.builtin("FMin", x * -1.0, s.like(FAR, x))) + 1.0)


def _gelu(s: Shader, x: Value) -> Value:
    """max(x, 0) - |x| erfc(|x| / sqrt 2) / 2: no choice of sign, which SPIR-V 1.3 would make lane by lane."""
    a = s.builtin("FMin", s.builtin("FAbs", x), s.like(12.0, x))  # beyond, erfc is below 4e-33
    t = s.like(1.0, x) / s.fma(a, s.like(8**-0.5, x), s.like(1.0, x))
    q = s.like(ERFC[-1], x)
    for c in reversed(ERFC[:-1]):
        q = s.fma(q, t, s.like(c, x))
    return _clamp(s, x, 0.0) - a * (t * q * 0.5) * s.builtin("Exp", a * a * -0.5)
