"""DepthToSpace and SpaceToDepth as Reshape and Transpose, and back."""

from __future__ import annotations

from npulab.ir import Node
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import add, add_reshape, captured, image, nodes, number, opset, text, whole

TO_SPACE = {"DCR": (0, 3, 4, 1, 5, 2), "CRD": (0, 1, 4, 2, 5, 3)}
"""How axes of N,b,b,C,H,W and of N,C,b,b,H,W become N,C,H,b,W,b."""
TO_DEPTH = (0, 3, 5, 1, 2, 4)
"""How axes of N,C,H,b,W,b become N,b,b,C,H,W."""


def to_transpose(r: Rewrite) -> list[str]:
    """DepthToSpace and SpaceToDepth are a Reshape to six axes, a Transpose and a Reshape."""
    done = []
    for n in nodes(r, "DepthToSpace", "SpaceToDepth"):
        shape = image(r, n.inputs[0])
        b = number(n, "blocksize", 0)
        if shape is None or b < 1:
            continue
        name, (count, c, h, w) = n.name or n.op.name, shape
        mode = text(n, "mode", "DCR")
        if n.op.name == "SpaceToDepth":
            if h % b or w % b:
                continue
            six, order, result = (count, c, h // b, b, w // b, b), TO_DEPTH, (count, c * b * b, h // b, w // b)
        else:
            if c % (b * b) or mode not in TO_SPACE:
                continue
            deep = c // (b * b)
            six = (count, b, b, deep, h, w) if mode == "DCR" else (count, deep, b, b, h, w)
            order, result = TO_SPACE[mode], (count, deep, h * b, w * b)
        value = add_reshape(r, n, f"{name}_six", n.inputs[0], six)
        value = add(r, n, f"{name}_order", "Transpose", (value,), {"perm": order}, shape=tuple(six[i] for i in order))
        r.substitute(n.outputs[0], add_reshape(r, n, f"{name}_four", value, result))
        done.append(f"{name}: Reshape, Transpose, Reshape")
    return done


def from_transpose(r: Rewrite) -> list[str]:
    """A Reshape to six axes, a Transpose and a Reshape that move blocks between channels and pixels are DepthToSpace or
    SpaceToDepth."""
    done = []
    for n in nodes(r, "Transpose"):
        first, last = r.maker(n.inputs[0], "Reshape"), r.only_reader(n.outputs[0], "Reshape")
        if first is None or last is None or r.only_reader(n.inputs[0]) is None:
            continue
        source, result = image(r, first.inputs[0]), image(r, last.outputs[0])
        found = _recognized(r, n, source, result) if source is not None and result is not None else None
        if found is None or not captured(r).isdisjoint(last.outputs):
            continue
        op, block, mode = found
        name = n.name or op
        a = {"blocksize": block, **({"mode": mode} if mode == "CRD" else {})}
        r.substitute(last.outputs[0], add(r, last, name, op, (first.inputs[0],), a, shape=result))
        done.append(f"{name}: {op} with blocks of {block}x{block}")
    return done


def _recognized(r: Rewrite, n: Node, source: tuple[int, ...], result: tuple[int, ...]) -> tuple[str, int, str] | None:
    """(operator, block, order of channels)."""
    v = r.values[n.inputs[0]]
    perm = whole(n, "perm")
    if not v.has_shape or v.dynamic_axes or len(v.shape) != 6 or len(perm) != 6:
        return None
    six, (count, c, h, w) = v.shape, source
    for mode, order in TO_SPACE.items():
        b = six[1] if mode == "DCR" else six[2]
        deep = c // max(b * b, 1)
        if perm == order and b > 1 and (mode == "DCR" or opset(r) >= 11) and result == (count, deep, h * b, w * b) \
                and six == ((count, b, b, deep, h, w) if mode == "DCR" else (count, deep, b, b, h, w)):
            return "DepthToSpace", b, mode
    b = six[3]
    if perm == TO_DEPTH and b > 1 and h % b == 0 and w % b == 0 and six == (count, c, h // b, b, w // b, b) \
            and result == (count, c * b * b, h // b, w // b):
        return "SpaceToDepth", b, ""
    return None


TO_TRANSPOSE = Pass("blocks-to-transpose", to_transpose, always=False)
FROM_TRANSPOSE = Pass("transpose-to-blocks", from_transpose, always=False)
