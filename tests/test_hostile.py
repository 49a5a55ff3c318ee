"""Hostile files: each ends with one clear error or an answer, soon, in little memory, and nothing raw on the terminal.

One process with a bound on its memory forks a child for each case, so that a case that breaks it breaks it alone.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")

from onnx import TensorProto, helper

SECONDS = 10
LARGE = 20
"""Seconds of what has 10^5 of something."""
MEGABYTES = 1024
ADDRESSES = 6 << 30
"""Bytes of address space of a case: libraries map much that they never touch."""
FLOAT = TensorProto.FLOAT


# protobuf by hand, for what the packages refuse to write


def varint(n):
    out = bytearray()
    while True:
        out.append(n & 0x7F | (0x80 if n > 0x7F else 0))
        n >>= 7
        if not n:
            return bytes(out)


def piece(number, content):
    """A field of bytes, a text, a message, or a number."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content & (1 << 64) - 1)
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor_type(dims=(1, 4)):
    shape = b"".join(piece(1, piece(1, d)) for d in dims)
    return piece(1, piece(1, FLOAT) + piece(2, shape))


def value_info(name, dims=(1, 4)):
    return piece(1, name) + piece(2, tensor_type(dims))


def step(op, inputs, outputs, extra=b"", name=""):
    return b"".join(piece(1, i) for i in inputs) + b"".join(piece(2, o) for o in outputs) + piece(4, op) + (
        piece(3, name) if name else b"") + extra


def wire(nodes, extra=b"", outputs=("y",), inputs=("x",)):
    """Bytes of a model around NodeProtos."""
    graph = b"".join(piece(1, n) for n in nodes) + piece(2, "hostile") + extra
    graph += b"".join(piece(11, value_info(i)) for i in inputs) + b"".join(piece(12, value_info(o)) for o in outputs)
    return piece(1, 8) + piece(7, graph) + piece(8, piece(1, "") + piece(2, 17))


def blob(name, dims, kind=FLOAT, extra=b""):
    return b"".join(piece(1, d) for d in dims) + piece(2, kind) + piece(8, name) + extra


def outside(name, dims, **where):
    entries = b"".join(piece(13, piece(1, k) + piece(2, v)) for k, v in where.items())
    return blob(name, dims, extra=entries + piece(14, 1))


def model(nodes, initializers=(), inputs=(("x", (1, 4)),), outputs=(("y", None),), opset=17, domains=()):
    graph = helper.make_graph(
        nodes, "hostile", [helper.make_tensor_value_info(n, FLOAT, d) for n, d in inputs],
        [helper.make_tensor_value_info(n, FLOAT, d) for n, d in outputs], list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def ints(name, values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, **attributes)


RELU = step("Relu", ["x"], ["y"])
ADD = step("Add", ["x", "w"], ["y"])


def nested(depth):
    """If in If in If: as deep as protobuf is asked to read."""
    inner = step("Relu", ["x"], ["y"])
    for _ in range(depth):
        graph = piece(1, inner) + piece(2, "b") + piece(12, value_info("y"))
        attribute = piece(5, piece(1, "then_branch") + piece(6, graph) + piece(20, 5))
        inner = step("If", ["c"], ["y"], attribute)
    return wire([inner], inputs=("x", "c"))


def chain(count):
    return wire([step("Relu", ["x" if i == 0 else f"t{i}"], ["y" if i == count - 1 else f"t{i + 1}"])
                      for i in range(count)])


def bomb(op, inputs, constants, **attributes):
    """A node of constants alone that would make 10^12 elements, added to the input."""
    return model([node(op, inputs, ["big"], **attributes), node("Add", ["x", "big"], ["y"])], constants)


ONE = helper.make_tensor("one", FLOAT, [1], [1.0])
HUGE = 10**6
LOOP = helper.make_graph(
    [node("Identity", ["c"], ["c2"]), node("Add", ["s", "s"], ["s2"])], "body",
    [helper.make_tensor_value_info("i", TensorProto.INT64, []),
     helper.make_tensor_value_info("c", TensorProto.BOOL, []),
     helper.make_tensor_value_info("s", FLOAT, [1, 4])],
    [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("s2", FLOAT, [1, 4])])
SMALL = model([node("Add", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])],
              [helper.make_tensor("w", FLOAT, [4], [1.0] * 4)])
IMAGE = [("x", (1, 1, 8, 8))]
ESCAPE = "\x1b[2J\x1b]0;owned\x07"

ONNX = {
    # name: (file, exit codes, words of the error)
    "empty graph": (piece(1, 8) + piece(7, b"") + piece(8, piece(2, 17)), {3}, "without a graph"),
    "cut in half": (SMALL[: len(SMALL) // 2], {3}, ""),
    "length of 2^62": (b"\x08\x08\x3a" + varint(1 << 62) + b"abc", {3}, "damaged"),
    "length of ten bytes": (b"\x08\x08\x3a" + b"\xff" * 10, {3}, "damaged"),
    "varint without end": (b"\x08" + b"\xff" * 64, {3}, ""),
    "If 1000 deep": (nested(1000), {3}, "damaged"),
    "If 40 deep": (nested(40), {0, 1, 3}, ""),
    "2^40 elements without data": (wire([ADD], piece(5, blob("w", [1 << 20, 1 << 20]))), {3}, "constant 'w'"),
    "2^30 elements without data": (wire([ADD], piece(5, blob("w", [1 << 15, 1 << 15]))), {3}, "constant 'w'"),
    "extents that wrap": (wire([ADD], piece(5, blob("w", [1 << 62, 4, 1 << 62]))), {3}, "too large"),
    "negative extent": (wire([ADD], piece(5, blob("w", [-1]))), {3}, "negative extent"),
    "100 dimensions": (wire([ADD], piece(5, blob("w", [1] * 100))), {3}, "too large"),
    "input of 2^60 elements": (model([node("Relu", ["x"], ["y"])], inputs=[("x", (1 << 30,) * 2)]), {3}, "too large"),
    "sparse constants": (wire([ADD], piece(15, piece(1, blob("w", [1])) + piece(3, 1 << 40))), {3}, "sparse"),
    "element type 99": (wire([ADD], piece(5, blob("w", [1], 99))), {3}, "99"),
    "cycle": (wire([step("Add", ["x", "b"], ["a"]), step("Relu", ["a"], ["b"]),
                         step("Relu", ["b"], ["y"])]), {3}, "cycle"),
    "self-loop": (wire([step("Add", ["x", "y"], ["y"])]), {3}, "cycle"),
    "written twice": (wire([RELU, RELU]), {3}, "a second time"),
    "constants of one name": (wire([ADD], 2 * piece(5, blob("w", [1], extra=piece(9, b"\0" * 4)))), {3},
                              "two constants"),
    "read of nothing": (wire([step("Relu", ["ghost"], ["y"])]), {3}, "which nothing computes"),
    "opset 999": (model([node("Relu", ["x"], ["y"])], opset=999), {0, 1, 3}, ""),
    "opset 2^62": (wire([RELU]).replace(piece(2, 17), piece(2, 1 << 62)), {0, 1, 3}, ""),
    "unknown domain": (model([node("Launch", ["x"], ["y"], domain="com.evil")], domains=["com.evil"]), {1}, ""),
    "no operator": (wire([step("", ["x"], ["y"])]), {3}, "no operator"),
    "names that are no text": (wire([step(b"\xff\xfe", ["x"], ["y"])]), {3}, "no text"),
    "names that steer a terminal": (wire([step(f"Op{ESCAPE}", ["x", f"t{ESCAPE}"], ["y"], name=ESCAPE)]), {3},
                                    "which nothing computes"),
    "operator that steers a terminal": (wire([step(f"Op{ESCAPE}", ["x"], ["y"], name=ESCAPE)]), {0, 1, 3}, ""),
    "name of 10^6 characters": (wire([step("Relu", ["x"], ["y"], name="M" * HUGE)]), {3}, "1000000 characters"),
    "operator of 10^6 characters": (wire([step("N" * HUGE, ["x"], ["y"])]), {3}, "1000000 characters"),
    "names as long as they may be": (wire([step("N" * 256, ["x"], ["y"], name="M" * 65536)]), {0, 1, 3}, ""),
    "reads a name of 10^6 characters": (wire([step("Relu", ["g" * 65000], ["y"])]), {3}, "nothing computes"),
    "strings": (model([node("Identity", ["w"], ["y"])], [helper.make_tensor("w", TensorProto.STRING, [1],
                                                                            [b"\x1b[31m" * 99])]), {0, 1, 3}, ""),
    "loop of 2^62 trips": (model([node("Loop", ["n", "c", "x"], ["y"], body=LOOP)],
                                 [helper.make_tensor("n", TensorProto.INT64, [], [1 << 62]),
                                  helper.make_tensor("c", TensorProto.BOOL, [], [True])]), {0, 1, 3}, ""),
    "rank of 1000": (model([node("Unsqueeze", ["x", "a"], ["y"])], [ints("a", list(range(1000)))]), {0, 1, 3}, ""),
    "pool of 2^40": (model([node("MaxPool", ["x"], ["y"], kernel_shape=[1 << 40, 1 << 40])], inputs=IMAGE),
                     {0, 1, 3}, ""),
    "stride 0": (model([node("MaxPool", ["x"], ["y"], kernel_shape=[1, 1], strides=[0, 0])], inputs=IMAGE),
                 {0, 1, 3}, ""),
    "group 0": (model([node("Conv", ["x", "w"], ["y"], group=0)], [helper.make_tensor("w", FLOAT, [1, 1, 1, 1], [1.0])],
                      [("x", (1, 1, 8, 8))]), {0, 1, 3}, ""),
}

BOMBS = {
    "ConstantOfShape": bomb("ConstantOfShape", ["s"], [ints("s", [HUGE, HUGE])]),
    "Expand": bomb("Expand", ["one", "s"], [ONE, ints("s", [HUGE, HUGE])]),
    "Tile": bomb("Tile", ["one", "s"], [ONE, ints("s", [10**12])]),
    "Range": bomb("Range", ["a", "b", "d"], [helper.make_tensor(n, FLOAT, [], [v]) for n, v in
                                             (("a", 0.0), ("b", 1e12), ("d", 1.0))]),
    "Range of small steps": bomb("Range", ["a", "b", "d"], [helper.make_tensor(n, FLOAT, [], [v]) for n, v in
                                                            (("a", 0.0), ("b", 1.0), ("d", 1e-12))]),
    "Pad": bomb("Pad", ["one", "s"], [ONE, ints("s", [10**12, 0])]),
    "Resize": bomb("Resize", ["four", "", "z"], [helper.make_tensor("four", FLOAT, [1, 1, 1, 1], [1.0]),
                                                 helper.make_tensor("z", FLOAT, [4], [1, 1, 1e6, 1e6])]),
    "Resize by sizes": bomb("Resize", ["four", "", "", "z"], [helper.make_tensor("four", FLOAT, [1, 1, 1, 1], [1.0]),
                                                              ints("z", [1, 1, HUGE, HUGE])]),
    "Upsample": model([node("Upsample", ["four", "z"], ["big"]), node("Add", ["x", "big"], ["y"])],
                      [helper.make_tensor("four", FLOAT, [1, 1, 1, 1], [1.0]),
                       helper.make_tensor("z", FLOAT, [4], [1, 1, 1e6, 1e6])], opset=9),
    "OneHot": bomb("OneHot", ["i", "d", "v"], [ints("i", [0]), helper.make_tensor("d", TensorProto.INT64, [], [10**12]),
                                               helper.make_tensor("v", FLOAT, [2], [0, 1])]),
    "outer product": model([node("MatMul", ["l", "r"], ["big"]), node("Add", ["x", "big"], ["y"])],
                           [helper.make_tensor("l", FLOAT, [100_000, 1], [1.0] * 100_000),
                            helper.make_tensor("r", FLOAT, [1, 100_000], [1.0] * 100_000)]),
    "broadcast": model([node("Add", ["l", "r"], ["big"]), node("Add", ["x", "big"], ["y"])],
                       [helper.make_tensor("l", FLOAT, [100_000, 1], [1.0] * 100_000),
                        helper.make_tensor("r", FLOAT, [1, 100_000], [1.0] * 100_000)]),
    "Gather": model([node("Gather", ["l", "i"], ["big"]), node("Add", ["x", "big"], ["y"])],
                    [helper.make_tensor("l", FLOAT, [1, 100_000], [1.0] * 100_000), ints("i", [0] * 100_000)]),
    "Conv with a pad": bomb("Conv", ["four", "k"], [helper.make_tensor("four", FLOAT, [1, 1, 1, 1], [1.0]),
                                                    helper.make_tensor("k", FLOAT, [1, 1, 1, 1], [1.0])],
                            pads=[500_000] * 4),
    "doubling": model([*(node("Concat", [f"t{i}"] * 8, [f"t{i + 1}"], axis=0) for i in range(14)),
                       node("Add", ["x", "t14"], ["y"])], [helper.make_tensor("t0", FLOAT, [4], [1.0] * 4)]),
    "Einsum": bomb("Einsum", ["l", "l", "l"], [helper.make_tensor("l", FLOAT, [10_000], [1.0] * 10_000)],
                   equation="i,j,k->ijk"),
}


def files(folder):
    """(name, arguments of npulab, exit codes, words) of every case, its files written."""
    def put(name, data):
        path = folder / name.replace(" ", "_").replace("^", "")
        path.write_bytes(data)
        return str(path)

    out = str(folder / "out.onnx")
    cases = [(name, ["check", put(f"{name}.onnx", data), "--target", "rk3588"], codes, words)
             for name, (data, codes, words) in ONNX.items()]
    for name, data in BOMBS.items():
        path = put(f"{name}.onnx", data)
        cases.append((f"{name} bomb, check", ["check", path, "--target", "rk3588"], {0, 1, 3}, ""))
        cases.append((f"{name} bomb, patch", ["patch", path, "-o", out], {0, 1, 3}, ""))
    for name in ("names that steer a terminal", "operator that steers a terminal", "names as long as they may be"):
        path = put(f"{name}.onnx", ONNX[name][0])
        cases += [(f"{name}, {verb}", [verb, path, *more], {0, 1, 3}, "") for verb, more in (
            ("teardown", []), ("patch", ["-o", out]), ("check", ["--target", "a311d"]), ("check", ["--all"]))]
    return cases + _outside(folder, put) + _sizes(put) + _feeds(folder, put) + _tflite(put)


def _outside(folder, put):
    """Weights beside the model, or where they must not be."""
    (folder / "weights.bin").write_bytes(b"\0" * 16)
    with (folder / "sparse.bin").open("wb") as f:
        f.truncate(1 << 31)
    os.mkfifo(folder / "fifo.bin")
    (folder / "null.bin").symlink_to("/dev/zero")
    (folder / "passwd.bin").symlink_to("/etc/passwd")
    (folder / "itself.bin").symlink_to("itself.bin")
    (folder / "folder.bin").mkdir()
    places = {
        "offset outside": ({"location": "weights.bin", "offset": "16"}, "lies outside"),
        "offset below zero": ({"location": "weights.bin", "offset": "-16"}, "lies outside"),
        "length outside": ({"location": "weights.bin", "length": str(1 << 62)}, "lies outside"),
        "length of no number": ({"location": "weights.bin", "length": "9" * 5000}, "no number"),
        "length that does not fit": ({"location": "weights.bin", "length": "8"}, "wrong length"),
        "location above": ({"location": "../../../etc/passwd"}, "outside the model's folder"),
        "location absolute": ({"location": "/etc/passwd"}, "outside the model's folder"),
        "location with a zero": ({"location": "a\0b"}, "cannot be read"),
        "location of 60000 characters": ({"location": "a" * 60000}, ""),
        "location empty": ({"location": ""}, ""),
        "a pipe": ({"location": "fifo.bin"}, "not there"),
        "/dev/zero": ({"location": "/dev/zero"}, "outside the model's folder"),
        "a link to /dev/zero": ({"location": "null.bin"}, "outside the model's folder"),
        "a link out": ({"location": "passwd.bin"}, "outside the model's folder"),
        "a link to itself": ({"location": "itself.bin"}, ""),
        "a folder": ({"location": "folder.bin"}, "not there"),
        "much of a terabyte of nothing": ({"location": "sparse.bin", "length": str(1 << 39)}, ""),
    }
    cases = []
    for i, (name, (where, words)) in enumerate(places.items()):
        path = put(f"w {i}.onnx", wire([ADD], piece(5, outside("w", [4], **where))))
        cases.append((f"weights: {name}", ["check", path, "--target", "rk3588"], {3}, words))
    return cases


def _sizes(put):
    """Much of everything."""
    many = wire([step("Relu", ["x"], ["y"])], b"".join(
        piece(5, blob(f"w{i}", [1], extra=piece(9, b"\0" * 4))) for i in range(50_000)))
    wide = wire([step("Concat", ["x"] * 100_000, ["y"], piece(5, piece(1, "axis") + piece(3, 1) + piece(20, 2)))])
    fan = wire([*(step("Relu", ["x"], [f"t{i}"]) for i in range(10_000)),
                     *(step("Add", [f"t{i}", f"t{i + 1}"], [f"u{i}"]) for i in range(9_999)),
                     step("Relu", ["u0"], ["y"])])
    often = wire([ADD], piece(5, blob("w", [4], extra=piece(9, b"") * 10**7)))
    return [(name, ["check", put(f"{name}.onnx", data), "--target", "rk3588"], {0, 1, 3}, "") for name, data in (
        ("100000 nodes", chain(100_000)), ("50000 constants", many), ("100000 inputs of a node", wide), ("fan", fan),
        ("constant with 10000000 contents", often))]


def _feeds(folder, put):
    """Arrays for patch --input: compressed zeros, headers that lie."""
    path = put("small.onnx", SMALL)

    def npz(name, header, count):
        where = folder / f"{name}.npz"
        with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z, z.open("x.npy", "w",
                                                                                            force_zip64=True) as f:
            text = header.encode()
            f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
            zeros = bytes(1 << 20)
            for _ in range(count):
                f.write(zeros)
        return str(where)

    def said(shape, kind="'<f4'"):
        return f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"

    bombs = {
        "10 GB by its header": (said((1, 4, 10**9)), 8),
        "64 MB of zeros": (said((1, 4)), 64),
        "2^60 elements": (said((1 << 30, 1 << 30)), 1),
        "pickles": (said((1, 4), "'|O'"), 1),
        "header of nonsense": ("(" * 60000, 0),
    }
    cases = [(f"feeds: {name}", ["patch", path, "-o", str(folder / "fed.onnx"), "--input", npz(f"feed{i}", *what)],
              codes, "") for i, (name, what) in enumerate(bombs.items())
             for codes in ({0} if name == "64 MB of zeros" else {2, 3},)]
    (folder / "text.npz").write_text("no zip")
    text = str(folder / "text.npz")
    return [*cases, ("feeds: no zip", ["patch", path, "-o", str(folder / "fed.onnx"), "--input", text], {3},
                     "is not a file of arrays")]


def _tflite(put):
    """Damaged FlatBuffers, read by check over boards and by the compiler's."""
    from npulab.exporters.tflite_builder import ModelBuilder

    b = ModelBuilder("seed")
    x = b.tensor("x", (1, 8, 8, 3), "uint8", scale=0.5, zero_point=3)
    w = b.tensor("w", (4, 3, 3, 3), "uint8", scale=0.1, zero_point=0, data=np.ones((4, 3, 3, 3), np.uint8))
    c = b.tensor("b", (4,), "int32", scale=0.05, zero_point=0, data=np.arange(4, dtype=np.int32))
    y = b.tensor("y", (1, 8, 8, 4), "uint8", scale=0.25, zero_point=128)
    b.op("CONV_2D", [x, w, c], [y], padding="SAME", stride_w=1, stride_h=1, fused_activation_function="RELU")
    seed = bytes(b.build([x], [y]))
    rng = np.random.default_rng(7)
    cases = []
    for i in range(10):
        data = bytearray(seed)
        for at in rng.integers(8, len(data) - 4, 4):
            data[at : at + 4] = struct.pack("<I", int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])))
        path = put(f"damaged {i}.tflite", bytes(data))
        for target in ("rk3588", "a311d"):
            cases.append((f"damaged TFLite {i}, {target}", ["check", path, "--target", target], {0, 1, 3}, ""))
    return cases


# running them


def _run(arguments):
    """In this process: exit code, what was printed, seconds, peak memory in MiB. A traceback is exit code 99."""
    import contextlib
    import io
    import traceback

    from npulab.cli import run_arguments

    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_arguments(arguments)
        except BaseException:
            code = 99
            traceback.print_exc(file=err)
    return {"code": code, "out": out.getvalue()[-4000:], "err": err.getvalue()[:4000],
            "raw": any(c in out.getvalue() + err.getvalue() for c in "\x1b\x07\x00"),
            "seconds": time.process_time() - began,
            "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _child(arguments, seconds):
    """The case in a fork of this process, with bounds; one that waits for something is ended too."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(15 * seconds)
        with os.fdopen(write, "w") as f:
            json.dump(_run(arguments), f)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    _, status = os.waitpid(pid, 0)
    if text:
        return json.loads(text)
    return {"code": 98, "out": "", "err": f"died of signal {os.WTERMSIG(status)}", "raw": False, "seconds": 0, "mib": 0}


def _main(folder):
    import onnxruntime  # noqa: F401 (before the forks: each would load it anew)

    import npulab.cli
    import npulab.passes.certificate
    import npulab.passes.pipeline  # noqa: F401
    from npulab.targets.facts.board import boards

    boards()
    made = files(Path(folder))
    _run(["check", str(Path(folder) / "small.onnx"), "--target", "rk3588"])
    print(json.dumps([(name, sorted(codes), words, _child(arguments, 4 * SECONDS))
                      for name, arguments, codes, words in made]))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_hostile_files_end_with_a_clear_error(results):
    wrong = [(name, r["code"], r["err"][-300:]) for name, codes, words, r in results
             if r["code"] not in codes or words not in r["err"] + r["out"] or "Traceback" in r["err"]]
    silent = [name for name, _, _, r in results if r["code"] > 1 and not r["err"].strip()]

    assert len(results) > 115
    assert not wrong
    assert not silent


def test_hostile_files_take_little_time_and_memory(results):
    slow = [(name, r["seconds"]) for name, _, _, r in results
            if r["seconds"] > (LARGE if "0000" in name else SECONDS)]
    large = [(name, r["mib"]) for name, _, _, r in results if r["mib"] > MEGABYTES]

    assert not slow
    assert not large


def test_a_loop_without_end_is_stopped():
    """What ONNX Runtime runs to compare networks has a bound on its time."""
    ort = pytest.importorskip("onnxruntime")
    from npulab.passes.bounds import limited_run

    session = ort.InferenceSession(ONNX["loop of 2^62 trips"][0], providers=["CPUExecutionProvider"])
    began = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"not done after 0\.3 s"):
        limited_run(session, ["y"], {"x": np.ones((1, 4), np.float32)}, 0.3)

    assert time.perf_counter() - began < SECONDS


def test_tensors_that_no_memory_holds_are_not_computed():
    """40 GB of zeros in an .onnx of some bytes."""
    from npulab.errors import UnsupportedError
    from npulab.importers import load
    from npulab.passes.bounds import affordable

    affordable(load(SMALL))
    with pytest.raises(UnsupportedError, match="is not run to compare it"):
        affordable(load(bomb("ConstantOfShape", ["s"], [ints("s", [HUGE, HUGE])])))
    with pytest.raises(UnsupportedError, match="is not run to compare it"):
        affordable(load(BOMBS["broadcast"]))


def test_weights_outside_are_hashed_once_each_byte(tmp_path):
    """A thousand tensors over the same bytes, and a terabyte that the file system does not store."""
    from npulab.errors import ModelError
    from npulab.importers import load

    (tmp_path / "w.bin").write_bytes(bytes(range(256)) * 4096)
    names = [f"w{i}" for i in range(1000)]
    constants = b"".join(piece(5, outside(n, [1 << 18], location="w.bin")) for n in names)
    (tmp_path / "net.onnx").write_bytes(wire([step("Sum", ["x", *names], ["y"])], constants))
    began = time.process_time()
    first = load(tmp_path / "net.onnx")
    assert time.process_time() - began < 2
    (tmp_path / "w.bin").write_bytes(bytes(range(255, -1, -1)) * 4096)
    assert load(tmp_path / "net.onnx").digest != first.digest

    with (tmp_path / "tb.bin").open("wb") as f:
        f.truncate(1 << 40)
    tera = piece(5, outside("w", [1 << 38], location="tb.bin"))
    (tmp_path / "tera.onnx").write_bytes(wire([ADD], tera))
    with pytest.raises(ModelError, match=r"too many weights outside the file|cannot be read"):
        load(tmp_path / "tera.onnx")


def test_nothing_in_a_file_steers_the_terminal(results):
    assert not [name for name, _, _, r in results if r["raw"]]


def test_errors_stay_short_whatever_the_names(results):
    assert not [(name, len(r["err"])) for name, _, _, r in results if len(r["err"]) > 2000]


if __name__ == "__main__":
    _main(sys.argv[1])
