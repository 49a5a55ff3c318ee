"""Every error npulab raises on purpose, as a tree that says whose problem it is.

    NpulabError
    ├── UsageError        the command line or an API argument          exit 2
    ├── ModelError        your file                                    exit 3
    ├── UnsupportedError  the target cannot do it                      exit 1
    ├── CapacityError     the numbers do not fit                       exit 1
    ├── DeviceError       the hardware, or the virtual NPU, refused    exit 4
    └── InvariantError    us: a defect of npulab, please report it     exit 4

An error prints as one sentence, then facts one a line: ``rule``, ``want``, ``got``, ``where``, ``source``, ``try``.
"""

from __future__ import annotations

import re
from typing import ClassVar

SAID_MAX = 300
"""Characters of another program's message."""


class NpulabError(Exception):
    """One sentence for a person, then named facts.

    >>> print(ModelError("cat.tflite is not a TFLite file", got="identifier b'ABCD'", want="identifier b'TFL3'"))
    cat.tflite is not a TFLite file
      got     identifier b'ABCD'
      want    identifier b'TFL3'
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, message: str, /, **facts: object) -> None:
        self.message = message
        self.facts = {name.rstrip("_"): str(value) for name, value in facts.items()}
        super().__init__(message)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {name:<7} {value}" for name, value in self.facts.items())])


class UsageError(NpulabError):
    exit_code = 2


class ModelError(NpulabError):
    exit_code = 3


class UnsupportedError(NpulabError):
    exit_code = 1


class CapacityError(NpulabError):
    exit_code = 1


class DeviceError(NpulabError):
    exit_code = 4


class InvariantError(NpulabError):
    exit_code = 4


def runtime_said(error: object) -> str:
    """What ONNX Runtime said, without the place in its own sources, which may be all that there is room for."""
    return re.sub(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)? (?=\S)", "", str(error).strip(), count=1)[:SAID_MAX]
