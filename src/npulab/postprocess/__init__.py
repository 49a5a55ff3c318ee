"""What follows a network whose head was cut off: boxes decoded and suppressed in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, UnsupportedError
from npulab.postprocess import glue
from npulab.postprocess.types import Nms, Post

Arrays = Mapping[str, NDArray[Any]]


def apply(post: Post, outputs: Arrays) -> dict[str, NDArray[Any]]:
    """The outputs of the untouched network, by name, from those of its body.

    Raises: ModelError if the outputs are not those that it was made for.
    """
    arrays = _checked(post, outputs)
    try:
        found = glue.restored(post.plain, arrays)
    except (ValueError, IndexError) as e:  # shapes that only show here, as of what one stage hands to the next
        raise ModelError(f"the post-processing of '{post.model}' does not fit together", got=str(e)[:200]) from None
    return {name: found[name] for name in post.outputs}


def detect(post: Post, outputs: Arrays, score: float = 0.25, iou: float = 0.45, limit: int = 300,
           several: bool = False) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Objects, from a body's outputs: boxes (N, 4: left, top, right, bottom, as fractions of the input), scores (N,),
    classes (N,). Boxes whose score is too low are not even decoded; see `glue.objects`.

    Raises: like apply; UnsupportedError for a network that says nothing about the units of its boxes.
    """
    if isinstance(post.stages[0], Nms):
        raise UnsupportedError(f"the boxes of '{post.model}' are in units that only its maker knows",
                               try_="npulab.postprocess.apply gives its outputs")
    return glue.objects(post.plain, _checked(post, outputs), score, iou, limit, several)


def _checked(post: Post, outputs: Arrays) -> dict[str, NDArray[Any]]:
    """The outputs as real numbers, by the names that the stages know, channels before height and width.

    A converter may have named them anew, or put channels last: then their order and shapes say which is which. The
    layout is one for all, because a map of 80 classes at 80 x 80 places would fit either way.
    """
    by_name = all(name in outputs for name in post.body)
    given = [np.asarray(outputs[name]) for name in post.body] if by_name else [np.asarray(x) for x in outputs.values()]
    shapes = list(post.body.values())
    last = [(s[0], *s[2:], s[1]) if len(s) == 4 else s for s in shapes]
    channels_last = len(given) == len(shapes) and [x.shape for x in given] == last != shapes
    if [x.shape for x in given] != (last if channels_last else shapes):
        raise ModelError(f"these are not the outputs that the post-processing of '{post.model}' was made for",
                         want="; ".join(f"{name}: {list(s)}" for name, s in post.body.items()),
                         got="; ".join(f"{name}: {list(np.shape(x))}" for name, x in outputs.items()) or "none")
    found = {}
    for (name, shape), x in zip(post.body.items(), given, strict=True):
        if x.dtype.kind not in "iuf" or (x.dtype.kind != "f" and name not in post.quantization):
            raise ModelError(f"the output '{name}' is not what the post-processing of '{post.model}' takes",
                             want="floats" + (", or whole numbers as the body has them" if post.quantization else ""),
                             got=str(x.dtype))
        if channels_last and len(shape) == 4:
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        found[name] = x.astype(np.float32) if x.dtype in (np.float16, np.float64) else x
    return glue.real(found, post.quantization)
