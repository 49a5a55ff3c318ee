"""Why an integer network is as far from the float one as it is: shares of its layers, and what answers to expect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npulab.evaluation import evaluate
from npulab.importers.onnx import read_onnx
from npulab.ir import Graph
from npulab.quantization.agreement import agreement, expected_agreement, noise_power
from npulab.quantization.calibrate import statistics
from npulab.quantization.compare import FirstSamples
from npulab.quantization.parts import each
from npulab.quantization.sensitivity import ends, rank_correlation, sensitivities
from npulab.quantization.session import Progress
from npulab.quantizing import Quantized

if TYPE_CHECKING:
    from npulab.runtime.images import Fit

SAMPLES = 4
"""That sensitivities are measured on."""
ANSWERS = 64
"""Samples whose answers are compared."""
CLASSES_MAX = 100_000


def explained(made: Quantized, progress: Progress | None = None) -> dict[str, Any]:
    """Sensitivities of all layers and tensors as they are now, and the share of samples that get the float network's
    answer: expected from the noise of a few, and measured. Plain data.
    """
    net, few = made.network, FirstSamples(made.samples, SAMPLES)
    how = made.recipe.activations
    bits = sorted({layer.scheme.bits for layer in net.layers if layer.scheme})
    widths = sorted({p.scheme.bits for p in net.points if p.scheme})
    with made.aim.biases_in(net):  # those of the integers would be wrong with float weights
        seen = statistics(net, few, how)
        rows = sensitivities(net, few, seen, how, made.recipe.weights, bits, widths, count=SAMPLES, progress=progress)
    own = {("weights", i): layer.scheme.bits for i, layer in enumerate(net.layers) if layer.scheme}
    own |= {("tensor", i): p.scheme.bits for i, p in enumerate(net.points) if p.scheme}
    rows = [r for r in rows if own.get((r.kind, r.index)) == r.bits]
    total = sum(r.noise for r in rows) or 1.0
    return {
        "sensitivity": [{"name": r.name, "kind": r.kind, "bits": r.bits, "decibels": r.decibels,
                         "predicted": r.predicted_decibels, "share": r.noise / total} for r in rows],
        "rank_correlation": rank_correlation([r.noise for r in rows], [r.predicted for r in rows])
        if len(rows) > 2 else None,
        "agreement": _answers(made),
    }


def _answers(made: Quantized) -> dict[str, Any] | None:
    """None for networks whose output is not one row of classes."""
    net = made.network
    if len(net.graph.outputs) != 1:
        return None
    value = net.graph.values[ends(net)[0]]
    if value.elements != max(value.shape, default=0) or not 2 <= value.elements <= CLASSES_MAX:
        return None
    some = FirstSamples(made.samples, ANSWERS)
    logits, other = (np.array(list(each(model, [value.name], some, lambda a: np.asarray(a[0]).reshape(-1))))
                     for model in (made.reference(), made.qdq))
    few = slice(None, 8)
    return {"expected": expected_agreement(logits, noise_power(logits[few], other[few])),
            "measured": agreement(logits, other), "samples": len(logits)}


def judged(graph: Graph, made: Quantized, data: Path, labels: Path | None, normalize: str | None, fit: Fit | None,
           limit: int | None = None) -> list[dict[str, Any]]:
    """Accuracy on labelled data of the float network, of the integer one simulated in floats, and of the finished file
    in the target's exact integers, where its rounding is published. Plain data, a row each."""
    tries: list[tuple[str, Graph, str | None]] = [
        ("float", graph, "onnxruntime-fast" if graph.format == "onnx" else "litert-fast"),
        ("integers, simulated in floats", read_onnx(made.qdq, graph.name), "onnxruntime")]
    if made.rules.arithmetic is not None:
        tries.append(("exact integers", made.graph, made.rules.name))
    rows = []
    for what, network, device in tries:
        found = evaluate(network, data, labels, device, normalize, fit, limit)
        rows.append({"what": what, "metric": found.metric, "value": found.value, "samples": found.samples})
    return rows

