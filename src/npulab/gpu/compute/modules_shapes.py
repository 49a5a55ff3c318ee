"""How products and convolutions as SPIR-V are cut into threads."""

from __future__ import annotations

import msgspec

from npulab.errors import InvariantError

ROWS = (1, 2, 4, 8)


class Shape(msgspec.Struct, frozen=True, tag="shape"):
    """rows   of a thread, at most: matrix rows, or pixels one after the other, of four columns (filters) each.
    group  threads: columns (in fours), rows (in tiles).

    Raises: InvariantError unless rows are among `ROWS` and there are threads.
    """

    rows: int = 4
    group: tuple[int, int] = (8, 8)

    def __post_init__(self) -> None:
        if self.rows not in ROWS or min(self.group) < 1:
            raise InvariantError("there is no such shape of threads", want=f"rows of {ROWS} and groups of 1 or more",
                                 got=f"{self.rows} rows, groups of {self.group}")

    @property
    def threads(self) -> int:
        return self.group[0] * self.group[1]
