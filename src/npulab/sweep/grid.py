"""A grid file to points; docs/sweep.md has the format."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from npulab.errors import ModelError, UsageError
from npulab.program.files import read_bounded
from npulab.sweep.points import Point
from npulab.targets.target import Channels, PlanName, all_targets

BYTES_MAX = 1 << 20
POINTS_MAX = 10**6
DEFAULT = "default"
"""In [set]: the chip's own number."""

SET_ORDER = ("sram", "nn_cores", "clock", "dram_bandwidth")
"""Those that only change speeds go last, so that points that share a program are neighbours."""

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Switch = Annotated[list[bool], msgspec.Meta(min_length=1)]
Numbers = Annotated[list[int | float | str], msgspec.Meta(min_length=1)]


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    zero_runs: Switch = msgspec.field(default_factory=lambda: [True])
    channels: Annotated[list[Channels], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["any"])
    kernel_cache: Switch = msgspec.field(default_factory=lambda: [True])
    image_cache: Switch = msgspec.field(default_factory=lambda: [True])
    features: Annotated[list[list[Text]], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: [[]])


class _Set(msgspec.Struct, forbid_unknown_fields=True):
    dram_bandwidth: Numbers = msgspec.field(default_factory=lambda: [DEFAULT])
    clock: Numbers = msgspec.field(default_factory=lambda: [DEFAULT])
    sram: Numbers = msgspec.field(default_factory=lambda: [DEFAULT])
    nn_cores: Numbers = msgspec.field(default_factory=lambda: [DEFAULT])


class _File(msgspec.Struct, forbid_unknown_fields=True):
    models: Annotated[list[Text], msgspec.Meta(min_length=1)]
    targets: Annotated[list[Text], msgspec.Meta(min_length=1)]
    plans: Annotated[list[PlanName], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["best"])
    options: _Options = msgspec.field(default_factory=_Options)
    set: _Set = msgspec.field(default_factory=_Set)


@dataclass(frozen=True)
class Grid:
    """points  by key, in the grid's order: the model changes slowest.
    files   SHA-256 of a model -> where its file is.
    """

    path: Path
    points: Mapping[str, Point]
    files: Mapping[str, Path]


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Every point of a grid file. Points that come out the same are one.

    Raises: UsageError if the file cannot be read; ModelError saying what is wrong in it.
    """
    path = Path(path)
    grid = _parse(path, read_bounded(path, "a sweep grid", BYTES_MAX))
    settings = [_settings(path, name, getattr(grid.set, name)) for name in SET_ORDER]
    _check_names(path, grid)
    names = _files(path, grid.models)
    options = grid.options
    axes: list[Sequence[Any]] = [names, grid.targets, grid.plans, options.zero_runs, options.channels,
                                 options.kernel_cache, options.image_cache, options.features, *settings]
    count = math.prod(len(a) for a in axes)
    if count > POINTS_MAX:
        raise ModelError(f"{path} has too many points", got=count, want=f"at most {POINTS_MAX}")
    files: dict[str, Path] = {}
    points: dict[str, Point] = {}
    every_options = {plan: _every_options(plan, options) for plan in grid.plans}
    every_set = list(_every_set(settings))
    for name in names:
        file = path.parent / name
        digest = _digest(file)
        files.setdefault(digest, file)
        for target, plan in itertools.product(grid.targets, grid.plans):
            for chosen, what_if in itertools.product(every_options[plan], every_set):
                point = Point(name, digest, target, plan, chosen, what_if)
                points.setdefault(point.key(), point)
    return Grid(path, points, files)


def _parse(path: Path, data: bytes) -> _File:
    try:
        return msgspec.convert(tomllib.loads(data.decode()), _File)
    except UnicodeDecodeError as e:
        raise ModelError(f"{path} is not a TOML file", got=f"bytes that are not UTF-8, at {e.start}") from e
    except msgspec.ValidationError as e:
        said, _, where = str(e).partition(" - at `$")
        raise ModelError(f"{path} is not a sweep grid", got=said[:1].lower() + said[1:],
                         where=where.strip("`.") or "the top level", try_="docs/sweep.md has every key") from e
    except RecursionError as e:
        raise ModelError(f"{path} is not a TOML file", got="brackets in brackets without end") from e
    except ValueError as e:  # TOML's own errors; an integer with thousands of digits
        raise ModelError(f"{path} is not a TOML file", got=e) from e


def _settings(path: Path, name: str, values: Sequence[float | str]) -> list[float | None]:
    """Numbers in B/s, Hz, bytes, cores; None is the chip's own."""
    from npulab.cli.plan_options import parse_settings

    out: list[float | None] = []
    for v in values:
        try:
            out.append(None if v == DEFAULT else parse_settings([f"{name}={v}"])[name])
        except UsageError as e:
            raise ModelError(f"{path}: {e.message.removeprefix('--set ')}", where=f"set.{name}", **e.facts) from e
    return out


def _check_names(path: Path, grid: _File) -> None:
    known = all_targets()
    for target in grid.targets:
        if target not in known:
            raise ModelError(f"{path}: there is no target '{target}'", where="targets", want=", ".join(sorted(known)))
    features = {f for target in grid.targets for f in known[target].features}
    for name in itertools.chain.from_iterable(grid.options.features):
        if name not in features:
            raise ModelError(f"{path}: none of its targets has a feature '{name}'", where="options.features",
                             want=", ".join(sorted(features)) or "no feature")


def _files(path: Path, patterns: Sequence[str]) -> list[str]:
    """Names of model files, from the grid's folder."""
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            names = sorted(n for n in glob.glob(pattern, root_dir=path.parent, recursive=True)
                           if (path.parent / n).is_file())
        except ValueError as e:  # a NUL
            raise ModelError(f"{path}: '{pattern}' is no pattern of file names", where="models", got=e) from e
        if not names:
            raise ModelError(f"{path}: no file matches '{pattern}'", where="models",
                             got=f"looked in {path.parent.absolute()}")
        found.update(dict.fromkeys(Path(n).as_posix() for n in names))
    return list(found)


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise ModelError(f"{file} cannot be read", got=e.strerror or e) from e


def _every_options(plan: PlanName, options: _Options) -> list[dict[str, Any]]:
    """Features are for plan best; plan reference has each point without them, once."""
    features = options.features if plan == "best" else [[]]
    return [{"zero_runs": z, "channels": c, "kernel_cache": k, "image_cache": i, "features": sorted(set(f))}
            for z, c, k, i, f in itertools.product(options.zero_runs, options.channels, options.kernel_cache,
                                                   options.image_cache, features)]


def _every_set(settings: Sequence[Sequence[float | None]]) -> Iterator[dict[str, float]]:
    for values in itertools.product(*settings):
        yield {name: v for name, v in zip(SET_ORDER, values, strict=True) if v is not None}
