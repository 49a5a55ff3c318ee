"""Host operators: small TFLite models, run by LiteRT with its reference kernels.

LiteRT executes these models in this process. It checks a model's FlatBuffer, but it is not a sandbox: whoever hands you
a model hands you input for LiteRT's native code. Isolate the whole process if that matters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from npulab.errors import DeviceError, UnsupportedError

Array = NDArray[Any]


class HostModel:
    """A TFLite model, ready to run. Tensors go in and come out by position.

    The kernels are the reference ones; a model with an operator that has none gets LiteRT's default kernels, without a
    delegate. State that the model keeps (an LSTM's) is cleared before each run: equal input gives equal output.

    `quick` asks for LiteRT's default kernels instead, for timing them: their results differ by a step here and there.

    Raises: UnsupportedError if LiteRT is not installed, or refuses the model; `what` names it in messages.
    """

    def __init__(self, model: bytes | memoryview, what: str, keep_all: bool = False, quick: bool = False) -> None:
        interpreter, kernels = _litert()
        self.what = what
        refusal = None
        for kind in (kernels.AUTO if quick else kernels.BUILTIN_REF, kernels.BUILTIN_WITHOUT_DEFAULT_DELEGATES):
            try:
                self._interpreter = interpreter(model_content=bytes(model), num_threads=1,
                                                experimental_op_resolver_type=kind,
                                                experimental_preserve_all_tensors=keep_all)
                self._interpreter.allocate_tensors()
                break
            except (ValueError, RuntimeError, TypeError, MemoryError) as e:
                refusal = refusal or e
        else:
            _refuse(what, refusal)
        self.inputs: list[dict[str, Any]] = self._interpreter.get_input_details()
        self.outputs: list[dict[str, Any]] = self._interpreter.get_output_details()

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """The model's outputs. Raises DeviceError if LiteRT fails on these arrays."""
        if len(arrays) != len(self.inputs):
            raise DeviceError(f"{self.what} takes another number of tensors", want=len(self.inputs), got=len(arrays))
        try:
            self._interpreter.reset_all_variables()
            for detail, array in zip(self.inputs, arrays, strict=True):
                self._interpreter.set_tensor(detail["index"], np.ascontiguousarray(array).reshape(array.shape))
            self._interpreter.invoke()
            return [self._interpreter.get_tensor(d["index"]) for d in self.outputs]
        except (ValueError, RuntimeError, TypeError, MemoryError) as e:
            raise DeviceError(f"LiteRT failed while running {self.what}", got=_said(e)) from e


def _litert() -> tuple[Any, Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as e:
        raise UnsupportedError("host operators need LiteRT, which is not installed", got=e,
                               try_="pip install 'npulab[litert]'") from e
    return Interpreter, OpResolverType


def _said(error: BaseException | None, limit: int = 240) -> str:
    """LiteRT's message on one line, repetitions cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


def _refuse(what: str, error: BaseException | None) -> NoReturn:
    said = _said(error)
    custom = re.search(r"unresolved custom op: ([\w.]+)", said)
    failed = re.search(r"Node number \d+ \((\w+)\)", said)
    if custom:
        raise UnsupportedError(f"LiteRT has no custom operator '{custom[1].rstrip('.')}', which {what} needs", got=said,
                               try_="cut the model before that operator, and compute it from the outputs")
    raise UnsupportedError(f"LiteRT refuses {what}", **{"op": failed[1]} if failed else {}, got=said,
                           try_="convert the model again with a current converter, or cut off what is refused")
