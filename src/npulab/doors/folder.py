"""Folders written whole or not at all, and never over what somebody else put there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from npulab.doors.bundle import MARK
from npulab.errors import UsageError

MANIFEST_MAX = 2**24


def check_free(folder: Path, force: bool) -> None:
    """Refuse a place that holds anything but an earlier export as it was written.

    Raises: UsageError; with `force` only for what is no folder, and for folders that the working folder lies in.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"cannot write the folder {folder}: it exists and is not a folder", try_="-o ANOTHER")
    if not folder.exists():
        return
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents, Path.home()):
        raise UsageError(f"{folder} is the working folder, or one around it", try_="-o a new folder inside it")
    try:
        inside = sorted(os.listdir(folder))
    except OSError as e:
        raise UsageError(f"cannot read {folder}", got=e.strerror) from None
    if not inside or force:
        return
    written = _written(folder)
    if written is None:
        raise UsageError(f"{folder} is no export of npulab, and would be replaced", got=f"it holds {_few(inside)}",
                         try_="-o ANOTHER, or --force")
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    if added := [p for p in found if p not in written]:
        raise UsageError(f"{folder} holds files that this export did not write, and would be replaced",
                         got=_few(added), try_="-o ANOTHER, or --force")


def _written(folder: Path) -> set[str] | None:
    """The files that an earlier export put there; None if it was none."""
    try:
        with open(folder / "export.json", "rb") as f:
            manifest = json.loads(f.read(MANIFEST_MAX))
        if manifest["made_by"] != MARK:
            return None
        return {*manifest["files"], "export.json", "convert.log", "verify.log", *manifest.get("made", ())}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def building(folder: Path, force: bool = False) -> Iterator[Path]:
    """A hidden folder beside `folder` to write into, which takes its name at the end; on an error it vanishes.

    Raises: UsageError where the place is taken or cannot be written.
    """
    check_free(folder, force)
    hidden = folder.parent / f".{folder.name[:80]}.{secrets.token_hex(6)}.tmp"
    try:
        hidden.mkdir()
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot write the folder {folder}", got=getattr(e, "strerror", None) or e,
                         try_="name a place in a folder you may write to") from None
    try:
        yield hidden
        old = folder.parent / f"{hidden.name}.old"
        if folder.exists():
            check_free(folder, force)
            os.rename(folder, old)
        os.rename(hidden, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise UsageError(f"cannot write the folder {folder}", got=e.strerror or e) from e
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put the files there; scripts can be executed."""
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
        if path.endswith(".sh"):
            place.chmod(0o755)
