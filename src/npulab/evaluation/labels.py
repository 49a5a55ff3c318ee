"""The class of each sample: a table, a folder a class, or an array beside the samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, UsageError
from npulab.program.files import read_bounded
from npulab.runtime.answers import Labels

BYTES_MAX = 1 << 28
ROWS_MAX = 1_000_000
T = TypeVar("T")


def read_table(path: str | os.PathLike[str], classes: Labels | None = None) -> dict[str, int]:
    """The class of each file, from lines of file, class and whatever else, with tabs between them.

    A class is its number, or a name of `classes`. A first line whose second column is neither is a heading.

    Raises: UsageError if it cannot be read; ModelError if it is no such table.
    """
    name = os.path.basename(os.fspath(path))
    try:
        text = read_bounded(path, "labels", BYTES_MAX).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ModelError(f"{name} is not a table of labels", want="text in UTF-8", got=e) from e
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > ROWS_MAX:
        raise ModelError(f"{name} is too long a table of labels", want=f"at most {ROWS_MAX} lines", got=len(lines))
    numbers = {label: i for i, label in classes.names.items()} if classes else {}
    found: dict[str, int] = {}
    for k, (i, line) in enumerate(lines):
        cells = [c.strip() for c in line.split("\t")]
        number = _number(cells[1], numbers) if len(cells) > 1 and cells[0] else None
        if number is None:
            if k == 0 and len(cells) > 1:
                continue
            raise ModelError(f"{name} is not a table of labels", where=f"line {i}", got=line[:100],
                             want="FILE<TAB>CLASS, a number from 0" + (" or a name of --classes" if numbers else ""),
                             try_="--classes FILE" if len(cells) > 1 and not numbers else "tabs between the columns")
        if found.setdefault(cells[0], number) != number:
            raise ModelError(f"{name} gives {cells[0][:100]} two classes", where=f"line {i}",
                             got=f"{found[cells[0]]} and {number}")
    if not found:
        raise ModelError(f"{name} is an empty table of labels", want="FILE<TAB>CLASS, one a line")
    return found


def _number(text: str, names: Mapping[str, int]) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else names.get(text)


def matched(names: Sequence[str], known: Mapping[str, T], path: str | os.PathLike[str]) -> tuple[list[int], list[T]]:
    """Positions of the names that `known` has, whole or without their folders, and what it has of them.

    Raises: UsageError if it has none of them, or if two of them are one for it.
    """
    positions, values, taken = [], [], dict[str, str]()
    for i, name in enumerate(names):
        key = name if name in known else name.rpartition("/")[2]
        if key not in known:
            continue
        if key in taken:
            raise UsageError(f"{os.fspath(path)} does not tell two files apart", got=f"{taken[key]} and {name}",
                             want="paths from the data's folder on")
        taken[key] = name
        positions.append(i)
        values.append(known[key])
    if not positions:
        raise UsageError(f"{os.fspath(path)} is of other files than the data", want=", ".join([*known][:3]),
                         got=", ".join(names[:3]))
    return positions, values


def by_folders(names: Sequence[str], path: Path, classes: Labels | None = None, beside: Labels | None = None
               ) -> tuple[NDArray[np.int64], int | None, str]:
    """The class of each file by the folder that it is in, how many classes there are, and a sentence on it.

    A folder whose name is a number is that class. Otherwise classes are in the order of `classes`, or of the labels
    `beside` the network if they name all folders, or of the folders' names.

    Raises: UsageError if the files are not in folders, or if `classes` lacks one.
    """
    parts = [name.split("/")[:-1] for name in names]
    first, last = min(parts), max(parts)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    folders = [p[shared] if len(p) > shared else "" for p in parts]
    known = sorted(set(folders))
    if len(known) < 2 or not known[0]:
        raise UsageError(f"nothing says which classes the images of {path} are of",
                         want="--labels TABLE.tsv, or a folder for each class",
                         got=f"{sum(not f for f in folders)} of {len(folders)} images in no folder of their own"
                         if known[0] == "" and len(known) > 1 else "one folder")
    if classes is None and all(f.isascii() and f.isdigit() and len(f) < 10 for f in known):
        return np.array([int(f) for f in folders], np.int64), None, "folders are numbers of classes"
    numbers = {label: i for i, label in classes.names.items()} if classes else {}
    if classes and (missing := [f for f in known if f not in numbers]):
        raise UsageError(f"{classes.source} does not name the class of the folder {missing[0]}",
                         want=", ".join(list(numbers)[:8]), got=", ".join(missing[:8]))
    if not classes and beside and set(known) <= (named := {label: i for i, label in beside.names.items()}).keys():
        classes, numbers = beside, named
    if classes:
        return np.array([numbers[f] for f in folders], np.int64), classes.count, f"classes as {classes.source} has them"
    numbers = {f: i for i, f in enumerate(known)}
    shown = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
    return (np.array([numbers[f] for f in folders], np.int64), len(known),
            f"{len(known)} classes in the order of the folders' names: {shown}")
