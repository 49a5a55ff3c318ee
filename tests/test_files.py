"""Files are written whole or not at all, whenever the process ends."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from npulab.errors import UsageError
from npulab.program import files
from npulab.program.files import check_place, write_atomically


@pytest.fixture(params=["without a name", "no names for such files", "hidden"])
def way(request, monkeypatch):
    """How the bytes get there: as Linux does it, where only `open` works, and elsewhere."""
    if request.param == "hidden":
        monkeypatch.setattr(files, "NAMELESS", 0)
    elif not files.NAMELESS or not os.path.isdir(files.OPEN_FILES):
        pytest.skip("no files without a name here")
    if request.param == "no names for such files":
        def refuse(*_args, **_more):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        monkeypatch.setattr(os, "link", refuse)
    return request.param


def test_new_and_old_files_are_written(tmp_path, way):
    target = tmp_path / "out"
    for content in (b"first", b"second, longer", b""):
        write_atomically(target, content)
        assert target.read_bytes() == content
    write_atomically(target, lambda f: f.writelines([b"a", b"b"]))
    assert target.read_bytes() == b"ab"
    assert os.listdir(tmp_path) == ["out"]


def test_permissions_are_those_of_any_new_file(tmp_path, way):
    write_atomically(tmp_path / "out", b"x")
    (tmp_path / "other").write_bytes(b"x")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_keeps_pointing_at_what_it_names(tmp_path, way):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_failure_leaves_what_was_there(tmp_path, way):
    (tmp_path / "out").write_bytes(b"old")

    def full(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UsageError, match="cannot write") as e:
        write_atomically(tmp_path / "out", full)
    assert "No space" in str(e.value.facts["got"])
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new", lambda f: (_ for _ in ()).throw(KeyboardInterrupt))
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"old"


def test_a_place_is_asked_for_and_left_as_it_was(tmp_path, way):
    check_place(tmp_path / "out")
    assert os.listdir(tmp_path) == []
    for bad in (tmp_path, tmp_path / "no" / "out", "a\0b"):
        with pytest.raises(UsageError, match="cannot write"):
            check_place(bad)


@pytest.mark.skipif(not files.NAMELESS or not os.path.isdir(files.OPEN_FILES), reason="files need names here")
@pytest.mark.parametrize("there", [b"", b"old"])
def test_a_process_that_is_killed_while_it_writes_leaves_nothing(tmp_path, there):
    try:
        os.close(os.open(tmp_path, os.O_WRONLY | files.NAMELESS))
    except OSError:
        pytest.skip("the file system of temporary files has none without a name")
    if there:
        (tmp_path / "out").write_bytes(there)
    code = ("import os, signal; from npulab.program.files import write_atomically; write_atomically('out', lambda f: "
            "(f.write(b'half'), f.flush(), os.kill(os.getpid(), signal.SIGKILL)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -signal.SIGKILL
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"out": there} if there else {})
