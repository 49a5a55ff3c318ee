"""Declare a descriptor, register or command word once; encode, decode, print and document it from there.

A layout is a class whose body is the manual's table. Each field names the bits it occupies in the notation of the
hardware documents, low piece first, so that a field scattered over several words is one line:

    class Job(Layout, words=2, source="Example TRM 4.2"):
        width: int = field("w0[0:12]", unit="px")
        shift: int = field("w0[27:31] w1[28:29]", doc="right shift after the multiply")
        address: int = field("w1[0:25]", scale=64, unit="B")

Bits that no field names are reserved: zero when encoded, reported by `unknown_bits` when decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self, dataclass_transform

from npulab.errors import InvariantError

_PIECE = re.compile(r"w(\d+)(?:\[(\d+)(?::(\d+))?\])?$")


@dataclass(frozen=True)
class Piece:
    """`count` bits of word `word`, starting at bit `low`."""

    word: int
    low: int
    count: int

    @cached_property
    def mask(self) -> int:
        return ((1 << self.count) - 1) << self.low


@dataclass
class Field:
    """One named value: where its bits are, and how they mean a number: value = raw * scale.

    Descriptors are read by the hundred, so what follows from the declaration is worked out once.
    """

    where: str
    pieces: tuple[Piece, ...]
    default: int | None
    signed: bool
    scale: int
    unit: str
    doc: str
    name: str = ""

    @cached_property
    def width(self) -> int:
        return sum(p.count for p in self.pieces)

    @cached_property
    def range(self) -> tuple[int, int]:
        """Smallest and largest value that fits."""
        if self.signed:
            half = 1 << (self.width - 1)
            return -half * self.scale, (half - 1) * self.scale
        return 0, ((1 << self.width) - 1) * self.scale


def field(where: str, *, default: int | None = None, signed: bool = False, scale: int = 1, unit: str = "",
          doc: str = "") -> Any:
    """A field of a Layout. `where` lists its pieces, least significant first, as ``w3[6:18]``, ``w2[7]`` or ``w9``."""
    pieces = []
    for text in where.split():
        m = _PIECE.match(text)
        if m is None:
            raise InvariantError(f"a bit range cannot be read: {text!r}", want="w<word>[<low>:<high>]")
        word, low = int(m[1]), int(m[2] or 0)
        high = int(m[3]) if m[3] else low if m[2] else 31
        pieces.append(Piece(word, low, high - low + 1))
    return Field(where, tuple(pieces), default, signed, scale, unit, doc)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class Layout:
    """A fixed number of 32-bit little-endian words, cut into named fields."""

    words: ClassVar[int]
    source: ClassVar[str]
    fields: ClassVar[dict[str, Field]]
    _declared: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls, *, words: int, source: str) -> None:
        cls.words, cls.source = words, source
        cls.fields = {}
        declared = [0] * words
        for name, f in list(vars(cls).items()):
            if not isinstance(f, Field):
                continue
            f.name = name
            cls.fields[name] = f
            delattr(cls, name)
            for p in f.pieces:
                if p.word >= words or p.low + p.count > 32 or p.count < 1 or declared[p.word] & p.mask:
                    raise InvariantError(f"{cls.__name__}.{name} overlaps a field or leaves the descriptor",
                                         bits=f.where, source=source)
                declared[p.word] |= p.mask
        cls._declared = tuple(declared)

    def __init__(self, **values: int) -> None:
        if unknown := values.keys() - self.fields.keys():
            raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        for name, f in self.fields.items():
            value = values.get(name, f.default)
            if value is None:
                raise TypeError(f"{type(self).__name__} needs {name}")
            object.__setattr__(self, name, int(value))
            low, high = f.range
            if not low <= value <= high or value % f.scale:
                step = f", in steps of {f.scale}" if f.scale > 1 else ""
                unit = f" {f.unit}" if f.unit else ""
                raise InvariantError(f"{type(self).__name__}.{name} = {value}{unit} does not fit",
                                     want=f"{low}..{high}{step}", bits=f.where, source=self.source)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; make a new one")

    def encode(self) -> list[int]:
        """The descriptor as 32-bit words."""
        out = [0] * self.words
        for name, f in self.fields.items():
            raw = getattr(self, name) // f.scale
            for p in f.pieces:
                out[p.word] |= (raw << p.low) & p.mask
                raw >>= p.count
        return out

    def to_bytes(self) -> bytes:
        return b"".join(w.to_bytes(4, "little") for w in self.encode())

    @classmethod
    def decode(cls, words: Sequence[int]) -> Self:
        """Read every field. Reserved bits are ignored here; `unknown_bits` lists those that are set."""
        if len(words) < cls.words:
            raise InvariantError(f"{cls.__name__} needs {cls.words} words", got=len(words), source=cls.source)
        values = {}
        for name, f in cls.fields.items():
            raw = shift = 0
            for p in f.pieces:
                raw |= ((words[p.word] & p.mask) >> p.low) << shift
                shift += p.count
            if f.signed and raw >> (shift - 1):
                raw -= 1 << shift
            values[name] = raw * f.scale
        return cls(**values)

    @classmethod
    def unknown_bits(cls, words: Sequence[int]) -> list[tuple[int, int]]:
        """(word, bits) for every word that has a bit set which no field names."""
        return [(i, int(w) & ~d) for i, (w, d) in enumerate(zip(words, cls._declared, strict=False)) if int(w) & ~d]

    @classmethod
    def table(cls) -> Iterator[tuple[str, str, str, str]]:
        """(bits, name, value range, meaning) of every field, for documentation."""
        for name, f in cls.fields.items():
            low, high = f.range
            step = f" step {f.scale}" if f.scale > 1 else ""
            yield f.where, name, f"{low}..{high}{step}{' ' + f.unit if f.unit else ''}", f.doc

    def items(self) -> Iterator[tuple[Field, int]]:
        for name, f in self.fields.items():
            yield f, getattr(self, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and type(other) is type(self) and other.encode() == self.encode()

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.encode())))

    def __repr__(self) -> str:
        shown = ", ".join(f"{f.name}={v:#x}" if v > 9 else f"{f.name}={v}" for f, v in self.items() if v != f.default)
        return f"{type(self).__name__}({shown})"
