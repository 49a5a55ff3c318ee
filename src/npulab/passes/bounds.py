"""Running a network that is not believed: bounds on its tensors and on its time."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.ir import Graph

TENSOR_MAX = 1 << 32
"""Bytes of one tensor of a network that is run to compare it."""
SECONDS_MAX = 300.0
"""Of one run."""


def affordable(graph: Graph) -> None:
    """Raises UnsupportedError for a network with a tensor that is not worth its memory, by the inferred shapes."""
    for v in graph.values:
        size = math.prod(v.shape) * (v.dtype.numpy.itemsize if v.dtype.numpy is not None else 1)
        if size > TENSOR_MAX:
            raise UnsupportedError(f"'{graph.name}' is not run to compare it", got=f"{v.name[:60]} of {size} bytes",
                                   want=f"tensors of at most {TENSOR_MAX} bytes")


def limited_run(session: Any, names: Sequence[str], feeds: Mapping[str, NDArray[np.generic]],
                seconds: float = SECONDS_MAX) -> list[Any]:
    """What ONNX Runtime computes, stopped after so many seconds: between two operators, those of a loop too.

    Raises: TimeoutError, and whatever the runtime raises.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        options.terminate = True

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        found: list[Any] = session.run(list(names), dict(feeds), options)
        return found
    except Exception:
        if expired.is_set():
            raise TimeoutError(f"not done after {seconds:g} s") from None
        raise
    finally:
        timer.cancel()
