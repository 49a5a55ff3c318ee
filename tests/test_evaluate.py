"""Samples from files, and how well networks do on them: figures that are known, files that are not what they say."""

import io
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npulab
from npulab import zoo
from npulab.cli import run_arguments
from npulab.errors import ModelError, NpulabError, UnsupportedError, UsageError
from npulab.evaluation import evaluate, open_device, top1, wilson
from npulab.evaluation.classification import offset_of
from npulab.evaluation.coco import average_precision, read_instances
from npulab.evaluation.detection import category_ids, decoder_of
from npulab.evaluation.labels import by_folders, read_table
from npulab.program.types import Tensor
from npulab.runtime import array_samples, datasets
from npulab.runtime.answers import Labels
from npulab.runtime.datasets import open_samples
from npulab.runtime.images import parse_normalization
from scripts import loaded
from shared import MODELS, SHARED, needs_shared

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "src" / "npulab" / "samples"
MODEL = SAMPLES / "digits.tflite"
FACTS = json.loads((SAMPLES / "digits.json").read_text())
F32 = Tensor(0, "x", "float32", (1, 3, 8, 6))
LAST = Tensor(0, "x", "float32", (1, 8, 6, 3))
ROW = Tensor(0, "x", "float32", (1, 5))
I8 = Tensor(0, "x", "int8", (1, 5), 0.5, -3)


@pytest.fixture(scope="module")
def digits():
    """Held-out digits of the sample network: images N,32,32,3 and labels."""
    pytest.importorskip("sklearn", reason="needs scikit-learn for the digits: pip install 'npulab[sample]'")
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'npulab[litert]'")
    with loaded("scripts/train_sample.py") as script:
        return script.held_out()


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """The digits as PNG files, a folder a class."""
    base = tmp_path_factory.mktemp("digits")
    for i, (image, label) in enumerate(zip(*digits, strict=True)):
        (base / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(base / str(label) / f"{i:04}.png")
    return base


@pytest.fixture
def command(capsys):
    def call(*arguments):
        code = run_arguments(["evaluate", *map(str, arguments)])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def painted(path, size=(12, 10), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


# the sample network, whose accuracy is known


def test_the_sample_network_is_as_accurate_as_its_page_says(folder, digits, tmp_path):
    images, labels = digits
    np.savez_compressed(tmp_path / "digits.npz", image=images, labels=labels)
    from_folder = evaluate(MODEL, folder)
    from_arrays = evaluate(MODEL, tmp_path / "digits.npz")

    assert round(from_folder.value, 4) == round(from_arrays.value, 4) == FACTS["accuracy_uint8"]
    assert from_folder.samples == from_arrays.samples == FACTS["held_out_samples"]
    assert np.array_equal(from_arrays.labels, labels)
    assert np.array_equal(from_arrays.correct, from_arrays.predictions == labels)
    order = [int(Path(n).stem) for n in from_folder.names]  # by class, then by number
    assert np.array_equal(from_folder.predictions, from_arrays.predictions[order])
    assert from_arrays.interval[0] < from_arrays.value < from_arrays.interval[1]
    assert from_arrays.device == "LiteRT, reference kernels"


def test_every_device_reads_the_digits_alike(folder):
    pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
    known = evaluate(MODEL, folder, limit=40)

    for device in ("litert-fast", "onnxruntime", "onnxruntime-fast", "a311d"):
        made = evaluate(MODEL, folder, device=device, limit=40)
        assert made.names == known.names
        assert (made.predictions == known.predictions).sum() >= 39
        assert made.device != known.device


def test_the_verb_prints_the_figure_for_people_and_for_programs(command, folder):
    code, out, _ = command(MODEL, "--data", folder, "--limit", 20, "--json")
    found = json.loads(out)

    assert code == 0
    assert (found["metric"], found["samples"], found["class_offset"]) == ("top-1", 20, 0)
    assert found["value"] == evaluate(MODEL, folder, limit=20).value
    code, out, _ = command(MODEL, "--data", folder, "--limit", 20)
    assert code == 0
    assert f"top-1   {found['value']:.4f}" in out
    assert "folders are numbers of classes" in out
    assert max(map(len, out.splitlines())) <= 80


def test_labels_in_a_table_with_or_without_a_heading_choose_the_samples(folder, tmp_path):
    names = open_samples(folder, [Tensor(0, "x", "uint8", (1, 32, 32, 3))]).names[::30]
    rows = [f"{n}\t{n.split('/')[0]}\tdigit" for n in names]
    (tmp_path / "plain.tsv").write_text("\n".join(rows))
    (tmp_path / "headed.tsv").write_text("file\tclass\tname\r\n" + "\r\n".join(rows) + "\r\n")
    (tmp_path / "named.tsv").write_text("\n".join(f"{Path(n).name}\tn{n[0]}" for n in names))
    (tmp_path / "names.txt").write_text("\n".join(f"n{d}" for d in range(10)))
    known = evaluate(MODEL, folder, tmp_path / "plain.tsv")

    assert known.samples == 12
    assert list(known.names) == list(names)
    assert known.notes == ("348 samples without a label left out",)
    for other in (evaluate(MODEL, folder, tmp_path / "headed.tsv"),
                  evaluate(MODEL, folder, tmp_path / "named.tsv", classes=tmp_path / "names.txt")):
        assert np.array_equal(other.predictions, known.predictions)
        assert np.array_equal(other.labels, known.labels)


def test_wrong_labels_lower_the_figure(folder, digits, tmp_path):
    images, labels = digits
    np.savez(tmp_path / "shifted.npz", image=images, labels=(labels + 1) % 10)

    assert evaluate(MODEL, tmp_path / "shifted.npz", limit=50).value <= 0.02


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (("no.tflite", "--data", "."), 3, "no.tflite"),
    ((MODEL, "--data", "nowhere"), 2, "nowhere holds no samples\n  want    a folder or .zip of images"),
    ((MODEL, "--data", MODEL), 2, "got     a file of another kind"),
    ((MODEL, "--data", SAMPLES), 2, "nothing says which classes the images of"),
    ((MODEL, "--data", SAMPLES, "--device", "z80"), 2, "there is no device 'z80' to run networks on"),
    ((MODEL, "--data", SAMPLES, "--normalize", "loud"), 2, "--normalize does not know 'loud'"),
    ((MODEL, "--data", SAMPLES, "--normalize", "127,1e-300"), 2, "--normalize does not know '127,1e-300'"),
    ((MODEL, "--data", SAMPLES, "--labels", "no.tsv"), 2, "cannot read no.tsv as labels"),
    ((MODEL, "--data", SAMPLES, "--labels", MODEL), 3, "digits.tflite is not a table of labels"),
    ((MODEL, "--data", SAMPLES, "--labels", "no.json"), 2, "cannot read no.json as labels"),
    ((MODEL, "--data", SAMPLES, "--labels", SAMPLES / "digits.json"), 3, "digits.json is not COCO's instances.json"),
    ((MODEL, "--data", SAMPLES, "--post", "x.json"), 2, "--post is of detectors"),
    ((MODEL, "--data", SAMPLES, "--limit", 0), 2, "greater than or equal to 1"),
    ((MODEL, "--data", SAMPLES, "--fit", "stretch"), 2, "'stretch'"),
])
def test_mistakes_are_told_with_their_exit_code(command, arguments, code, text):
    got, out, err = command(*arguments)

    assert (got, out) == (code, "")
    assert text in err
    assert "Traceback" not in err


# figures


@pytest.mark.parametrize(("right", "of", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilsons_interval_is_the_published_one(right, of, low, high):
    """Newcombe 1998, Two-sided confidence intervals for the single proportion, Stat. Med. 17, table I, method 3."""
    assert np.allclose(wilson(right, of), (low, high), atol=5e-5)


def test_top1_of_any_callable_counts_ties_and_no_numbers():
    rows = np.array([[0, 1, 0], [2, 2, 1], [np.nan, 5, 6], [np.nan] * 3, [1, 2, 3]], np.float32)
    samples = [{"x": row} for row in rows]
    made = top1(lambda feed: feed["x"][None], samples, [1, 1, 2, 0, 0], offset=0)

    assert made.predictions.tolist() == [1, 0, 2, -1, 2]
    assert made.correct.tolist() == [True, False, True, False, False]
    assert made.in_five.tolist() == [True, True, True, False, True]
    assert (made.value, made.top5) == (0.4, 0.8)
    assert top1(lambda feed: {"a": feed["x"], "b": np.zeros((2, 2))}, samples, [1, 1, 2, 0, 0]).value == 0.4


def test_a_background_class_is_found_and_said():
    assert offset_of(1001, np.array([0, 999]), None)[0] == 1
    assert "class 0 taken as background" in offset_of(1001, np.array([5]), None)[1]
    assert offset_of(1001, np.array([1, 1000]), None) == (0, "")  # they count the background already
    assert offset_of(1000, np.array([0, 999]), None) == (0, "")
    assert offset_of(11, np.array([3]), 10)[0] == 1
    assert offset_of(12, np.array([3]), 10) == (0, "12 outputs for 10 classes: are they the same ones?")
    made = top1(lambda feed: feed["x"], [{"x": np.eye(1001)[k]} for k in (1, 1000, 0)], [0, 999, 7])
    assert (made.offset, made.predictions.tolist(), made.correct.tolist()) == (1, [0, 999, -1], [True, True, False])


def test_labels_that_the_network_does_not_have_are_refused():
    with pytest.raises(UsageError, match=r"want    labels 0\.\.2 for its 3 outputs\n  got     0\.\.3"):
        top1(lambda feed: feed["x"], [{"x": np.zeros(3)}] * 2, [0, 3])
    for offset in (3, 100):
        with pytest.raises(UsageError, match=f"an offset of {offset} leaves none of the network's 3 outputs a label"):
            top1(lambda feed: feed["x"], [{"x": np.zeros(3)}] * 2, [0, 1], offset)
    with pytest.raises(UnsupportedError, match="not one row of scores"):
        top1(lambda feed: np.zeros((2, 2)), [{"x": np.zeros(3)}], [0])
    with pytest.raises(UsageError, match="fewer samples than labels"):
        top1(lambda feed: feed["x"], [{"x": np.zeros(3)}], [0, 1])
    with pytest.raises(UsageError, match="more samples than labels"):
        top1(lambda feed: feed["x"], [{"x": np.zeros(3)}] * 2, [0])


def test_folders_are_classes_in_sorted_order_unless_a_file_says_otherwise():
    names = ["set/cat/0.png", "set/ant/0.png", "set/cat/1.png", "set/dog/0.png"]
    order = Labels({0: "dog", 1: "cat", 2: "ant", 3: "eel"}, "order.txt")

    assert by_folders(names, Path("x"))[0].tolist() == [1, 0, 1, 2]
    assert by_folders(names, Path("x"))[2] == "3 classes in the order of the folders' names: ant, cat, dog"
    for found in (by_folders(names, Path("x"), order), by_folders(names, Path("x"), None, order)):
        assert found == (pytest.approx(np.array([1, 2, 1, 0])), 4, "classes as order.txt has them")
    assert by_folders(["10/a.png", "9/b.png"], Path("x"))[:2] == (pytest.approx(np.array([10, 9])), None)
    with pytest.raises(UsageError, match=r"order\.txt does not name the class of the folder bee"):
        by_folders(["bee/a.png", "cat/b.png"], Path("x"), order)
    with pytest.raises(UsageError, match="got     one folder"):
        by_folders(["a/1.png", "a/2.png"], Path("x"))


@pytest.mark.parametrize(("text", "message"), [
    ("", "empty table"), ("file\tclass\n", "empty table"), ("a.png 3\n", "want    FILE<TAB>CLASS"),
    ("a.png\t3\nb.png\tcat\n", "line 2\n  got     b.png\tcat"), ("a\t1\na\t2", "gives a two classes"),
    ("a\t-1\nb\t-1", "not a table"), ("a\t99999999999\nb\t99999999999", "not a table"),
])
def test_tables_that_are_none_are_refused(tmp_path, text, message):
    (tmp_path / "labels.tsv").write_text(text)

    with pytest.raises(ModelError, match=message):
        read_table(tmp_path / "labels.tsv")


def test_a_table_for_other_files_or_for_two_of_one_name_is_refused(folder, tmp_path):
    (tmp_path / "labels.tsv").write_text("elsewhere.png\t1\n")
    with pytest.raises(UsageError, match=r"is of other files than the data\n  want    elsewhere\.png\n  got     0/"):
        evaluate(MODEL, folder, tmp_path / "labels.tsv")
    for name in ("a/0.png", "b/0.png"):
        painted(tmp_path / "two" / name)
    (tmp_path / "labels.tsv").write_text("0.png\t1\n")
    with pytest.raises(UsageError, match=r"does not tell two files apart\n  got     a/0\.png and b/0\.png"):
        evaluate(MODEL, tmp_path / "two", tmp_path / "labels.tsv")


# images as samples


def test_images_of_a_folder_and_of_a_zip_are_the_same_samples_whatever_the_layout(tmp_path):
    wanted = {}
    for k, name in enumerate(("b/2.png", "a/10.png", "a/9.PNG", "c.png", ".hidden/x.png", "notes.txt.png~")):
        pixels = painted(tmp_path / "set" / Path(name).with_suffix(".png"), (6, 8), k)
        (tmp_path / "set" / Path(name).with_suffix(".png")).rename(tmp_path / "set" / name)
        wanted[name] = pixels
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        for name in reversed(wanted):
            z.write(tmp_path / "set" / name, name)
    for source in (tmp_path / "set", tmp_path / "set.zip"):
        for tensor, axes in ((F32, (2, 0, 1)), (LAST, (0, 1, 2))):
            samples = open_samples(source, [tensor], "raw")
            assert samples.names == ("a/10.png", "a/9.PNG", "b/2.png", "c.png")
            for _ in range(2):  # the same each time
                for name, feed in zip(samples.names, samples, strict=True):
                    assert feed["x"].dtype == np.float32
                    assert np.array_equal(feed["x"][0], wanted[name].transpose(axes))
        assert open_samples(source, [F32], limit=2).names == ("a/10.png", "b/2.png")


def test_normalizations_go_by_name_too():
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    assert np.allclose(mean / 255, [0.485, 0.456, 0.406])
    assert np.allclose(std / 255, [0.229, 0.224, 0.225])
    assert parse_normalization("imagenet", LAST).mean == tuple(mean)
    assert parse_normalization("imagenet", LAST).std == tuple(std)
    assert parse_normalization("tf", LAST) == parse_normalization("127.5,127.5", LAST)


def test_centre_is_the_middle_seven_eighths_and_letterbox_has_gray_bars(tmp_path):
    pixels = painted(tmp_path / "a" / "0.png", (64, 64))
    tensor = Tensor(0, "x", "float32", (1, 56, 56, 3))
    (centre,) = open_samples(tmp_path / "a", [tensor], "raw", "centre")
    assert np.array_equal(centre["x"][0], pixels[4:60, 4:60])

    Image.fromarray(np.full((20, 40, 3), 7, np.uint8)).save(tmp_path / "a" / "0.png")
    (boxed,) = open_samples(tmp_path / "a", [Tensor(0, "x", "float32", (1, 40, 40, 3))], "raw", "letterbox")
    assert np.array_equal(np.unique(boxed["x"][0, :10]), [114])
    assert np.array_equal(np.unique(boxed["x"][0, 10:30]), [7])


def test_coco_folders_give_their_images(tmp_path):
    painted(tmp_path / "images" / "1.png")
    painted(tmp_path / "masks" / "1.png")
    (tmp_path / "instances.json").write_text("{}")

    assert open_samples(tmp_path, [LAST]).names == ("1.png",)


def broken(tmp_path, kind):
    """A zip that is not what it says."""
    path = tmp_path / "bad.zip"
    good = io.BytesIO()
    Image.new("RGB", (4, 4)).save(good, "PNG")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        if kind == "bomb":
            z.writestr("a/bomb.png", bytes(datasets.ENTRY_BYTES + 1))
        elif kind == "empty":
            z.writestr("a/readme.txt", "no images")
        elif kind == "text":
            z.writestr("a/no image.png", "hello")
        else:
            z.writestr("a/ok.png", good.getvalue() * 40)
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: len(data) // 2]
    elif kind == "flipped":
        data[60] ^= 0xFF
    elif kind == "encrypted":
        at = data.index(b"PK\x01\x02")
        data[at + 8] |= 1
    elif kind == "lying":  # says that it unpacks to less than it does
        at = data.index(b"PK\x01\x02")
        data[at + 24 : at + 28] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("kind", "error", "message"), [
    ("bomb", ModelError, "too large an image\n  where   a/bomb.png"),
    ("empty", UsageError, "bad.zip holds no images"),
    ("text", ModelError, "is not an image that Pillow reads(.|\n)*where   a/no image.png of "),
    ("cut", ModelError, "is no zip file, or is damaged"),
    ("flipped", ModelError, "where   a/ok.png"),
    ("encrypted", ModelError, "is encrypted\n  where   a/ok.png"),
    ("lying", ModelError, "where   a/ok.png"),
])
def test_hostile_zips_are_refused_by_name(tmp_path, kind, error, message):
    with pytest.raises(error, match=message):
        list(open_samples(broken(tmp_path, kind), [LAST]))


def test_folders_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"holds no images\n  want    files that end in \.png"):
        open_samples(tmp_path, [LAST])
    painted(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:60])
    with pytest.raises(ModelError, match=r"0.png is not an image(.|\n)*where   b/0.png of "):
        list(open_samples(tmp_path, [LAST]))
    with pytest.raises(UsageError, match="no way 'stretch' to fit an image\n  want    squash, crop, pad, centre, "):
        open_samples(tmp_path, [LAST], fit="stretch")
    with pytest.raises(UsageError, match="got     a limit of 0"):
        open_samples(tmp_path, [LAST], limit=0)
    os.mkfifo(tmp_path / "a" / "endless.png")  # reading it would wait for ever
    assert open_samples(tmp_path, [LAST]).names == ("a/0.png", "b/0.png")
    with pytest.raises(UsageError, match="does not take an image"):
        open_samples(tmp_path, [ROW])
    with pytest.raises(UsageError, match="one input\n  got     2 inputs: x: float32"):
        open_samples(tmp_path, [LAST, ROW])
    with pytest.raises(UsageError, match="three means for an image of one channel"):
        open_samples(tmp_path, [Tensor(0, "x", "float32", (1, 8, 8, 1))], "imagenet")
    monkeypatch.setattr(array_samples, "SAMPLES_MAX", 1)
    with pytest.raises(UsageError, match="too many samples\n  want    at most 1"):
        open_samples(tmp_path, [LAST])


# arrays as samples


def saved(tmp_path, **arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    return tmp_path / "x.npz"


def test_arrays_come_sample_by_sample_by_name_or_alone(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.integers(0, 9, (7, 1, 4), np.int32)
    other = Tensor(1, "ids", "int64", (1, 4))
    path = saved(tmp_path, ids=b, x=a.astype(np.float32), labels=np.arange(7))
    samples = open_samples(path, [ROW, other])
    for _ in range(2):
        for i, feed in enumerate(samples):
            assert feed["x"].shape == (1, 5)
            assert np.array_equal(feed["x"][0], a[i].astype(np.float32))
            assert feed["ids"].dtype == np.int64
            assert np.array_equal(feed["ids"], b[i])
    some = open_samples(path, [ROW, other], limit=3)
    assert (list(some.names), some.labels.tolist()) == ([0, 2, 4], [0, 2, 4])
    assert [f["x"][0, 0] for f in some] == a[[0, 2, 4], 0].astype(np.float32).tolist()

    np.save(tmp_path / "y.npy", a.astype(">f8"))
    alone = open_samples(tmp_path / "y.npy", [ROW], limit=2)
    assert np.array_equal(np.concatenate([f["x"] for f in alone]), a[[0, 3]].astype(np.float32))
    whole = [f["x"] for f in open_samples(saved(tmp_path, whatever=a.astype(np.float32)), [I8])]
    assert np.array_equal(np.concatenate(whole), np.rint(a.astype(np.float32) / 0.5).astype(int) - 3)


def test_pixels_in_arrays_are_normalized_and_take_either_layout(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), np.uint8)
    for array in (pixels, pixels.transpose(0, 3, 1, 2)):
        for tensor, axes in ((F32, (0, 3, 1, 2)), (LAST, (0, 1, 2, 3))):
            found = [f["x"] for f in open_samples(saved(tmp_path, x=array), [tensor], "127,128")]
            assert np.allclose(np.concatenate(found), ((pixels - 127.0) / 128).transpose(axes))
    quantized = Tensor(0, "x", "int8", (1, 8, 6, 3), 0.05, 4)
    (first, _) = open_samples(saved(tmp_path, x=pixels), [quantized], "imagenet")
    real = (pixels[0] - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    assert np.array_equal(first["x"][0], np.clip(np.rint(real / 0.05) + 4, -128, 127).astype(np.int8))


def header(shape, dtype="<f4", fortran=False):
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": dtype, "fortran_order": fortran, "shape": shape})
    return f.getvalue()


@pytest.mark.parametrize(("content", "error", "message"), [
    (b"", ModelError, "is no file of arrays, or is damaged"),
    (b"PK\x03\x04" * 9, ModelError, "is no file of arrays, or is damaged"),
    (header((2**40, 5)), ModelError, "is cut off, or longer than it says\n  want    219902325"),
    (header((2, 5)) + bytes(39), ModelError, "is cut off(.|\n)*got     39 bytes"),
    (header((0, 5)), UsageError, "holds no samples"),
    (header((2, 5), "<f4", True) + bytes(40), ModelError, r"Fortran order\n  try     save numpy.ascontiguousarray"),
    (header((2, 6)) + bytes(48), UsageError, r"want    N,5\n  got     float32\[2, 6\]"),
    (header(()) + bytes(4), UsageError, "want    N,5"),
    (header((2, 5), "<c8") + bytes(80), ModelError, "holds no numbers\n  got     complex64"),
    (header((2, 5), "|V1000000000"), ModelError, "holds no numbers"),
    (header((2, 5)) + np.array([0] * 7 + [np.nan] * 3, "<f4").tobytes(), ModelError,
     r"not finite\n  where   array\[1\]\n  want    finite float32\n  got     nan, 3 of 5"),
    (header((1, 5), "<f8") + np.array([0, 0, 0, 0, 1e300]).tobytes(), ModelError, r"got     1e\+300, 1 of 5"),
    (b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr': __import__('os').abort(), 'shape': (1,), }".ljust(64), ModelError,
     "is no file of arrays"),
])
def test_hostile_arrays_are_refused(tmp_path, content, error, message):
    (tmp_path / "x.npy").write_bytes(content)

    with pytest.raises(error, match=message):
        list(open_samples(tmp_path / "x.npy", [ROW]))


@pytest.mark.parametrize(("arrays", "error", "message"), [
    ({"x": np.array([[None] * 5], object)}, ModelError, "holds no numbers\n  got     object"),
    ({"a": np.zeros((1, 5)), "b": np.zeros((1, 5))}, UsageError, "no array for the input 'x'(.|\n)*got     a, b"),
    ({"x": np.zeros((3, 5)), "labels": np.zeros(2, int)}, UsageError, "want    3\n  got     2 labels"),
    ({"x": np.zeros((3, 5)), "labels": np.zeros((3, 2), int)}, UsageError, "is no class for each sample"),
    ({"x": np.zeros((3, 5)), "labels": np.zeros(3)}, UsageError, "is no class for each sample"),
    ({}, UsageError, "no array for the input 'x'"),
])
def test_archives_that_do_not_fit_are_refused(tmp_path, arrays, error, message):
    with pytest.raises(error, match=message):
        open_samples(saved(tmp_path, **arrays), [ROW])


def test_other_numbers_than_the_input_holds_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"different numbers of samples\n  got     x \[3, 5\], y \[2, 5\]"):
        open_samples(saved(tmp_path, x=np.zeros((3, 5)), y=np.zeros((2, 5))),
                     [ROW, Tensor(1, "y", "float32", (1, 5))])
    with pytest.raises(ModelError, match=r"does not hold\n  where   x\[0\]\n  want    int8\n  got     0\.\.300"):
        list(open_samples(saved(tmp_path, x=np.array([[0, 1, 2, 3, 300]])), [I8]))
    with pytest.raises(UsageError, match="no single scale to quantize by"):
        list(open_samples(saved(tmp_path, x=np.zeros((1, 5))), [Tensor(0, "x", "int32", (1, 5))]))
    with pytest.raises(UsageError, match="no pixels to normalize"):
        open_samples(saved(tmp_path, x=np.zeros((1, 5))), [ROW], "tf")
    path = saved(tmp_path, x=np.ones((4096, 5)))
    path.write_bytes(path.read_bytes().replace(np.ones(1).tobytes() * 4, bytes(32), 1))  # the checksum tells
    with pytest.raises(ModelError, match=r"is damaged\n  where   x\[40\d\d\]"):
        list(open_samples(path, [ROW]))


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    tensor = Tensor(0, "x", "float32", (1, 64, 64, 3))  # 48 KiB a sample
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((500, 64, 64, 3), np.float32))
    np.save(tmp_path / "x.npy", np.zeros((500, 64, 64, 3), np.float32))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        one = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(one, "PNG")
        for i in range(300):
            z.writestr(f"{i:04}.png", one.getvalue())
    for name, limit in (("x.npz", None), ("x.npy", None), ("x.npy", 3), ("x.zip", None)):
        tracemalloc.start()
        count = sum(1 for feed in open_samples(tmp_path / name, [tensor], limit=limit) if feed["x"].shape)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count in (500, 300, 3)
        assert peak < 3 << 20  # 24 MB are in the arrays


# detectors


def instances(tmp_path, boxes, **changes):
    """Two images of 100 x 50 pixels; boxes (image, category, left, top, width, height)."""
    content = {"images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 50} for i in (1, 2)],
               "categories": [{"id": 10 * c, "name": f"c{c}"} for c in (1, 2, 3)],
               "annotations": [{"image_id": b[0], "category_id": b[1], "bbox": list(b[2:])} for b in boxes]} | changes
    (tmp_path / "instances.json").write_text(json.dumps(content))
    for i in (1, 2):
        painted(tmp_path / "images" / f"{i}.png", (100, 50), i)
    return read_instances(tmp_path / "instances.json")


BOXES = [(1, 10, 20, 10, 30, 20), (1, 30, 60, 5, 30, 40), (2, 20, 0, 0, 50, 50)]


def test_average_precision_of_what_is_right_is_one_and_falls_with_what_is_wrong(tmp_path):
    pytest.importorskip("pycocotools", reason="pip install 'npulab[evaluate]'")
    truth = instances(tmp_path, BOXES)
    rows = np.array([[b[0], *b[2:], 0.9, b[1]] for b in BOXES], np.float64)
    moved, mistaken = rows.copy(), rows.copy()
    moved[:, 1] += rows[:, 3] * 0.25  # overlap 0.6: right at 0.5, 0.55 and 0.6
    mistaken[0, 6] = 20

    assert average_precision(truth, rows, [1, 2]) == pytest.approx((1, 1))
    assert np.allclose(average_precision(truth, moved, [1, 2]), (0.3, 1.0))
    assert average_precision(truth, mistaken, [1, 2])[0] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert average_precision(truth, rows[:2], [1, 2])[0] == pytest.approx(2 / 3)
    assert average_precision(truth, rows[:2], [1]) == pytest.approx((1, 1))
    assert average_precision(truth, rows[:0], [1]) == (0.0, 0.0)
    with pytest.raises(UsageError, match="none of the images has an object"):
        average_precision(truth, rows, [])


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("objectness", [True, False])
@pytest.mark.parametrize("unit", [1, 100])
def test_rows_of_yolo_become_boxes(tmp_path, axis, objectness, unit):
    truth = instances(tmp_path, BOXES)
    rows = np.array([[50, 50, 20, 10], [51, 50, 20, 10], [50, 50, 20, 10], [99, 99, 2, 2], [1, 1, 2, 2]], np.float32)
    scores = np.array([[0, .5, 0], [0, .4, 0], [.3, 0, 0], [.0005, 0, 0], [0, 0, .9]], np.float32)
    parts = [rows * unit / 100, *([np.full((5, 1), 0.5, np.float32)] if objectness else []), scores]
    table = np.concatenate(parts, 1)[None]
    table = table if axis == -1 else table.transpose(0, 2, 1)

    class Known:
        outputs = (Tensor(0, "rows", "float32", table.shape),)

    decoder = decoder_of(npulab.load(MODEL), Known, truth, (100, 100))
    boxes, found, classes = decoder.boxes({"rows": table})

    assert decoder.title == f"YOLOv{5 if objectness else 8}'s rows"
    assert np.allclose(found, np.array([.9, .5, .3]) / (2 if objectness else 1))
    assert classes.tolist() == [2, 1, 0]
    assert np.allclose(boxes, [[0, 0, .02, .02], [.4, .45, .6, .55], [.4, .45, .6, .55]], atol=1e-6)
    assert category_ids(decoder, truth, None).tolist() == [10, 20, 30]
    named = Labels({0: "c3", 1: "c1", 2: "eel"}, "order.txt")
    assert category_ids(decoder, truth, named).tolist() == [30, 10, -1]


def test_a_network_that_paints_the_truth_has_an_ap_of_one_through_the_whole_verb(tmp_path, command):
    """Its outputs are constants: rows of YOLOv8 for the one picture."""
    onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
    pytest.importorskip("pycocotools", reason="pip install 'npulab[evaluate]'")
    instances(tmp_path, [b for b in BOXES if b[0] == 1])
    # 100 x 50 in a square of 64: scale 0.64, bars of 16 above and below
    rows = np.array([[(20 + 15) * .64, (10 + 10) * .64 + 16, 30 * .64, 20 * .64, .9, 0, 0],
                     [(60 + 15) * .64, (5 + 20) * .64 + 16, 30 * .64, 40 * .64, 0, 0, .9]], np.float32)
    helper = onnx.helper
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
             helper.make_node("Mul", ["mean", "zero"], ["n"]), helper.make_node("Add", ["rows", "n"], ["y"])]
    graph = helper.make_graph(
        nodes, "painter", [helper.make_tensor_value_info("x", 1, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("y", 1, [1, 2, 7])],
        [onnx.numpy_helper.from_array(rows[None], "rows"), onnx.numpy_helper.from_array(np.float32(0), "zero")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "painter.onnx")
    (tmp_path / "images" / "2.png").unlink()

    code, out, _ = command(tmp_path / "painter.onnx", "--data", tmp_path, "--json")
    found = json.loads(out)
    assert (code, found["metric"], found["samples"]) == (0, "AP", 1)
    assert (found["value"], found["ap50"]) == pytest.approx((1, 1))
    assert found["notes"] == ["boxes by YOLOv8's rows", "1 images of the labels are not among the data"]
    code, out, _ = command(tmp_path / "painter.onnx", "--data", tmp_path, "--fit", "squash")
    assert code == 0
    assert "AP      1.0000" not in out  # the boxes now lie elsewhere
    code, out, err = command(tmp_path / "painter.onnx", "--data", tmp_path, "--fit", "centre")
    assert code == 2
    assert "leaves out parts of the images" in err


@pytest.mark.parametrize(("changes", "message"), [
    ({"images": []}, "has no images"), ({"categories": []}, "has no categories"),
    ({"images": [{"id": 1, "file_name": "1.png", "width": 0, "height": 5}]}, "without a size"),
    ({"images": [{"id": 1, "file_name": f"{k}.png", "width": 1, "height": 5} for k in (1, 2)]}, "two images"),
    ({"annotations": [{"image_id": 1, "category_id": 10, "bbox": [1, 2, 3]}]}, r"not COCO's(.|\n)*bbox"),
    ({"annotations": "many"}, "not COCO's"),
])
def test_instances_that_are_none_are_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        instances(tmp_path, BOXES, **changes)


def test_outputs_that_are_no_boxes_are_refused_with_what_to_do(tmp_path):
    pytest.importorskip("pycocotools", reason="pip install 'npulab[evaluate]'")
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'npulab[litert]'")
    instances(tmp_path, BOXES)

    with pytest.raises(UnsupportedError, match=r"rows of 4 or 5 \+ 3 columns(.|\n)*\[1, 10\](.|\n)*cut-head"):
        evaluate(MODEL, tmp_path)


# networks with figures of their own


@needs_shared
def test_efficientnet_is_given_what_it_was_trained_with():
    ort = pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
    model, images = MODELS / "float" / "efficientnet_lite0_imagenet_float.onnx", SHARED / "images" / "imagenet-500"
    made = evaluate(model, images, normalize="127,128", fit="centre", limit=8)
    session = ort.InferenceSession(str(model))
    wanted = []
    for name in made.names:
        with Image.open(images / name) as image:
            pixels = np.asarray(image.convert("RGB").crop((16, 16, 240, 240)), np.float32)
        (row,) = session.run(None, {"input": ((pixels - 127) / 128).transpose(2, 0, 1)[None]})
        wanted.append(int(row.argmax()))

    assert made.predictions.tolist() == wanted
    assert made.value >= 0.5
    assert made.offset == 0


@needs_shared
@pytest.mark.parametrize(("file", "options"), [
    ("float/mobilenet_v1_0.25_224_1_default_1.tflite", {"normalize": "tf", "fit": "centre"}),
    ("quantized/mobilenet_v1_0.25_224_quant.tflite", {"fit": "centre"})])
def test_mobilenets_class_zero_is_background(file, options):
    made = evaluate(MODELS / file, SHARED / "images" / "imagenet-500", device="litert-fast", limit=50, **options)

    assert made.offset == 1
    assert 0.4 <= made.value <= 0.72  # 0.56 and 0.55 of all
    assert made.notes[-1].startswith("1001 outputs for 1000 classes")


@needs_shared
@pytest.mark.parametrize(("file", "options", "figure"), [
    ("float/pretrainedResnet.tflite", {"normalize": "raw"}, 0.755),
    ("quantized/pretrainedResnet_quant.tflite", {}, 0.754),
    ("quantized/pretrainedResnet_large_int8.tflite", {}, 0.811)])
def test_cifar_folders_sort_into_the_order_of_its_classes(file, options, figure):
    made = evaluate(MODELS / file, SHARED / "images" / "cifar10-5000.zip", device="litert-fast", limit=300, **options)

    assert made.interval[0] <= figure <= made.interval[1]
    assert np.array_equal(np.bincount(made.labels), [30] * 10)


@needs_shared
def test_detectors_are_found_out_and_their_post_processing_beside_them(tmp_path):
    pytest.importorskip("pycocotools", reason="pip install 'npulab[evaluate]'")
    images = SHARED / "images" / "coco-138"
    yolo = evaluate(MODELS / "float" / "yolov5n_coco_float.onnx", images, limit=3)
    ssd = evaluate(MODELS / "quantized" / "ssdlite_mobiledet_coco_qat_postprocess.tflite", images, limit=3,
                   device="litert-fast")

    assert yolo.notes[0] == "boxes by YOLOv5's rows"
    assert yolo.value > 0.2
    assert ssd.notes[0] == "boxes by TFLite_Detection_PostProcess"
    assert ssd.value > 0.2
    from npulab.passes.tflite_head import without_head
    from npulab.postprocess.types import to_json

    cut = without_head(npulab.load(MODELS / "quantized" / "ssdlite_mobiledet_coco_qat_postprocess.tflite"))
    (tmp_path / "body.tflite").write_bytes(cut.data)
    (tmp_path / "body.post.json").write_bytes(to_json(cut.post))
    again = evaluate(tmp_path / "body.tflite", images, limit=3, device="litert-fast")
    assert np.allclose(again.predictions, ssd.predictions, atol=1e-4)
    raw = evaluate(MODELS / "quantized" / "ssdlite_mobiledet_coco_qat_raw.tflite", images, limit=3,
                   device="litert-fast", post=tmp_path / "body.post.json")
    assert raw.value > 0.2


def test_an_onnx_network_of_the_zoo_runs_on_every_runtime_here(tmp_path):
    pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'npulab[litert]'")
    graph = npulab.load(zoo.build("mobilenet-v1", 32, 10))
    x = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    found = []
    for name in ("onnxruntime", "onnxruntime-fast", "litert", "litert-fast"):
        device = open_device(graph, name)
        (row,) = device.run({device.inputs[0].name: x}).values()
        found.append(row.reshape(-1))
        assert device.inputs[0].shape == (1, 3, 32, 32)  # in its own layout
    assert all(np.allclose(found[0], row, rtol=1e-3, atol=1e-5) for row in found)
    with pytest.raises(NpulabError, match="rounds is not published"):
        open_device(graph, "rk3588")


def test_exact_integers_are_what_the_reference_kernels_compute():
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'npulab[litert]'")
    graph = npulab.load(MODEL)
    x = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    ours, theirs = (open_device(graph, name) for name in ("generic-int8", "litert"))
    a, b = ours.run({ours.inputs[0].name: x}), theirs.run({theirs.inputs[0].name: x})
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert "exact integers" in ours.title


def test_arrays_serve_both_orders_of_axes(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 3, 6, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    for shape, want in (((1, 3, 6, 8), x), ((1, 6, 8, 3), x.transpose(0, 2, 3, 1))):
        found = list(open_samples(tmp_path / "x.npz", [Tensor(0, "x", "float32", shape, None, None)]))
        assert np.array_equal(np.concatenate([f["x"] for f in found]), want)
    with pytest.raises(UsageError, match="does not fit"):
        open_samples(tmp_path / "x.npz", [Tensor(0, "x", "float32", (1, 8, 6, 3), None, None)])
