"""ONNX models run on samples: one session, one sample after another or some side by side."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from npulab.errors import UnsupportedError, UsageError, runtime_said
from npulab.importers.onnx_parts import Thin, thin
from npulab.program.pages import LARGE, Buffer, Scratch
from npulab.quantization.light import opened
from npulab.quantization.types import Array, Feeds

T = TypeVar("T")
S = TypeVar("S")
Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""
M_ARENA_MAX = -8
"""Of glibc's malloc.h; other C libraries know no such option, and say so by doing nothing."""
OPEN_FILES = "/proc/self/fd"
"""Where Linux has the process's open files by number, those without a name too; not everywhere is /proc mounted."""


def workers() -> int:
    """Samples side by side."""
    return max(1, min(8, os.cpu_count() or 1))


def in_order(pool: ThreadPoolExecutor, job: Callable[[S], T], samples: Iterable[S], ahead: int,
             progress: Progress | None = None) -> Iterator[T]:
    """Results of `job`, in the samples' order, with at most `ahead` of them in memory."""
    waiting: deque[Future[T]] = deque()
    done, total = 0, len(samples) if isinstance(samples, Sized) else 0
    try:
        for feeds in samples:
            waiting.append(pool.submit(job, feeds))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
                done += 1
                if progress:
                    progress(done, total)
        while waiting:
            yield waiting.popleft().result()
            done += 1
            if progress:
                progress(done, total)
    finally:
        for f in waiting:
            f.cancel()


def give_back() -> None:
    """Memory that sessions had, to the system: glibc keeps what lies between other things, 100 MB of EfficientNet's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def share_heap() -> None:
    """New threads take memory from the process's one heap: glibc gives each its own, which keeps what samples took
    there, 25 MiB of EfficientNet's."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_ARENA_MAX, 1)


def _widen(model: Thin) -> None:
    """Constants of 2 bits as bytes: kernels that ONNX Runtime fuses out of DequantizeLinear take none such."""
    from onnx import TensorProto, numpy_helper

    bytes_of = {getattr(TensorProto, "INT2", -1): np.int8, getattr(TensorProto, "UINT2", -1): np.uint8}
    for t in model.proto.graph.initializer:
        if t.data_type in bytes_of:
            if t.name in model.contents:
                t.raw_data = bytes(model.contents.pop(t.name)[1]())
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(bytes_of[t.data_type]), t.name))


def runner(model: Buffer | Thin, names: Sequence[str], threads: int = 1, plain: bool = False
           ) -> Callable[[Feeds], list[Array]]:
    """A function from inputs to the tensors `names`, which may lie inside the model. Networks of common operators run
    as they are (light.opened); for others ONNX Runtime is loaded, `threads` a run. A Thin model gets them as outputs
    then.

    Layers between DequantizeLinear and QuantizeLinear are computed in floats: integer kernels would differ from CPU to
    CPU. `plain`: no optimizations at all.

    Raises: UsageError without ONNX Runtime; UnsupportedError if it does not run the model.
    """
    give_back()
    made = model if isinstance(model, Thin) else thin(model)
    del model
    light = opened(made, names)
    if light is not None:
        return light
    try:
        import onnx
        import onnxruntime as ort
    except ImportError:
        raise UsageError("quantizing runs networks in ONNX Runtime, which is not installed",
                         try_="pip install 'npulab[onnx]'") from None
    graph = made.proto.graph
    have = {o.name for o in graph.output}
    for name in dict.fromkeys(names):
        if name not in have:
            graph.output.append(onnx.ValueInfoProto(name=name))
    _widen(made)
    inputs = {i.name for i in graph.input}
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False  # it keeps twice of what a sample takes, each session for itself
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else data become int8 by the way
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    asked = [n for n in names if n not in inputs]

    def session(source: str | bytes) -> Any:
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"],
                                        disabled_optimizers=["WeightBiasQuantization"])  # of layers in floats, unasked
        except Exception as e:  # the runtime is C++: it raises what it likes
            raise UnsupportedError("ONNX Runtime does not run the network", got=runtime_said(e)) from None

    ready = _opened(made, session)
    del made, graph
    give_back()  # what opening it took

    def run(feeds: Feeds) -> list[Array]:
        try:
            found = dict(zip(asked, ready.run(asked, dict(feeds)) if asked else [], strict=True))
        except Exception as e:
            raise UnsupportedError("ONNX Runtime does not run the network on this sample",
                                   got=runtime_said(e)) from None
        return [np.asarray(feeds[n]) if n in inputs else found[n] for n in names]

    return run


def _opened(model: Thin, session: Callable[[str | bytes], Any]) -> Any:
    """The session of a model. Large ones are read from a file without a name: as bytes they would be there twice."""
    size, pieces = model.pieces()
    if size < LARGE or not os.path.isdir(OPEN_FILES):
        return session(b"".join(pieces))
    with Scratch(pieces) as scratch:
        return session(f"{OPEN_FILES}/{scratch.file.fileno()}")
