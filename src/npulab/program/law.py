"""The law of a Program: what must hold before anything runs it.

`verify` is called on every file that is read, whose author may be anyone, and on every program that the compiler made.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from npulab.errors import ModelError
from npulab.ir.types import DType
from npulab.program.types import HostStep, Job, NpuStep, Program, Section, SectionKind, Tensor, Transfer

MAPPED_LIMIT = 1 << 30
"""Bytes that all sections may map together. The largest network tried needs 60 MB; the chip's boards have 2 to 4 GB."""

TENSOR_LIMIT = 1 << 30
"""Bytes of one tensor."""

WORDS_LIMIT = 1 << 22
"""Command words of one stream: 16 MiB; the largest seen is some 10,000 words."""

DESCRIPTOR_BYTES = {"nn": 136, "tp": 124}
"""What one descriptor occupies, by the kind of its job."""

ADDRESSES = 1 << 32
INT32 = range(-(1 << 31), 1 << 31)
COUNT = range(1 << 62)
"""Quantities that are only ever added up and shown."""


def verify(program: Program) -> None:
    """Everything named exists, lies where it must, and is there before it is read.

    1. Sections have content of their own size, do not overlap, lie within 32 bits and map at most 1 GiB.
    2. Tensors have a type, a shape of bounded size, a finite scale, and are listed once.
    3. Streams hold 32-bit words; the jobs of a step lie in its stream one behind the other, numbered through.
    4. Descriptors and coefficients lie inside the content of one section; transfers inside one tensor section, and move
       the whole tensor.
    5. A step reads tensors that are inputs or that an earlier step made; no tensor and no operator is computed twice;
       the outputs are made.

    Raises: ModelError naming the part.
    """
    _words(program.init, "the initialisation stream")
    if len(program.digest) != 64 or set(program.digest) - set("0123456789abcdef"):
        raise ModelError("the program names no model", want="a SHA-256, 64 hexadecimal digits", got=program.digest[:80])
    memory = Memory(program.sections)
    tensors = _tensors(program)
    ops = range(len(program.ops))
    if len(set(program.inputs)) != len(program.inputs):
        raise ModelError("the program lists an input twice", got=list(program.inputs))
    for v in (*program.inputs, *program.outputs):
        _listed(tensors, v, "the program's inputs and outputs")
    ready = set(program.inputs)
    done: set[int] = set()
    number = 0
    for i, step in enumerate(program.steps):
        where = f"step {i}"
        for n in step.nodes:
            if n not in ops:
                raise ModelError(f"{where} computes operator {n}, which does not exist", want=f"0..{len(ops) - 1}")
            if n in done:
                raise ModelError(f"{where} computes operator {n} a second time")
            done.add(n)
        if isinstance(step, HostStep):
            _host(step, where, tensors, ready)
        else:
            _npu(step, where, tensors, ready, memory, ops, number)
            number += len(step.jobs)
    for v in program.outputs:
        if v not in ready:
            raise ModelError(f"output tensor {v} ('{tensors[v].name}') is never computed")
    for h in program.host_nodes:
        if h.node not in ops:
            raise ModelError(f"host operator {h.node} does not exist", want=f"0..{len(ops) - 1}")
    if len(program.origins) not in (0, len(ops)):
        raise ModelError("the program names the origins of other operators than it has", want=len(ops),
                         got=len(program.origins))
    for c in program.choices:
        if c.node not in ops or c.saved_ns not in COUNT:
            raise ModelError(f"a choice for operator {c.node} makes no sense",
                             want=f"an operator 0..{len(ops) - 1}, and a time saved")


def tensor_bytes(tensor: Tensor) -> int | None:
    """The size of a tensor in its model's layout, or None where elements have no fixed size here."""
    itemsize = getattr(DType(tensor.dtype).numpy, "itemsize", None)
    return None if itemsize is None else math.prod(tensor.shape) * int(itemsize)


class Memory:
    """Sections by address. Raises ModelError if they cannot all be mapped."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = sorted(sections, key=lambda s: s.address)
        self.starts = [s.address for s in self.sections]
        end, total = 0, 0
        for s in self.sections:
            name = f"section '{s.name}'"
            if not (s.address >= 0 and 0 < s.size <= MAPPED_LIMIT and s.address + s.size <= ADDRESSES):
                raise ModelError(f"{name} does not lie in the NPU's memory", want=f"inside 0..{ADDRESSES - 1:#x}",
                                 got=f"{s.size} bytes at {s.address:#x}")
            if s.address < end:
                raise ModelError(f"{name} overlaps the one before it", want=f"an address from {end:#x}",
                                 got=f"{s.address:#x}")
            if s.data is not None and len(s.data) != s.size:
                raise ModelError(f"{name} has content of another size", want=f"{s.size} bytes",
                                 got=f"{len(s.data)} bytes")
            end = s.address + s.size
            total += s.size
        if total > MAPPED_LIMIT:
            raise ModelError("the program maps too much memory", want=f"at most {MAPPED_LIMIT} bytes",
                             got=f"{total} bytes")

    def inside(self, address: int, size: int) -> Section | None:
        """The section that holds all of address..address+size, if one does."""
        at = bisect_right(self.starts, address) - 1
        if at < 0 or size <= 0:
            return None
        s = self.sections[at]
        return s if address + size <= s.address + s.size else None

    def content(self, address: int, size: int) -> bytes:
        """The bytes that lie at `address` from the start. Raises ModelError if nothing does."""
        s = self.inside(address, size)
        if s is None or s.data is None:
            raise ModelError(f"the program has no content at {address:#x}", want=f"{size} bytes")
        return s.data[address - s.address : address - s.address + size]


def _tensors(program: Program) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    types = {d.value for d in DType}
    for t in program.tensors:
        name = f"tensor {t.value} ('{t.name}')"
        if t.value not in INT32 or t.value < 0 or t.value in found:
            raise ModelError(f"{name} is listed twice, or has no index")
        if t.dtype not in types:
            raise ModelError(f"{name} has an unknown type", got=t.dtype)
        if len(t.shape) > 8 or any(n not in INT32 or n < 0 for n in t.shape):
            raise ModelError(f"{name} has no shape that a tensor can have", want="at most 8 sizes from 0",
                             got=list(t.shape)[:16])
        if (tensor_bytes(t) or math.prod(t.shape)) > TENSOR_LIMIT:
            raise ModelError(f"{name} is too large", want=f"at most {TENSOR_LIMIT} bytes", got=list(t.shape))
        if (t.scale is None) != (t.zero_point is None):
            raise ModelError(f"{name} has a scale without a zero point, or a zero point without a scale")
        if t.scale is not None and not math.isfinite(t.scale):
            raise ModelError(f"{name} has no finite scale", got=t.scale)
        if t.zero_point is not None and t.zero_point not in INT32:
            raise ModelError(f"{name} has a zero point outside 32 bits", got=t.zero_point)
        found[t.value] = t
    return found


def _listed(tensors: dict[int, Tensor], v: int, who: str) -> Tensor:
    if v not in tensors:
        raise ModelError(f"{who} name tensor {v}, which the program does not list")
    return tensors[v]


def _words(words: Sequence[int], what: str) -> None:
    if len(words) > WORDS_LIMIT:
        raise ModelError(f"{what} is too long", want=f"at most {WORDS_LIMIT} words", got=f"{len(words)} words")
    if words and not (min(words) >= 0 and max(words) < ADDRESSES):
        raise ModelError(f"{what} holds a word of more than 32 bits")


def _read(values: Iterable[int], where: str, tensors: dict[int, Tensor], ready: set[int]) -> None:
    for v in values:
        t = _listed(tensors, v, f"the inputs of {where}")
        if v not in ready:
            raise ModelError(f"{where} reads tensor {v} ('{t.name}') before anything computed it")


def _made(values: Iterable[int], where: str, tensors: dict[int, Tensor], ready: set[int]) -> None:
    for v in values:
        t = _listed(tensors, v, f"the outputs of {where}")
        if v in ready:
            raise ModelError(f"{where} computes tensor {v} ('{t.name}') a second time")
        ready.add(v)


def _host(step: HostStep, where: str, tensors: dict[int, Tensor], ready: set[int]) -> None:
    _read(step.inputs, where, tensors, ready)
    _made(step.outputs, where, tensors, ready)
    if step.model[4:8] != b"TFL3":
        raise ModelError(f"the host model of {where} is not a TFLite file", want="identifier b'TFL3'",
                         got=f"identifier {step.model[4:8]!r}")


def _npu(step: NpuStep, where: str, tensors: dict[int, Tensor], ready: set[int], memory: Memory, ops: range,
         number: int) -> None:
    _words(step.words, f"the stream of {where}")
    for t in (*step.uploads, *step.downloads):
        _transfer(t, where, tensors, memory)
    _read((t.value for t in step.uploads), where, tensors, ready)
    _made((t.value for t in step.downloads), where, tensors, ready)
    end = 0
    for i, job in enumerate(step.jobs):
        _job(job, f"job {number + i}", memory, ops, number + i, end, len(step.words))
        end = sum(job.words)


def _transfer(t: Transfer, where: str, tensors: dict[int, Tensor], memory: Memory) -> None:
    tensor = _listed(tensors, t.value, f"the transfers of {where}")
    what = f"{where} moves tensor {t.value} ('{tensor.name}')"
    section = memory.inside(t.address, t.size)
    if section is None or section.kind is not SectionKind.TENSOR:
        raise ModelError(f"{what} outside the tensor sections", got=f"{t.size} bytes at {t.address:#x}")
    if t.size != tensor_bytes(tensor):
        raise ModelError(f"{what} in part", want=f"{tensor_bytes(tensor)} bytes", got=f"{t.size} bytes")
    if t.flip and tensor.dtype not in ("int8", "uint8"):
        raise ModelError(f"{what} with the sign bits turned", want="int8 or uint8", got=tensor.dtype)


def _job(job: Job, name: str, memory: Memory, ops: range, index: int, end: int, words: int) -> None:
    if job.index != index:
        raise ModelError(f"{name} is numbered {job.index}", want="numbers in the order of execution")
    if job.kind not in DESCRIPTOR_BYTES:
        raise ModelError(f"{name} is of an unknown kind", want=" or ".join(DESCRIPTOR_BYTES), got=job.kind)
    for n in job.nodes:
        if n not in ops:
            raise ModelError(f"{name} comes from operator {n}, which does not exist", want=f"0..{len(ops) - 1}")
    first, count = job.words
    if not (end <= first and 0 < count <= words and first + count <= words):
        raise ModelError(f"the words of {name} are not where they must be", want=f"inside {end}..{words}",
                         got=f"{count} words from {first}")
    if not job.descriptors or (job.kind == "nn" and len(job.descriptors) != 1):
        raise ModelError(f"{name} has the wrong number of descriptors", want="one for nn, one or more for tp",
                         got=len(job.descriptors))
    for address in job.descriptors:
        section = memory.inside(address, DESCRIPTOR_BYTES[job.kind])
        if section is None or section.kind is not SectionKind.DESCRIPTOR or section.data is None:
            raise ModelError(f"a descriptor of {name} does not lie in a descriptor section", got=f"{address:#x}")
    if job.coefficients is not None:
        section = memory.inside(*job.coefficients)
        if section is None or section.kind is not SectionKind.COEFFICIENTS or section.data is None:
            raise ModelError(f"the coefficients of {name} do not lie in a coefficient section",
                             got="{1} bytes at {0:#x}".format(*job.coefficients))
    if job.macs not in COUNT:
        raise ModelError(f"{name} counts {job.macs} multiply-accumulates", want="0 or more")
