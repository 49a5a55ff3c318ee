"""Train, quantize and write the sample network: `python scripts/train_sample.py` (needs NumPy, scikit-learn, LiteRT).

A MobileNet-style classifier of handwritten digits, in three steps:

    train       float32 with batch normalization, manual gradients, Adam, on augmented images
    fine-tune   batch normalization folded, every tensor seen through its 8 bits (straight-through gradients)
    write       uint8 weights and activations with one scale a tensor, int32 biases; measured with LiteRT

Files go to src/npulab/samples. Two runs on one machine with one set of packages write identical bytes: every random
number comes from SEED, and the linear algebra runs in one thread, so that sums do not depend on the core count.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Ints = NDArray[np.int64]

SAMPLES = Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples"
SEED = 7120
HELD_OUT = 360  # of 1797 images
PICTURE = 1275  # a held-out seven that is easy to read, chosen by eye
SIZE = 32
CHANNELS = 3
INPUT_SCALE, INPUT_ZERO = 1 / 128, 128  # pixels 0..255 become -1..0.992
BATCH = 64
EPOCHS, RATE = 45, 4e-3
TUNE_EPOCHS, TUNE_RATE = 12, 4e-4


# The network


@dataclass(frozen=True)
class Conv:
    """A convolution with SAME padding. `depthwise`: one kernel a channel. `relu6`: clamp to 0..6."""

    name: str
    source: str
    kernel: int
    stride: int
    channels: int
    relu6: bool
    depthwise: bool = False


@dataclass(frozen=True)
class Add:
    name: str
    source: str
    other: str


@dataclass(frozen=True)
class Average:
    """Mean over rows and columns."""

    name: str
    source: str


Layer = Conv | Add | Average


def depthwise(name: str, source: str, stride: int, channels: int) -> Conv:
    return Conv(name, source, 3, stride, channels, True, depthwise=True)


def pointwise(name: str, source: str, channels: int, relu6: bool) -> Conv:
    return Conv(name, source, 1, 1, channels, relu6)


def residual(block: str, source: str, channels: int) -> tuple[Layer, ...]:
    """MobileNetV2's inverted bottleneck: widen, filter, narrow, add."""
    return (
        pointwise(f"{block}/expand", source, 2 * channels, True),
        depthwise(f"{block}/depthwise", f"{block}/expand", 1, 2 * channels),
        pointwise(f"{block}/project", f"{block}/depthwise", channels, False),
        Add(f"{block}/add", f"{block}/project", source),
    )


LAYERS: tuple[Layer, ...] = (
    Conv("stem", "input", 3, 2, 16, True),
    depthwise("block1/depthwise", "stem", 1, 16),
    pointwise("block1/project", "block1/depthwise", 24, False),
    *residual("block2", "block1/project", 24),
    depthwise("block3/depthwise", "block2/add", 2, 24),
    pointwise("block3/project", "block3/depthwise", 48, False),
    *residual("block4", "block3/project", 48),
    depthwise("block5/depthwise", "block4/add", 2, 48),
    pointwise("block5/features", "block5/depthwise", 128, True),
    Average("pool", "block5/features"),
    pointwise("logits", "pool", 10, False),
)


# The data


def load_images() -> tuple[U8, Ints]:
    """All 1797 digits, 32x32, light ink on black, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = np.rint(np.asarray(data.images) * (255 / 16)).astype(np.uint8)
    return np.stack([enlarge(d, SIZE) for d in small]), np.asarray(data.target, np.int64)


def enlarge(digit: U8, size: int) -> U8:
    return np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC), np.uint8)


def split(count: int) -> tuple[Ints, Ints]:
    """Indices of the training images and of the held-out ones. RandomState: its stream is frozen for ever."""
    order = np.random.RandomState(SEED).permutation(count).astype(np.int64)
    return order[HELD_OUT:], order[:HELD_OUT]


def held_out() -> tuple[U8, Ints]:
    """The images no training step sees, as the network takes them (N, 32, 32, 3), and their labels."""
    images, labels = load_images()
    _, test = split(len(images))
    return np.repeat(images[test][..., None], CHANNELS, axis=-1), labels[test]


def augment(images: U8, rng: np.random.Generator) -> F32:
    """Pixels 0..255 (N, 32, 32, 3) after random turns, shifts, sizes, slants, colours, noise; half of them dark ink on
    light paper, so that a scan works as well as the data set's own light on black."""
    n = len(images)
    turn, slant = rng.uniform(-0.2, 0.2, n), rng.uniform(-0.15, 0.15, n)
    wide, high = rng.uniform(0.85, 1.2, (2, n))
    shift_x, shift_y = rng.uniform(-3, 3, (2, n))
    middle = (SIZE - 1) / 2
    y, x = np.mgrid[:SIZE, :SIZE] - middle
    xx, xy, x0, yx, yy, y0 = (
        v[:, None, None]
        for v in (wide * np.cos(turn), slant - np.sin(turn), shift_x, np.sin(turn), high * np.cos(turn), shift_y)
    )
    xs, ys = xx * x + xy * y + middle + x0, yx * x + yy * y + middle + y0
    ink = bilinear(images.astype(np.float32) / np.float32(255), xs, ys)[..., None]
    paper = rng.uniform(0, 0.2, (n, 1, 1, 1)) + rng.uniform(-0.05, 0.05, (n, 1, 1, CHANNELS))
    full = rng.uniform(0.75, 1, (n, 1, 1, 1)) + rng.uniform(-0.1, 0.1, (n, 1, 1, CHANNELS))
    out = paper + (full - paper) * ink + rng.normal(0, 0.02, (n, SIZE, SIZE, CHANNELS))
    out = np.where(rng.random((n, 1, 1, 1)) < 0.5, 1 - out, out)
    clean = rng.random((n, 1, 1, 1)) < 0.25  # some as the data set has them
    out = np.where(clean, ink, out)
    return np.rint(np.clip(out, 0, 1) * 255).astype(np.float32)


def bilinear(images: F32, xs: NDArray[np.float64], ys: NDArray[np.float64]) -> F32:
    """Values of `images`, squares, at fractional positions, black outside."""
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    xs, ys = np.clip(xs + 1, 0, size + 0.999), np.clip(ys + 1, 0, size + 0.999)
    x0, y0 = xs.astype(np.int64), ys.astype(np.int64)
    fx, fy = (xs - x0).astype(np.float32), (ys - y0).astype(np.float32)
    n = np.arange(len(images))[:, None, None]
    top = padded[n, y0, x0] * (1 - fx) + padded[n, y0, x0 + 1] * fx
    low = padded[n, y0 + 1, x0] * (1 - fx) + padded[n, y0 + 1, x0 + 1] * fx
    return np.asarray(top * (1 - fy) + low * fy, np.float32)


def to_real(pixels: U8 | F32) -> F32:
    return ((pixels.astype(np.float32) - INPUT_ZERO) * np.float32(INPUT_SCALE)).astype(np.float32)


# Linear parts of the layers, forwards and backwards; N, H, W, C


def padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TFLite's SAME: (before, after)."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def taps(x: F32, layer: Conv) -> Iterator[tuple[int, int, F32]]:
    """(row, column, the input pixels under that kernel element), over the padded image."""
    k, s = layer.kernel, layer.stride
    around = padding(x.shape[1], k, s)
    padded = np.pad(x, ((0, 0), around, around, (0, 0))) if k > 1 else x
    out = -(-x.shape[1] // s)
    for i in range(k):
        for j in range(k):
            yield i, j, padded[:, i : i + (out - 1) * s + 1 : s, j : j + (out - 1) * s + 1 : s]


def linear(layer: Conv, x: F32, w: F32) -> F32:
    if layer.depthwise:
        y: F32 | None = None
        for i, j, part in taps(x, layer):
            y = part * w[i, j] if y is None else y + part * w[i, j]
        assert y is not None
        return y
    if layer.kernel == 1:
        return np.asarray(x @ w[0, 0], np.float32)
    columns = np.concatenate([part for _, _, part in taps(x, layer)], axis=-1)
    return np.asarray(columns @ w.reshape(-1, layer.channels), np.float32)


def linear_back(layer: Conv, x: F32, w: F32, dy: F32, need_dx: bool) -> tuple[F32 | None, F32]:
    """(gradient of the input, gradient of the weights)."""
    dw = np.zeros_like(w)
    flat = dy.reshape(-1, layer.channels)
    if layer.kernel == 1:
        dw[0, 0] = x.reshape(-1, x.shape[-1]).T @ flat
        return np.asarray(dy @ w[0, 0].T, np.float32), dw
    before, after = padding(x.shape[1], layer.kernel, layer.stride)
    n, size, _, c = x.shape
    dx = np.zeros((n, size + before + after, size + before + after, c), np.float32)
    s, span = layer.stride, (dy.shape[1] - 1) * layer.stride + 1
    for i, j, part in taps(x, layer):
        if layer.depthwise:
            dw[i, j] = np.einsum("nhwc,nhwc->c", part, dy)
        else:
            dw[i, j] = part.reshape(-1, c).T @ flat
        if need_dx:
            dx[:, i : i + span : s, j : j + span : s] += dy * w[i, j] if layer.depthwise else dy @ w[i, j].T
    return (dx[:, before : before + size, before : before + size] if need_dx else None), dw


# Quantization


@dataclass(frozen=True)
class Grid:
    """uint8 values of a tensor: real = scale * (q - zero)."""

    scale: float
    zero: int

    @property
    def low(self) -> float:
        return -self.zero * self.scale

    @property
    def high(self) -> float:
        return (255 - self.zero) * self.scale

    def quantize(self, x: F32) -> U8:
        steps = np.rint(x / np.float32(self.scale)) + self.zero
        return np.asarray(np.clip(steps, 0, 255), np.uint8)

    def see(self, x: F32) -> F32:
        """`x` as 8 bits show it."""
        return ((self.quantize(x).astype(np.float32) - self.zero) * np.float32(self.scale)).astype(np.float32)


def grid_of(low: float, high: float) -> Grid:
    """The grid that holds low..high and has 0 exactly. Scales are float32, as the file stores them."""
    low, high = min(low, 0.0), max(high, 0.0, low + 1e-6)
    scale = float(np.float32((high - low) / 255))
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, 255)))


def relu6_grid(high: float) -> Grid:
    """From 0 to at most 6.0 exactly, so that a driver may leave the upper clamp to the range."""
    scale = np.float32(min(high, 6.0) / 255)
    while float(scale) * 255 > 6.0:
        scale = np.nextafter(scale, np.float32(0))
    return Grid(float(scale), 0)


# Forwards and backwards through the whole network


class Network:
    """Parameters by name; `folded` has biases in place of batch normalization, `grids` makes it see 8 bits."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.params: dict[str, F32] = {}
        self.moments: dict[str, tuple[F32, F32]] = {}  # running mean and variance of each convolution
        self.grids: dict[str, Grid] = {}
        self.folded = False
        width = {"input": CHANNELS}
        for layer in LAYERS:
            width[layer.name] = width[layer.source]
            if isinstance(layer, Conv):
                fan_in = layer.kernel**2 * (1 if layer.depthwise else width[layer.source])
                shape = (layer.kernel, layer.kernel, *(() if layer.depthwise else (width[layer.source],)),
                         layer.channels)
                self.params[f"{layer.name}/w"] = rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)
                self.params[f"{layer.name}/gamma"] = np.ones(layer.channels, np.float32)
                self.params[f"{layer.name}/beta"] = np.zeros(layer.channels, np.float32)
                self.moments[layer.name] = (np.zeros(layer.channels, np.float32), np.ones(layer.channels, np.float32))
                width[layer.name] = layer.channels

    def weights(self, layer: Conv) -> F32:
        """As the convolution uses them."""
        w = self.params[f"{layer.name}/w"]
        return grid_of(float(w.min()), float(w.max())).see(w) if self.grids else w

    def forward(self, x: F32, training: bool = False) -> tuple[dict[str, F32], dict[str, F32]]:
        """(values of all layers, what `backward` needs besides them)."""
        values: dict[str, F32] = {"input": x}
        kept: dict[str, F32] = {}
        for layer in LAYERS:
            source = values[layer.source]
            if isinstance(layer, Add):
                y = source + values[layer.other]
            elif isinstance(layer, Average):
                y = source.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
            else:
                y = linear(layer, source, self.weights(layer))
                y = y + self.params[f"{layer.name}/b"] if self.folded else self._normalize(layer, y, training, kept)
                if layer.relu6:
                    kept[f"{layer.name}/active"] = np.asarray((y > 0) & (y < 6), np.float32)
                    y = np.clip(y, 0, 6)
            if self.grids:
                grid = self.grids[layer.name]
                if training:
                    inside = np.asarray((y >= grid.low) & (y <= grid.high), np.float32)
                    kept[f"{layer.name}/inside"] = inside
                y = grid.see(y)
            values[layer.name] = y
        return values, kept

    def _normalize(self, layer: Conv, y: F32, training: bool, kept: dict[str, F32]) -> F32:
        mean, variance = self.moments[layer.name]
        if training:
            now = y.mean(axis=(0, 1, 2), dtype=np.float32), y.var(axis=(0, 1, 2), dtype=np.float32)
            self.moments[layer.name] = (0.95 * mean + 0.05 * now[0], 0.95 * variance + 0.05 * now[1])
            mean, variance = now
        spread = np.sqrt(variance + np.float32(1e-3))
        y = (y - mean) / spread
        kept[f"{layer.name}/normal"], kept[f"{layer.name}/spread"] = y, spread
        return np.asarray(y * self.params[f"{layer.name}/gamma"] + self.params[f"{layer.name}/beta"], np.float32)

    def backward(self, values: dict[str, F32], kept: dict[str, F32], d_logits: F32) -> dict[str, F32]:
        """Gradients of the parameters."""
        grads: dict[str, F32] = {}
        back: dict[str, F32] = {"logits": d_logits}
        for layer in reversed(LAYERS):
            dy = back.pop(layer.name)
            if f"{layer.name}/inside" in kept:
                dy = dy * kept[f"{layer.name}/inside"]
            if isinstance(layer, Add):
                sources = [(layer.source, dy), (layer.other, dy)]
            elif isinstance(layer, Average):
                shape = values[layer.source].shape
                sources = [(layer.source, np.broadcast_to(dy / np.float32(shape[1] * shape[2]), shape))]
            else:
                if layer.relu6:
                    dy = dy * kept[f"{layer.name}/active"]
                if self.folded:
                    grads[f"{layer.name}/b"] = dy.sum(axis=(0, 1, 2))
                else:
                    dy = self._normalize_back(layer, dy, kept, grads)
                dx, grads[f"{layer.name}/w"] = linear_back(
                    layer, values[layer.source], self.weights(layer), dy, layer.source != "input")
                sources = [] if dx is None else [(layer.source, dx)]
            for name, d in sources:
                back[name] = back[name] + d if name in back else d
        return grads

    def _normalize_back(self, layer: Conv, dy: F32, kept: dict[str, F32], grads: dict[str, F32]) -> F32:
        normal, spread = kept[f"{layer.name}/normal"], kept[f"{layer.name}/spread"]
        count = np.float32(dy.size // layer.channels)
        grads[f"{layer.name}/beta"] = beta = dy.sum(axis=(0, 1, 2))
        grads[f"{layer.name}/gamma"] = gamma = np.einsum("nhwc,nhwc->c", dy, normal)
        rate = self.params[f"{layer.name}/gamma"] / spread
        return np.asarray(rate * (dy - beta / count - normal * (gamma / count)), np.float32)

    def fold(self) -> None:
        """Put batch normalization into weights and biases."""
        for layer in LAYERS:
            if isinstance(layer, Conv):
                mean, variance = self.moments[layer.name]
                rate = self.params.pop(f"{layer.name}/gamma") / np.sqrt(variance + np.float32(1e-3))
                self.params[f"{layer.name}/b"] = self.params.pop(f"{layer.name}/beta") - mean * rate
                self.params[f"{layer.name}/w"] = self.params[f"{layer.name}/w"] * rate
        self.folded = True

    def calibrate(self, x: F32) -> None:
        """Choose the grid of every layer from what it computes for `x`."""
        values, _ = self.forward(x)
        grids: dict[str, Grid] = {"input": Grid(INPUT_SCALE, INPUT_ZERO)}
        for layer in LAYERS:
            y = values[layer.name]
            if isinstance(layer, Conv) and layer.relu6:
                grids[layer.name] = relu6_grid(float(y.max()))
            elif isinstance(layer, Average):
                grids[layer.name] = grids[layer.source]  # TFLite's kernel does not rescale
            else:
                grids[layer.name] = grid_of(float(y.min()), float(y.max()))
        self.grids = grids

    def accuracy(self, x: F32, labels: Ints) -> float:
        found = [self.forward(x[i : i + 180])[0]["logits"].reshape(-1, 10).argmax(1) for i in range(0, len(x), 180)]
        return float(np.mean(np.concatenate(found) == labels))


def train(net: Network, images: U8, labels: Ints, epochs: int, rate: float, rng: np.random.Generator) -> None:
    """Adam with a cosine schedule and decoupled weight decay on softmax cross-entropy."""
    first = {k: np.zeros_like(v) for k, v in net.params.items()}
    second = {k: np.zeros_like(v) for k, v in net.params.items()}
    steps = epochs * (len(images) // BATCH)
    step = 0
    for epoch in range(epochs):
        order, losses = rng.permutation(len(images)), []
        for at in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[at : at + BATCH]
            values, kept = net.forward(to_real(augment(images[chosen], rng)), training=True)
            loss, d_logits = cross_entropy(values["logits"], labels[chosen])
            losses.append(loss)
            grads = net.backward(values, kept, d_logits)
            step += 1
            now = np.float32(rate * min(1.0, step / 50) * 0.5 * (1 + np.cos(np.pi * step / steps)))
            for k, g in grads.items():
                first[k] = 0.9 * first[k] + 0.1 * g
                second[k] = 0.999 * second[k] + 0.001 * g * g
                move = (first[k] / (1 - 0.9**step)) / (np.sqrt(second[k] / (1 - 0.999**step)) + 1e-8)
                decay = 0.02 if k.endswith("/w") else 0.0
                net.params[k] = (net.params[k] - now * (move + decay * net.params[k])).astype(np.float32)
        if (epoch + 1) % 10 == 0:
            print(f"  epoch {epoch + 1:3d} of {epochs}: loss {np.mean(losses):.4f}", file=sys.stderr)


def cross_entropy(logits: F32, labels: Ints) -> tuple[float, F32]:
    """(mean loss, its gradient)."""
    flat = logits.reshape(len(labels), 10)
    p = np.exp(flat - flat.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(-np.log(p[rows, labels] + 1e-9).mean())
    p[rows, labels] -= 1
    return loss, (p / len(labels)).astype(np.float32).reshape(logits.shape)


# The file


def write_tflite(net: Network) -> bytes:
    """The network as a TFLite file: uint8, one scale a tensor, RELU6 fused, softmax at the end."""
    from npulab.exporters.tflite_builder import ModelBuilder

    model = ModelBuilder("digits")
    sizes = {"input": SIZE}
    at = {"input": model.tensor("image", (1, SIZE, SIZE, CHANNELS), "uint8", scale=INPUT_SCALE, zero_point=INPUT_ZERO)}
    width = {"input": CHANNELS}

    def activation(name: str, size: int, channels: int) -> int:
        sizes[name], width[name] = size, channels
        grid = net.grids[name]
        return model.tensor(name, (1, size, size, channels), "uint8", scale=grid.scale, zero_point=grid.zero)

    for layer in LAYERS:
        size, channels = sizes[layer.source], width[layer.source]
        if isinstance(layer, Add):
            at[layer.name] = activation(layer.name, size, channels)
            model.op("ADD", [at[layer.source], at[layer.other]], [at[layer.name]], fused_activation_function="NONE")
        elif isinstance(layer, Average):
            at[layer.name] = activation(layer.name, 1, channels)
            model.op("AVERAGE_POOL_2D", [at[layer.source]], [at[layer.name]], padding="VALID", stride_w=1, stride_h=1,
                     filter_width=size, filter_height=size, fused_activation_function="NONE")
        else:
            w = net.params[f"{layer.name}/w"]
            grid = grid_of(float(w.min()), float(w.max()))
            stored = w[None] if layer.depthwise else np.transpose(w, (3, 0, 1, 2))
            weights = model.tensor(f"{layer.name}/weights", stored.shape, "uint8", scale=grid.scale,
                                   zero_point=grid.zero, data=np.ascontiguousarray(grid.quantize(stored)))
            scale = float(np.float32(np.float32(net.grids[layer.source].scale) * np.float32(grid.scale)))
            steps = np.rint(net.params[f"{layer.name}/b"].astype(np.float64) / scale).astype(np.int32)
            bias = model.tensor(f"{layer.name}/bias", steps.shape, "int32", scale=scale, zero_point=0, data=steps)
            at[layer.name] = activation(layer.name, -(-size // layer.stride), layer.channels)
            options: dict[str, object] = {
                "padding": "SAME", "stride_w": layer.stride, "stride_h": layer.stride,
                "fused_activation_function": "RELU6" if layer.relu6 else "NONE",
                "dilation_w_factor": 1, "dilation_h_factor": 1,
            }
            if layer.depthwise:
                options["depth_multiplier"] = 1
            model.op("DEPTHWISE_CONV_2D" if layer.depthwise else "CONV_2D", [at[layer.source], weights, bias],
                     [at[layer.name]], **options)
    grid = net.grids["logits"]
    shape = model.tensor("shape", (2,), "int32", data=np.array([1, 10], np.int32))
    flat = model.tensor("flat", (1, 10), "uint8", scale=grid.scale, zero_point=grid.zero)
    model.op("RESHAPE", [at["logits"], shape], [flat], new_shape=[1, 10])
    answer = model.tensor("probabilities", (1, 10), "uint8", scale=1 / 256, zero_point=0)
    model.op("SOFTMAX", [flat], [answer], beta=1.0)
    return model.build([at["input"]], [answer])


def evaluate(model: bytes, images: U8) -> U8:
    """Probabilities (N, 10) in steps of 1/256, by LiteRT's reference kernels."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    run = Interpreter(model_content=model, experimental_op_resolver_type=OpResolverType.BUILTIN_REF, num_threads=1)
    run.allocate_tensors()
    source, result = run.get_input_details()[0]["index"], run.get_output_details()[0]["index"]
    out = []
    for image in images:
        run.set_tensor(source, image[None])
        run.invoke()
        out.append(run.get_tensor(result)[0])
    return np.stack(out)


def share(probabilities: U8, labels: Ints) -> float:
    """Part of the answers that is right, to four decimals."""
    return round(float(np.mean(probabilities.argmax(1) == labels)), 4)


def write_picture(path: Path) -> None:
    """The held-out seven PICTURE, 256x256."""
    from sklearn.datasets import load_digits

    small = np.rint(load_digits().images[PICTURE] * (255 / 16)).astype(np.uint8)
    Image.fromarray(enlarge(small, 256)).save(path, optimize=True)


def main() -> None:
    start = time.perf_counter()
    rng = np.random.default_rng(SEED)
    images, labels = load_images()
    training, _ = split(len(images))
    seen, answers = images[training], labels[training]
    pixels, expected = held_out()

    net = Network(rng)
    print(f"float: {EPOCHS} epochs", file=sys.stderr)
    train(net, seen, answers, EPOCHS, RATE, rng)
    net.fold()
    accuracy_float = net.accuracy(to_real(pixels), expected)
    print(f"float accuracy {accuracy_float:.4f} after {time.perf_counter() - start:.0f} s", file=sys.stderr)

    net.calibrate(to_real(np.concatenate([augment(seen, rng) for _ in range(2)])))
    print(f"8 bits: {TUNE_EPOCHS} epochs", file=sys.stderr)
    train(net, seen, answers, TUNE_EPOCHS, TUNE_RATE, rng)

    model = write_tflite(net)
    SAMPLES.mkdir(exist_ok=True)
    (SAMPLES / "digits.tflite").write_bytes(model)
    (SAMPLES / "digits.labels.txt").write_text("".join(f"{d}\n" for d in range(10)))
    write_picture(SAMPLES / "digit.png")
    facts = {
        "accuracy_float": round(accuracy_float, 4),
        "accuracy_uint8": share(evaluate(model, pixels), expected),
        "accuracy_uint8_dark_ink_on_light_paper": share(evaluate(model, 255 - pixels), expected),
        "measured_by": "LiteRT, reference kernels (BUILTIN_REF); float figure by the training script",
        "held_out_samples": len(expected),
        "training_samples": len(training),
        "seed": SEED,
        "picture": {"file": "digit.png", "data_set_index": PICTURE, "label": 7},
        "bytes": len(model),
        "sha256": hashlib.sha256(model).hexdigest(),
        "data": "scikit-learn load_digits: test set of the UCI Optical Recognition of Handwritten Digits data set",
        "data_licence": "CC BY 4.0",
        "data_authors": "E. Alpaydin, C. Kaynak (1998), https://doi.org/10.24432/C50P49",
    }
    (SAMPLES / "digits.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
    print(f"took {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
