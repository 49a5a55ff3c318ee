"""Attention: the fused operator in its parts, and one projection for each of query, key and value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from npulab.ir import Node
from npulab.ir.ops import OnnxOp
from npulab.passes.matmul import is_projection
from npulab.passes.patterns import At, any_wanted, attributes, each, present, shape_of, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

MASK_MAX = 1 << 20
"""Elements of a causal mask that becomes a constant."""


def projections(r: Rewrite) -> list[str]:
    """One MatMul for query, key and value together, whose result is reshaped, transposed and taken apart with Gather,
    or with Split, becomes one MatMul, Reshape and Transpose for each, of at most four dimensions."""
    done = []
    for n, _ in each(r, "Transpose", all_=True):
        done += _from_gathers(r, n)
    for n, _ in each(r, "Split", all_=True):
        done += _from_split(r, n)
    return done


def split(r: Rewrite) -> list[str]:
    """Attention (opset 23), and com.microsoft's Attention and MultiHeadAttention, without a past, become MatMul, a
    scale on the query, the mask, Softmax and MatMul; projections and heads as MatMul, Reshape and Transpose."""
    done = []
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or not r.wanted(n):
            continue
        match (op.domain, op.name):
            case ("", "Attention"):
                ok = _onnx(r, n)
            case ("com.microsoft", "Attention"):
                ok = _packed(r, n)
            case ("com.microsoft", "MultiHeadAttention"):
                ok = _multi_head(r, n)
            case _:
                continue
        if ok:
            done.append(f"{title(n)}: {op.name} in MatMul and Softmax")
    return done


def _from_gathers(r: Rewrite, n: Node) -> list[str]:
    reshape = r.maker(n.inputs[0], "Reshape")
    perm = attributes(n).get("perm")
    shape = shape_of(r, n.inputs[0])
    gathers = r.readers(n.outputs[0])
    if reshape is None or perm is None or shape is None or n.outputs[0] in r.outputs or not gathers \
            or r.only_reader(n.inputs[0]) is None:
        return []
    parts = _projection(r, reshape.inputs[0])
    if parts is None or not any_wanted(r, n, reshape, *parts[3], *gathers):
        return []
    x, weights, bias, _ = parts
    lead = shape_of(r, x)
    assert lead is not None
    k = len(lead) - 1
    if shape[:k] != lead[:-1] or math.prod(shape[k:]) != weights.shape[1]:
        return []
    for g in gathers:
        index = r.constant(g.inputs[1]) if g.op.name == "Gather" and g.inputs[0] == n.outputs[0] else None
        place = perm[int(attributes(g).get("axis", 0)) % len(perm)]
        if index is None or index.ndim or place < k:
            return []
    for g in gathers:
        axis = int(attributes(g).get("axis", 0)) % len(perm)
        place = perm[axis]
        found = r.constant(g.inputs[1])
        assert found is not None
        index = int(found) % shape[place]
        own = weights.reshape(-1, *shape[k:]).take(index, place - k + 1).reshape(len(weights), -1)
        row = None if bias is None else bias.reshape(shape[k:]).take(index, place - k).reshape(-1)
        at = At(r, g)
        y = at.reshape(_projected(at, x, own, row), (*shape[:place], *shape[place + 1:]))
        rest = [p - (p > place) for p in perm if p != place]
        at.replace(at.transpose(y, rest))
    return [f"{title(n)}: {len(gathers)} projections of {weights.shape[1] // shape[place]} instead of one"]


def _from_split(r: Rewrite, n: Node) -> list[str]:
    parts = _projection(r, n.inputs[0])
    if parts is None or not any_wanted(r, n, *parts[3]):
        return []
    x, weights, bias, _ = parts
    rank = len(r.values[n.inputs[0]].shape)
    sizes = [shape[-1] if (shape := shape_of(r, v)) else 0 for v in n.outputs]
    if int(attributes(n).get("axis", 0)) % rank != rank - 1 or sum(sizes) != weights.shape[1] or 0 in sizes:
        return []
    at, start = At(r, n), 0
    for v, size in zip(n.outputs, sizes, strict=True):
        row = None if bias is None else bias[start : start + size]
        r.substitute(v, _projected(at, x, weights[:, start : start + size], row))
        start += size
    return [f"{title(n)}: {len(sizes)} projections instead of one"]


def _projection(r: Rewrite, value: int) -> tuple[int, np.ndarray, np.ndarray | None, list[Node]] | None:
    """(x, weights, bias, nodes) if the value is x times a constant matrix, plus a constant row, for one reader only."""
    add = r.maker(value, "Add")
    bias: np.ndarray | None = None
    nodes: list[Node] = []
    if r.only_reader(value) is None:
        return None
    if add is not None:
        i = next((i for i, v in enumerate(add.inputs) if r.constant(v) is not None), None)
        bias = r.constant(add.inputs[i]) if i is not None else None
        if i is None or bias is None or r.only_reader(add.inputs[1 - i]) is None:
            return None
        value = add.inputs[1 - i]
        nodes.append(add)
    product = r.maker(value, "MatMul", "Gemm")
    weights = r.constant(product.inputs[1]) if product is not None else None
    if product is None or weights is None or not is_projection(r, product) or shape_of(r, product.inputs[0]) is None:
        return None
    if product.op.name == "Gemm" and present(product, 2):
        row = r.constant(product.inputs[2])
        if row is None or bias is not None:
            return None
        bias = row
    if bias is not None and bias.size != weights.shape[1]:
        return None
    return product.inputs[0], weights, None if bias is None else bias.reshape(-1), [*nodes, product]


def _projected(at: At, x: int, weights: np.ndarray, bias: np.ndarray | None) -> int:
    shape = (*at.r.values[x].shape[:-1], weights.shape[1])
    y = at.op("MatMul", x, at.r.add_constant(f"{at.name}_weights", weights), shape=shape)
    return y if bias is None else at.op("Add", y, at.r.add_constant(f"{at.name}_bias", bias))


def _onnx(r: Rewrite, n: Node) -> bool:
    """Attention of opset 23, with as many heads of keys as of queries."""
    own = attributes(n)
    shapes = [shape_of(r, v) for v in n.inputs[:3]]
    if any(present(n, i) for i in range(4, len(n.inputs))) or sum(v >= 0 for v in n.outputs) != 1 \
            or own.get("softcap") or None in shapes:
        return False
    q, k, v = (s for s in shapes if s is not None)
    heads = int(own.get("q_num_heads", q[1] if len(q) == 4 else 0))
    theirs = int(own.get("kv_num_heads", k[1] if len(k) == 4 else 0))
    if heads < 1 or heads != theirs or len({len(q), len(k), len(v)}) != 1 or len(q) not in (3, 4):
        return False
    scale = own.get("scale") or (q[-1] if len(q) == 4 else q[-1] // heads)**-0.5
    mask = n.inputs[3] if present(n, 3) else -1
    return _attended(r, n, n.inputs[:3], heads, float(scale), mask, bool(own.get("is_causal")))


def _multi_head(r: Rewrite, n: Node) -> bool:
    """com.microsoft's MultiHeadAttention of three tensors [batch, tokens, heads * size], with a bias or without."""
    own, shapes = attributes(n), [shape_of(r, v) if v >= 0 else None for v in n.inputs[:3]]
    bias = r.constant(n.inputs[3]) if present(n, 3) else None
    if len(shapes) < 3 or any(s is None or len(s) != 3 for s in shapes) or (bias is None and present(n, 3)) \
            or any(present(n, i) for i in range(4, len(n.inputs))) or sum(v >= 0 for v in n.outputs) != 1:
        return False
    at, start, values = At(r, n), 0, []
    for v, s in zip(n.inputs[:3], shapes, strict=True):
        assert s is not None
        if bias is not None:
            row = r.add_constant(f"{at.name}_bias", bias[start : start + s[-1]])
            v, start = at.op("Add", v, row), start + s[-1]
        values.append(v)
    heads = int(own["num_heads"])
    size = r.values[n.inputs[0]].shape[-1] // heads
    return _attended(r, n, values, heads, float(own.get("scale") or size**-0.5), -1, bool(own.get("unidirectional")))


def _packed(r: Rewrite, n: Node) -> bool:
    """com.microsoft's Attention: the projections of all three are inside."""
    own, shape = attributes(n), shape_of(r, n.inputs[0])
    weights = r.constant(n.inputs[1])
    bias = r.constant(n.inputs[2]) if present(n, 2) else None
    if shape is None or len(shape) != 3 or weights is None or (bias is None and present(n, 2)) \
            or any(present(n, i) for i in range(3, len(n.inputs))) or sum(v >= 0 for v in n.outputs) != 1 \
            or own.get("do_rotary"):
        return False
    sizes: Sequence[int] = own.get("qkv_hidden_sizes") or (weights.shape[1] // 3,) * 3
    at, start, values = At(r, n), 0, []
    for size in sizes:
        part = slice(start, start + size)
        values.append(_projected(at, n.inputs[0], weights[:, part], None if bias is None else bias[part]))
        start += size
    heads = int(own["num_heads"])
    scale = float(own.get("scale") or (sizes[0] // heads)**-0.5)
    return _attended(r, n, values, heads, scale, -1, bool(own.get("unidirectional")))


def _attended(r: Rewrite, n: Node, qkv: Sequence[int], heads: int, scale: float, mask: int, causal: bool) -> bool:
    """softmax(q k scale + mask) v in place of the node's output; False, before anything is written, where the mask is
    too large."""
    at = At(r, n)
    shapes = [r.values[v].shape for v in qkv]
    tokens, keys = shapes[0][-2], shapes[1][-2]
    if causal and tokens * keys > MASK_MAX:
        return False
    flat = len(shapes[0]) == 3
    if flat:
        split_ = [at.reshape(v, (*s[:2], heads, s[2] // heads)) for v, s in zip(qkv, shapes, strict=True)]
        q, k, v = at.transpose(split_[0], (0, 2, 1, 3)), at.transpose(split_[1], (0, 2, 3, 1)), at.transpose(
            split_[2], (0, 2, 1, 3))
    else:
        q, k, v = qkv[0], at.transpose(qkv[1], (0, 1, 3, 2)), qkv[2]
    batch = shapes[0][0]
    scores = at.op("MatMul", at.op("Mul", q, scale), k, shape=(batch, heads, tokens, keys))
    if causal:
        lower = np.where(np.tril(np.ones((tokens, keys), bool)), 0, -np.inf)
        scores = at.op("Add", scores, r.add_constant(f"{at.name}_causal", lower.astype(r.values[q].dtype.numpy)))
    if mask >= 0:
        if r.values[mask].dtype.value == "bool":
            low = r.add_constant(f"{at.name}_low", np.array(-np.inf, r.values[q].dtype.numpy))
            scores = r.add(n, f"{at.name}_where", "Where", (mask, scores, low), like=scores)
        else:
            scores = at.op("Add", scores, mask)
    size = r.values[v].shape[-1]
    y = at.op("MatMul", at.op("Softmax", scores, axis=-1), v, shape=(batch, heads, tokens, size))
    if flat:
        y = at.reshape(at.transpose(y, (0, 2, 1, 3)), (batch, tokens, heads * size))
    at.replace(y)
    return True


QKV = Pass("attention-projections", projections, always=False)
SPLIT = Pass("attention-split", split, always=False)
PASSES = (SPLIT, QKV)
