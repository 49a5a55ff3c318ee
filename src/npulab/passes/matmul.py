"""MatMul and Gemm in the forms that NPUs have: plain ones, of two or three dimensions, with the bias inside."""

from __future__ import annotations

import math

import numpy as np

from npulab.ir import Node
from npulab.passes.patterns import At, any_wanted, attributes, each, is_float, present, shape_of, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

HEADS_MAX = 16
"""Matrices of one MatMul that become MatMuls of their own."""


def with_bias(r: Rewrite) -> list[str]:
    """MatMul with a constant matrix, and the Add of a constant row that alone reads it, become one Gemm; between two
    Reshapes if the data have more than two dimensions."""
    done = []
    for n, _ in each(r, "MatMul", all_=True):
        shape, weights = shape_of(r, n.inputs[0]), r.constant(n.inputs[1])
        add = r.only_reader(n.outputs[0], "Add")
        if shape is None or len(shape) < 2 or weights is None or weights.ndim != 2 or add is None \
                or not is_float(r, n.inputs[0]):
            continue
        bias = next((c for v in add.inputs if (c := r.constant(v)) is not None), None)
        if bias is None or bias.shape[-1:] != weights.shape[1:] or bias.size != weights.shape[1] \
                or bias.ndim > len(shape) or not any_wanted(r, n, add):
            continue
        at = At(r, add)
        at.name = title(n)
        x = n.inputs[0] if len(shape) == 2 else at.reshape(n.inputs[0], (math.prod(shape[:-1]), shape[-1]))
        row = r.add_constant(f"{at.name}_bias", bias.reshape(-1))
        y = at.op("Gemm", x, n.inputs[1], row, shape=(math.prod(shape[:-1]), weights.shape[1]))
        at.replace(y if len(shape) == 2 else at.reshape(y, (*shape[:-1], weights.shape[1])))
        done.append(f"{title(n)}: Gemm with the bias of {title(add)}")
    return done


def to_matrix(r: Rewrite) -> list[str]:
    """MatMul of data with more than two dimensions and a constant matrix becomes one of two matrices, between two
    Reshapes."""
    done = []
    for n, _ in each(r, "MatMul"):
        shape, weights = shape_of(r, n.inputs[0]), shape_of(r, n.inputs[1])
        if shape is not None and weights is not None and len(shape) > 2 and len(weights) == 2:
            at = At(r, n)
            flat = at.reshape(n.inputs[0], (math.prod(shape[:-1]), shape[-1]))
            y = at.op("MatMul", flat, n.inputs[1], shape=(math.prod(shape[:-1]), weights[1]))
            at.replace(at.reshape(y, (*shape[:-1], weights[1])))
            done.append(f"{title(n)}: two dimensions instead of {len(shape)}")
    return done


def to_three(r: Rewrite) -> list[str]:
    """MatMul of more than three dimensions, equal ones before the last two, becomes one of three, between Reshapes."""
    done = []
    for n, _ in each(r, "MatMul"):
        pair = _alike(r, n)
        if pair is not None and len(pair[0]) > 3:
            at, lead = At(r, n), math.prod(pair[0][:-2])
            a, b = (at.reshape(v, (lead, *s[-2:])) for v, s in zip(n.inputs, pair, strict=True))
            y = at.op("MatMul", a, b, shape=(lead, pair[0][-2], pair[1][-1]))
            at.replace(at.reshape(y, (*pair[0][:-1], pair[1][-1])))
            done.append(f"{title(n)}: three dimensions instead of {len(pair[0])}")
    return done


def by_heads(r: Rewrite) -> list[str]:
    """MatMul of up to 16 pairs of computed matrices, the heads of an attention, becomes one MatMul for each pair:
    Slices and Reshapes before them, a Concat and a Reshape behind."""
    done = []
    for n, _ in each(r, "MatMul"):
        pair = _alike(r, n)
        count = math.prod(pair[0][:-2]) if pair is not None else 0
        if pair is None or not 1 < count <= HEADS_MAX:
            continue
        at, out = At(r, n), (pair[0][-2], pair[1][-1])
        a, b = (at.reshape(v, (count, *s[-2:])) for v, s in zip(n.inputs, pair, strict=True))
        heads = []
        for i in range(count):
            x, y = (at.reshape(at.slice(v, 0, i, i + 1), s[-2:]) for v, s in zip((a, b), pair, strict=True))
            heads.append(at.reshape(at.op("MatMul", x, y, shape=out), (1, *out)))
        joined = at.op("Concat", *heads, shape=(count, *out), axis=0)
        at.replace(at.reshape(joined, (*pair[0][:-2], *out)))
        done.append(f"{title(n)}: {count} of two dimensions")
    return done


def plain_gemm(r: Rewrite) -> list[str]:
    """Gemm with alpha, beta or transA becomes one without: the factors go into constant weights and bias, and data to
    be transposed get a Transpose."""
    done = []
    for n, own in each(r, "Gemm"):
        alpha, beta, across = float(own.get("alpha", 1.0)), float(own.get("beta", 1.0)), bool(own.get("transA", 0))
        inputs = list(n.inputs)
        b, c = r.constant(inputs[1]), r.constant(inputs[2]) if present(n, 2) else None
        if (alpha, beta, across) == (1.0, 1.0, False) or (alpha != 1 and b is None) \
                or (beta != 1 and present(n, 2) and c is None):
            continue
        at = At(r, n)
        if across:
            inputs[0] = at.transpose(inputs[0], (1, 0))
        for i, factor, old in ((1, alpha, b), (2, beta, c)):
            if factor != 1 and old is not None:
                scaled = (old.astype(np.float64) * factor).astype(old.dtype)
                inputs[i] = r.add_constant(f"{at.name}_{'weights' if i == 1 else 'bias'}", scaled)
        r.change(n, inputs=inputs, attributes={"transB": int(own.get("transB", 0))})
        done.append(f"{title(n)}: Gemm without alpha, beta and transA")
    return done


def gemm_to_matmul(r: Rewrite) -> list[str]:
    """Gemm with constant weights becomes MatMul and Add."""
    done = []
    for n, own in each(r, "Gemm"):
        weights = r.constant(n.inputs[1])
        plain = (own.get("alpha", 1.0), own.get("beta", 1.0), own.get("transA", 0)) == (1.0, 1.0, 0)
        if weights is None or not plain:
            continue
        at = At(r, n)
        matrix = r.add_constant(f"{at.name}_weights", weights.T) if own.get("transB") else n.inputs[1]
        y = at.op("MatMul", n.inputs[0], matrix, shape=r.values[n.outputs[0]].shape)
        at.replace(at.op("Add", y, n.inputs[2]) if present(n, 2) else y)
        done.append(f"{title(n)}: MatMul" + (" and Add" if present(n, 2) else ""))
    return done


def scale(r: Rewrite) -> list[str]:
    """A Mul or Div by a number, behind a MatMul, Gemm or Conv with constant weights and nothing but reshaping, and the
    bias, between them, goes into weights and bias. A product of two computed matrices is scaled through its first."""
    done = []
    for n, _ in each(r, "Mul", "Div", all_=True):
        factor = _number(r, n)
        if factor is None:
            continue
        value, number = factor
        chain = _scalable(r, value)
        if chain is None:
            continue
        for node, places in chain:
            inputs = list(node.inputs)
            for i in places:
                old = r.constant(inputs[i])
                assert old is not None
                inputs[i] = r.add_constant(f"{title(node)}_scaled", (old.astype(np.float64) * number).astype(old.dtype))
            r.change(node, inputs=inputs)
        r.substitute(n.outputs[0], value)
        done.append(f"{title(n)}: * {number:.6g} goes into {title(chain[-1][0])}")
    return done


def _number(r: Rewrite, n: Node) -> tuple[int, float] | None:
    """(x, c) if the node is x * c."""
    for x, c in (n.inputs, n.inputs[::-1]) if n.op.name == "Mul" else (n.inputs,):
        constant = r.constant(c)
        if constant is not None and constant.size == 1 and is_float(r, x) and r.constant(x) is None \
                and constant.ndim <= len(r.values[x].shape) and (number := float(constant.reshape(-1)[0])):
            return x, number if n.op.name == "Mul" else 1 / number
    return None


def _scalable(r: Rewrite, value: int) -> list[tuple[Node, tuple[int, ...]]] | None:
    """(node, inputs to be scaled) of all that makes the value, last first; None if something else reads a part."""
    found: list[tuple[Node, tuple[int, ...]]] = []
    for _ in range(16):
        n = r.maker(value, "MatMul", "Gemm", "Conv", "Add", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
        if n is None or r.only_reader(value) is None:
            return None
        match n.op.name:
            case "Add":
                i = next((i for i, v in enumerate(n.inputs) if r.constant(v) is not None), None)
                if i is None:
                    return None
                found.append((n, (i,)))
                value = n.inputs[1 - i]
            case "MatMul":
                i = next((i for i in (1, 0) if r.constant(n.inputs[i]) is not None), None)
                if i is not None:
                    return [*found, (n, (i,))]
                value = n.inputs[0]
            case "Gemm" | "Conv":
                bias = present(n, 2)
                if r.constant(n.inputs[1]) is None or (bias and r.constant(n.inputs[2]) is None):
                    return None
                return [*found, (n, (1, 2) if bias else (1,))]
            case _:
                value = n.inputs[0]
    return None


def _alike(r: Rewrite, n: Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of two computed operands with the same leading dimensions."""
    a, b = (shape_of(r, v) for v in n.inputs)
    computed = all(r.constant(v) is None for v in n.inputs)
    return (a, b) if a is not None and b is not None and len(a) > 2 and a[:-2] == b[:-2] and computed else None


def is_projection(r: Rewrite, n: Node) -> bool:
    """Whether the node is a MatMul or Gemm with a constant matrix on the right and nothing unusual."""
    own, weights = attributes(n), r.constant(n.inputs[1])
    return weights is not None and weights.ndim == 2 and not (own.get("transA") or own.get("transB")) \
        and own.get("alpha", 1.0) == own.get("beta", 1.0) == 1.0


BIAS = Pass("matmul-bias", with_bias, always=False)
MATRIX = Pass("matmul-2d", to_matrix, always=False)
THREE = Pass("matmul-3d", to_three, always=False)
HEADS = Pass("matmul-heads", by_heads, always=False)
PLAIN = Pass("gemm-plain", plain_gemm, always=False)
GEMM = Pass("gemm-to-matmul", gemm_to_matmul, always=False)
SCALE = Pass("scale-into-weights", scale)
PASSES = (SCALE, PLAIN, GEMM, BIAS, MATRIX, THREE, HEADS)
