"""Large bytes in files: pages that are let go come back as they were, and a full disk is said at once."""

from __future__ import annotations

import mmap
import os
import tempfile
from functools import partial

import numpy as np
import pytest
from onnx import TensorProto, helper

from npulab.errors import CapacityError
from npulab.program import pages
from npulab.program.pages import LARGE, arrays_away, let_go, put_away
from npulab.quantization import parts
from npulab.quantization.compare import noises
from npulab.quantization.types import ListedSamples


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


@pytest.fixture
def full(monkeypatch):
    """A disk for temporary files that is full."""
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(open, "/dev/full", "r+b"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("way", ["put away", "between parts", "compared"])
def test_a_full_disk_is_said_however_little_is_written(full, monkeypatch, way, size):
    monkeypatch.setattr(pages, "LARGE", 1)
    x = np.zeros(size // 4, np.float32)
    between = parts._Between()
    steps = {"put away": lambda: put_away([x.data.cast("B")], x.nbytes),
             "between parts": lambda: (between.put({"x": x}), list(between.all())),
             "compared": lambda: noises(relu(x.size), relu(x.size), {"y": "y"}, ListedSamples([{"x": x}]))}
    with pytest.raises(CapacityError, match="the disk for temporary files is full") as error:
        steps[way]()
    between.close()

    assert "1 MiB" in str(error.value)


def relu(size):
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, [size])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [size])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


def test_that_there_is_no_folder_for_temporary_files_is_said(monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/gone']")
    monkeypatch.setattr(tempfile, "TemporaryFile", none)
    with pytest.raises(CapacityError, match="/gone"):
        put_away([bytes(LARGE)], LARGE)
