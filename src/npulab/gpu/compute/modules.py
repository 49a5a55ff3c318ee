"""Kernels of networks as SPIR-V, for Vulkan: what a layer becomes, and running it. The kernels are in `modules_*`.

Tensors are row by row, images NHWC, of float32, float16 or int8; their last axis is padded to a multiple of four, and
padding is 0, in what shaders read and in what they write. Sums are float32, of int8 int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError, InvariantError, UnsupportedError
from npulab.gpu.compute.integers import bytes_alone
from npulab.gpu.compute.modules_numbers import DTYPES, fours, padded
from npulab.gpu.compute.types import Number
from npulab.gpu.vulkan import Vulkan


@dataclass(frozen=True, slots=True)
class Module:
    """words   SPIR-V.      groups  (x, y).
    buffers    roles of bindings 0, 1, ...
    operations scalar operations that are needed (a fused multiply-add is two).
    turns      of loops that a thread does, at most.
    local_bytes  of local memory that a group holds.
    halves     it computes on halves, too: not every device does.
    threads    of a group.
    """

    words: bytes
    groups: tuple[int, int]
    buffers: tuple[str, ...]
    operations: float
    turns: int
    local_bytes: int = 0
    halves: bool = False
    threads: int = 64


@dataclass(frozen=True, slots=True)
class Layer:
    """Modules, one after the other.

    shapes     role -> shape, of "input", "input1", ... and "output", without padding.    number  of all of them.
    constants  role -> array, packed as the modules want it.
    scratch    role -> bytes that live during these modules alone.
    """

    modules: tuple[Module, ...]
    shapes: Mapping[str, tuple[int, ...]]
    number: Number = "float32"
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    scratch: Mapping[str, int] = field(default_factory=dict)

    @property
    def operations(self) -> float:
        return sum(m.operations for m in self.modules)


def run(bench: Vulkan, layer: Layer, tensors: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], float]:
    """(output, seconds by the device's clock), once; otherwise as `prepared`."""
    launch, read = prepared(bench, layer, tensors)
    seconds = launch()
    return read(), seconds


def prepared(bench: Vulkan, layer: Layer, tensors: Mapping[str, NDArray[Any]]
             ) -> tuple[Callable[[], float], Callable[[], NDArray[Any]]]:
    """(runs it, as often as it is called: seconds by the device's clock; reads the output). Raises: what the bench
    does; UnsupportedError if its driver does not do all turns of the loops, or it has no halves and they are needed;
    CapacityError if it has not the local memory or the threads; InvariantError for tensors of other shapes, or of int8
    layers with numbers that are no bytes.

    Shapes:  tensors by roles and the output as the layer's, without padding; axes before the last may be joined.
    """
    for role, want in layer.shapes.items():
        got = tensors[role].shape if role in tensors else ()
        if role != "output" and (got[-1:] != want[-1:] or math.prod(got) != math.prod(want)):
            raise InvariantError(f"the tensor '{role}' is of another shape", want=want, got=got or "none")
        if layer.number == "int8" and role != "output":
            bytes_alone(f"numbers of the tensor '{role}'", tensors[role])
    turns, local_bytes = max(m.turns for m in layer.modules), max(m.local_bytes for m in layer.modules)
    if turns > bench.turns_max:  # llvmpipe: silently
        raise UnsupportedError(f"{bench.identity.name} ends loops after {bench.turns_max} turns", want=turns)
    if local_bytes > bench.limits.local_bytes:
        raise CapacityError(f"{bench.identity.name} has no room for what a work group holds",
                            want=f"{local_bytes} bytes of local memory", got=bench.limits.local_bytes)
    if (threads := max(m.threads for m in layer.modules)) > bench.limits.group_max:
        raise CapacityError(f"{bench.identity.name} has no work groups of so many threads", want=f"{threads} threads",
                            got=f"at most {bench.limits.group_max}", try_="a shape of fewer threads")
    if any(m.halves for m in layer.modules) and "float16" not in bench.limits.elements:
        raise UnsupportedError(f"{bench.identity.name} does not compute on halves",
                               try_="halves=False: they are stored, floats computed")
    dtype = DTYPES[layer.number]
    shape = layer.shapes["output"]
    columns = 4 * fours(shape[-1])
    size = math.prod(shape[:-1]) * columns
    output = np.frombuffer(b"\xff" * (size * np.dtype(dtype).itemsize), dtype)  # not a number, until written
    given = {role: padded(np.asarray(x), dtype) for role, x in tensors.items()} | dict(layer.constants)
    given |= {role: np.zeros(-(-count // 4), np.uint32) for role, count in layer.scratch.items()}
    given["output"] = output
    needed = {role for m in layer.modules for role in m.buffers}
    buffers = {role: bench._buffer(content) for role, content in given.items() if role in needed}

    def launch() -> float:
        return sum(bench.compute(m.words, m.groups, [buffers[r] for r in m.buffers]) for m in layer.modules)

    def read() -> NDArray[Any]:
        found: NDArray[Any] = bench._read(buffers["output"], size, dtype)
        return found.reshape(*shape[:-1], columns)[..., :shape[-1]]

    return launch, read
