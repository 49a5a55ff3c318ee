"""Post-processing as one Python file that needs NumPy alone, made of the very functions that npulab itself runs."""

from __future__ import annotations

import ast
import inspect
import json
from types import ModuleType

import msgspec

from npulab.postprocess import boxes, glue, ssd, suppress, yolo
from npulab.postprocess.types import Post

PARTS: tuple[ModuleType, ...] = (boxes, yolo, ssd, suppress, glue)


def standalone(post: Post) -> str:
    """The program: `postprocess(outputs)` and `detect(outputs, ...)` over a dictionary of a body's outputs."""
    functions = "\n\n".join(_body(m) for m in PARTS)
    picture = "" if post.picture is None else (
        f"\nInput: {post.picture.name!r}, {post.picture.height} x {post.picture.width} pixels.")
    outputs = "\n".join(f"    {name!r}: {list(shape)}" for name, shape in post.body.items())
    body = {name: list(shape) for name, shape in post.body.items()}
    named = {name: list(q) for name, q in post.quantization.items()}
    return f'''"""Post-processing of {_plain(post.model)}, whose head was cut off. Made by npulab; needs NumPy alone.

    import {{this file}} as post
    original = post.postprocess(outputs)              # what the network gave before the cut, by name
    boxes, scores, classes = post.detect(outputs)     # objects; boxes as fractions of the input
    pixels = post.on_picture(boxes, (input height, width), (picture height, width), "pad")

`outputs` is a dictionary of the body's outputs; maps may all have channels last instead:
{_plain(outputs)}{_plain(picture)}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

{functions}

# this network

HEAD: Any = prepared({_literal(json.loads(msgspec.json.encode(post.stages)))})
OUTPUTS = {list(post.outputs)!r}
BODY: Any = {body!r}
QUANTIZATION: Any = {named!r}


def postprocess(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """What the untouched network gave, by name."""
    found = restored(HEAD, real(placed(outputs, BODY), QUANTIZATION))
    return {{name: found[name] for name in OUTPUTS}}


def detect(outputs: Mapping[str, Array], score: float = 0.25, iou: float = 0.45, limit: int = 300,
           several: bool = False) -> tuple[Array, Array, Array]:
    """Boxes (N, 4: left, top, right, bottom, as fractions of the input), scores and classes."""
    return objects(HEAD, real(placed(outputs, BODY), QUANTIZATION), score, iou, limit, several)
'''


def _body(module: ModuleType) -> str:
    """A module's source without its heading and imports."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    for n in ast.parse(source).body:
        if isinstance(n, ast.Import | ast.ImportFrom) or (n.lineno == 1 and isinstance(n, ast.Expr)):
            assert n.end_lineno is not None
            lines[n.lineno - 1 : n.end_lineno] = [""] * (n.end_lineno - n.lineno + 1)
    name = module.__name__.rsplit(".", 1)[-1]
    return f"# {name}\n\n" + "\n".join(lines).strip() + "\n"


def _plain(text: str) -> str:
    """Text from a file, for the inside of a docstring."""
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _literal(value: object) -> str:
    """A literal with one entry of the outermost dictionaries a line."""
    assert isinstance(value, list)
    return "[\n" + "".join("    {\n" + "".join(f"        {k!r}: {v!r},\n" for k, v in stage.items()) + "    },\n"
                           for stage in value) + "]"
