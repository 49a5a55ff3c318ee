"""The sample network that the project ships: its files, its figures, and what an NPU driver may expect of it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npulab
from scripts import loaded

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "src" / "npulab" / "samples"
MODEL = SAMPLES / "digits.tflite"
FACTS = json.loads((SAMPLES / "digits.json").read_text())


@pytest.fixture(scope="module")
def script():
    """scripts/train_sample.py as a module; its `evaluate` runs LiteRT's reference kernels."""
    pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'npulab[litert]'")
    pytest.importorskip("sklearn", reason="needs scikit-learn for the digits: pip install 'npulab[sample]'")
    with loaded("scripts/train_sample.py") as module:
        yield module


def picture() -> np.ndarray:
    """digit.png as the network takes it."""
    with Image.open(SAMPLES / FACTS["picture"]["file"]) as image:
        small = image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(small, np.uint8)


def test_the_network_is_the_one_its_figures_were_measured_on():
    data = MODEL.read_bytes()

    assert hashlib.sha256(data).hexdigest() == FACTS["sha256"]
    assert len(data) == FACTS["bytes"] < 300_000


def test_there_is_a_label_for_each_answer():
    assert (SAMPLES / "digits.labels.txt").read_text().split() == [str(d) for d in range(10)]


def test_the_picture_is_large_enough_to_see():
    with Image.open(SAMPLES / "digit.png") as image:
        assert image.size == (256, 256)


def test_eight_bits_cost_less_than_half_a_point():
    assert FACTS["accuracy_uint8"] >= 0.975
    assert FACTS["accuracy_uint8"] >= FACTS["accuracy_float"] - 0.005


def test_the_accuracy_written_down_is_the_accuracy_measured(script):
    images, labels = script.held_out()
    model = MODEL.read_bytes()

    assert len(labels) == FACTS["held_out_samples"]
    assert script.share(script.evaluate(model, images), labels) == FACTS["accuracy_uint8"]
    assert (script.share(script.evaluate(model, 255 - images), labels)
            == FACTS["accuracy_uint8_dark_ink_on_light_paper"])


def test_the_picture_is_classified_right_and_is_no_training_image(script):
    answer = script.evaluate(MODEL.read_bytes(), picture()[None])[0]
    training, test = script.split(1797)

    assert answer.argmax() == FACTS["picture"]["label"] == 7
    assert FACTS["picture"]["data_set_index"] in test
    assert not set(training) & set(test)


def test_default_kernels_give_the_answers_of_the_reference_kernels(script):
    from ai_edge_litert.interpreter import Interpreter

    images, _ = script.held_out()
    run = Interpreter(model_path=str(MODEL), num_threads=1)
    run.allocate_tensors()
    source, result = run.get_input_details()[0], run.get_output_details()[0]
    answers = []
    for image in images[:50]:
        run.set_tensor(source["index"], image[None])
        run.invoke()
        answers.append(run.get_tensor(result["index"])[0].argmax())

    assert answers == script.evaluate(MODEL.read_bytes(), images[:50]).argmax(1).tolist()


@pytest.mark.parametrize("plan", ["reference", "best"])
def test_the_virtual_npu_reads_the_digits_as_litert_does(script, plan):
    images, labels = script.held_out()
    expected = script.evaluate(MODEL.read_bytes(), images)
    session = npulab.open_session(npulab.compile(npulab.load(MODEL), target="a311d", plan=plan))

    found = np.stack([session.run({"image": image[None]})["probabilities"][0] for image in images])

    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.99
    assert script.share(found, labels) >= FACTS["accuracy_uint8"] - 0.005


def test_every_tensor_has_one_scale_and_every_relu6_range_ends_at_six_or_below(script):
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=str(MODEL))
    tensors = {t["name"]: t for t in run.get_tensor_details() if t["name"]}
    clamped = [layer.name for layer in script.LAYERS if isinstance(layer, script.Conv) and layer.relu6]

    assert {t["dtype"] for t in tensors.values()} == {np.uint8, np.int32}
    assert all(len(t["quantization_parameters"]["scales"]) <= 1 for t in tensors.values())
    assert clamped
    for name in clamped:
        scale, zero = tensors[name]["quantization"]
        assert float(scale) * (255 - zero) <= 6.0
        assert zero == 0
