"""Files in and out: reading with a bound, writing whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from npulab.errors import ModelError, UsageError


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

    The bytes go to a hidden name in the same folder, reach the disk, and then take the real name. `content` is the
    bytes or a function that writes them. A process killed outright may leave the hidden file, never half the real one.

    Raises: UsageError if the place cannot be written.
    """
    target, hidden, handle = _hidden(path)
    try:
        with open(handle, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content)
            f.flush()
            os.fsync(f.fileno())
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
    _, hidden, handle = _hidden(path)
    os.close(handle)
    hidden.unlink(missing_ok=True)


def _hidden(path: str | os.PathLike[str]) -> tuple[Path, Path, int]:
    """The file behind the links, a new one with a hidden name beside it, and that one opened."""
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            raise UsageError(f"cannot write {target}: it exists and is not a file",
                             try_="name a file in a folder you may write to")
        target = Path(os.path.realpath(target))  # a link keeps pointing at the file it names
        hidden = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
        return target, hidden, os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot write {path}", got=getattr(e, "strerror", None) or e,
                         try_="name a file in a folder you may write to") from e
