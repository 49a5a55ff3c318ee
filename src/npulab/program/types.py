"""Program: everything needed to run a compiled model, and nothing of how it was found.

A Program is a list of steps over named tensors (by value index of the source graph). An NPU step uploads tensors into
a memory image, submits one command stream, and downloads tensors; a host step runs a small model cut from the source.
"""

from __future__ import annotations

import enum

import msgspec


class SectionKind(enum.Enum):
    """What a range of NPU memory holds."""

    DESCRIPTOR = "descriptor"
    COEFFICIENTS = "coefficients"
    TENSOR = "tensor"


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mapped range of NPU memory. `data` is its content at start; None: nothing has written it yet."""

    name: str
    kind: SectionKind
    address: int
    size: int
    data: bytes | None = None


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor at a border (model input or output, or between NPU and host), as the model declares it."""

    value: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None = None
    zero_point: int | None = None


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Copy tensor `value` to or from `address`, `size` bytes; `flip` XORs each byte with 0x80 (int8 <-> uint8)."""

    value: int
    address: int
    size: int
    flip: bool


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One NPU job: its origin, and where its parts lie. `words` is its (first, count) in the step's stream."""

    index: int
    kind: str
    role: str
    nodes: tuple[int, ...]
    descriptors: tuple[int, ...]
    words: tuple[int, int]
    coefficients: tuple[int, int] | None = None
    macs: int = 0


class NpuStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="npu"):
    """Upload, submit, download. `nodes` are the source operators this step computes."""

    nodes: tuple[int, ...]
    uploads: tuple[Transfer, ...]
    words: tuple[int, ...]
    jobs: tuple[Job, ...]
    downloads: tuple[Transfer, ...]


class HostStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="host"):
    """Run `model` (a TFLite file with just these nodes) on the CPU; tensors are matched to values by position."""

    nodes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    model: bytes


class HostNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A source operator that the host runs, and every reason why."""

    node: int
    op: str
    reasons: tuple[str, ...]


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the search chose for a source operator, instead of what, and the nanoseconds it saves by the timing model.

    `feature` is the option it rests on ("" if none), `state` how far that is proven: "witnessed" or "inferred".
    """

    node: int
    choice: str
    instead: str
    saved_ns: int
    feature: str = ""
    state: str = "witnessed"


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled model. `digest` is the SHA-256 (hex) of the model file; `ops` names every source operator.

    `options` are the plan options that are not default, `choices` those of the search, `origins` the names of the nodes
    that operators were made from if the model came in another dialect: for reports, nothing runs on them.
    """

    target: str
    plan: str
    model: str
    digest: str
    init: tuple[int, ...]
    sections: tuple[Section, ...]
    steps: tuple[NpuStep | HostStep, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    host_nodes: tuple[HostNode, ...]
    ops: tuple[str, ...]
    options: dict[str, str] = {}
    choices: tuple[Choice, ...] = ()
    origins: tuple[str, ...] = ()
