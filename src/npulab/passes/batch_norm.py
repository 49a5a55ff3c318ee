"""BatchNormalization into the convolution before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def fold(r: Rewrite) -> list[str]:
    """A BatchNormalization of constants, behind a convolution, transposed convolution or Gemm that nobody else reads,
    is a scale of its weights and bias: w g / sqrt(v + e), and (b - m) g / sqrt(v + e) + beta (Ioffe, Szegedy 2015)."""
    done = []
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or op.name != "BatchNormalization" \
                or op.attributes.get("training_mode"):
            continue
        before = r.maker(n.inputs[0], "Conv", "ConvTranspose", "Gemm")
        gamma, beta, mean, variance = (r.constant(v) for v in n.inputs[1:5])
        if before is None or r.only_reader(n.inputs[0]) is None \
                or gamma is None or beta is None or mean is None or variance is None:
            continue
        weights = r.constant(before.inputs[1])
        has_bias = len(before.inputs) > 2 and before.inputs[2] >= 0
        bias = r.constant(before.inputs[2]) if has_bias else np.zeros(len(gamma), np.float32)
        if weights is None or weights.dtype != np.float32 or bias is None:
            continue
        epsilon: Any = op.attributes.get("epsilon", 1e-5)
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        assert isinstance(before.op, OnnxOp)
        factor = _along_outputs(before.op, weights.shape, scale)
        if factor is None:
            continue
        name = n.name or "batch_norm"
        moved = (bias.astype(np.float64) - mean.astype(np.float64)) * scale + beta.astype(np.float64)
        scaled = np.multiply(weights, factor, dtype=np.float64)
        r.change(before, inputs=(before.inputs[0], r.add_constant(f"{name}_weights", scaled.astype(np.float32)),
                                 r.add_constant(f"{name}_bias", moved.astype(np.float32))))
        r.substitute(n.outputs[0], before.outputs[0])
        done.append(f"{n.name or op.name}: folded into {before.name or before.op.name}")
    return done


def _along_outputs(op: OnnxOp, shape: tuple[int, ...], scale: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """What weights of `shape` are multiplied with to scale output channel i by scale[i]; None if that cannot be."""
    ones = (1,) * (len(shape) - 2)
    if op.name == "Conv":
        return scale.reshape(-1, 1, *ones) if shape[0] == len(scale) else None
    if op.name == "Gemm":
        plain = op.attributes.get("alpha", 1.0) == op.attributes.get("beta", 1.0) == 1.0
        across = 0 if op.attributes.get("transB") else 1
        return scale.reshape((-1, 1) if across == 0 else (1, -1)) if plain and shape[across] == len(scale) else None
    groups: Any = op.attributes.get("group", 1)  # of a transposed convolution: inputs and outputs are dealt out to them
    if shape[0] % groups or shape[1] * groups != len(scale):
        return None
    return np.repeat(scale.reshape(groups, shape[1]), shape[0] // groups, axis=0).reshape(shape[0], shape[1], *ones)


PASS = Pass("batch-norm", fold)
