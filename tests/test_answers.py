"""Tensors to answers: classes with the right names, boxes in the right places, or a summary."""

import numpy as np
import pytest
from PIL import Image

from npulab.errors import ModelError, UsageError
from npulab.program.types import Tensor
from npulab.runtime.answers import Box, Labels, answer, draw, labels_beside, read_labels
from npulab.runtime.images import Covered
from programs import program


def labels(*names):
    return Labels(dict(enumerate(names)), "names.txt")


def classifier(count):
    return program(tensors=(Tensor(0, "x", "int8", (1, 8)), Tensor(1, "y", "int8", (1, 8)),
                            Tensor(2, "p", "uint8", (1, count), 1 / 256, 0)))


def top(count, names, scores=None):
    stored = np.zeros((1, count), np.uint8)
    for i, s in (scores or {2: 200, 1: 50}).items():
        stored[0, i] = s
    return answer(classifier(count), {"p": stored}, names)


def detector(**outputs):
    names = ("boxes", "classes", "scores", "count")
    shapes = ((1, 3, 4), (1, 3), (1, 3), (1,))
    tensors = tuple(Tensor(i, n, "float32", s) for i, (n, s) in enumerate(zip(names, shapes, strict=True)))
    found = {"boxes": [[[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1], [0, 0, 0, 0]]], "classes": [[16, 0, 1]],
             "scores": [[0.9, 0.6, 0.8]], "count": [2.0]} | outputs
    made = program(tensors=tensors, outputs=(0, 1, 2, 3), ops=("CONV_2D", "TFLite_Detection_PostProcess"))
    return made, {k: np.array(v, np.float32) for k, v in found.items()}


def test_the_likeliest_classes_come_first_with_real_scores():
    found = top(4, labels("a", "b", "c", "d"))

    assert [(g.index, g.label, g.score) for g in found.classes[:2]] == [(2, "c", 200 / 256), (1, "b", 50 / 256)]
    assert found.notes == ()


def test_equal_scores_come_in_the_order_of_classes():
    assert [g.index for g in top(5, None, {3: 9, 1: 9}).classes] == [1, 3, 0, 2, 4]


def test_one_label_less_than_classes_means_class_0_is_background():
    found = top(4, labels("a", "b", "c"), {0: 9, 2: 200})

    assert [g.label for g in found.classes[:2]] == ["b", "background"]
    assert found.notes == ("names.txt has one label less than the model has classes: class 0 taken as background",)


def test_one_label_more_that_says_background_is_skipped():
    found = top(3, labels("background", "a", "b", "c"))

    assert found.classes[0].label == "c"
    assert "which the model does not count" in found.notes[0]


def test_labels_that_do_not_fit_are_said_to():
    found = top(4, labels("a"), {2: 200})

    assert found.classes[0].label == "class 2"
    assert found.notes == ("names.txt has 1 labels for 4 classes: names may be wrong",)


def test_without_labels_a_softmax_at_the_end_makes_a_classifier():
    assert top(4, None).classes[0].label == "class 2"
    plain = classifier(4)
    other = type(plain)(**{f: getattr(plain, f) for f in plain.__struct_fields__} | {"ops": ("ADD", "ADD", "ADD")})
    found = answer(other, {"p": np.array([[1, 2, 3, 4]], np.uint8)}, None)
    assert found.classes is None
    assert (found.tensors[0].low, found.tensors[0].high) == (1 / 256, 4 / 256)


def test_boxes_are_those_counted_and_sure_enough():
    made, outputs = detector()
    names = labels(*["person", *["other"] * 15, "dog"])

    found = answer(made, outputs, names, threshold=0.7)

    assert [(b.label, round(b.score, 2), round(b.left, 2)) for b in found.boxes] == [("dog", 0.9, 0.2)]
    assert [b.label for b in answer(made, outputs, names, threshold=0.5).boxes] == ["dog", "person"]


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -3.0, 1e30])
def test_a_count_that_is_no_count_does_no_harm(count):
    made, outputs = detector(count=[count], scores=[[float("nan")] * 3], classes=[[float("inf")] * 3])

    assert answer(made, outputs, None).boxes == ()


def test_boxes_are_drawn_where_the_model_saw_them():
    image = Image.new("RGB", (200, 100), "white")
    box = Box(16, "dog", 0.9, 0.25, 0.25, 0.75, 0.75)

    drawn = np.asarray(draw(image, [box], Covered(0, 0, 200, 100)))

    assert np.asarray(image).min() == 255
    changed = np.argwhere((drawn != 255).any(axis=-1))
    assert changed.min(0)[1] == 50
    assert changed.max(0).tolist() == [75, 150]
    padded = np.asarray(draw(image, [box], Covered(0, -50, 200, 200)))
    assert np.argwhere((padded != 255).any(axis=-1)).max(0).tolist() == [99, 150]


def test_boxes_beyond_the_image_or_inside_out_are_drawn_too():
    image = Image.new("RGB", (30, 20))
    for edges in ((-1e9, -5, 1e9, 7), (0.9, 0.9, 0.1, 0.1), (5, 5, 6, 6)):
        assert draw(image, [Box(1, "x" * 300, 1.0, *edges)], Covered(0, 0, 30, 20)).size == (30, 20)


def test_label_files_are_lines_or_an_index_and_a_name(tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes("\ufeffcat\n\nKatze für alle\r\n\n".encode())
    assert read_labels(path).names == {0: "cat", 1: "", 2: "Katze für alle"}
    path.write_text("7\tseven\n2\ttwo words\n")
    assert read_labels(path).names == {7: "seven", 2: "two words"}


def test_what_is_no_label_file_is_refused(tmp_path):
    path = tmp_path / "l.txt"
    with pytest.raises(UsageError, match=r"cannot read .*l\.txt as labels"):
        read_labels(path)
    path.write_bytes(b"\n\n")
    with pytest.raises(ModelError, match=r"l.txt is not a label file\n  want    1..1000000 lines\n  got     0 lines"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="want    text in UTF-8"):
        read_labels(path)


def test_labels_beside_the_model_are_found(tmp_path):
    (tmp_path / "cat.labels.txt").write_text("cat")

    assert labels_beside(tmp_path / "cat.tflite") == tmp_path / "cat.labels.txt"
    assert labels_beside(tmp_path / "dog.tflite") is None
