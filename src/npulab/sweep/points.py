"""Point, what is measured; Record, what comes of it; and `measure`, the verb between them.

All three are content: the same point gives the same record in every process and on every machine, so neither knows a
path or a time of day.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec

import npulab
from npulab.errors import ModelError, NpulabError
from npulab.targets.target import PlanName, PlanOptions

if TYPE_CHECKING:
    from npulab.ir import Graph
    from npulab.profiling.types import Profile
    from npulab.program.types import Program

RECORD_VERSION = 1
"""Raised when a Record means something else than before: points measured earlier are then other points."""

SHOWING = ("atlas", "cli", "report", "samples", "sweep")
"""Rooms of the package that no profile depends on."""

NODE_COLUMNS = ("node", "op", "unit", "ms", "bound", "macs", "macs_useful", "dram_bytes", "sram_bytes")
"""What a Record keeps of each row of a profile; npulab.profiling.types.Row says what they are."""

T = TypeVar("T")


@cache
def version() -> str:
    """'0.1.0+<12 hex digits>.1': npulab's version, a digest of the sources that a profile comes from, RECORD_VERSION.

    The digest is there because times change with the model's code and constants, between releases too; a table that
    mixed them would say nothing.
    """
    home = Path(npulab.__file__).parent
    found = hashlib.sha256()
    for path in sorted(home.rglob("*")):
        name = path.relative_to(home)
        if path.suffix in (".py", ".toml", ".json") and name.parts[0] not in SHOWING:
            found.update(name.as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return f"{npulab.__version__}+{found.hexdigest()[:12]}.{RECORD_VERSION}"


class Point(msgspec.Struct, frozen=True):
    """One combination. `model` is its name in the grid, for people; what counts is `digest`, SHA-256 of the file.

    options  every field of PlanOptions that changes a program, "features" as a sorted list.
    what_if  npulab.targets.target.Settings.
    """

    model: str
    digest: str
    target: str
    plan: PlanName
    options: Mapping[str, Any]
    what_if: Mapping[str, float]

    def key(self) -> str:
        """SHA-256 in hex of all that the record depends on."""
        return hashlib.sha256(canonical({
            "model": self.digest, "target": self.target, "plan": self.plan, "options": self.options,
            "what_if": self.what_if, "npulab": version()}).encode()).hexdigest()

    def plan_options(self) -> PlanOptions:
        return PlanOptions(**{**self.options, "features": frozenset(self.options["features"])})


class Record(msgspec.Struct, frozen=True):
    """What one point came to. state "failed": `error_class` and `error` say why, the numbers are None.

    low_ms, high_ms    the total is expected between them.
    bound              the npulab.profiling.types.Term that bounds most of the time.
    npu_ops, host_ops  operators of the model that run there; those that need no work are in neither.
    nodes              NODE_COLUMNS: name -> one value for each row of the profile.
    """

    state: Literal["done", "failed"]
    total_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    bound: str | None = None
    dram_bytes: int | None = None
    sram_bytes: int | None = None
    npu_ops: int | None = None
    host_ops: int | None = None
    error_class: str | None = None
    error: str | None = None
    nodes: Mapping[str, list[Any]] | None = None


def canonical(data: Any) -> str:
    """JSON with one spelling."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def failed(error: Exception) -> Record:
    """The record of a point that came to an error."""
    if isinstance(error, NpulabError):
        return Record("failed", error_class=type(error).__name__, error=str(error))
    return Record("failed", error_class=type(error).__name__,
                  error=f"{type(error).__name__}: {error}\n  This is a defect of npulab; please report it.")


def read_model(path: str | os.PathLike[str], digest: str) -> bytes:
    """The bytes of the model file. Raises ModelError if they are not those of `digest`, or cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise ModelError("the model's file cannot be read", got=e.strerror or e) from e
    if hashlib.sha256(data).hexdigest() != digest:
        raise ModelError("the model's file changed while the sweep ran", try_="the sweep again")
    return data


def measure(point: Point, read: Callable[[], bytes]) -> Record:
    """Profile one point. `read` gives the model's bytes; it is not called if the point before had the same model.

    Nothing is raised: whatever goes wrong is the record.
    """
    try:
        return _record(_profile(point, read))
    except Exception as e:
        return failed(e)


class _Latest(Generic[T]):
    """The last thing made: the next point mostly needs the same. Threads may use it; at worst they make it twice."""

    def __init__(self) -> None:
        self.kept: tuple[object, T] | None = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        kept = self.kept
        if kept is None or kept[0] != key:
            kept = self.kept = (key, make())
        return kept[1]


_graphs: _Latest[Graph] = _Latest()
_programs: _Latest[Program] = _Latest()


def _profile(point: Point, read: Callable[[], bytes]) -> Profile:
    from npulab import api

    options = point.plan_options()

    def graph() -> Graph:
        return _graphs.get(point.digest, lambda: api.load(read()))

    if point.plan == "reference" and point.what_if.keys() <= {"dram_bandwidth", "clock"}:
        # A driver decides without asking how fast the chip is; plan best searches by it, and has to again.
        program = _programs.get((point.digest, point.target, options),
                                lambda: api.compile(graph(), point.target, point.plan, options=options))
        return api.profile(program, what_if=point.what_if)
    return api.profile(graph(), point.target, point.plan, options, point.what_if)


def _record(profile: Profile) -> Record:
    from npulab.profiling.join import as_data

    data = as_data(profile)
    nodes = data["nodes"]
    units = [n["unit"].split("+") for n in nodes if n["node"] is not None]
    low, high = data["interval_ms"]
    if not all(map(math.isfinite, (data["total_ms"], low, high))):
        raise ModelError("the timing model gives no finite time for this", got=f"{data['total_ms']} ms")
    return Record(
        "done", data["total_ms"], low, high, data["bound"], data["dram_bytes"], data["sram_bytes"],
        sum("nn" in u or "tp" in u for u in units), sum("host" in u for u in units),
        nodes={c: [n[c] for n in nodes] for c in NODE_COLUMNS},
    )
