"""The facts of Ethos-U against Arm's compiler: `python bench/vela.py VELA [MODELS_DIR] [--count N] [--seed N]`.

VELA is the `vela` program of the package ethos-u-vela (5.2.0 is what the facts describe), installed in an environment
of its own. Every 8-bit model of MODELS_DIR and N generated models of one operator are compiled for an Ethos-U55; where
Vela puts each operator is compared with `npulab check --target ethos_u55`. What Vela does not list, as it made it part
of something else, is not compared. A model that makes Vela fail counts as agreement if the check says host. Prints the
share that agrees, and each disagreement with npulab's reason.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.ir import DType, Graph
from npulab.targets.facts.board import find_board

LINE = re.compile(r"^\s*(CPU|NPU): (\S+) = (.*?)(?: \(outputs .*)?$", re.M)
SECONDS_MAX = 300


def placed(vela: str, path: Path) -> dict[str, str] | None:
    """Output tensor -> "npu" or "host", of the operators that Vela lists; None if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run([vela, str(path), "--accelerator-config", "ethos-u55-128", "--show-cpu-operations",
                                   "--output-dir", folder], capture_output=True, text=True, timeout=SECONDS_MAX)
        except subprocess.TimeoutExpired:
            return None
    found = {name: "npu" if side == "NPU" else "host" for side, _, name in LINE.findall(done.stdout + done.stderr)}
    return found or None


def compared(vela: str, path: Path) -> list[tuple[str, str, str, str]]:
    """(operator, Vela's place, ours, our reasons) of each node that Vela lists."""
    graph = load(path)
    theirs = placed(vela, path)
    rows = []
    for node, finding in zip(graph.nodes, find_board("ethos_u55").check(graph).findings, strict=True):
        place = "fails" if theirs is None else _place(graph, node.outputs, theirs)
        ours = "npu" if finding.where == "npu" else "host"
        if place:
            why = "; ".join(r.found for r in (*finding.reasons, *finding.undecided))[:160]
            rows.append((node.op.name, place, ours, why))
    return rows


def _place(graph: Graph, outputs: tuple[int, ...], theirs: dict[str, str]) -> str | None:
    return next((theirs[graph.values[v].name] for v in outputs if graph.values[v].name in theirs), None)


class One:
    """One operator with random operands, as a TFLite model."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.model = ModelBuilder("one")
        self.count = 0
        self.dtype = str(self.rng.choice(["int8", "int8", "int8", "int8", "uint8", "int16", "float32"]))
        self.inputs: list[int] = []

    def any(self, *choices: int) -> int:
        return int(self.rng.choice(choices))

    def tensor(self, shape: tuple[int, ...], dtype: str | None = None, data: object = None, scale: float | None = 0.1,
               zero: int = 0) -> int:
        self.count += 1
        dtype = dtype or self.dtype
        integer = dtype in ("int8", "uint8", "int16")
        return self.model.tensor(f"t{self.count}", shape, dtype, scale=scale if integer else None,
                                 zero_point=zero if integer and scale else None, data=data)

    def input(self, *shape: int, **rest: object) -> int:
        v = self.tensor(shape, **rest)
        self.inputs.append(v)
        return v

    def numbers(self, *values: int) -> int:
        return self.tensor((len(values),), "int32", np.array(values, np.int32), scale=None)

    def image(self) -> tuple[int, int, int, int]:
        return (self.any(1, 1, 1, 2), self.any(7, 16, 33, 80), self.any(7, 16, 33, 80), self.any(1, 3, 8, 24))

    def build(self) -> bytes:
        kind = str(self.rng.choice(KINDS))
        outputs = getattr(self, "_" + kind)()
        return self.model.build(self.inputs, outputs)

    def _out(self, *shape: int, **rest: object) -> list[int]:
        return [self.tensor(shape, **rest)]

    def _window(self, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], same: bool,
                dilation: tuple[int, int] = (1, 1)) -> tuple[int, ...]:
        return tuple(-(-n // s) if same else max(1, -(-(n - (k - 1) * d) // s))
                     for n, k, s, d in zip(size, kernel, stride, dilation, strict=True))

    def _convolution(self, depthwise: bool = False) -> list[int]:
        n, h, w, c = self.image()
        kernel = self.any(1, 2, 3, 5, 7), self.any(1, 2, 3, 5, 7)
        stride = (self.any(1, 1, 2, 3, 4),) * 2 if self.rng.random() < 0.7 else (self.any(1, 2, 3), self.any(1, 2, 3))
        same = bool(self.rng.random() < 0.6)
        dilation = (self.any(1, 2),) * 2 if stride == (1, 1) and self.rng.random() < 0.3 else (1, 1)
        out = c * self.any(1, 1, 2) if depthwise else self.any(1, 8, 20)
        wide = "int8" if self.dtype != "float32" and self.dtype != "uint8" else self.dtype
        shape = (1, *kernel, out) if depthwise else (out, *kernel, c)
        x = self.input(n, h, w, c)
        weights = self.tensor(shape, wide, self.rng.integers(0, 100, shape).astype(wide), scale=0.01)
        bias = "float32" if wide == "float32" else "int64" if self.dtype == "int16" else "int32"
        b = self.tensor((out,), bias, np.zeros(out, bias), scale=None)
        size = self._window((h, w), kernel, stride, same, dilation)
        y = self._out(n, *size, out)
        options = {"depth_multiplier": out // c} if depthwise else {}
        self.model.op("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", [x, weights, b], y,
                      padding="SAME" if same else "VALID", stride_h=stride[0], stride_w=stride[1],
                      dilation_h_factor=dilation[0], dilation_w_factor=dilation[1], **options)
        return y

    def _depthwise(self) -> list[int]:
        return self._convolution(True)

    def _pool(self) -> list[int]:
        n, h, w, c = self.image()
        kernel = self.any(1, 2, 3, 5, 7), self.any(1, 2, 3, 5, 7)
        stride = self.any(1, 2, 3, 4), self.any(1, 2, 3, 4)
        same = bool(self.rng.random() < 0.5)
        x = self.input(n, h, w, c)
        y = self._out(n, *self._window((h, w), kernel, stride, same), c)
        self.model.op(str(self.rng.choice(["MAX_POOL_2D", "AVERAGE_POOL_2D"])), [x], y, stride_h=stride[0],
                      padding="SAME" if same else "VALID", stride_w=stride[1], filter_height=kernel[0],
                      filter_width=kernel[1])
        return y

    def _two(self) -> list[int]:
        shape = self.image()
        other = shape if self.rng.random() < 0.6 else (1, 1, 1, shape[3])
        x, z = self.input(*shape), self.input(*other)
        y = self._out(*shape)
        self.model.op(str(self.rng.choice(["ADD", "SUB", "MUL", "MINIMUM", "MAXIMUM"])), [x, z], y)
        return y

    def _function(self) -> list[int]:
        shape = self.image()
        name = str(self.rng.choice(["LOGISTIC", "TANH", "RELU", "RELU6", "RELU_N1_TO_1", "HARD_SWISH", "LEAKY_RELU",
                                    "ABS", "EXP", "QUANTIZE"]))
        x = self.input(*shape)
        zero = -128 if name == "LOGISTIC" and self.dtype == "int8" else 0
        y = self._out(*shape, scale={"LOGISTIC": 1 / 256, "TANH": 1 / 128}.get(name, 0.1), zero=zero)
        self.model.op(name, [x], y, **({"alpha": 0.1} if name == "LEAKY_RELU" else {}))
        return y

    def _softmax(self) -> list[int]:
        shape = (self.any(1, 1, 2), self.any(5, 40, 300))
        x = self.input(*shape)
        y = self._out(*shape, scale=1 / 256, zero=-128 if self.dtype == "int8" else 0)
        self.model.op("SOFTMAX", [x], y, beta=float(self.rng.choice([1.0, 1.0, 2.0, -1.0])))
        return y

    def _dense(self) -> list[int]:
        n, m = self.any(4, 64, 500), self.any(1, 10, 64)
        x = self.input(self.any(1, 1, 4), n)
        wide = "int8" if self.dtype in ("int8", "int16") else self.dtype
        w = self.tensor((m, n), wide, self.rng.integers(0, 100, (m, n)).astype(wide), scale=0.01)
        y = self._out(int(self.model.tensors[x]["shape"][0]), m)
        self.model.op("FULLY_CONNECTED", [x, w], y)
        return y

    def _joined(self) -> list[int]:
        shape, axis = self.image(), self.any(0, 1, 2, 3)
        parts = [self.input(*shape) for _ in range(self.any(2, 3))]
        y = self._out(*(s * len(parts) if i == axis else s for i, s in enumerate(shape)))
        self.model.op("CONCATENATION", parts, y, axis=axis, fused_activation_function="NONE")
        return y

    def _padded(self) -> list[int]:
        shape = self.image()
        pads = [(self.any(0, 0, 0, 1), self.any(0, 0, 1)) for _ in shape]
        x = self.input(*shape)
        table = self.tensor((4, 2), "int32", np.array(pads, np.int32), scale=None)
        y = self._out(*(s + sum(p) for s, p in zip(shape, pads, strict=True)))
        self.model.op("PAD", [x, table], y)
        return y

    def _reshaped(self) -> list[int]:
        n, h, w, c = self.image()
        x = self.input(n, h, w, c)
        shape = (n, h * w, c)
        y = self._out(*shape)
        self.model.op("RESHAPE", [x, self.numbers(*shape)], y, new_shape=list(shape))
        return y

    def _turned(self) -> list[int]:
        shape, perm = self.image(), [int(i) for i in self.rng.permutation(4)]
        x = self.input(*shape)
        y = self._out(*(shape[i] for i in perm))
        self.model.op("TRANSPOSE", [x, self.numbers(*perm)], y)
        return y

    def _resized(self) -> list[int]:
        n, h, w, c = self.image()
        times = self.any(1, 2, 3, 4, 8)
        name = str(self.rng.choice(["RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"]))
        corners = bool(self.rng.random() < 0.3)
        size = [s * times - (times - 1) * corners for s in (h, w)]
        if self.rng.random() < 0.2:
            size[0] += 1
        x = self.input(n, h, w, c)
        y = self._out(n, *size, c)
        self.model.op(name, [x, self.numbers(*size)], y, align_corners=corners,
                      half_pixel_centers=bool(not corners and self.rng.random() < 0.4))
        return y

    def _mean(self) -> list[int]:
        shape = self.image()
        axes = sorted(int(a) for a in self.rng.choice(4, self.any(1, 2), replace=False))
        x = self.input(*shape)
        y = self._out(*(1 if i in axes else s for i, s in enumerate(shape)))
        self.model.op("MEAN", [x, self.numbers(*axes)], y, keep_dims=True)
        return y

    def _sliced(self) -> list[int]:
        shape = self.image()
        begin = [int(self.rng.integers(0, max(1, s // 2))) for s in shape]
        step = [1, self.any(1, 1, 2), self.any(1, 1, 2), 1]
        x = self.input(*shape)
        y = self._out(*(-(-(s - b) // t) for s, b, t in zip(shape, begin, step, strict=True)))
        self.model.op("STRIDED_SLICE", [x, self.numbers(*begin), self.numbers(*shape), self.numbers(*step)], y)
        return y

    def _transposed(self) -> list[int]:
        _, h, w, c = self.image()
        k, s, same = self.any(1, 2, 3, 4), self.any(1, 2, 2, 3), bool(self.rng.random() < 0.7)
        out = self.any(1, 8)
        size = [n * s if same else (n - 1) * s + max(k, s) for n in (h, w)]
        wide = "int8" if self.dtype in ("int8", "int16") else self.dtype
        weights = self.tensor((out, k, k, c), wide, self.rng.integers(0, 100, (out, k, k, c)).astype(wide), scale=0.01)
        x = self.input(1, h, w, c)
        y = self._out(1, *size, out)
        self.model.op("TRANSPOSE_CONV", [self.numbers(1, *size, out), weights, x], y, stride_h=s, stride_w=s,
                      padding="SAME" if same else "VALID")
        return y


KINDS = [name[1:] for name in vars(One) if name.startswith("_") and name[1:] not in ("_init__", "out", "window")
         and not name.startswith("__")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vela")
    parser.add_argument("models", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    files = sorted(given.models.rglob("*.tflite")) if given.models else []
    files = [f for f in files if any(v.dtype in (DType.INT8, DType.UINT8) for v in load(f).values)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        ones = []
        for i in range(given.count):
            ones.append(Path(folder) / f"{i}.tflite")
            ones[-1].write_bytes(One(given.seed * 1_000_000 + i).build())
        for title, paths in (("models", files), ("generated operators", ones)):
            report(title, paths, list(pool.map(lambda p: compared(given.vela, p), paths)))


def report(title: str, paths: list[Path], found: list[list[tuple[str, str, str, str]]]) -> None:
    rows = [(p.stem, *row) for p, one in zip(paths, found, strict=True) for row in one]
    if not rows:
        return
    wrong = Counter((op, theirs, ours, why) for _, op, theirs, ours, why in rows
                    if ours != ("host" if theirs == "fails" else theirs))
    agree = len(rows) - sum(wrong.values())
    fails = sum(theirs == "fails" for _, _, theirs, _, _ in rows)
    print(f"{title}: {agree} of {len(rows)} verdicts agree ({100 * agree / len(rows):.1f} %); Vela failed on {fails}")
    for (op, theirs, ours, why), times in wrong.most_common():
        print(f"  {times} x {op}: vela {theirs}, npulab {ours} {why}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
