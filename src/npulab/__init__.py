"""npulab takes a neural network and an edge NPU and carries it all the way: check, patch, compile, run, explain.

    import npulab

    graph = npulab.load("mobilenet.tflite")
    program = npulab.compile(graph, target="a311d")
    outputs = npulab.open_session(program).run({"input": image})

Names are loaded when first used, so that `import npulab` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npulab.api import (
        check,
        compile,
        convert,
        load,
        open_session,
        patch,
        probe,
        profile,
        quantize,
        read_program,
        roofline,
        write_program,
    )
    from npulab.errors import (
        CapacityError,
        DeviceError,
        InvariantError,
        ModelError,
        NpulabError,
        UnsupportedError,
        UsageError,
    )
    from npulab.ir import Graph
    from npulab.plan.types import Verdict
    from npulab.profiling.types import Profile
    from npulab.program.types import Program
    from npulab.runtime.session import Session
    from npulab.targets.target import PlanOptions

__version__ = "0.1.0"

_HOMES = {
    "api": ("check", "compile", "convert", "load", "open_session", "patch", "probe", "profile", "quantize",
            "read_program", "roofline", "write_program"),
    "errors": ("CapacityError", "DeviceError", "InvariantError", "ModelError", "NpulabError", "UnsupportedError",
               "UsageError"),
    "ir": ("Graph",),
    "plan.types": ("Verdict",),
    "profiling.types": ("Profile",),
    "program.types": ("Program",),
    "runtime.session": ("Session",),
    "targets.target": ("PlanOptions",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CapacityError", "DeviceError", "Graph", "InvariantError", "ModelError", "NpulabError", "PlanOptions",
    "Profile", "Program", "Session", "UnsupportedError", "UsageError", "Verdict", "check", "compile", "convert", "load",
    "open_session", "patch", "probe", "profile", "quantize", "read_program", "roofline", "write_program",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'npulab' has no attribute '{name}'")
    return getattr(importlib.import_module(f"npulab.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
