"""Small float networks and samples for the tests of quantization."""

from __future__ import annotations

import numpy as np

from npulab.importers import load
from npulab.quantization.types import ListedSamples
from npulab.zoo.builder import Net


def small(seed=0, channels=8):
    """Convolutions, a depthwise one, a sum, a pool, a concatenation, a dense layer; input x, output y."""
    net = Net("small", seed)
    x = net.input("x", 1, 3, 16, 16)
    x = stem = net.conv(x, channels, 3, 2, "relu", name="stem")
    x = net.depthwise(x, 3, 1, "relu6", name="filter")
    x = net.conv(x, channels, 1, name="project")
    x = net.add(x, stem, name="join")
    y = net.pool(stem, 3, 1, name="peak", pad=1)
    x = net.concat([x, y], 1, name="both")
    x = net.global_pool(x, name="mean")
    x = net.flatten(x, name="flat")
    x = net.linear(x, 10, name="dense")
    net.output(x, "y")
    return load(net.onnx())


def detector(seed=0):
    """A head that joins boxes of hundreds of pixels with scores of 0..1 at its end."""
    net = Net("detector", seed)
    x = net.input("x", 1, 3, 16, 16)
    x = net.conv(x, 16, 3, 1, "relu", name="stem")
    x = net.conv(x, 6, 1, name="head")
    x = net.reshape(x, 1, 6, 256, name="rows")
    boxes, scores = net.split(x, [4, 2], 1, name="parts")
    boxes = net.multiply(boxes, net.constant("stride", np.array(160, np.float32)), name="pixels")
    scores = net.node("Sigmoid", [scores], net.shapes[scores], "scores")
    x = net.concat([boxes, scores], 1, name="joined")
    net.output(x, "y")
    return load(net.onnx())


def samples(graph, count=12, seed=0, name="x"):
    rng = np.random.default_rng(seed)
    shape = next(graph.values[v].shape for v in graph.inputs if graph.values[v].name == name)
    return ListedSamples([{name: rng.normal(size=shape).astype(np.float32)} for _ in range(count)], "noise")
