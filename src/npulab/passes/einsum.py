"""Einsum as MatMul."""

from __future__ import annotations

import math
from collections.abc import Sequence

from npulab.passes.patterns import At, each, shape_of, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def to_matmul(r: Rewrite) -> list[str]:
    """Einsum of two tensors becomes MatMul, with a Transpose and a Reshape of what needs one. Not where a letter occurs
    twice in a term, is summed over in one term alone, or where there are dots."""
    done = []
    for n, own in each(r, "Einsum"):
        equation = own["equation"]
        text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
        left, arrow, out = text.partition("->")
        terms = left.split(",")
        shapes = [shape_of(r, v) for v in n.inputs]
        if not arrow:
            out = "".join(sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1))
        if len(terms) != 2 or "." in text or any(len(set(t)) != len(t) for t in (*terms, out)) or None in shapes:
            continue
        sizes = {c: k for t, s in zip(terms, shapes, strict=True) for c, k in zip(t, s or (), strict=True)}
        a, b = terms
        batch = [c for c in out if c in a and c in b]
        inner = [c for c in a if c in b and c not in out]
        rows, columns = [c for c in out if c not in b], [c for c in out if c not in a]
        if {*a} != {*batch, *rows, *inner} or {*b} != {*batch, *inner, *columns}:
            continue
        if any(k != sizes[c] for t, s in zip(terms, shapes, strict=True) for c, k in zip(t, s or (), strict=True)):
            continue  # sizes of 1 that spread
        at = At(r, n)

        def count(letters: Sequence[str], sizes: dict[str, int] = sizes) -> int:
            return math.prod(sizes[c] for c in letters)

        def ordered(value: int, term: str, groups: Sequence[list[str]], at: At = at) -> int:
            letters = [c for g in groups for c in g]
            perm = [term.index(c) for c in letters]
            value = value if perm == sorted(perm) else at.transpose(value, perm)
            shape = [*(sizes[c] for c in groups[0]), *(count(g) for g in groups[1:])]  # noqa: B023 (used at once)
            return value if list(at.r.values[value].shape) == shape else at.reshape(value, shape)

        x = ordered(n.inputs[0], a, (batch, rows, inner))
        y = ordered(n.inputs[1], b, (batch, inner, columns))
        lead = [sizes[c] for c in batch]
        z = at.op("MatMul", x, y, shape=(*lead, count(rows), count(columns)))
        letters = [*batch, *rows, *columns]
        if len(rows) != 1 or len(columns) != 1:
            z = at.reshape(z, [sizes[c] for c in letters])
        perm = [letters.index(c) for c in out]
        at.replace(z if perm == sorted(perm) else at.transpose(z, perm))
        done.append(f"{title(n)}: {text} is MatMul")
    return done


PASS = Pass("einsum-to-matmul", to_matmul, always=False)
