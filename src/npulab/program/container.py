"""The `.npu` file: a Program as bytes, and back.

    bytes     content
    0..7      magic: "NPULAB" 0D 0A; a transfer that changes line ends is seen at once
    8..39     SHA-256 of everything behind it
    40..43    format version, unsigned little-endian
    44..47    length of the header, unsigned little-endian
    48..      header: JSON, the Program with each run of bytes replaced by (offset, size) in the payload
    then      payload from the next multiple of 64: streams as little-endian words, sections, host models; each at the
              next multiple of 64 behind the one before it, in the order below (_assemble), zeros between

Equal programs give equal bytes. A file is read only if its payload is laid out exactly so, hence ranges cannot overlap,
hide anything, or reach outside, and only if the Program obeys its law (law.py): the hash tells damage, not authorship.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import Any

import msgspec
import numpy as np

from npulab.errors import ModelError
from npulab.program import law
from npulab.program.files import read_bounded, write_atomically
from npulab.program.types import (
    Choice,
    HostNode,
    HostStep,
    Job,
    NpuStep,
    Program,
    Section,
    SectionKind,
    Tensor,
    Transfer,
)

MAGIC = b"NPULAB\r\n"
VERSION = 1
ALIGNMENT = 64
PREFIX = struct.Struct("<8s32sII")
FILE_LIMIT = (1 << 30) + (1 << 26)
HEADER_LIMIT = 1 << 24

Range = tuple[int, int]
"""(offset, size) in the payload."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    kind: SectionKind
    address: int
    size: int
    data: Range | None


class _NpuStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="npu"):
    nodes: tuple[int, ...]
    uploads: tuple[Transfer, ...]
    words: Range
    jobs: tuple[Job, ...]
    downloads: tuple[Transfer, ...]


class _HostStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="host"):
    nodes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    model: Range


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    target: str
    plan: str
    model: str
    digest: str
    init: Range
    sections: tuple[_Section, ...]
    steps: tuple[_NpuStep | _HostStep, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    host_nodes: tuple[HostNode, ...]
    ops: tuple[str, ...]
    options: dict[str, str] = {}
    choices: tuple[Choice, ...] = ()
    origins: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET


def write_program(program: Program, path: str | os.PathLike[str]) -> None:
    """Write a `.npu` file, whole or not at all. Raises UsageError if the place cannot be written."""
    write_atomically(path, program_bytes(program))


def program_bytes(program: Program) -> bytes:
    """The file's content. Equal programs give equal bytes."""
    payload = _Payload()
    init = payload.words(program.init)
    sections = tuple(_Section(s.name, s.kind, s.address, s.size, None if s.data is None else payload.add(s.data))
                     for s in program.sections)
    steps = tuple(
        _HostStep(s.nodes, s.inputs, s.outputs, payload.add(s.model)) if isinstance(s, HostStep)
        else _NpuStep(s.nodes, s.uploads, payload.words(s.words), s.jobs, s.downloads)
        for s in program.steps
    )
    header = msgspec.json.encode(_Header(
        program.target, program.plan, program.model, program.digest, init, sections, steps, program.tensors,
        program.inputs, program.outputs, program.host_nodes, program.ops, program.options, program.choices,
        program.origins or msgspec.UNSET,
    ))
    gap = bytes(-(PREFIX.size + len(header)) % ALIGNMENT)
    rest = b"".join([struct.pack("<II", VERSION, len(header)), header, gap, *payload.parts])
    return MAGIC + hashlib.sha256(rest).digest() + rest


def read_program(source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> Program:
    """The Program of a `.npu` file (or of its bytes), verified.

    Raises: UsageError if the file cannot be read; ModelError if it is foreign, damaged, newer, or breaks the law.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "the program", bytes(source)
    else:
        name, data = os.fspath(source), read_bounded(source, "a program file", FILE_LIMIT)
    try:
        program = _decode(data)
        law.verify(program)
    except ModelError as e:
        raise ModelError(f"{name} cannot be used: {e.message}", **e.facts) from None
    return program


def is_program(path: str | os.PathLike[str]) -> bool:
    """Whether the file says that it is a `.npu` file. False if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


class _Payload:
    """Collects byte runs; each starts at a multiple of 64."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, data: bytes) -> Range:
        padding = -self.size % ALIGNMENT
        start = self.size + padding
        self.parts += [bytes(padding), data]
        self.size = start + len(data)
        return start, len(data)

    def words(self, words: tuple[int, ...]) -> Range:
        return self.add(np.array(words, "<u4").tobytes())


class _Reader:
    """Hands out the payload's runs in order, and insists that they are where `_Payload` puts them."""

    def __init__(self, payload: memoryview) -> None:
        self.payload = payload
        self.end = 0

    def take(self, place: Range, what: str) -> bytes:
        offset, size = place
        start = self.end + -self.end % ALIGNMENT
        if offset != start or size < 0 or offset + size > len(self.payload):
            raise ModelError(f"the bytes of {what} are not where they must be",
                             want=f"at {start}, at most {max(0, len(self.payload) - start)} bytes",
                             got=f"{size} bytes at {offset}")
        if any(self.payload[self.end : start]):
            raise ModelError(f"the padding before {what} is not zero")
        self.end = offset + size
        return bytes(self.payload[offset : self.end])

    def words(self, place: Range, what: str) -> tuple[int, ...]:
        if place[1] % 4 or place[1] > 4 * law.WORDS_LIMIT:
            raise ModelError(f"{what} is not a stream of words", got=f"{place[1]} bytes",
                             want=f"a multiple of 4 up to {4 * law.WORDS_LIMIT} bytes")
        return tuple(np.frombuffer(self.take(place, what), "<u4").tolist())


def _decode(data: bytes) -> Program:
    if len(data) < PREFIX.size or data[:8] != MAGIC:
        raise ModelError("it is not a program file of npulab", want=f"a file that begins with {MAGIC!r}",
                         got=f"{len(data)} bytes that begin with {data[:8]!r}",
                         try_="npulab compile MODEL --target a311d -o FILE.npu")
    _, digest, version, length = PREFIX.unpack_from(data)
    found = hashlib.sha256(memoryview(data)[40:]).digest()
    if found != digest:
        raise ModelError("it is damaged or cut short: its bytes do not give its SHA-256", want=digest.hex(),
                         got=f"{found.hex()} over {len(data)} bytes", try_="copy it again, or compile the model again")
    if version != VERSION:
        raise ModelError("it is of another format version", want=f"version {VERSION}", got=f"version {version}",
                         try_="use the npulab that wrote it, or compile the model again")
    start = PREFIX.size + length
    start += -start % ALIGNMENT
    if length > HEADER_LIMIT or start > len(data):
        raise ModelError("its header does not end inside the file",
                         want=f"at most {min(HEADER_LIMIT, len(data) - PREFIX.size)} bytes", got=f"{length} bytes")
    try:
        header = msgspec.json.decode(memoryview(data)[PREFIX.size : PREFIX.size + length], type=_Header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        raise ModelError("its header is not the description of a program", got=e) from None
    if any(data[PREFIX.size + length : start]):
        raise ModelError("the padding behind its header is not zero")
    return _assemble(header, memoryview(data)[start:])


def _assemble(h: _Header, payload: memoryview) -> Program:
    reader = _Reader(payload)
    init = reader.words(h.init, "the initialisation stream")
    sections = tuple(
        Section(s.name, s.kind, s.address, s.size,
                None if s.data is None else reader.take(s.data, f"section '{s.name}'"))
        for s in h.sections
    )
    steps: list[NpuStep | HostStep] = []
    for i, s in enumerate(h.steps):
        if isinstance(s, _HostStep):
            model = reader.take(s.model, f"the host model of step {i}")
            steps.append(HostStep(s.nodes, s.inputs, s.outputs, model))
        else:
            words = reader.words(s.words, f"the stream of step {i}")
            steps.append(NpuStep(s.nodes, s.uploads, words, s.jobs, s.downloads))
    if reader.end != len(payload):
        raise ModelError("it does not end where its content ends", want=f"{reader.end} bytes of payload",
                         got=f"{len(payload)} bytes")
    kept: dict[str, Any] = {"init": init, "sections": sections, "steps": tuple(steps), "origins": h.origins or ()}
    same = ("target", "plan", "model", "digest", "tensors", "inputs", "outputs", "host_nodes", "ops", "options",
            "choices")
    return Program(**kept, **{name: getattr(h, name) for name in same})
