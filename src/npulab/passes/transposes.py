"""Transposes and Reshapes: merged, cancelled, moved to where they cancel, and written as the ones that chips take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.passes.patterns import At, attributes, each, opset, present, reduced, shape_of, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

UNARY = ("Abs", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
         "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid",
         "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu", "Cast")
"""Operators on each element; what Clip reads besides are single numbers."""
BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu")
SINKS = (*UNARY, *BINARY, "Concat", "Pad", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "Softmax")
FAR = 32
"""Operators that a Transpose passes at most."""


def merge(r: Rewrite) -> list[str]:
    """Transposes in a row become one, or none; so do Reshapes, Flattens, Squeezes and Unsqueezes of tensors of fixed
    size. A Transpose that only moves axes of size 1 becomes a Reshape."""
    done = []
    for n, _ in each(r, "Transpose", all_=True):
        perm, shape = _perm(r, n), shape_of(r, n.inputs[0])
        before = r.maker(n.inputs[0], "Transpose")
        theirs = _perm(r, before) if before is not None else None
        if perm is None:
            continue
        if before is not None and theirs is not None:
            both = tuple(theirs[p] for p in perm)
            if both == tuple(range(len(both))) and n.outputs[0] not in r.outputs:
                r.substitute(n.outputs[0], before.inputs[0])
                done.append(f"{title(n)}: undoes {title(before)}")
                continue
            r.change(n, inputs=(before.inputs[0],), attributes={"perm": both})
            done.append(f"{title(n)}: one with {title(before)}")
        elif shape is not None and opset(r) >= 5 and perm != tuple(sorted(perm)) and _still(shape, perm):
            target = r.add_constant(f"{title(n)}_shape", np.array([shape[p] for p in perm], np.int64))
            r.change(n, op="Reshape", inputs=(n.inputs[0], target), attributes={})
            done.append(f"{title(n)}: moves axes of size 1 only, a Reshape")
    for n, _ in each(r, *RESHAPES, all_=True):
        before = r.maker(n.inputs[0], *RESHAPES)
        shape, old = shape_of(r, n.outputs[0]), shape_of(r, n.inputs[0])
        source = shape_of(r, before.inputs[0]) if before is not None else None
        if before is None or shape is None or old is None or source is None or 0 in source or opset(r) < 5:
            continue
        target = r.add_constant(f"{title(n)}_shape", np.array(shape, np.int64))
        r.change(n, op="Reshape", inputs=(before.inputs[0], target), attributes={})
        done.append(f"{title(n)}: one with {title(before)}")
    return done


RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def sink(r: Rewrite) -> list[str]:
    """A Transpose moves behind the operators on single elements, Concat, Pad, Reduce* and Softmax that follow it, if
    another Transpose comes there, which then merges with it or cancels it. The same Transpose on every input counts as
    one."""
    done = []
    for n, own in each(r, *SINKS, all_=True):
        found = _above(r, n)
        if found is None or not _meets(r, n.outputs[0], found[0]):
            continue
        perm, sources = found
        made = _lifted(r, n, own, perm, sources)
        if made is None:
            continue
        value, after = made
        r.change(n, op="Transpose", inputs=(value,), attributes={"perm": after})
        done.append(f"{title(n)}: in front of the Transpose {list(perm)}")
    return done


def as_reshape(r: Rewrite) -> list[str]:
    """Squeeze, Unsqueeze and Flatten of tensors of fixed size become Reshape."""
    done = []
    for n, _ in each(r, "Squeeze", "Unsqueeze", "Flatten"):
        shape = shape_of(r, n.outputs[0])
        if shape is not None and shape_of(r, n.inputs[0]) is not None and 0 not in shape and opset(r) >= 5:
            target = r.add_constant(f"{title(n)}_shape", np.array(shape, np.int64))
            r.change(n, op="Reshape", inputs=(n.inputs[0], target), attributes={})
            done.append(f"{title(n)}: {n.op.name} is Reshape")
    return done


def outermost(r: Rewrite) -> list[str]:
    """A Transpose is written with four dimensions, between Reshapes: axes that stay together are one, axes of size 1
    are gone, and what is left begins at the first dimension."""
    return _written(r, outer=True)


def innermost(r: Rewrite) -> list[str]:
    """As transpose-outer, and what is left ends at the last dimension."""
    return _written(r, outer=False)


def _written(r: Rewrite, outer: bool) -> list[str]:
    done = []
    for n, _ in each(r, "Transpose"):
        perm, shape = _perm(r, n), shape_of(r, n.inputs[0])
        if perm is None or shape is None or 0 in shape:
            continue
        core, order = _core(shape, perm)
        if not 2 <= len(core) <= 4:
            continue
        offset = 0 if outer else 4 - len(core)
        target = (*(1,) * offset, *core, *(1,) * (4 - len(core) - offset))
        full = list(range(4))
        full[offset : offset + len(core)] = [p + offset for p in order]
        if target == shape and tuple(full) == perm:
            continue
        at = At(r, n)
        y = at.transpose(at.reshape(n.inputs[0], target), full)
        at.replace(at.reshape(y, [shape[p] for p in perm]))
        done.append(f"{title(n)}: as {list(full)} of {'x'.join(map(str, target))}")
    return done


def _core(shape: Sequence[int], perm: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """(sizes, order) of the same movement without axes of size 1, neighbours that stay neighbours as one axis."""
    kept = [p for p in perm if shape[p] != 1]
    runs: list[list[int]] = []
    big = [i for i, k in enumerate(shape) if k != 1]
    for p in kept:
        if runs and big.index(p) == big.index(runs[-1][-1]) + 1:
            runs[-1].append(p)
        else:
            runs.append([p])
    ordered = sorted(runs)
    return tuple(math.prod(shape[p] for p in run) for run in ordered), [ordered.index(run) for run in runs]


def _still(shape: Sequence[int], perm: Sequence[int]) -> bool:
    """Whether the elements stay in their order."""
    big = [p for p in perm if shape[p] != 1]
    return big == sorted(big)


def _perm(r: Rewrite, n: Node) -> tuple[int, ...] | None:
    own: Any = attributes(n).get("perm")
    v = r.values[n.inputs[0]]
    return tuple(own) if own is not None else tuple(range(len(v.shape)))[::-1] if v.has_shape else None


def _above(r: Rewrite, n: Node) -> tuple[tuple[int, ...], dict[int, int]] | None:
    """(perm, {input: what it is before its Transpose}) if all computed inputs have the same Transpose above them."""
    perm: tuple[int, ...] | None = None
    sources: dict[int, int] = {}
    for v in _data(n):
        if v < 0 or r.constant(v) is not None:
            continue
        before = r.maker(v, "Transpose")
        own = _perm(r, before) if before is not None else None
        readers = {m.index for m in r.readers(v)}
        if before is None or own is None or perm not in (None, own) or readers != {n.index} or v in r.outputs:
            return None
        perm, sources[v] = own, before.inputs[0]
    return (perm, sources) if perm is not None else None


def _data(n: Node) -> Sequence[int]:
    """Inputs that are permuted."""
    return n.inputs if n.op.name in (*BINARY, "Concat") else n.inputs[:1]


def _meets(r: Rewrite, value: int, perm: tuple[int, ...]) -> bool:
    """Whether behind the value, and operators that can be passed, there is a Transpose."""
    for _ in range(FAR):
        if value in r.outputs:
            return False
        readers = {m.index: m for m in r.readers(value)}
        if len(readers) != 1:
            return False
        (n,) = readers.values()
        if r.only_reader(value, "Transpose") is not None:
            return True
        if r.maker(n.outputs[0], *SINKS) is None or len(n.outputs) != 1:
            return False
        for v in _data(n):
            if v in (value, -1) or r.constant(v) is not None:
                continue
            other = r.maker(v, "Transpose")
            if other is None or _perm(r, other) != perm or {m.index for m in r.readers(v)} != {n.index}:
                return False
        reduction = reduced(r, n) if n.op.name.startswith("Reduce") else (0, True)
        if reduction is None or not reduction[1] or (n.op.name == "Softmax" and opset(r) < 13):
            return False
        value = n.outputs[0]
    return False


def _lifted(r: Rewrite, n: Node, own: Mapping[str, Any], perm: tuple[int, ...], sources: Mapping[int, int],
            ) -> tuple[int, tuple[int, ...]] | None:
    """(value, perm) with the operator in front of the Transpose; None, and nothing written, where it cannot go."""
    name, rank = n.op.name, len(perm)
    given = dict(own)
    inputs = list(n.inputs)
    arrays: dict[int, np.ndarray] = {}
    if name in (*BINARY, "Concat"):
        for i, v in enumerate(inputs):
            c = r.constant(v)
            if c is None:
                inputs[i] = sources[v]
            elif c.ndim > rank or (name == "Concat" and c.ndim != rank):
                return None
            elif c.size > 1 or name == "Concat":
                full = c.reshape((1,) * (rank - c.ndim) + c.shape)
                arrays[i] = np.ascontiguousarray(full.transpose(np.argsort(perm)))
            elif c.ndim:
                arrays[i] = c.reshape(())
        if len(inputs) > 2 and name not in ("Concat", "Max", "Min"):
            return None
    else:
        inputs[0] = sources[n.inputs[0]]
    match name:
        case "Concat":
            given["axis"] = perm[int(own["axis"]) % rank]
        case "Softmax":
            if opset(r) < 13:
                return None
            given["axis"] = perm[int(own.get("axis", -1)) % rank]
        case "Pad":
            pads = r.constant(n.inputs[1]) if present(n, 1) else None
            if pads is None or present(n, 3) or pads.size != 2 * rank:
                return None
            moved = np.zeros((2, rank), np.int64)
            moved[:, list(perm)] = pads.reshape(2, rank)
            arrays[1] = moved.reshape(-1)
        case "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin":
            found = reduced(r, n)
            if found is None or not found[1] or not found[0]:
                return None
            axes = tuple(sorted(perm[a] for a in found[0]))
            if present(n, 1):
                arrays[1] = np.array(axes, np.int64)
            else:
                given["axes"] = axes
        case _ if name in UNARY and any(v >= 0 and r.values[v].elements != 1 for v in inputs[1:]):
            return None
    for i, array in arrays.items():
        inputs[i] = r.add_constant(f"{title(n)}_moved", array)
    shape = r.values[n.outputs[0]].shape
    back = np.argsort(perm)
    value = r.add(n, f"{title(n)}_moved", name, inputs, given, like=n.outputs[0],
                  shape=tuple(shape[b] for b in back) if len(shape) == rank else shape)
    return value, perm


MERGE = Pass("transposes", merge)
SINK = Pass("transpose-push", sink)
RESHAPE = Pass("squeeze-to-reshape", as_reshape, always=False)
OUTER = Pass("transpose-outer", outermost, always=False)
INNER = Pass("transpose-inner", innermost, always=False)
PASSES = (SINK, MERGE, RESHAPE, OUTER, INNER)
