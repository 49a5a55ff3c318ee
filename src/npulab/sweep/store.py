"""The results of sweeps: one SQLite file, a row for each point that was measured, keyed by content.

A row is written once its point is measured, in a transaction that is on the disk before the next begins: a sweep killed
at any moment leaves a valid file. A row of a done point is never written again.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import msgspec

from npulab.errors import ModelError, UsageError
from npulab.sweep.points import Point, Record, canonical, version

APPLICATION = 0x6E707377
"""SQLite's application_id of these files: 'npsw'."""
SCHEMA = 1
BUSY_SECONDS = 30.0

NUMBERS = ("state", "total_ms", "low_ms", "high_ms", "bound", "dram_bytes", "sram_bytes", "npu_ops", "host_ops",
           "error_class", "error")
COLUMNS = ("key", "model", "model_sha256", "target", "plan", "options", "what_if", "npulab", *NUMBERS, "nodes")

TABLE = """
CREATE TABLE results (
  key TEXT PRIMARY KEY NOT NULL,
  model TEXT NOT NULL, model_sha256 TEXT NOT NULL, target TEXT NOT NULL, plan TEXT NOT NULL,
  options TEXT NOT NULL, what_if TEXT NOT NULL, npulab TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('done', 'failed')),
  total_ms REAL, low_ms REAL, high_ms REAL, bound TEXT, dram_bytes INTEGER, sram_bytes INTEGER,
  npu_ops INTEGER, host_ops INTEGER, error_class TEXT, error TEXT,
  nodes BLOB
)"""


class Store:
    """The file at `path`, which is made when the first row is written.

    Raises: ModelError if there is a file that is not one of ours, or is damaged, or of another schema; UsageError if
    the place cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._db: sqlite3.Connection | None = None
        if _is_ours(self.path):
            self._open()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def states(self) -> dict[str, str]:
        """Key -> "done" or "failed", of every row, other grids' too."""
        if self._db is None:
            return {}
        with self._errors():
            return dict(self._db.execute("SELECT key, state FROM results"))

    def records(self, keys: Mapping[str, object]) -> Iterator[tuple[str, Record]]:
        """The rows among `keys`, without their nodes, in no order."""
        if self._db is None:
            return
        with self._errors():
            for key, *numbers in self._db.execute(f"SELECT key, {', '.join(NUMBERS)} FROM results"):
                if key in keys:
                    yield key, msgspec.convert(dict(zip(NUMBERS, numbers, strict=True)), Record)

    def nodes(self, key: str) -> dict[str, list[object]] | None:
        """The profile's table of one point, by column; None if there is none."""
        with self._errors():
            row = None if self._db is None else self._db.execute("SELECT nodes FROM results WHERE key = ?",
                                                                 (key,)).fetchone()
            return msgspec.json.decode(zlib.decompress(row[0]), type=dict[str, list[object]]) \
                if row is not None and row[0] is not None else None

    def write(self, measured: Iterable[tuple[Point, Record]]) -> None:
        """Add rows, all or none. A row that is done already stays; one that failed is replaced."""
        rows = [_row(p, r) for p, r in measured]
        if self._db is None:
            self._open()
        assert self._db is not None
        with self._errors(), _transaction(self._db):
            self._db.executemany(
                f"INSERT INTO results VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT (key) DO UPDATE SET "
                f"{', '.join(f'{c} = excluded.{c}' for c in COLUMNS[1:])} WHERE state = 'failed'", rows)

    def _open(self) -> None:
        with self._errors():
            self._db = db = sqlite3.connect(os.path.abspath(self.path), timeout=BUSY_SECONDS, isolation_level=None)
            try:
                db.execute("PRAGMA synchronous = FULL")
                with _transaction(db):
                    if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # new, or killed at birth
                        db.execute(f"PRAGMA application_id = {APPLICATION}")
                        db.execute(f"PRAGMA user_version = {SCHEMA}")
                        db.execute(TABLE)
                found = tuple(r[1] for r in db.execute("PRAGMA table_info(results)"))
                if found != COLUMNS:
                    raise sqlite3.DatabaseError("its table is another one")
                checked = db.execute("PRAGMA quick_check(1)").fetchone()[0]
                if checked != "ok":
                    raise sqlite3.DatabaseError(checked)
            except BaseException:
                self.close()
                raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as e:
            raise UsageError(f"cannot use {self.path} as a results file", got=e,
                             try_="a file in a folder you may write to, that has space left") from e
        except (sqlite3.DatabaseError, msgspec.MsgspecError, zlib.error, UnicodeDecodeError) as e:
            raise ModelError(f"{self.path} is damaged", got=str(e).split("\n")[0],
                             try_="another file with -o; `sqlite3 FILE .recover` saves the rows it can") from e


def _is_ours(path: Path) -> bool:
    """Whether there is a results file to read; False if there is none yet. SQLite opens no file that is not ours.

    The header is read as bytes: the name of the format, at 60 the user_version, at 68 the application_id
    (sqlite.org/fileformat2.html, section 1.3).
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} exists and is not a file", want="a place for the results file")
        if not path.exists() and not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}", got=f"{path.parent} is not a folder")
        if not path.exists():
            return False
        with path.open("rb") as f:
            head = f.read(100)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UsageError(f"cannot read {path} as a results file", got=getattr(e, "strerror", None) or e) from e
    if not head:
        return False
    if not (head.startswith(b"SQLite format 3\0") and head[68:72] == APPLICATION.to_bytes(4, "big")):
        raise ModelError(f"{path} is not a results file of npulab sweep", try_="another file with -o")
    schema = int.from_bytes(head[60:64], "big")
    if schema != SCHEMA:
        raise ModelError(f"{path} is a results file of another version of npulab", got=f"schema {schema}",
                         want=f"schema {SCHEMA}", try_="another file with -o")
    return True


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _row(p: Point, r: Record) -> tuple[object, ...]:
    """Compressed here and not where the point was measured: zlib's output may differ between machines."""
    return (p.key(), p.model, p.digest, p.target, p.plan, canonical(p.options), canonical(p.what_if), version(),
            *(getattr(r, name) for name in NUMBERS),
            None if r.nodes is None else zlib.compress(canonical(r.nodes).encode(), 9))
