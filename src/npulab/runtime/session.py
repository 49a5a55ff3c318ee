"""Session: a Program on a Device, run as often as you like."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import DeviceError, InvariantError, UnsupportedError, UsageError
from npulab.ir.types import DType
from npulab.program.types import HostStep, NpuStep, Program, Tensor, Transfer
from npulab.runtime.device import Device, Fault
from npulab.runtime.host import HostModel

Array = NDArray[Any]
Trace = Callable[[int, Array], None]
"""Is given every tensor that becomes known: its value index in the source graph, and its content."""

FAULTS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did in one run. `seconds` is wall time of this machine; it says nothing about a board."""

    index: int
    where: str
    nodes: tuple[int, ...]
    ops: tuple[str, ...]
    jobs: int
    macs: int
    upload_bytes: int
    download_bytes: int
    seconds: float


class Session:
    """Maps the program's memory, initialises the device, prepares host models; then `run`, repeatedly.

    `device` may be None for a program without NPU steps. `records` tells of the last run, a row per step.

    Raises: DeviceError if the device reports a fault; UnsupportedError if LiteRT is missing or refuses a host model.
    """

    def __init__(self, program: Program, device: Device | None) -> None:
        self.program = program
        self.records: list[StepRecord] = []
        self._tensors = {t.value: t for t in program.tensors}
        self._names = tensor_names(program)
        self._hosts = {i: HostModel(s.model, _host_name(program, s))
                       for i, s in enumerate(program.steps) if isinstance(s, HostStep)}
        self._device = device
        if any(isinstance(s, NpuStep) for s in program.steps):
            if device is None:
                raise UsageError("the program has NPU steps, and no device was given")
            for section in program.sections:
                device.map(section.name, section.address, section.size, section.data)
            if program.init:
                _check(device.submit(program.init), "the initialisation stream")

    def run(self, inputs: Mapping[str | int, Array], trace: Trace | None = None) -> dict[str, Array]:
        """The model's outputs by name. Inputs go by name, or by position from 0.

        Raises: UsageError if an input is missing, unknown, or of another shape or type; DeviceError on faults.
        """
        known = self._take(inputs)
        records: list[StepRecord] = []
        if trace:
            for v, array in known.items():
                trace(v, array)
        for i, step in enumerate(self.program.steps):
            start = time.perf_counter()
            made = self._npu(i, step, known) if isinstance(step, NpuStep) else self._host(i, step, known)
            records.append(_record(self.program, i, step, time.perf_counter() - start))
            known.update(made)
            if trace:
                for v, array in made.items():
                    trace(v, array)
        self.records = records
        return {self._names[v]: known[v] for v in self.program.outputs}

    def _take(self, inputs: Mapping[str | int, Array]) -> dict[int, Array]:
        """value -> array, after checks."""
        wanted = self.program.inputs
        names = {self._names[v]: v for v in wanted}
        listed = ", ".join(f"'{n}'" for n in names)
        found: dict[int, Array] = {}
        for key, array in inputs.items():
            v = names.get(key) if isinstance(key, str) else wanted[key] if 0 <= key < len(wanted) else None
            if v is None:
                raise UsageError(f"the model has no input {key!r}", want=listed)
            if v in found:
                raise UsageError(f"input '{self._names[v]}' is given twice")
            t = self._tensors[v]
            array = np.asarray(array)
            dtype = DType(t.dtype).numpy
            if dtype is None:
                raise UnsupportedError(f"input '{self._names[v]}' is of a type that NumPy does not have", got=t.dtype)
            if array.dtype != dtype or array.shape != t.shape:
                raise UsageError(f"input '{self._names[v]}' is of another shape or type", want=describe(t),
                                 got=f"{array.dtype}{list(array.shape)}")
            found[v] = np.ascontiguousarray(array).reshape(t.shape)
        missing = [self._names[v] for v in wanted if v not in found]
        if missing:
            raise UsageError("not every input is given", want=listed, got=f"nothing for '{missing[0]}'")
        return found

    def _npu(self, i: int, step: NpuStep, known: Mapping[int, Array]) -> dict[int, Array]:
        device = self._device
        assert device is not None  # __init__ refuses NPU steps without a device
        for t in step.uploads:
            data = np.ascontiguousarray(known[t.value]).reshape(-1).view(np.uint8)
            if data.size != t.size:
                raise DeviceError(f"tensor '{self._names[t.value]}' has another size than it was compiled for",
                                  want=f"{t.size} bytes", got=f"{data.size} bytes")
            device.write(t.address, data ^ np.uint8(0x80) if t.flip else data)
        _check(device.submit(step.words), f"step {i}")
        return {t.value: self._download(device, t) for t in step.downloads}

    def _download(self, device: Device, t: Transfer) -> Array:
        tensor = self._tensors[t.value]
        data = device.read(t.address, t.size)
        data = data ^ np.uint8(0x80) if t.flip else data.copy()
        dtype = DType(tensor.dtype).numpy
        if dtype is None:
            raise InvariantError(f"the NPU returns a tensor of type {tensor.dtype}")
        return data.view(dtype).reshape(tensor.shape)

    def _host(self, i: int, step: HostStep, known: Mapping[int, Array]) -> dict[int, Array]:
        found = self._hosts[i].run([known[v] for v in step.inputs])
        if len(found) != len(step.outputs):
            raise DeviceError(f"{self._hosts[i].what} gives another number of tensors", want=len(step.outputs),
                              got=len(found))
        return dict(zip(step.outputs, found, strict=True))


def tensor_names(program: Program) -> dict[int, str]:
    """value -> the name to know it by: the model's own; a name that is empty or not unique gets the value's index."""
    count = Counter(t.name for t in program.tensors)
    return {t.value: t.name if t.name and count[t.name] == 1 else f"{t.name or 'tensor'}#{t.value}"
            for t in program.tensors}


def describe(t: Tensor) -> str:
    return f"{t.dtype}{list(t.shape)}"


def _host_name(program: Program, step: HostStep) -> str:
    ops = list(dict.fromkeys(program.ops[n] for n in step.nodes))
    shown = ", ".join(ops[:4]) + (", ..." if len(ops) > 4 else "")
    nodes = f"node {step.nodes[0]}" if len(step.nodes) == 1 else f"{len(step.nodes)} nodes"
    return f"the host part {shown} ({nodes} of {program.model})" if step.nodes else "a host part without nodes"


def _check(faults: list[Fault], what: str) -> None:
    if not faults:
        return
    shown = [str(f) for f in faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        shown.append(f"and {len(faults) - FAULTS_SHOWN} more")
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise DeviceError(f"the NPU reports {count} in {what}", got="\n          ".join(shown))


def _record(program: Program, i: int, step: NpuStep | HostStep, seconds: float) -> StepRecord:
    ops = tuple(program.ops[n] for n in step.nodes)
    if isinstance(step, HostStep):
        return StepRecord(i, "host", step.nodes, ops, 0, 0, 0, 0, seconds)
    return StepRecord(i, "npu", step.nodes, ops, len(step.jobs), sum(j.macs for j in step.jobs),
                      sum(t.size for t in step.uploads), sum(t.size for t in step.downloads), seconds)
