"""Nouns of computing on a GPU: a kernel's source, a launch of it, what a layer is lowered to, traits of a device.

Tensors are dense float32, float16 (stored; computed on as floats unless halves are asked for), int8 or int32. Images
are NHWC, matrices row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Number = Literal["float32", "float16", "int8"]
"""What a kernel's inputs and weights are stored as."""
Activation = Literal["none", "relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid", "tanh", "gelu", "leaky"]
"""Applied to what a kernel is about to store. leaky: 0.01 of what is negative unless the layer says otherwise."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """OpenCL C with one entry point. The same source is compiled once for a device."""

    source: str
    entry: str


@dataclass(frozen=True, slots=True)
class Buffer:
    """An argument: the tensor in this role. Roles of a layer: "input", "input1"..., "output", names of its constants
    and scratch tensors."""

    role: str


Argument = Buffer | np.int32 | np.uint32 | np.float32


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a kernel.

    size, group  work items in all and in a group; each of size is a multiple of group's.
    operations   scalar operations that the layer needs (a fused multiply-add is two), not those that padding adds.
    traffic      bytes that it reads and writes at least once.
    """

    kernel: Kernel
    size: tuple[int, ...]
    group: tuple[int, ...]
    arguments: tuple[Argument, ...]
    label: str
    operations: float = 0.0
    traffic: float = 0.0


@dataclass(frozen=True, slots=True)
class Lowered:
    """A layer as launches, one after the other.

    constants  role -> array, packed as the kernels want it; uploaded once.
    scratch    role -> bytes that live during these launches alone.
    """

    launches: tuple[Launch, ...]
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    scratch: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Traits:
    """What tiling is chosen by. From a probe's result where there is one, else as the device states, else assumed.

    cpu            one work item should do much: it has a whole core with its vector registers.
    vector         float32 of the widest vector that a work item computes on at once (1: scalar GPU lanes).
    registers      32-bit registers of a work item that cost no occupancy (CPU: lanes of all vector registers).
    warp           work items that go in step.     local_bytes  of local memory a group.      group_max  work items.
    caches         bytes of L1, L2..., of one core the first.
    operations     a second at most, in float32, a fused multiply-add two; 0: not known.
    bandwidth      bytes a second of memory; 0: not known.
    halves         computes on float16 (cl_khr_fp16).
    sources        trait -> "measured", "stated" or "assumed".
    """

    name: str
    cpu: bool
    compute_units: int
    vector: int
    registers: int
    warp: int
    local_bytes: int
    group_max: int
    caches: tuple[int, ...] = ()
    operations: float = 0.0
    bandwidth: float = 0.0
    halves: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)
