"""Nouns of counting: a mix of operations, and code that is not understood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Mix = dict[str, float]
"""How many of each: "fma float32" (scalars: lanes of vectors count each), "mul int32", "sqrt float32"..., "load bytes"
and "store bytes" of memory that is not the thread's own, "loads" and "stores" that move them (of a gather each lane's),
"texel bytes" that reads of images give, "spill bytes" of the thread's own memory, "calls" of what is not seen, "masked"
instructions that leave some lanes as they are."""
TEXELS = "texels"
"""Reads of images as instructions of their own: each gives four numbers, however many bytes are stored of them."""
SUMS = "add int32 on data"
"""Of "add int32", those whose result is not known: a loop's count of its turns and what leads to places in memory are,
what begins with the content of a buffer is not."""
MACHINE = "x86-64 machine code"
"""A Counted's code that has no instructions for barriers."""
OWN = 1 << 22
"""Instructions to follow at most, those apart that only compute on data."""


class NotRead(Exception):  # noqa: N818 - an answer, not an error
    """The code cannot be read, or where it goes hangs on what is not known; the message says which."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What a turn of a kernel's loop does in each work item.

    mix     None: not read.      code  what was read: "x86-64 machine code", "PTX", "SPIR-V".
    uneven  kinds of which some turns have more than others, and what was seen.
    why     of what was not read, the reason.
    """

    mix: Mapping[str, float] | None
    code: str = ""
    uneven: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the source states of a turn in each work item.

    work   its name in a Timing's work: "operations", "bytes", "loads".
    kinds  how many of each kind of a Mix.     unit  of the kinds for one of `work`: 4 where a load has 4 bytes.
    pads   what is done at once does not fill a vector register of four: lanes that nothing needs may come with it.
    most   so many times what is stated may be done for it: products of bytes, which compilers make of wider ones.
    besides  what is no work of its own, and must be there where the code has instructions for it.
    each   bytes of a load or store, 0: whichever. More at once are several put together.
    texel  bytes of a texel as it is stored: what a read of one counts for where it is an instruction.
    """

    work: str
    kinds: Mapping[str, float] = field(default_factory=dict)
    unit: float = 1.0
    pads: bool = False
    most: float = 1.0
    besides: Mapping[str, float] = field(default_factory=dict)
    each: int = 0
    texel: int = 0


@dataclass(frozen=True, slots=True)
class Picture:
    """A two-dimensional image among a kernel's arguments: columns and rows, bytes of a row, and OpenCL's numbers for
    order and type of its channels (cl_image_format)."""

    width: int
    height: int
    row: int
    order: int
    kind: int
    channels: int
    channel_bytes: int


Argument = bytes | Picture | None
"""Of a launch: a scalar's bytes, an image, a buffer."""
Follow = Callable[[int], Mix]
"""What the work items of a group do in all with so many turns. Raises: NotRead."""


def add(to: Mix, more: Mapping[str, float], times: float = 1.0) -> None:
    for kind, count in more.items():
        to[kind] = to.get(kind, 0.0) + times * count
