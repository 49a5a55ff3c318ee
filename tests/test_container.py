"""The .npu file: what goes in comes out, equal in gives equal out, and anything else is refused with a reason."""

import hashlib
import json
import os
import random
import struct

import msgspec
import numpy as np
import pytest

from npulab.errors import ModelError, UsageError
from npulab.program import container, files, law
from npulab.program.container import program_bytes, read_program, write_program
from npulab.program.dump import dump
from npulab.program.types import HostStep, Program, Section, SectionKind, Tensor, Transfer
from programs import INPUT, SHAPE, SIZE, program


def signed(data):
    """The same file with a right hash: what an attacker would hand in."""
    return data[:8] + hashlib.sha256(data[40:]).digest() + data[40:]


def with_header(change):
    """A file whose header went through `change`, with a right hash."""
    data = program_bytes(program())
    length, = struct.unpack_from("<I", data, 44)
    start = 48 + length + -(48 + length) % 64
    header = json.loads(data[48 : 48 + length])
    change(header)
    new = json.dumps(header, separators=(",", ":")).encode()
    out = data[:44] + struct.pack("<I", len(new)) + new + bytes(-(48 + len(new)) % 64) + data[start:]
    return signed(out)


def test_a_program_comes_back_equal(tmp_path):
    path = tmp_path / "a.npu"

    write_program(program(), path)

    assert read_program(path) == program()
    assert read_program(path.read_bytes()) == program()


def test_equal_programs_give_equal_bytes():
    assert program_bytes(program()) == program_bytes(read_program(program_bytes(program())))


def test_every_run_of_bytes_starts_at_a_multiple_of_64():
    data = program_bytes(program())
    length, = struct.unpack_from("<I", data, 44)
    start = 48 + length + -(48 + length) % 64
    at = data.index(bytes(range(100)), start)

    assert start % 64 == 0
    assert (at - start) % 64 == 0


def test_writing_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.npu"
    path.write_bytes(b"old")

    write_program(program(), path)

    assert os.listdir(tmp_path) == ["a.npu"]
    assert read_program(path) == program()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch, call):
    path = tmp_path / "a.npu"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(UsageError) as e:
        write_program(program(), path)

    assert str(e.value) == (f"cannot write {path}\n  got     No space left on device\n"
                            "  try     free some space, or name another place")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.npu"]


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_program(program(), tmp_path / "a.npu")

    assert os.listdir(tmp_path) == []


def test_a_folder_or_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"it exists and is not a file\n  try"):
        write_program(program(), tmp_path)
    with pytest.raises(UsageError, match="No such file or directory"):
        write_program(program(), tmp_path / "no" / "a.npu")
    with pytest.raises(UsageError, match="No such file or directory"):
        read_program(tmp_path / "no.npu")


def test_a_link_keeps_pointing_at_the_file_it_names(tmp_path):
    (tmp_path / "real.npu").write_bytes(b"old")
    (tmp_path / "link.npu").symlink_to("real.npu")

    write_program(program(), tmp_path / "link.npu")

    assert (tmp_path / "link.npu").is_symlink()
    assert read_program(tmp_path / "real.npu") == program()


def test_a_foreign_file_is_told_from_a_damaged_one():
    with pytest.raises(ModelError) as e:
        read_program(b"\x1c\0\0\0TFL3 and more")

    assert str(e.value) == (
        "the program cannot be used: it is not a program file of npulab\n"
        "  want    a file that begins with b'NPULAB\\r\\n'\n"
        "  got     17 bytes that begin with b'\\x1c\\x00\\x00\\x00TFL3'\n"
        "  try     npulab compile MODEL --target a311d -o FILE.npu")


def test_a_cut_file_and_one_turned_bit_are_damage():
    data = program_bytes(program())

    for damaged in (data[:-1], data[:100], data + b"\0", data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        with pytest.raises(ModelError, match="damaged or cut short: its bytes do not give its SHA-256"):
            read_program(damaged)


def test_a_newer_version_says_what_to_do():
    data = program_bytes(program())

    with pytest.raises(ModelError) as e:
        read_program(signed(data[:40] + struct.pack("<I", 7) + data[44:]))

    assert str(e.value) == ("the program cannot be used: it is of another format version\n  want    version 1\n"
                            "  got     version 7\n  try     use the npulab that wrote it, or compile the model again")


def put(*path_and_value):
    *path, value = path_and_value

    def change(header):
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


@pytest.mark.parametrize(("change", "text"), [
    (put("sections", 2, "data", [0, 100]), "the bytes of section 'coefficients' are not where they must be"),
    (put("sections", 2, "data", [64, 1 << 40]), "the bytes of section 'coefficients' are not where they must be"),
    (put("sections", 2, "data", [64, -1]), "the bytes of section 'coefficients' are not where they must be"),
    (put("sections", 3, "data", None), "are not where they must be"),
    (put("init", [0, 7]), "the initialisation stream is not a stream of words"),
    (put("sections", 0, "size", 1 << 40), "section 'in' does not lie in the NPU's memory"),
    (put("sections", 0, "address", 0xFFFFFFFF), "section 'in' does not lie in the NPU's memory"),
    (put("sections", 0, "size", 1 << 20), "section 'out' overlaps the one before it"),
    (put("sections", 2, "size", 99), "section 'coefficients' has content of another size"),
    (put("inputs", [9]), "name tensor 9, which the program does not list"),
    (put("inputs", [0, 0]), "lists an input twice"),
    (put("inputs", []), "step 0 reads tensor 0 ('x') before anything computed it"),
    (put("outputs", [5]), "name tensor 5"),
    (put("steps", 0, "downloads", []), "step 1 reads tensor 1 ('y') before anything computed it"),
    (put("steps", 0, "downloads", 0, "value", 0), "computes tensor 0 ('x') a second time"),
    (put("steps", 0, "uploads", 0, "address", INPUT + 1), "outside the tensor sections"),
    (put("steps", 0, "uploads", 0, "address", 0x803000), "outside the tensor sections"),
    (put("steps", 0, "uploads", 0, "size", 63), "step 0 moves tensor 0 ('x') in part"),
    (put("steps", 0, "jobs", 1, "words", [2, 2]), "the words of job 1 are not where they must be"),
    (put("steps", 0, "jobs", 1, "words", [4, 90]), "the words of job 1 are not where they must be"),
    (put("steps", 0, "jobs", 1, "words", [4, -1]), "the words of job 1 are not where they must be"),
    (put("steps", 0, "jobs", 0, "index", 1), "job 0 is numbered 1"),
    (put("steps", 0, "jobs", 0, "kind", "gpu"), "job 0 is of an unknown kind"),
    (put("steps", 0, "jobs", 0, "nodes", [3]), "job 0 comes from operator 3, which does not exist"),
    (put("steps", 0, "jobs", 0, "descriptors", []), "job 0 has the wrong number of descriptors"),
    (put("steps", 0, "jobs", 0, "descriptors", [0x803180]), "a descriptor of job 0 does not lie"),
    (put("steps", 0, "jobs", 0, "coefficients", [0x802000, 101]), "the coefficients of job 0 do not lie"),
    (put("steps", 0, "jobs", 0, "macs", -1), "job 0 counts -1 multiply-accumulates"),
    (put("steps", 1, "nodes", [0]), "step 1 computes operator 0 a second time"),
    (put("steps", 1, "nodes", [-1]), "step 1 computes operator -1, which does not exist"),
    (put("tensors", 0, "dtype", "int7"), "tensor 0 ('x') has an unknown type"),
    (put("tensors", 0, "shape", [1 << 30, 1 << 30]), "tensor 0 ('x') is too large"),
    (put("tensors", 0, "shape", [-1]), "tensor 0 ('x') has no shape that a tensor can have"),
    (put("tensors", 0, "value", -1), "is listed twice, or has no index"),
    (put("tensors", 0, "scale", None), "a scale without a zero point"),
    (put("host_nodes", 0, "node", 3), "host operator 3 does not exist"),
    (put("digest", "../../etc/passwd"), "the program names no model"),
    (put("extra", 1), "its header is not the description of a program"),
    (put("target", None), "its header is not the description of a program"),
    (put("steps", 0, "jobs", 0, "macs", 1e300), "its header is not the description of a program"),
])
def test_a_right_hash_does_not_make_a_program_right(change, text):
    with pytest.raises(ModelError) as e:
        read_program(with_header(change))

    assert text in str(e.value)


def test_more_than_a_gigabyte_is_not_mapped():
    many = tuple(Section(f"s{i}", SectionKind.TENSOR, i << 28, 1 << 28) for i in range(5))

    with pytest.raises(ModelError, match="maps too much memory"):
        law.verify(program(sections=many, steps=(), outputs=(0,)))


def test_bytes_behind_the_end_are_refused():
    data = program_bytes(program())

    with pytest.raises(ModelError, match="does not end where its content ends"):
        read_program(signed(data + bytes(64)))


def test_a_header_that_claims_gigabytes_is_refused_before_it_is_read():
    data = program_bytes(program())

    with pytest.raises(ModelError, match="its header does not end inside the file"):
        read_program(signed(data[:44] + struct.pack("<I", 0xFFFFFFF0) + data[48:]))


def test_two_thousand_damaged_files_give_a_typed_error_or_a_lawful_program():
    rng = random.Random(7)
    whole = program_bytes(program())
    good = 0
    for case in range(2000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice(b'0123456789-.,:[]{}"\0\xffe')
                case 2:
                    del data[at : at + rng.randrange(1, 40)]
                case 3:
                    data[at:at] = data[at : at + rng.randrange(1, 40)]
        blob = signed(bytes(data)) if case % 2 else bytes(data)
        try:
            found = read_program(blob)
        except ModelError:
            continue
        good += 1
        law.verify(found)
        assert read_program(program_bytes(found)) == found
    assert good > 50  # turned bits in weights and names are legal


def test_the_law_refuses_what_only_a_compiler_could_make():
    step = program().steps[0]
    wide = msgspec.structs.replace(step, words=(*step.words[:-1], 1 << 32))

    with pytest.raises(ModelError, match="holds a word of more than 32 bits"):
        law.verify(program(steps=(wide, program().steps[1])))
    with pytest.raises(ModelError, match="is not a TFLite file"):
        law.verify(program(steps=(step, HostStep((2,), (1,), (2,), b""))))
    with pytest.raises(ModelError, match="no finite scale"):
        law.verify(program(tensors=(Tensor(0, "x", "int8", SHAPE, float("nan"), 0), *program().tensors[1:])))
    flipped = msgspec.structs.replace(step, uploads=(Transfer(0, INPUT, SIZE, True),))
    with pytest.raises(ModelError, match="with the sign bits turned"):
        law.verify(program(steps=(flipped, program().steps[1]),
                           tensors=(Tensor(0, "x", "int16", (32,), 0.1, 0), *program().tensors[1:])))


def test_the_dump_has_every_part_of_every_job(tmp_path):
    made: Program = program()

    dump(made, tmp_path / "d")

    report = json.loads((tmp_path / "d" / "jobs.json").read_text())
    assert list(report) == ["target", "plan", "jobs", "submits", "host_nodes", "memory"]
    first, second = report["jobs"]
    assert first == {"index": 0, "kind": "nn", "role": "convolution", "nodes": [0], "nn": "job_000_nn.bin",
                     "coef": "job_000_coef.bin", "tp": [], "cmd": "job_000_cmd.bin"}
    assert second["nn"] is None
    assert second["coef"] is None
    assert second["tp"] == ["job_001_tp0.bin", "job_001_tp1.bin"]

    def content(name):
        return (tmp_path / "d" / name).read_bytes()

    assert content("job_000_nn.bin") == (bytes(range(256)) * 2)[:136]
    assert content("job_001_tp1.bin") == (bytes(range(256)) * 2)[384 : 384 + 124]
    assert content("job_000_coef.bin") == bytes(range(100))
    assert np.frombuffer(content("job_001_cmd.bin"), "<u4").tolist() == [0x08010E01, 2]
    assert [len(content(s)) for s in report["submits"]] == [8, 32]
    assert report["host_nodes"] == [{"node": 2, "op": "SOFTMAX", "reasons": ["Softmax runs on the host."]}]
    assert report["memory"][0] == {"name": "in", "address": INPUT, "bytes": SIZE}


def test_a_missing_file_is_no_program(tmp_path):
    assert container.is_program(tmp_path / "missing") is False
