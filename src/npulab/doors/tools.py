"""The vendor's tool, run on an export in a process of its own: bounded in time and memory, its words kept in a log."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.doors.bundle import Bundle
from npulab.doors.types import Door
from npulab.errors import UsageError
from npulab.passes.certificate import Agreement, agreement

LOG_MAX = 2**20
"""Bytes of a log that are kept, from its end."""
FILE_MAX = 2**33
"""Bytes of one file that a tool may write."""
MEMORY_SHARE = 0.8
"""Of the machine's memory, that a tool may take."""
OUTPUTS_MAX = 2**30
VERIFY_SECONDS = 600
KEPT = ("LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT", "OMP_NUM_THREADS")
"""Variables of the environment that a tool sees, beside PATH, HOME, TMPDIR and TOOL."""


@dataclass(frozen=True, slots=True)
class Tool:
    """Where a door's tool is: the Python that has it, and the program for scripts of the shell."""

    python: str
    program: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Ran:
    """What came of it. `made`: files that appeared. `agreements`: of each output, empty where nothing ran here."""

    converted: bool
    seconds: float
    why: str
    log: str
    made: tuple[str, ...]
    agreements: tuple[Agreement, ...]
    placed: tuple[int, tuple[str, ...]] | None = None


def locate(door: Door, path: Path | None = None) -> Tool:
    """The tool in this environment, or at `path`: a Python that has it, or its program.

    Raises: UsageError saying what to install where.
    """
    if path is not None:
        full = Path(os.path.abspath(path))  # not resolved: a virtual environment's Python is a link
        if not full.is_file() or not os.access(full, os.X_OK):
            raise UsageError(f"--tool {path} is no program", want=f"{door.program or 'a Python'} that has {door.tool}")
        if full.name.startswith("python"):
            return Tool(str(full), str(full.parent / door.program) if door.program else "")
        return Tool(sys.executable, str(full))
    if door.program:
        found = shutil.which(door.program, path=os.pathsep.join([str(Path(sys.executable).parent),
                                                                 os.environ.get("PATH", os.defpath)]))
        if found:
            return Tool(sys.executable, found)
    elif door.module and _has(door.module):
        return Tool(sys.executable)
    how = "a Python of an environment that has it" if door.package else "the path of the program"
    raise UsageError(f"{door.tool} is not installed here", want=door.install,
                     try_=f"--tool {how}, or run the script of the folder where the tool is")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def run(folder: Path, door: Door, tool: Tool, bundle: Bundle, seconds: int = 0) -> Ran:
    """Convert in `folder`, run the result where that is possible here, and compare.

    `seconds`: time for the conversion, door.seconds if 0. Logs are convert.log and verify.log of the folder.
    """
    before = _files(folder)
    start = time.perf_counter()
    why = ""
    script = next((folder / n for n in ("convert.py", "convert.sh") if (folder / n).exists()), None)
    if script:
        why = _call(script, door, tool, folder / "convert.log", seconds or door.seconds)
        product = folder / door.product
        if not why and not (product.is_dir() or (product.is_file() and product.stat().st_size)):
            why = f"it made no {door.product}"
    took = time.perf_counter() - start
    converted = not why
    if converted and (folder / "verify.py").exists() and bundle.expected:
        failed = _call(folder / "verify.py", door, tool, folder / "verify.log", VERIFY_SECONDS)
        why = f"the result does not run: {failed}" if failed and script else failed
    agreements = _compared(folder / "outputs.npz", bundle)
    for junk in ("outputs.npz", "__pycache__"):
        with contextlib.suppress(OSError):
            (folder / junk).unlink() if (folder / junk).is_file() else shutil.rmtree(folder / junk)
    log = "\n".join((folder / n).read_text("utf-8", "replace") for n in ("convert.log", "verify.log")
                    if (folder / n).exists())
    made = tuple(sorted(_files(folder) - before))
    placed = _placed(folder / door.product) if door.name == "vela" and not why else None
    return Ran(converted, took, why, log, made, agreements, placed)


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def _call(script: Path, door: Door, tool: Tool, log: Path, seconds: int) -> str:
    """Run a script of the folder. What went wrong, "" if nothing did."""
    command = ["/bin/bash", script.name] if script.suffix == ".sh" else [tool.python, script.name]
    with tempfile.TemporaryDirectory() as home, open(log, "wb") as out:
        try:
            process = subprocess.Popen(command, cwd=script.parent, stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=subprocess.STDOUT, env=_environment(door, tool, home),
                                       start_new_session=True, preexec_fn=_limit if os.name == "posix" else None)
        except OSError as e:
            return f"{command[0]} does not start: {e.strerror}"
        try:
            code = process.wait(seconds)
            why = "" if code == 0 else f"it ended with code {code}"
        except subprocess.TimeoutExpired:
            why = f"it took more than {seconds} s"
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it started, too
            process.wait()
    _shorten(log)
    return why


def _environment(door: Door, tool: Tool, home: str) -> dict[str, str]:
    """Little more than a PATH, and none where the tool would call what it finds there (MNN's telemetry calls pip)."""
    places = [str(Path(p).parent) for p in (tool.program, tool.python) if p]
    path = "" if door.name == "mnn" else os.pathsep.join([*places, "/usr/local/bin", "/usr/bin", "/bin"])
    own = {"PATH": path, "HOME": home, "TMPDIR": home, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1",
           "PYTHON": tool.python, "HF_HUB_OFFLINE": "1"}
    if tool.program:
        own["TOOL"] = tool.program
    return {k: os.environ[k] for k in KEPT if k in os.environ} | own


def _limit() -> None:
    import resource

    memory = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * MEMORY_SHARE)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX, FILE_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _shorten(log: Path) -> None:
    size = log.stat().st_size
    if size > LOG_MAX:
        with open(log, "r+b") as f:
            f.seek(size - LOG_MAX)
            rest = f.read(LOG_MAX)
            f.seek(0)
            f.write(rest)
            f.truncate(len(rest))


def _compared(path: Path, bundle: Bundle) -> tuple[Agreement, ...]:
    """Each output that the script wrote beside what the source network computes."""
    if not path.is_file() or path.stat().st_size > OUTPUTS_MAX or not bundle.expected:
        return ()
    names = [t["name"] for t in bundle.manifest["outputs"]]
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays: Sequence[NDArray[Any]] = [stored[f"out{k}"] for k in range(len(names))]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return ()
    return tuple(agreement(name, want, made.reshape(want.shape) if made.size == want.size else made)
                 for name, want, made in zip(names, bundle.expected, arrays, strict=True))


def _placed(path: Path) -> tuple[int, tuple[str, ...]] | None:
    """Of Vela's result: its NPU operators, and the names of those that stay on the CPU.

    Read from the tables themselves: Vela's scratch tensors are computed by nobody, which no Graph allows.
    """
    from npulab.errors import NpulabError
    from npulab.formats.flatbuffer import Table
    from npulab.formats.tflite import schema

    try:
        model = Table.root(schema(), "Model", memoryview(path.read_bytes()))
        codes = [t.text("custom_code") or schema().names["BuiltinOperator"].get(
            max(t.integer("builtin_code"), t.integer("deprecated_builtin_code")), "?")
            for t in model.tables("operator_codes")]
        names = [codes[t.integer("opcode_index")] for t in next(model.tables("subgraphs")).tables("operators")]
    except (NpulabError, OSError, IndexError, StopIteration):
        return None
    return names.count("ethos-u"), tuple(n for n in names if n != "ethos-u")
