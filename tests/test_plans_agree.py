"""Both plans give the same bytes on real networks, and every layer is LiteRT's within one step."""

import numpy as np
import pytest

import npulab
from npulab.program.types import NpuStep
from npulab.runtime.compare import compare_layers
from shared import SHARED, needs_shared

MODELS = SHARED / "models" / "quantized"
HAZARDS = {
    "mobilenet_v1_0.25_128_quant": [],
    "mobilenet_v1_0.25_224_quant": [],
    "mobilenet_v1_1.0_224_quant": [],
    "ssdlite_mobiledet_coco_qat_raw": [108],  # H5: depthwise 3x3, stride 2, on 2x2 pixels
}
"""uint8 networks, and the first nodes that the reference driver computes wrong (NN notes, section 13)."""
LAYERS = [*HAZARDS, "coco_ssd_mobilenet_v1_1.0_quant_2018_06_29", "yolox_nano_uint8_416x320", "ad01_int8",
          "pretrainedResnet_quant", "yolov8n_full_integer_quant_416", "kws_ref_model", "yolov5n-int8", "vww_96_int8",
          "movenet_single_pose_lightning_ptq"]


def noise(program, seed):
    rng = np.random.default_rng(seed)
    by_value = {t.value: t for t in program.tensors}
    out = {}
    for t in (by_value[v] for v in program.inputs):
        low, high = (-128, 128) if t.dtype == "int8" else (0, 256)
        out[t.name] = (rng.integers(low, high, t.shape).astype(t.dtype) if t.dtype != "float32"
                       else rng.random(t.shape, np.float32))
    return out


def behind(graph, nodes):
    """Values that depend on what `nodes` compute."""
    spoilt = {v for n in nodes for v in graph.nodes[n].outputs}
    for n in graph.nodes:
        if spoilt & set(n.inputs):
            spoilt |= set(n.outputs)
    return spoilt


@needs_shared
@pytest.mark.parametrize("name", HAZARDS)
def test_both_plans_compute_the_same_wherever_the_reference_is_right(name):
    graph = npulab.load(MODELS / f"{name}.tflite")
    ours, theirs = {}, {}
    for program, known in ((npulab.compile(graph, keep_all=True), ours),
                           (npulab.compile(graph, plan="reference"), theirs)):
        npulab.open_session(program).run(noise(program, 1), trace=known.__setitem__)

    both = (ours.keys() & theirs.keys()) - behind(graph, HAZARDS[name]) - set(graph.inputs)
    assert len(both) >= 3
    for v in both:
        np.testing.assert_array_equal(ours[v], theirs[v])


@needs_shared
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_within_one_of_litert_on_the_same_input(name):
    pytest.importorskip("ai_edge_litert")
    graph = npulab.load(MODELS / f"{name}.tflite")
    program = npulab.compile(graph, keep_all=True)
    known = {}
    session = npulab.open_session(program)
    session.run(noise(program, 2), trace=known.__setitem__)
    rows = [r for r in compare_layers(program, graph, known) if r.is_layer]

    computed = sum(len(s.nodes) for s in program.steps if isinstance(s, NpuStep))
    assert len(rows) == computed >= 3  # every node the NPU computes, and each with a number
    assert [r for r in rows if r.max_abs is None or r.max_abs > 1] == []
