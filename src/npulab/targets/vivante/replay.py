"""Execute a recorded case: the command streams and memory images of the open driver, against TFLite's reference.

A case is a zip of `NPU/index.json`, the streams `NPU/submitNNN.cmd.bin`, memory images `NPU/mem-S-VA.bin` of submit S
at address VA, and `ref.npz` with the tensors that TFLite's reference kernels compute. Submit 0 initialises the NPU;
each other one is a subgraph. What a recording holds counts as written: it is all the memory that the driver mapped.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import DeviceError, ModelError
from npulab.runtime.replay import ReplayedOutput, ReplayResult
from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.machine import Limits, VirtualNPU

MEMBER_MAX = 64 << 20
"""Bytes of one member, unpacked."""
TOTAL_MAX = 512 << 20
MEMBERS_MAX = 4096
_MEMORY = re.compile(r"mem-(\d{1,4})-([0-9a-f]{1,8})\.bin")


class _Case:
    """The archive, read with bounds."""

    def __init__(self, path: str | os.PathLike[str], npu: str) -> None:
        self.path, self.npu = path, npu
        try:
            self.zip = zipfile.ZipFile(path)
            infos = self.zip.infolist()
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as e:
            raise ModelError(f"{path} is not a recorded case", got=e, want="a zip archive") from None
        if len(infos) > MEMBERS_MAX or sum(i.file_size for i in infos) > TOTAL_MAX:
            raise ModelError(f"{path} is too large for a recorded case", got=f"{len(infos)} members",
                             want=f"at most {MEMBERS_MAX} members of {TOTAL_MAX} bytes in all")
        self.sizes = {i.filename: i.file_size for i in infos}

    def read(self, name: str) -> bytes:
        if name not in self.sizes:
            raise ModelError(f"{self.path} has no '{name}'", try_="use a case recorded for this NPU")
        if self.sizes[name] > MEMBER_MAX:
            raise ModelError(f"'{name}' in {self.path} is too large", got=f"{self.sizes[name]} bytes",
                             want=f"at most {MEMBER_MAX}")
        try:
            with self.zip.open(name) as f:
                return f.read(MEMBER_MAX + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as e:
            raise ModelError(f"'{name}' in {self.path} is damaged", got=e) from None

    def index(self) -> dict[str, Any]:
        try:
            index = json.loads(self.read(f"{self.npu}/index.json"))
        except (ValueError, RecursionError) as e:
            raise ModelError(f"the index of {self.path} is not JSON", got=str(e)[:80]) from None
        if not isinstance(index, dict):
            raise ModelError(f"the index of {self.path} is not an object")
        return index

    def reference(self) -> dict[str, NDArray[np.generic]]:
        try:
            with np.load(io.BytesIO(self.read("ref.npz")), allow_pickle=False) as arrays:
                if sum(i.file_size for i in arrays.zip.infolist()) > TOTAL_MAX:
                    raise ValueError("too large")
                return {k: arrays[k] for k in arrays.files}
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, SyntaxError,
                NotImplementedError, RuntimeError, AttributeError, TypeError, OverflowError, MemoryError) as e:
            raise ModelError(f"ref.npz in {self.path} cannot be read", got=str(e)[:80]) from None


def replay(path: str | os.PathLike[str], chip: Chip, limits: Limits | None = None) -> ReplayResult:
    """Execute every stream of a case on a virtual NPU and compare each subgraph's outputs with the reference.

    A subgraph behind host operators gets its inputs from the reference: the recording had no hardware, so what lies
    in its memory was never computed.

    Raises: ModelError for whatever is wrong with the file. What is wrong with a stream is a fault in the result.
    """
    case = _Case(path, chip.name)
    index, reference = case.index(), case.reference()
    outputs: list[ReplayedOutput] = []
    faults: list[str] = []
    jobs = 0
    submits = _submits(case, index, reference, chip, limits)
    while True:
        with _lawful(path):
            submit = next(submits, None)
        if submit is None:
            return ReplayResult(tuple(outputs), tuple(faults), jobs)
        number, npu, words, subgraph = submit
        stopped = [f"submit {number}: {f}" for f in npu.submit(words)]  # an exception here is our defect: let it show
        jobs += len(npu.trace)
        faults += stopped
        if subgraph is not None and not stopped:
            with _lawful(path):
                outputs += _compare(npu, number - 1, subgraph, reference)


def open_submits(path: str | os.PathLike[str], chip: Chip,
                 limits: Limits | None = None) -> list[tuple[VirtualNPU, list[int]]]:
    """Each stream of a case with a virtual NPU that holds its memory: to submit as often as wanted.

    Raises: ModelError for whatever is wrong with the file.
    """
    case = _Case(path, chip.name)
    with _lawful(path):
        return [(npu, words) for _, npu, words, _ in _submits(case, case.index(), case.reference(), chip, limits)]


@contextlib.contextmanager
def _lawful(path: str | os.PathLike[str]) -> Iterator[None]:
    """An index that is not what it should be shows in many ways; they are all the file's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        raise ModelError(f"the index of {path} is not that of a recorded case",
                         got=f"{type(e).__name__}: {str(e)[:80]}") from None


def _submits(case: _Case, index: Mapping[str, Any], reference: Mapping[str, NDArray[np.generic]], chip: Chip,
             limits: Limits | None) -> Iterator[tuple[int, VirtualNPU, list[int], Mapping[str, Any] | None]]:
    """(number, an NPU with the memory of that submit, its words, its subgraph; None for the initialisation)."""
    for number, submit in enumerate(index["submits"]):
        npu = VirtualNPU(chip, limits)
        raw = case.read(f"{case.npu}/{submit['file']}")
        words = np.frombuffer(raw[: len(raw) // 4 * 4], "<u4").tolist()
        for name in sorted(case.sizes):
            found = _MEMORY.fullmatch(name.removeprefix(f"{case.npu}/"))
            if found and int(found[1]) == number:
                content = case.read(name)
                try:
                    npu.map(name, int(found[2], 16), len(content), content)
                except DeviceError as e:
                    raise ModelError(f"the memory image '{name}' does not fit", got=e.message) from None
        subgraph = index["subgraphs"][number - 1] if number else None
        recorded = subgraph is None or any(n.startswith(f"{case.npu}/mem-{number}-") for n in case.sizes)
        if not recorded:
            raise ModelError(f"{case.path} has no memory image of submit {number}", try_="compare its bytes instead")
        if subgraph is not None and number > 1:
            _fill_inputs(npu, subgraph, reference)
        yield number, npu, words, subgraph


def _fill_inputs(npu: VirtualNPU, subgraph: Mapping[str, Any], reference: Mapping[str, NDArray[np.generic]]) -> None:
    wanted = set(subgraph["partition"]["inputs"])
    for op in subgraph["hw_ops"]:
        for which in ("input", "input2"):
            tensor = op.get(which, {}).get("tensor")
            if tensor in wanted and f"t{tensor}" in reference:
                try:
                    npu.write(int(op[which]["va"], 16), _unsigned(reference[f"t{tensor}"]))
                except DeviceError as e:
                    raise ModelError(f"input tensor {tensor} lies outside the recorded memory", got=e.message) from None


def _unsigned(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """8-bit values in the engine's unsigned domain."""
    if values.dtype not in (np.int8, np.uint8):
        raise ValueError(f"a tensor of {values.dtype}")
    flip = np.uint8(0x80 if values.dtype == np.int8 else 0)
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1) ^ flip


def _compare(npu: VirtualNPU, number: int, subgraph: Mapping[str, Any],
             reference: Mapping[str, NDArray[np.generic]]) -> list[ReplayedOutput]:
    """Each output of the subgraph, where its last writer left it."""
    places = {op["output"]["tensor"]: op["output"] for op in subgraph["hw_ops"]}
    out = []
    for tensor in subgraph["partition"]["outputs"]:
        if tensor not in places or f"t{tensor}" not in reference:
            continue
        want = _unsigned(reference[f"t{tensor}"])
        try:
            got = npu.read(int(places[tensor]["va"], 16), want.size)
        except DeviceError as e:
            raise ModelError(f"output tensor {tensor} lies outside the recorded memory", got=e.message) from None
        difference = np.abs(want.astype(np.int16) - got)
        out.append(ReplayedOutput(number, tensor, int(difference.max(initial=0)), int(np.count_nonzero(difference)),
                                  want.size))
    return out
