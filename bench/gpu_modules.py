"""How fast the kernels over Vulkan are on a device, one by one.

    python bench/gpu_modules.py [DEVICE [SECONDS]]

10^9 operations a second of the plain kernel, whatever the algorithm (a multiply-add is two), by the device's clock, the
best of RUNS after the first, which compiles. Results are not looked at: the tests do that.

With SECONDS instead how threads share the work (`modules_shapes`): as where no device is known, as the model says, as
found in SECONDS for each kernel; in turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from npulab.gpu import vulkan
from npulab.gpu.compute import (
    modules_attention,
    modules_convolution,
    modules_integer_attention,
    modules_integer_rows,
    modules_integer_winograd,
    modules_integers,
    modules_products,
    modules_rows,
    modules_shapes,
    modules_trials,
    modules_tuner,
    modules_winograd,
)
from npulab.gpu.compute.modules import Layer, prepared, run
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.modules_traits import traits_of
from npulab.gpu.compute.problems import Attention, Convolution, LayerNorm, Product, Softmax
from npulab.gpu.compute.types import Number

RUNS = 8
NUMBERS: tuple[Number, ...] = ("float32", "float16")


def layers(halves: bool) -> Iterator[tuple[str, str, Layer, float]]:
    """(kernel, numbers, layer, operations)"""
    r = np.random.default_rng(0)
    weights = r.standard_normal((64, 3, 3, 64))
    for number in NUMBERS:
        what = Product(1, 256, 256, 256, number=number)
        b = r.standard_normal((256, 256))
        yield "product 256 256 256", number, modules_products.product(what, b), what.operations
        if number == "float16" and halves:
            yield ("product 256 256 256", "float16, added as halves", modules_products.product(what, b, halves=True),
                   what.operations)
        conv = Convolution(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1), number=number)
        yield "3x3 56x56 64-64", number, modules_convolution.convolution(conv, weights), conv.operations
        for m in (2, 4):
            layer = modules_winograd.convolution(conv, weights, size=m)
            yield f"3x3 56x56 64-64, F({m}x{m})", number, layer, conv.operations
        each = Convolution(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1), groups=64, number=number)
        yield "3x3 56x56 64 depthwise", number, modules_convolution.convolution(each, weights[..., :1]), each.operations
        heads = modules_attention.attention(Attention(8, 256, 256, 64, 64, 0.125, number=number))
        yield "attention 8 heads 256 by 64", number, heads, heads.operations
        rows = modules_rows.softmax(Softmax(1024, 1000, number=number))
        yield "softmax 1024 by 1000", number, rows, rows.operations
        norm = modules_rows.layer_norm(LayerNorm(1024, 1000, number=number), np.ones(1000), np.zeros(1000))
        yield "layer norm 1024 by 1000", number, norm, norm.operations
    bytes_ = r.integers(-127, 128, (64, 3, 3, 64)).astype(np.int8)
    conv = Convolution(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1), number="int8")
    rest = (None, 3, [1 << 30] * 64, [-8] * 64, 0)
    yield "3x3 56x56 64-64", "int8", modules_integers.convolution(conv, bytes_, *rest), conv.operations
    yield ("3x3 56x56 64-64, F(2x2)", "int8", modules_integer_winograd.convolution(conv, bytes_, *rest),
           conv.operations)
    square = r.integers(-127, 128, (256, 256)).astype(np.int8)
    layer = modules_integers.product(1, 256, 256, 256, square, None, 3, [1 << 30] * 256, [-8] * 256, 0)
    yield "product 256 256 256", "int8", layer, 2.0 * 256**3
    rows = modules_integer_rows.softmax(Softmax(1024, 1000, number="int8"), 0.05)
    yield "softmax 1024 by 1000", "int8", rows, rows.operations
    norm = modules_integer_rows.layer_norm(LayerNorm(1024, 1000, number="int8"), 0.05, 0.05, 0)
    yield "layer norm 1024 by 1000", "int8", norm, norm.operations
    what = Attention(8, 256, 256, 64, 64, 0.125, number="int8")
    heads = modules_integer_attention.attention(what, (0.02,) * 3, (0,) * 3, 0.004, 0)
    yield "attention 8 heads 256 by 64", "int8", heads, heads.operations


def shapes(device: vulkan.Vulkan, seconds: float) -> None:
    traits, image = traits_of(device), Convolution(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1))
    print("\n| kernel | Gop/s, no device known | the model's | found |\n|---|---|---|---|")
    for kernel, what in (
            ("product 256 256 256", Product(1, 256, 256, 256)), ("product 1 1024 1000", Product(1, 1, 1024, 1000)),
            ("3x3 56x56 64-64", image), ("the same of int8", replace(image, number="int8")),
            ("the same depthwise", replace(image, groups=64))):
        with tempfile.TemporaryDirectory() as folder:
            found = modules_tuner.tune(device, traits, what, Path(folder), seconds)
        trials = modules_trials.Trials(device, what)
        choices = [Shape(), modules_shapes.first(what, traits), found]
        launches = [prepared(device, trials.made(c), trials.inputs)[0] for c in choices]
        times = list(zip(*([launch() for launch in launches] for _ in range(4 * RUNS)), strict=True))
        print(f"| {kernel} | " + " | ".join(
            f"{what.operations / min(t[1:]) / 1e9:.1f} ({said(c)})" for t, c in zip(times, choices, strict=True))
            + " |", flush=True)


def said(choice: modules_shapes.Choice) -> str:
    if isinstance(choice, modules_shapes.Fewer):
        return f"F({choice.size}x{choice.size}), {said(choice.shape)}"
    return f"{choice.rows} rows, {choice.group[0]} by {choice.group[1]}"


def main() -> None:
    device = vulkan.open_device(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(device.identity.name, device.identity.driver, device.identity.platform, sep="; ")
    if len(sys.argv) > 2:
        shapes(device, float(sys.argv[2]))
        return
    print("\n| kernel | numbers | Gop/s |\n|---|---|---|")
    r = np.random.default_rng(1)
    for kernel, numbers, layer, operations in layers("float16" in device.limits.elements):
        tensors = {role: r.integers(-100, 101, shape) if layer.number == "int8" else r.standard_normal(shape)
                   for role, shape in layer.shapes.items() if role != "output"}
        seconds = min([run(device, layer, tensors)[1] for _ in range(RUNS + 1)][1:])
        print(f"| {kernel} | {numbers} | {operations / seconds / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    main()
