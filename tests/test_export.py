"""Doors: what they write, that scripts are scripts, that tools run in bounds, and what the C array's bytes are."""

import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npulab import zoo
from npulab.cli import run_arguments
from npulab.doors import folder, tflm, tools
from npulab.doors.bundle import bundle
from npulab.doors.catalog import DOORS, SCRIPTS, board_doors, chosen, find_door
from npulab.doors.model import computed, opset_of, prepare, real
from npulab.doors.types import Picture, Preprocessing
from npulab.errors import CapacityError, NpulabError, UnsupportedError, UsageError
from npulab.exporters import c_array
from npulab.importers import load
from npulab.targets.facts.schema import ids
from shared import MODELS, needs_shared

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

DIGITS = Path(tools.__file__).parents[1] / "samples" / "digits.tflite"
HOW = Preprocessing((10.0, 20.0, 30.0), (50.0, 60.0, 70.0), "bgr")


def net(name="picture", opset=17, shape=(1, 3, 12, 10), dtype=TensorProto.FLOAT):
    """Convolution, ReLU, mean, matrix product: ONNX."""
    rng = np.random.default_rng(3)
    constants = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n)
                 for n, s in (("w", (4, 3, 3, 3)), ("b", (4,)), ("m", (4, 5)))]
    nodes = [helper.make_node("Conv", [name, "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
             helper.make_node("Relu", ["c"], ["r"], "relu"),
             helper.make_node("GlobalAveragePool", ["r"], ["g"], "mean"),
             helper.make_node("Flatten", ["g"], ["f"], "flat"),
             helper.make_node("MatMul", ["f", "m"], ["scores"], "product")]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info(name, dtype, shape)],
                              [helper.make_tensor_value_info("scores", TensorProto.FLOAT, (shape[0], 5))], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(5):
        Image.fromarray(rng.integers(0, 256, (20 + k, 30, 3), np.uint8)).save(place / f"{k}.png")
    (place / "notes.txt").write_text("not a picture")
    return place


def cli(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = run_arguments(["export", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def script(place, text):
    """A program at `place`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    place.chmod(0o755)
    return place


def scripts_of(files):
    return {p: c.decode() for p, c in files.items() if p.endswith((".py", ".sh"))}


# every door


@pytest.mark.parametrize("door", DOORS, ids=lambda d: d.name)
def test_every_door_writes_scripts_that_are_scripts(door, pictures, tmp_path):
    made, refused = {}, {}
    for name, content, how in (("float", net(), None), ("pixels", net(), HOW), ("digits", DIGITS, None)):
        try:
            samples_ = pictures if door.calibration and how else None
            made[name] = bundle(load(content), door, door.targets[0] if door.targets else "", None, how, samples_)
        except UnsupportedError as e:
            refused[name] = e
    assert made, door.name
    assert all(e.facts for e in refused.values())
    for name, b in made.items():
        assert {"README.txt", "export.json", "example.npz"} < set(b.files)
        for path, text in scripts_of(b.files).items():
            assert not re.search(r"@[A-Z_]+@", text), (path, "a setting is left open")
            if path.endswith(".py"):
                compile(text, path, "exec")
            else:
                subprocess.run(["bash", "-n"], input=text.encode(), check=True)
        stored = json.loads(b.files["export.json"])
        assert stored["door"] == door.name
        assert set(stored["files"]) == set(b.files) - {"export.json"}
        text = b.files["README.txt"].decode()
        assert max(len(line) for line in text.splitlines() if "://" not in line) <= 80, door.name
        assert door.tool in text
        assert door.source in text
        (tmp_path / name).mkdir()
        folder.write_files(tmp_path / name, b.files)
    if ruff := shutil.which("ruff", path=os.path.dirname(sys.executable)):  # names that do not exist, unused imports
        done = subprocess.run([ruff, "check", "--isolated", "--select", "F,E9", str(tmp_path)], capture_output=True)
        assert done.returncode == 0, done.stdout.decode()


def test_every_template_belongs_to_a_door_and_every_board_to_one():
    used = {t for d in DOORS for t in d.scripts} | {"export_data.py.txt"}
    assert used == {p.name for p in SCRIPTS.iterdir()}
    for board, (name, word) in board_doors().items():
        assert board in ids()
        door = find_door(name)
        assert word in door.targets or (not word and not door.targets), board
        assert chosen(None, board) == (door, word)


def test_names_in_a_model_cannot_become_code(pictures):
    evil = "x'\"\n$(touch pwned)`touch pwned`;import os\\"
    for door in DOORS:
        if "onnx" not in door.takes:
            continue
        b = bundle(load(net(evil)), door, door.targets[0] if door.targets else "", None, HOW,
                   pictures if door.calibration else None)
        for text in scripts_of(b.files).values():
            assert "pwned" not in text
        assert "\n$(" not in b.files["README.txt"].decode()


def test_preprocessing_stands_where_the_tool_wants_it(pictures):
    graph = load(net())
    said = {name: bundle(graph, find_door(name), "", None, HOW, pictures if find_door(name).calibration else None)
            for name in ("rknn", "hailo", "openvino", "axera", "onnx", "axelera", "k210")}
    for name in ("rknn", "hailo", "openvino", "k210"):
        text = said[name].files["convert.py"].decode()
        assert "MEAN = [10.0, 20.0, 30.0]" in text, name
        assert "SWAP_RED_AND_BLUE = True" in text, name
    config = json.loads(said["axera"].files["config.json"])
    assert config["input_processors"][0]["mean"] == [10.0, 20.0, 30.0]
    assert config["input_processors"][0]["tensor_format"] == "BGR"
    assert config["quant"]["input_configs"][0]["calibration_size"] == 5
    assert "MEAN = [10.0, 20.0, 30.0]" in said["axelera"].files["preprocess.py"].decode()
    assert "inside the converted network" in " ".join(said["rknn"].files["README.txt"].decode().split())
    assert "the application does this" in " ".join(said["onnx"].files["README.txt"].decode().split())


def test_pixels_become_the_numbers_that_the_network_takes():
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    x = real(pixels, HOW, Picture("x", 2, 2, 3, True))
    assert x.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(x[0, 0], (pixels[0, :, :, 2] - 10.0) / 50.0, rtol=1e-6)  # blue comes first
    np.testing.assert_allclose(x[0, 2], (pixels[0, :, :, 0] - 30.0) / 70.0, rtol=1e-6)


def test_the_helper_reads_what_was_written(pictures, tmp_path):
    b = bundle(load(net()), find_door("openvino"), "CPU", None, HOW, pictures)
    folder.write_files(tmp_path, b.files)
    helper_ = types.ModuleType("export_data")
    helper_.__file__ = str(tmp_path / "export_data.py")
    exec(compile((tmp_path / "export_data.py").read_text(), "export_data.py", "exec"), helper_.__dict__)
    np.testing.assert_array_equal(helper_.example()[0], helper_.real(helper_.pixels()))
    assert [a.shape for a in helper_.expected()] == [(1, 5)]
    assert helper_.raw_samples().shape == (5, 12, 10, 3)
    assert next(helper_.samples())[0].shape == (1, 3, 12, 10)
    helper_.report([helper_.expected()[0] + 1])
    assert np.load(tmp_path / "outputs.npz")["out0"].shape == (1, 5)


# the model


def test_a_newer_opset_is_lowered_and_computes_the_same():
    graph = load(net(opset=20))
    older = prepare(graph, find_door("axelera"))
    assert opset_of(older.graph) == 14
    assert older.notes == ("opset 20 lowered to 14",)
    x = {"in0": np.random.default_rng(1).normal(size=(1, 3, 12, 10)).astype(np.float32)}
    np.testing.assert_array_equal(computed(graph, x)[0], computed(older.graph, x)[0])
    assert prepare(graph, find_door("axelera"), opset=20).notes == ()


def test_dynamic_sizes_need_a_number_and_floats_no_integer_compiler(capsys, tmp_path):
    (tmp_path / "d.onnx").write_bytes(net(shape=(1, 3, "n", 10)))
    code, _, err = cli(capsys, tmp_path / "d.onnx", "--to", "rknn", "-o", tmp_path / "o")
    assert code == 2
    assert "wants fixed sizes" in err
    assert "--dim NAME=SIZE" in err
    assert cli(capsys, tmp_path / "d.onnx", "--to", "rknn", "-o", tmp_path / "o", "--dim", "n=12")[0] == 0
    (tmp_path / "f.onnx").write_bytes(net())
    code, _, err = cli(capsys, tmp_path / "f.onnx", "--to", "vela", "-o", tmp_path / "v")
    assert code == 1
    assert "Vela" in err
    assert not (tmp_path / "v").exists()


@needs_shared
def test_a_dynamic_batch_of_tflite_is_the_size_that_the_file_has():
    graph = load(MODELS / "quantized" / "vww_96_int8.tflite")
    b = bundle(graph, find_door("vela"), "ethos-u55-128")
    assert b.files["model.tflite"] == bytes(graph.source)
    assert "dynamic sizes" in b.notes[0]
    assert b.expected[0].shape == (1, 2)


# calibration


def test_calibration_takes_pictures_or_arrays(pictures, tmp_path):
    graph = load(net())
    b = bundle(graph, find_door("rknn"), "rk3588", None, None, pictures)
    assert b.files["calibration.txt"].decode().split() == [f"calibration/{k:03}.png" for k in range(5)]
    assert Image.open(io.BytesIO(b.files["calibration/003.png"])).size == (10, 12)
    for k in range(3):
        np.savez(tmp_path / f"{k}.npz", picture=np.full((1, 3, 12, 10), k, np.float32))
    b = bundle(graph, find_door("qnn"), "75", None, None, tmp_path)
    assert b.files["calibration.txt"].decode().split() == [f"calibration/{k:03}_0.npy" for k in range(3)]
    assert np.load(io.BytesIO(b.files["calibration/002_0.npy"])).max() == 2
    np.savez(tmp_path / "4.npz", other=np.zeros(3))
    with pytest.raises(UsageError, match="has no array 'picture'"):
        bundle(graph, find_door("qnn"), "75", None, None, tmp_path)
    (tmp_path / "4.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(NpulabError, match="not a file of arrays by name"):
        bundle(graph, find_door("qnn"), "75", None, None, tmp_path)


def test_calibration_that_is_none(pictures, tmp_path):
    with pytest.raises(UsageError, match="is no calibration set"):
        bundle(load(net()), find_door("rknn"), "rk3588", None, None, tmp_path)
    with pytest.raises(UsageError, match="measures no ranges"):
        bundle(load(net()), find_door("ncnn"), "", None, None, pictures)
    with pytest.raises(UsageError, match="cannot read the calibration folder"):
        bundle(load(net()), find_door("rknn"), "rk3588", None, None, tmp_path / "none")


# TensorFlow Lite Micro


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4099])
def test_a_c_array_has_the_bytes(size, tmp_path):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    source, header = c_array.to_c_array(data, "model_data", "a */ comment /* and more\n")
    (tmp_path / "model_data.c").write_bytes(source)
    (tmp_path / "model_data.h").write_bytes(header)
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include <stdint.h>\n#include "model_data.h"\n'
        "int main(void) { if ((uintptr_t)model_data % 16) return 3;\n"
        "  return fwrite(model_data, 1, model_data_len, stdout) != model_data_len; }\n")
    subprocess.run([compiler, "-Wall", "-Werror", "-o", "a.out", "main.c", "model_data.c"], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "a.out"], capture_output=True, check=True).stdout == data
    if shutil.which("g++") and size == 17:
        subprocess.run(["g++", "-x", "c++", "-Wall", "-Werror", "-o", "b.out", "main.c", "model_data.c"], cwd=tmp_path,
                       check=True)
        assert subprocess.run([tmp_path / "b.out"], capture_output=True, check=True).stdout == data


def test_a_c_array_refuses_what_c_does_not_take(monkeypatch):
    with pytest.raises(UsageError, match="no name for a C array"):
        c_array.to_c_array(b"", "1x")
    monkeypatch.setattr(c_array, "SIZE_MAX", 3)
    with pytest.raises(CapacityError, match="too large for a C array"):
        c_array.to_c_array(b"1234", "x")


def test_tflm_names_its_operators_and_refuses_others(tmp_path):
    b = bundle(load(DIGITS), find_door("tflm"))
    text = b.files["model_ops.h"].decode()
    calls = b.manifest["tflm"]["operators"]
    assert "AddConv2D" in calls
    assert f"MicroMutableOpResolver<{len(calls)}>" in text
    assert all(f"resolver.{c}()" in text for c in calls)
    assert "MODEL_INPUT0_SCALE" in b.files["model_io.h"].decode()
    assert f"sha256 {b.manifest['files']['model.tflite']['sha256']}" in b.files["model_data.c"].decode()[:200]
    if shutil.which("gcc"):
        (tmp_path / "io.h").write_bytes(b.files["model_io.h"])
        (tmp_path / "x.c").write_text('#include "io.h"\nfloat s = MODEL_INPUT0_SCALE;\n'
                                      "int z = MODEL_OUTPUT0_ZERO_POINT;\n")
        subprocess.run(["gcc", "-c", "-Wall", "-Werror", "x.c"], cwd=tmp_path, check=True)


@needs_shared
def test_tflm_refuses_operators_that_it_has_not():
    with pytest.raises(UnsupportedError, match="no kernel for operators") as e:
        tflm.resolver_calls(load(MODELS / "float" / "selfie_segmentation.tflite"))
    assert e.value.facts["got"] == "Convolution2DTransposeBias"


ALLOCATED = {
    "float/ad01_fp32": 6224, "float/mobilenet_v1_0.25_224_1_default_1": 1643520, "float/pretrainedResnet": 203376,
    "float/pretrainedResnet_large_float": 502320, "float/vww_96_float": 324800, "quantized/ad01_int8": 3984,
    "quantized/keras_lstm_mnist_ptq": 4480, "quantized/kws_ref_model": 24272, "quantized/person_detect": 85264,
    "quantized/pretrainedResnet_large_int8": 133744, "quantized/pretrainedResnet_quant": 55984,
    "quantized/vww_96_int8": 103680, "quantized/yolov5n-int8": 5025328,
    "quantized/yolov8n_full_integer_quant_416": 2179472}
"""Bytes of the arena that the package tflite-micro 0.dev20261023 allocated for each model."""


@needs_shared
@pytest.mark.parametrize("name", ALLOCATED)
def test_the_arena_hint_is_enough_and_not_much_more(name):
    hint = tflm.arena_bytes(load(MODELS / f"{name}.tflite"))
    assert ALLOCATED[name] <= hint <= ALLOCATED[name] * 1.05 + 1500


# folders


def test_nothing_but_an_earlier_export_is_replaced(capsys, tmp_path):
    model, out = tmp_path / "m.onnx", tmp_path / "out"
    model.write_bytes(net())
    assert cli(capsys, model, "--to", "onnx", "-o", out)[0] == 0
    assert cli(capsys, model, "--to", "rknn", "-o", out)[0] == 0  # an export of ours, as it was written
    assert not (out / "verify.py").exists()
    (out / "model.hef").write_text("hours of work")
    code, _, err = cli(capsys, model, "--to", "onnx", "-o", out)
    assert code == 2
    assert "did not write" in err
    assert "model.hef" in err
    assert "--force" in err
    assert cli(capsys, model, "--to", "onnx", "-o", out, "--force")[0] == 0
    assert not (out / "model.hef").exists()
    other = tmp_path / "other"
    other.mkdir()
    assert cli(capsys, model, "--to", "onnx", "-o", other)[0] == 0  # an empty folder
    shutil.rmtree(other)
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    code, _, err = cli(capsys, model, "--to", "onnx", "-o", other)
    assert code == 2
    assert "is no export of npulab" in err
    assert "thesis.txt" in err
    assert cli(capsys, model, "--to", "onnx", "-o", model)[0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "other", "out"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with folder.building(tmp_path / "x") as place:
            (place / "half").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_working_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for place in (".", "..", "../.."):
        with pytest.raises(UsageError, match="the working folder"):
            folder.check_free(Path(place), True)


# running tools


def test_a_door_of_this_environment_runs_and_is_compared(capsys, tmp_path):
    (tmp_path / "m.onnx").write_bytes(net())
    code, out, _ = cli(capsys, tmp_path / "m.onnx", "--to", "onnx", "-o", tmp_path / "o", "--run", "--json")
    found = json.loads(out)["run"]
    assert code == 0
    assert found["converted"]
    assert found["outputs"][0]["relative_error"] < 1e-5
    assert not (tmp_path / "o" / "outputs.npz").exists()
    code, out, _ = cli(capsys, DIGITS, "--to", "tflite", "-o", tmp_path / "t", "--run")
    assert code == 0
    assert "largest error" in out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    code, out, _ = cli(capsys, DIGITS, "--to", "tflite", "-o", tmp_path / "t", "--run")  # logs are known as our own
    assert code == 0


FAKE = """#!{python}
import json, os, pathlib, sys
print(json.dumps(dict(os.environ)))
{body}
"""


def fake(tmp_path, body):
    return script(tmp_path / "bin" / "vela", FAKE.format(python=sys.executable, body=body))


def test_a_program_runs_without_our_environment(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    program = fake(tmp_path, "pathlib.Path('model_vela.tflite').write_bytes(pathlib.Path('model.tflite').read_bytes())")
    code, out, err = cli(capsys, DIGITS, "--to", "vela", "-o", tmp_path / "o", "--tool", program, "--json")
    assert code == 0, out + err
    found = json.loads(out)["run"]
    assert found["npu_operators"] == 0
    assert len(found["cpu_operators"]) == len(load(DIGITS).nodes)
    assert found["made"] == ["convert.log", "model_vela.tflite"]
    seen = json.loads((tmp_path / "o" / "convert.log").read_text().splitlines()[0])
    assert "SECRET_TOKEN" not in seen
    assert seen["HOME"] != os.environ.get("HOME")
    assert stat.S_IMODE((tmp_path / "o" / "convert.sh").stat().st_mode) & 0o100


@pytest.mark.parametrize(("body", "why"), [
    ("sys.exit('the network is too deep')", "ended with code 1"),
    ("pass", "made no model_vela.tflite"),
    ("import time; time.sleep(60)", "took more than 1 s"),
    ("x = bytearray(2**30)", "ended with code 1"),
])
def test_a_tool_that_fails_is_told_with_its_last_words(capsys, tmp_path, monkeypatch, body, why):
    if "bytearray" in body:
        monkeypatch.setattr(tools, "MEMORY_SHARE", 2**29 / (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    code, out, _ = cli(capsys, DIGITS, "--to", "vela", "-o", tmp_path / "o", "--tool", fake(tmp_path, body),
                       "--seconds", 1 if "sleep" in body else 0)
    assert code == 1
    assert why in " ".join(out.split()), out
    assert (tmp_path / "o" / "README.txt").exists()  # the export itself is whole
    if "deep" in body:
        assert "too deep" in out
    if "bytearray" in body:
        assert "MemoryError" in out


def test_mnn_finds_no_program(tmp_path):
    b = bundle(load(net()), find_door("mnn"))
    folder.write_files(tmp_path, b.files)
    (tmp_path / "_tools.py").write_text("import os, pathlib\nassert os.environ['PATH'] == ''\n"
                                        "def mnnconvert(a): pathlib.Path('model.mnn').write_text(' '.join(a))\n")
    ran = tools.run(tmp_path, find_door("mnn"), tools.Tool(sys.executable), b)
    assert ran.converted
    assert "does not run" in ran.why
    assert "--modelFile model.onnx" in (tmp_path / "model.mnn").read_text()


def test_wrong_outputs_of_a_tool_are_seen(tmp_path):
    b = bundle(load(net()), find_door("onnx"))
    folder.write_files(tmp_path, b.files)
    (tmp_path / "verify.py").write_text("from export_data import expected, report\nreport([expected()[0] + 0.5])\n")
    ran = tools.run(tmp_path, find_door("onnx"), tools.Tool(sys.executable), b)
    assert ran.agreements[0].largest == pytest.approx(0.5, rel=1e-5)
    assert not ran.agreements[0].equal
    (tmp_path / "verify.py").write_text("open('outputs.npz', 'wb').write(b'no archive')\n")
    assert tools.run(tmp_path, find_door("onnx"), tools.Tool(sys.executable), b).agreements == ()


def test_the_log_is_bounded(tmp_path):
    (tmp_path / "log").write_bytes(b"a" * (tools.LOG_MAX + 5) + b"last words")
    tools._shorten(tmp_path / "log")
    content = (tmp_path / "log").read_bytes()
    assert len(content) == tools.LOG_MAX
    assert content.endswith(b"last words")


# the command line


def test_the_list_says_doors_tools_and_boards(capsys):
    code, out, _ = cli(capsys, "--list")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    listed = {d["name"]: d for d in json.loads(cli(capsys, "--list", "--json")[1])["doors"]}
    assert "rk3588" in listed["rknn"]["boards"]
    assert listed["hailo"]["package"] is None
    assert listed["vela"]["integer_only"]
    assert listed["rknn"]["preprocessing_inside"]


@pytest.mark.parametrize(("arguments", "code", "said"), [
    ((), 2, "needs to know where to"),
    (("--to", "rknnn"), 2, "there is no door 'rknnn'"),
    (("--to", "rknn", "--board", "hailo8"), 2, "rknn does not make files for hailo8"),
    (("--board", "max78000"), 1, "no door here leads to max78000"),
    (("--board", "rk9999"), 2, "there is no board 'rk9999'"),
    (("--to", "rknn", "--chip", "rk1"), 2, "knows no chip 'rk1'"),
    (("--to", "ncnn", "--chip", "cpu"), 2, "does not ask for a chip"),
    (("--to", "onnx", "--mean", "1,2"), 2, "--mean does not know '1,2'"),
    (("--to", "onnx", "--mean", "nan"), 2, "--mean does not know 'nan'"),
    (("--to", "onnx", "--std", "0"), 2, "do not fit the network's input"),
    (("--to", "onnx", "--order", "grb"), 2, "--order does not know 'grb'"),
    (("--to", "onnx", "--order", "bgr"), 2, "says nothing without --mean"),
    (("--to", "hailo", "--run"), 2, "hailo_dataflow_compiler from Hailo's developer zone"),
    (("--to", "rknn", "--tool", "/nowhere/python"), 2, "is no program"),
])
def test_wrong_usage_says_what_to_do(capsys, tmp_path, arguments, code, said):
    (tmp_path / "m.onnx").write_bytes(net())
    got, out, err = cli(capsys, tmp_path / "m.onnx", "-o", tmp_path / "o", *arguments)
    assert (got, out) == (code, ""), err
    assert said in err
    assert not (tmp_path / "o").exists()


def test_a_board_picks_tool_and_chip(capsys, tmp_path):
    (tmp_path / "m.onnx").write_bytes(net())
    code, out, _ = cli(capsys, tmp_path / "m.onnx", "--board", "rk3566_rk3568", "-o", tmp_path / "o", "--json")
    assert code == 0
    assert json.loads(out)["target"] == "rk3566"
    assert "CHIP = 'rk3566'" in (tmp_path / "o" / "convert.py").read_text()
    assert cli(capsys, tmp_path / "m.onnx", "--to", "rknn", "--chip", "rk3568", "-o", tmp_path / "p")[0] == 0
    assert "CHIP = 'rk3568'" in (tmp_path / "p" / "convert.py").read_text()


def test_a_head_that_was_cut_off_goes_along_as_a_program(capsys, tmp_path):
    (tmp_path / "m.onnx").write_bytes(zoo.build("yolov8n", size=64))
    assert run_arguments(["patch", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "b.onnx"), "--pass", "cut-head"]) == 0
    assert cli(capsys, tmp_path / "b.onnx", "--to", "onnx", "-o", tmp_path / "o")[0] == 0
    assert (tmp_path / "o" / "postprocess.py").read_bytes() == (tmp_path / "b_post.py").read_bytes()
    assert "give the outputs, dequantized, to postprocess.py" in (tmp_path / "o" / "README.txt").read_text()


def test_the_arena_of_a_very_large_network_is_bounded_work(monkeypatch):
    graph = load(DIGITS)
    exact = tflm.arena_bytes(graph)
    monkeypatch.setattr(tflm, "LIVES_MAX", 0)
    assert exact * 0.9 < tflm.arena_bytes(graph) < exact * 1.1
