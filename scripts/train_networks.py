"""Train and write the networks that low-bit quantization is measured on: `python scripts/train_networks.py [NAME ...]`.

Needs `npulab[train]`: PyTorch, scikit-learn, ONNX and ONNX Runtime. Three classifiers of handwritten digits, 1x1x24x24:

    depthwise   MobileNetV2's inverted bottlenecks (arXiv:1801.04381): ReLU6, batch normalization
    residual    ResNet's basic blocks (arXiv:1512.03385): ReLU, batch normalization
    attention   a vision transformer (arXiv:2010.11929): layer normalization, softmax, GELU

Files go to src/npulab/samples/networks: a network each, the calibration and held-out images, and the figures. The
batch normalizations stay nodes of the file, so that their statistics are there for calibration without data. Nothing
is scaled by hand: how far the ranges of channels spread is what training leaves, and the settings below decide it.

Two runs on one machine with one set of packages write identical bytes: every random number comes from a seed, PyTorch
runs its deterministic algorithms in one thread. Other packages or vector instructions add numbers in another order.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from train_sample import bilinear

from npulab.samples import networks as sample
from npulab.zoo.builder import Net

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Ints = NDArray[np.int64]

FOLDER = Path(sample.__file__).parent
SEED = 7121
HELD_OUT, CALIBRATION = 797, 256  # of 1797 images; of the 1000 others
SIZE, ENLARGED = 24, 3  # pixels; one pixel of the data set is three
BATCH = 50


@dataclass(frozen=True)
class Training:
    """OneCycle (arXiv:1708.07120): `rate` is the highest, reached after 15 % of the steps. Adam is AdamW's."""

    optimizer: Literal["adam", "sgd"]
    rate: float
    decay: float
    epochs: int


TRAINING = {
    # a high rate and no decay: some channels all but die before their normalization, which then multiplies them by
    # far more than their neighbours, as in networks that are trained for long
    "depthwise": Training("adam", 1.5e-2, 0, 20),
    "residual": Training("sgd", 0.1, 1e-4, 12),
    "attention": Training("adam", 2e-3, 1e-2, 100),
}


# The data


def load_images() -> tuple[U8, Ints]:
    """All 1797 digits, 8x8, ink 0..16, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.asarray(data.images, np.uint8), np.asarray(data.target, np.int64)


def split(count: int) -> tuple[Ints, Ints]:
    """Indices of the training images and of the held-out ones. RandomState: its stream is frozen for ever."""
    order = np.random.RandomState(SEED).permutation(count).astype(np.int64)
    return order[HELD_OUT:], order[:HELD_OUT]


def perturb(digits: U8, rng: np.random.Generator) -> U8:
    """Photographs of digits, pixels 0..252 (N, 24, 24): enlarged, turned, slanted, stretched, shifted, of some
    contrast, with noise."""
    n = len(digits)
    turn, slant = rng.uniform(-0.2, 0.2, n), rng.uniform(-0.15, 0.15, n)
    wide, high = rng.uniform(0.88, 1.12, (2, n))
    shift_x, shift_y = rng.uniform(-1.8, 1.8, (2, n))
    middle = (SIZE - 1) / 2
    y, x = np.mgrid[:SIZE, :SIZE] - middle
    xx, xy, x0, yx, yy, y0 = (
        v[:, None, None]
        for v in (wide * np.cos(turn), slant - np.sin(turn), shift_x, np.sin(turn), high * np.cos(turn), shift_y)
    )
    xs, ys = ((a + middle + 0.5) / ENLARGED - 0.5 for a in (xx * x + xy * y + x0, yx * x + yy * y + y0))
    ink = bilinear(digits.astype(np.float32) / np.float32(16), xs, ys)
    paper = rng.uniform(0, 0.3, (n, 1, 1))
    noise = rng.normal(0, 1, (n, SIZE, SIZE)) * rng.uniform(0, 0.06, (n, 1, 1))
    out = paper + rng.uniform(0.4, 0.7, (n, 1, 1)) * ink + noise
    return (np.rint(np.clip(out, 0, 1) * 63) * 4).astype(np.uint8)  # 64 levels: a file a third smaller


def stored() -> dict[str, NDArray[Any]]:
    """What the file of images holds: `calibration`, `test` (N, 24, 24) and `labels` of the test, all uint8."""
    digits, labels = load_images()
    training, test = split(len(digits))
    rng = np.random.default_rng(SEED)
    return {
        "calibration": perturb(digits[training[:CALIBRATION]], rng),
        "test": perturb(digits[test], rng),
        "labels": labels[test].astype(np.uint8),
    }


# The networks


class Unit(nn.Sequential):
    """Convolution, batch normalization, activation; padding keeps the size at stride 1."""

    def __init__(self, c: int, out: int, kernel: int, stride: int = 1, groups: int = 1,
                 activation: type[nn.Module] | None = None) -> None:
        super().__init__(nn.Conv2d(c, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out),
                         *([activation()] if activation else []))


class Bottleneck(nn.Module):
    """Widen, filter, narrow; added to its input where the shapes are one."""

    def __init__(self, c: int, out: int, stride: int, widen: int = 4) -> None:
        super().__init__()
        self.adds = c == out and stride == 1
        self.expand = Unit(c, widen * c, 1, activation=nn.ReLU6)
        self.filter = Unit(widen * c, widen * c, 3, stride, widen * c, nn.ReLU6)
        self.project = Unit(widen * c, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.filter(self.expand(x)))
        return x + y if self.adds else y


class Basic(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, c: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = Unit(c, out, 3, stride, activation=nn.ReLU)
        self.second = Unit(out, out, 3)
        self.around = Unit(c, out, 1, stride) if c != out or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(self.first(x)) + (self.around(x) if self.around else x))


class Convolutional(nn.Module):
    """A stem, blocks, the mean over rows and columns, a classifier."""

    def __init__(self, stem: Unit, blocks: list[nn.Module], features: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.classifier = stem, nn.ModuleList(blocks), nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A transformer's block, normalized before each half."""

    def __init__(self, width: int, heads: int, widen: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.project = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, widen * width), nn.Linear(widen * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        y = self.norm1(x)
        q, k, v = (linear(y).reshape(n, tokens, self.heads, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(2, 3)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.project(y)
        return x + self.narrow(functional.gelu(self.widen(self.norm2(x))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3, patch: int = 4, widen: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (SIZE // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Encoder(width, heads, widen) for _ in range(depth))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(1))  # type: ignore[no-any-return]


def build(name: str) -> nn.Module:
    """The untrained network."""
    if name == "attention":
        return Attention()
    if name == "residual":
        widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2)]
        return Convolutional(Unit(1, 16, 3, 2, activation=nn.ReLU), [Basic(*w) for w in widths], 48)
    widths = [(8, 12, 1), (12, 12, 1), (12, 16, 2), (16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 1)]
    blocks: list[nn.Module] = [Bottleneck(*w) for w in widths]
    return Convolutional(Unit(1, 8, 3, 2, activation=nn.ReLU6), [*blocks, Unit(32, 96, 1, activation=nn.ReLU6)], 96)


def train(net: nn.Module, digits: U8, labels: Ints, how: Training, rng: np.random.Generator) -> None:
    """New perturbations of all images in each epoch."""
    if how.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), how.rate, momentum=0.9, nesterov=True,
                                                           weight_decay=how.decay)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), how.rate, weight_decay=how.decay)
    steps = len(digits) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, how.epochs * steps, pct_start=0.15)
    net.train()
    for epoch in range(how.epochs):
        order = rng.permutation(len(digits))
        images = torch.from_numpy(sample.normalized(perturb(digits[order], rng)))
        answers = torch.from_numpy(labels[order])
        for i in range(0, steps * BATCH, BATCH):
            loss = functional.cross_entropy(net(images[i : i + BATCH]), answers[i : i + BATCH])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"  epoch {epoch + 1}: loss {loss.item():.4f}", file=sys.stderr)
    net.eval()


# The files


class Export:
    """Writes modules into a builder's network, by the name that PyTorch knows them by."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.net = Net(name, SEED)
        self.module = module
        self.names = {m: n.replace(".", "/") for n, m in module.named_modules()}

    def weight(self, name: str, tensor: Tensor) -> str:
        return self.net.constant(name, np.ascontiguousarray(tensor.detach().numpy()))

    def conv(self, x: str, m: nn.Conv2d, name: str) -> str:
        bias = None if m.bias is None else m.bias.detach().numpy()
        pad = m.padding[0]
        assert isinstance(pad, int)
        return self.net.conv_of(x, m.weight.detach().numpy(), bias, m.stride[0], m.groups, pad, name)

    def unit(self, x: str, unit: Unit) -> str:
        name = self.names[unit]
        conv, norm, *activation = unit
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        x = self.conv(x, conv, f"{name}/conv")
        assert norm.running_mean is not None
        assert norm.running_var is not None
        moments = {"scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean, "variance": norm.running_var}
        inputs = [x, *(self.weight(f"{name}/norm.{n}", t) for n, t in moments.items())]
        x = self.net.node("BatchNormalization", inputs, self.net.shapes[x], f"{name}/norm", epsilon=norm.eps)
        if not activation:
            return x
        return self.net.activate(x, "relu6" if isinstance(activation[0], nn.ReLU6) else "relu")

    def block(self, x: str, m: nn.Module) -> str:
        name = self.names[m]
        if isinstance(m, Unit):
            return self.unit(x, m)
        if isinstance(m, Bottleneck):
            y = self.unit(self.unit(self.unit(x, m.expand), m.filter), m.project)
            return self.net.add(x, y, name=f"{name}/add") if m.adds else y
        assert isinstance(m, Basic)
        y = self.unit(self.unit(x, m.first), m.second)
        y = self.net.add(y, self.unit(x, m.around) if m.around else x, name=f"{name}/add")
        return self.net.activate(y, "relu")

    def linear(self, x: str, m: nn.Linear) -> str:
        """As exporters write it: Gemm for a matrix, MatMul and Add for more."""
        net, name, shape = self.net, self.names[m], (*self.net.shapes[x][:-1], m.out_features)
        bias = self.weight(f"{name}.bias", m.bias)
        if len(shape) == 2:
            return net.node("Gemm", [x, self.weight(f"{name}.weight", m.weight), bias], shape, name, transB=1)
        y = net.node("MatMul", [x, self.weight(f"{name}.weight", m.weight.T)], shape, f"{name}/matmul")
        return net.node("Add", [y, bias], shape, name)

    def norm(self, x: str, m: nn.LayerNorm) -> str:
        name = self.names[m]
        inputs = [x, self.weight(f"{name}.scale", m.weight), self.weight(f"{name}.shift", m.bias)]
        return self.net.node("LayerNormalization", inputs, self.net.shapes[x], name, axis=-1, epsilon=m.eps)

    def encoder(self, x: str, m: Encoder) -> str:
        net, name = self.net, self.names[m]
        one, tokens, width = net.shapes[x]
        d, scores = width // m.heads, (one, m.heads, tokens, tokens)
        y = self.norm(x, m.norm1)
        q, k, v = (
            net.transpose(net.reshape(self.linear(y, linear), one, tokens, m.heads, d, name=f"{name}/{n}/heads"),
                          *order, name=f"{name}/{n}/turned")
            for n, linear, order in (("q", m.q, (0, 2, 1, 3)), ("k", m.k, (0, 2, 3, 1)), ("v", m.v, (0, 2, 1, 3)))
        )
        q = net.multiply(q, net.number(d**-0.5), name=f"{name}/scaled")
        y = net.node("Softmax", [net.node("MatMul", [q, k], scores, f"{name}/scores")], scores, f"{name}/softmax",
                     axis=-1)
        y = net.node("MatMul", [y, v], (one, m.heads, tokens, d), f"{name}/values")
        y = net.reshape(net.transpose(y, 0, 2, 1, 3, name=f"{name}/together"), *net.shapes[x], name=f"{name}/joined")
        x = net.add(x, self.linear(y, m.project), name=f"{name}/add1")
        y = net.activate(self.linear(self.norm(x, m.norm2), m.widen), "gelu")
        return net.add(x, self.linear(y, m.narrow), name=f"{name}/add2")

    def onnx(self) -> bytes:
        net, m = self.net, self.module
        x = net.input("image", 1, 1, SIZE, SIZE)
        if isinstance(m, Convolutional):
            x = self.unit(x, m.stem)
            for block in m.blocks:
                x = self.block(x, block)
            x = net.flatten(net.global_pool(x, name="pool"), name="features")
        else:
            assert isinstance(m, Attention)
            x = self.conv(x, m.patches, "patches")
            _, width, rows, columns = net.shapes[x]
            x = net.reshape(x, 1, width, rows * columns, name="patches/flat")
            x = net.transpose(x, 0, 2, 1, name="patches/tokens")
            x = net.add(x, self.weight("positions", m.positions), name="embedding")
            for block in m.blocks:
                assert isinstance(block, Encoder)
                x = self.encoder(x, block)
            x = net.node("ReduceMean", [self.norm(x, m.norm)], (1, width), "features", axes=[1], keepdims=0)
        net.output(self.linear(x, m.classifier), "logits")
        return net.onnx()


def answers(model: bytes, images: F32) -> F32:
    """What ONNX Runtime says of each image: (N, 10)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])


def make(name: str) -> dict[str, Any]:
    """Train one network, write its file, and say what networks.json says of it."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    digits, labels = load_images()
    training, _ = split(len(digits))
    net = build(name)
    print(f"{name}: {TRAINING[name].epochs} epochs", file=sys.stderr)
    train(net, digits[training], labels[training], TRAINING[name], np.random.default_rng(SEED))
    model = Export(name, net).onnx()
    _, images, expected = sample.data(name)
    said = answers(model, images)
    with torch.no_grad():
        off = float(np.abs(said - net(torch.from_numpy(images)).numpy()).max())
    assert off < 1e-4, f"{name}: the file is {off} off what PyTorch computes"
    (FOLDER / f"{name}.onnx").write_bytes(model)
    print(f"  took {time.perf_counter() - start:.0f} s, off by {off:.1e}", file=sys.stderr)
    return {
        "accuracy": round(float((said.argmax(1) == expected).mean()), 4),
        "parameters": sum(p.numel() for p in net.parameters()),
        "training": asdict(TRAINING[name]),
        "bytes": len(model),
        "sha256": hashlib.sha256(model).hexdigest(),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    np.savez_compressed(FOLDER / "images.npz", **stored())
    path = FOLDER / "networks.json"
    known = json.loads(path.read_text())["networks"] if path.exists() else {}
    made = {name: make(name) for name in sys.argv[1:] or sample.NAMES}
    facts = {
        "networks": {name: made.get(name, known.get(name)) for name in sample.NAMES if name in made or name in known},
        "measured_by": "ONNX Runtime, float32, on the held-out images",
        "input": {"name": "image", "shape": [1, 1, SIZE, SIZE], "mean": [sample.MEAN], "std": [sample.DEVIATION],
                  "pixels": "0..255, grey; real = (pixel - mean) / std"},
        "training_samples": 1797 - HELD_OUT, "calibration_samples": CALIBRATION, "held_out_samples": HELD_OUT,
        "seed": SEED,
        "data": "scikit-learn load_digits: test set of the UCI Optical Recognition of Handwritten Digits data set",
        "data_licence": "CC BY 4.0",
        "data_authors": "E. Alpaydin, C. Kaynak (1998), https://doi.org/10.24432/C50P49",
        "data_changes": "enlarged to 24x24, turned, slanted, stretched, shifted, contrast changed, noise added",
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts["networks"], indent=2))


if __name__ == "__main__":
    main()
