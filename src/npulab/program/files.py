"""Files in and out: reading with a bound, writing whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from npulab.errors import ModelError, UsageError

NAMELESS: int = getattr(os, "O_TMPFILE", 0)
"""Opens a new file without a name in a folder. Linux."""
OPEN_FILES = "/proc/self/fd"
"""Where Linux has the process's open files by number."""


def read_bounded(path: str | os.PathLike[str], what: str, limit: int) -> bytes:
    """The file's bytes. `what` names its role in messages ("a program file"); `limit` in bytes.

    Raises: UsageError if it cannot be read; ModelError if it is larger than `limit`.
    """
    try:
        with open(path, "rb") as f:
            if stat.S_ISDIR(os.fstat(f.fileno()).st_mode):  # some systems open folders
                raise IsADirectoryError(21, "Is a directory")
            data = f.read(limit + 1)
    except OSError as e:
        raise UsageError(f"cannot read {os.fspath(path)} as {what}", got=e.strerror or e) from e
    except ValueError as e:  # a path with a NUL
        raise UsageError(f"cannot read {os.fspath(path)!r} as {what}", got=e) from e
    if len(data) > limit:
        raise ModelError(f"{os.fspath(path)} is too large for {what}", want=f"at most {limit} bytes",
                         got=f"more than {limit} bytes")
    return data


def write_atomically(path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file so that readers see the old one or the whole new one, and a failure leaves nothing behind.

    The bytes go to a file without a name (Linux; elsewhere with a hidden one) in the same folder, reach the disk, and
    then take the real name. `content` is the bytes or a function that writes them. Of a process killed outright nothing
    is left, or, where files need a name, the hidden one; never half the real one.

    Raises: UsageError if the place cannot be written.
    """
    target, hidden, handle, named = _opened(path)
    try:
        with open(handle, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content)
            f.flush()
            os.fsync(f.fileno())
            if not named:
                try:
                    named = not _linked(f.fileno(), target)
                    if named:  # no name is taken from another file but by `replace`
                        _linked(f.fileno(), hidden)
                except OSError:  # a system that opens such files and gives them no names
                    named = True
                    _copied(f.fileno(), hidden)
        if named:
            os.replace(hidden, target)
    except OSError as e:
        hidden.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}", got=e.strerror or e,
                         try_="free some space, or name another place") from e
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


def check_place(path: str | os.PathLike[str]) -> None:
    """Whether a file can be written there, asked before long work. Raises: UsageError as `write_atomically`."""
    _, hidden, handle, named = _opened(path)
    os.close(handle)
    if named:
        hidden.unlink(missing_ok=True)


def _opened(path: str | os.PathLike[str]) -> tuple[Path, Path, int, bool]:
    """The file behind the links, a new hidden name beside it, a new file, opened, and whether it has that name."""
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            raise UsageError(f"cannot write {target}: it exists and is not a file",
                             try_="name a file in a folder you may write to")
        target = Path(os.path.realpath(target))  # a link keeps pointing at the file it names
        hidden = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
        if NAMELESS and os.path.isdir(OPEN_FILES):
            with suppress(OSError):  # not every file system has them; what else is wrong is said below
                return target, hidden, os.open(target.parent, os.O_RDWR | NAMELESS, 0o666), False
        return target, hidden, os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), True
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot write {path}", got=getattr(e, "strerror", None) or e,
                         try_="name a file in a folder you may write to") from e


def _linked(handle: int, name: Path) -> bool:
    """Whether an open file has a name now; not if there is such a file."""
    folder = os.open(OPEN_FILES, os.O_RDONLY)
    try:
        os.link(str(handle), name, src_dir_fd=folder)  # by linkat, which follows the link there
    except FileExistsError:
        return False
    finally:
        os.close(folder)
    return True


def _copied(handle: int, name: Path) -> None:
    with open(os.dup(handle), "rb") as source, open(name, "xb") as to:
        source.seek(0)
        shutil.copyfileobj(source, to)
        to.flush()
        os.fsync(to.fileno())
