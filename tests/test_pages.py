"""Large bytes in files: pages that are let go come back as they were, and a full disk is said at once."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from npulab.program.pages import arrays_away, let_go


def mapped(path, content):
    path.write_bytes(content)
    with path.open("rb") as f:
        return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))


def test_what_was_written_over_a_mapped_file_is_not_let_go(tmp_path):
    """Pages of a copy on write are nowhere else: a user's samples scaled in place became the file's again."""
    np.save(tmp_path / "x.npy", np.full((8, 100_000), 255, np.float32))
    x = np.load(tmp_path / "x.npy", mmap_mode="c")
    x /= 255
    for kept in arrays_away(list(x)):
        assert (kept == 1).all()
    assert (x == 1).all()
    let_go(x)
    assert (x == 1).all()


@pytest.mark.parametrize("at", [0, 5, mmap.PAGESIZE])
def test_nothing_of_a_mapped_file_can_be_let_go(tmp_path, at):
    let_go(mapped(tmp_path / "a", b"a" * mmap.PAGESIZE)[at:at])
