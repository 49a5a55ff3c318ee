"""A small builder of ONNX models: layers by their parameters, with names, shapes and seeded weights.

Weights are He's (arXiv:1502.01852), by activation, and biases are random as those that a folded batch normalization
leaves: in a ReLU network the mean square of what leaves a layer is about that of what entered it. SiLU and HardSwish
have no such factor: they take three quarters of a small signal's power and half of a large one's. There the weights
amplify by 1.7, so that a large signal shrinks, and the biases are large, so that a small one does not vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UsageError

OPSET = 17
IR_VERSION = 8
"""The first that allows opset 17."""
Activation = Literal["", "relu", "relu6", "silu", "hardswish", "gelu"]
POWER = {"": 1.0, "relu": 2.0, "relu6": 2.0, "silu": 1.7, "hardswish": 1.7, "gelu": 2.0}
"""Mean square of what the weights before an activation make of inputs with a mean square of 1."""
BIAS = {"": 0.1, "relu": 0.1, "relu6": 0.1, "silu": 0.6, "hardswish": 0.6, "gelu": 0.1}
"""Standard deviation of the biases before an activation."""


class Net:
    """A network that grows at its end. Tensors are names; a node's output has the node's name; `shapes` has each."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.rng = np.random.default_rng(seed)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.nodes: list[tuple[str, tuple[str, ...], tuple[str, ...], str, dict[str, Any]]] = []
        self.constants: dict[str, NDArray[Any]] = {}

    # what everything is made of

    def input(self, name: str, *shape: int) -> str:
        self.shapes[name] = shape
        self.inputs.append(name)
        return name

    def node(self, op: str, inputs: Sequence[str], shape: Sequence[int], name: str, **attributes: Any) -> str:
        """A node with one output of that shape, both called `name`."""
        return self.split_node(op, inputs, [(name, shape)], name, **attributes)[0]

    def split_node(self, op: str, inputs: Sequence[str], outputs: Sequence[tuple[str, Sequence[int]]], name: str,
                   **attributes: Any) -> list[str]:
        names = [n for n, _ in outputs]
        assert not self.shapes.keys() & set(names), names
        self.shapes.update((n, tuple(int(i) for i in s)) for n, s in outputs)
        self.nodes.append((op, tuple(inputs), tuple(names), name, attributes))
        return names

    def constant(self, name: str, data: NDArray[Any]) -> str:
        """An initializer; a second one of the same name must be the same."""
        known = self.constants.setdefault(name, data)
        assert known is data or np.array_equal(known, data), name
        self.shapes[name] = known.shape
        return name

    def integers(self, name: str, numbers: Sequence[int]) -> str:
        return self.constant(name, np.array(numbers, np.int64))

    def number(self, x: float) -> str:
        return self.constant(f"number_{x:g}", np.array(x, np.float32))

    def normal(self, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> NDArray[np.float32]:
        drawn = self.rng.standard_normal(shape, np.float32)
        return drawn * np.float32(deviation) + np.float32(mean)

    def output(self, x: str, name: str) -> None:
        """The tensor `x`, which a node has just made, leaves the network as `name`."""
        op, inputs, outputs, node, attributes = self.nodes[-1]
        assert outputs == (x,), "an output must be the newest tensor"
        self.nodes[-1] = (op, inputs, (name,), node, attributes)
        self.shapes[name] = self.shapes.pop(x)
        self.outputs.append(name)

    # layers with weights

    def conv(self, x: str, out: int, kernel: int, stride: int = 1, activation: Activation = "", *, name: str,
             groups: int = 1, pad: int | None = None, power: float = 1.0) -> str:
        """Convolution with bias and activation; padding keeps the size at stride 1. `power`: of the output."""
        fan_in = self.shapes[x][1] // groups * kernel**2
        w = self.normal((out, self.shapes[x][1] // groups, kernel, kernel), (power * POWER[activation] / fan_in)**0.5)
        bias = self.normal((out,), BIAS[activation])
        y = self.conv_of(x, w, bias, stride, groups, kernel // 2 if pad is None else pad, name)
        return self.activate(y, activation)

    def depthwise(self, x: str, kernel: int, stride: int, activation: Activation, *, name: str) -> str:
        c = self.shapes[x][1]
        return self.conv(x, c, kernel, stride, activation, name=name, groups=c)

    def conv_of(self, x: str, weights: NDArray[np.float32], bias: NDArray[np.float32] | None, stride: int, groups: int,
                pad: int, name: str) -> str:
        """Convolution with these weights O,I,H,W."""
        n, _, h, w = self.shapes[x]
        out, _, k, _ = weights.shape
        inputs = [x, self.constant(f"{name}.weight", weights)]
        if bias is not None:
            inputs.append(self.constant(f"{name}.bias", bias))
        return self.node("Conv", inputs, (n, out, (h + 2 * pad - k) // stride + 1, (w + 2 * pad - k) // stride + 1),
                         name, kernel_shape=[k, k], strides=[stride] * 2, pads=[pad] * 4, dilations=[1, 1],
                         group=groups)

    def linear(self, x: str, out: int, activation: Activation = "", *, name: str, power: float = 1.0) -> str:
        """Fully connected over the last dimension: Gemm for a matrix, MatMul and Add for more, as exporters do."""
        *lead, fan_in = self.shapes[x]
        w = self.normal((out, fan_in), (power * POWER[activation] / fan_in)**0.5)
        bias = self.constant(f"{name}.bias", self.normal((out,), BIAS[activation]))
        if len(lead) == 1:
            y = self.node("Gemm", [x, self.constant(f"{name}.weight", w), bias], (*lead, out), name, transB=1)
        else:
            w = np.ascontiguousarray(w.T)
            y = self.node("MatMul", [x, self.constant(f"{name}.weight", w)], (*lead, out), f"{name}/matmul")
            y = self.node("Add", [y, bias], (*lead, out), name)
        return self.activate(y, activation)

    # layers without

    def activate(self, x: str, activation: Activation) -> str:
        shape = self.shapes[x]
        match activation:
            case "":
                return x
            case "relu":
                return self.node("Relu", [x], shape, f"{x}/relu")
            case "relu6":
                return self.node("Clip", [x, self.number(0), self.number(6)], shape, f"{x}/relu6")
            case "hardswish":
                return self.node("HardSwish", [x], shape, f"{x}/hardswish")
            case "silu":
                return self.multiply(x, self.node("Sigmoid", [x], shape, f"{x}/sigmoid"), name=f"{x}/silu")
            case "gelu":  # x/2 (1 + erf(x / sqrt 2))
                y = self.node("Div", [x, self.number(2**0.5)], shape, f"{x}/gelu/div")
                y = self.node("Erf", [y], shape, f"{x}/gelu/erf")
                y = self.node("Add", [y, self.number(1)], shape, f"{x}/gelu/add")
                return self.multiply(self.multiply(x, y, name=f"{x}/gelu/mul"), self.number(0.5), name=f"{x}/gelu")

    def pool(self, x: str, kernel: int, stride: int, *, name: str, pad: int = 0, ceil: bool = False) -> str:
        """Largest of each window. `ceil`: windows that reach over the edge count."""
        n, c, *hw = self.shapes[x]
        size = [(i + 2 * pad - kernel + (stride - 1 if ceil else 0)) // stride + 1 for i in hw]
        return self.node("MaxPool", [x], (n, c, *size), name, kernel_shape=[kernel] * 2, strides=[stride] * 2,
                         pads=[pad] * 4, ceil_mode=int(ceil))

    def global_pool(self, x: str, *, name: str) -> str:
        return self.node("GlobalAveragePool", [x], (*self.shapes[x][:2], 1, 1), name)

    def flatten(self, x: str, *, name: str) -> str:
        n, *rest = self.shapes[x]
        return self.node("Flatten", [x], (n, int(np.prod(rest))), name, axis=1)

    def elementwise(self, op: str, a: str, b: str, *, name: str) -> str:
        return self.node(op, [a, b], np.broadcast_shapes(self.shapes[a], self.shapes[b]), name)

    def add(self, a: str, b: str, *, name: str) -> str:
        return self.elementwise("Add", a, b, name=name)

    def multiply(self, a: str, b: str, *, name: str) -> str:
        return self.elementwise("Mul", a, b, name=name)

    def concat(self, xs: Sequence[str], axis: int, *, name: str) -> str:
        shape = list(self.shapes[xs[0]])
        shape[axis] = sum(self.shapes[x][axis] for x in xs)
        return self.node("Concat", xs, shape, name, axis=axis)

    def split(self, x: str, pieces: Sequence[int], axis: int, *, name: str) -> list[str]:
        shape = self.shapes[x]
        assert sum(pieces) == shape[axis]
        outputs = [(f"{name}/{i}", (*shape[:axis], n, *shape[axis + 1:])) for i, n in enumerate(pieces)]
        return self.split_node("Split", [x, self.integers(f"{name}.pieces", pieces)], outputs, name, axis=axis)

    def reshape(self, x: str, *shape: int, name: str) -> str:
        assert np.prod(shape) == np.prod(self.shapes[x])
        return self.node("Reshape", [x, self.integers(f"{name}.shape", shape)], shape, name)

    def transpose(self, x: str, *order: int, name: str) -> str:
        return self.node("Transpose", [x], [self.shapes[x][i] for i in order], name, perm=list(order))

    def upsample(self, x: str, *, name: str) -> str:
        """Twice the size, each pixel four times."""
        n, c, h, w = self.shapes[x]
        scales = self.constant("upsample.scales", np.array([1, 1, 2, 2], np.float32))
        return self.node("Resize", [x, "", scales], (n, c, 2 * h, 2 * w), name, mode="nearest",
                         coordinate_transformation_mode="asymmetric", nearest_mode="floor")

    # the file

    def onnx(self) -> bytes:
        """The model, checked by onnx.

        Raises: UsageError where onnx is not installed.
        """
        try:
            import onnx
            from onnx import TensorProto, helper, numpy_helper
        except ImportError as e:
            raise UsageError("the zoo writes ONNX files, and the package onnx is not installed",
                             try_="pip install 'npulab[onnx]'") from e

        def info(name: str) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[name])

        made = [name for _, _, names, _, _ in self.nodes for name in names]
        graph = helper.make_graph(
            [helper.make_node(op, inputs, outputs, name, **attributes)
             for op, inputs, outputs, name, attributes in self.nodes],
            self.name, [info(n) for n in self.inputs], [info(n) for n in self.outputs],
            [numpy_helper.from_array(np.asarray(a, order="C"), n) for n, a in self.constants.items()],
            value_info=[info(n) for n in made if n not in self.outputs])
        model = helper.make_model(graph, producer_name="npulab", ir_version=IR_VERSION,
                                  opset_imports=[helper.make_opsetid("", OPSET)])
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))
