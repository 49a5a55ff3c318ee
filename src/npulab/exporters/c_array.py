"""Bytes as a C array: a .c file with the data, aligned to 16 bytes, and a header that both C and C++ take."""

from __future__ import annotations

import re

import numpy as np

from npulab.errors import CapacityError, UsageError

ALIGNMENT = 16
"""What TensorFlow Lite Micro asks of the model's address. Source: its `MicroInterpreter` documentation."""
SIZE_MAX = 2**28
"""Bytes: the text is five times as long, and no microcontroller has as much flash."""
COLUMNS = 16

_CELLS = np.frombuffer("".join(f"0x{i:02x}," for i in range(256)).encode(), np.uint8).reshape(256, 5)


def to_c_array(data: bytes | memoryview, symbol: str, comment: str = "") -> tuple[bytes, bytes]:
    """(NAME.c, NAME.h) that define `const unsigned char symbol[]` and `const unsigned int symbol_len`.

    `symbol` is a C identifier; `comment` one line about the content. The .c file includes "symbol.h".

    Raises: UsageError for a symbol that C does not take; CapacityError for more than 256 MiB.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,62}", symbol):
        raise UsageError(f"'{symbol[:70]}' is no name for a C array", want="letters, digits and _, a letter first")
    if len(data) > SIZE_MAX:
        raise CapacityError("the model is too large for a C array", got=f"{len(data)} bytes", want=f"{SIZE_MAX} bytes")
    said = "".join(c if " " <= c <= "~" else "?" for c in comment).replace("*/", "* /").replace("/*", "/ *")
    about = f"/* {said} */\n" if said else ""
    guard = f"{symbol.upper()}_H_"
    header = (f"{about}#ifndef {guard}\n#define {guard}\n\n#ifdef __cplusplus\nextern \"C\" {{\n#endif\n\n"
              f"extern const unsigned char {symbol}[];\nextern const unsigned int {symbol}_len;\n\n"
              f"#ifdef __cplusplus\n}}\n#endif\n\n#endif  /* {guard} */\n")
    source = (f"{about}#include \"{symbol}.h\"\n\n"
              "#if defined(__cplusplus)\n#define ALIGNED alignas(16)\n"
              "#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L\n#define ALIGNED _Alignas(16)\n"
              "#else\n#define ALIGNED __attribute__((aligned(16)))\n#endif\n\n"
              f"ALIGNED const unsigned char {symbol}[] = {{\n")
    tail = f"}};\nconst unsigned int {symbol}_len = {len(data)}u;\n"
    return source.encode() + _rows(data) + tail.encode(), header.encode()


def _rows(data: bytes | memoryview) -> bytes:
    """`0x00,0x01,...` with COLUMNS numbers a line. An empty array is not C, so it gets one zero."""
    numbers = np.frombuffer(data, np.uint8) if len(data) else np.zeros(1, np.uint8)
    whole = len(numbers) // COLUMNS * COLUMNS
    rows = np.full((whole // COLUMNS, COLUMNS * 5 + 1), ord("\n"), np.uint8)
    rows[:, :-1] = _CELLS[numbers[:whole]].reshape(-1, COLUMNS * 5)
    rest = _CELLS[numbers[whole:]].tobytes()
    return rows.tobytes() + (rest + b"\n" if rest else b"")
