"""Which nodes of a network become one launch: convolutions and products with what follows them, attention.

The network is in the ONNX dialect: that one has a word for every operator of the other, its nodes keep the names of the
file, and npulab's passes work on it. They go first: constants folded, BatchNormalization in the convolutions, GELU,
SiLU, HardSwish and LayerNormalization one node each.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.dialects import to_onnx
from npulab.gpu.compute.types import Activation
from npulab.ir import DType, Graph, Node
from npulab.ir.ops import OnnxOp
from npulab.passes import pipeline

PASSES = ("constants", "identities", "pads", "batch-norm", "branches", "transposes", "expand", "pool-floor",
          "attention-split", "softmax-last-axis", "instance-norm-split", "group-norm-to-instance-norm",
          "einsum-to-matmul", "layer-norm", "gelu", "silu-to-swish", "hardswish", "hardsigmoid", "min-max-to-clip")
LIMIT = 1e-6
"""Relative, that the numbers inside an activation may be off what the kernels have."""
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
MASKED = -1e4
"""From which on a mask is as good as minus infinity: exp(-10000) is 0 in float32."""


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that are computed at once, in the order of the network; the last one's output is the group's.

    kind      "convolution", "product", "attention" or "single".      anchor  the node that does the work.
    bias      value to add for each channel or column, constant; -1: none.    residual  value of the result's shape to
              add, before the activation; -1: none.
    inputs    of attention: query, key and value, as they enter the products.
    scale     of attention and of products.
    """

    kind: str
    nodes: tuple[Node, ...]
    anchor: Node
    bias: int = -1
    residual: int = -1
    activation: Activation = "none"
    slope: float = 0.01
    inputs: tuple[int, ...] = ()
    scale: float = 1.0
    causal: bool = False

    @property
    def output(self) -> int:
        return self.nodes[-1].outputs[0]

    @property
    def reads(self) -> tuple[int, ...]:
        if self.kind == "attention":
            return self.inputs
        return tuple(v for v in (*self.anchor.inputs, self.bias, self.residual) if v >= 0)

    @property
    def operators(self) -> str:
        return "+".join(n.op.name for n in self.nodes)

    @property
    def title(self) -> str:
        return self.anchor.name or f"{self.anchor.op.name}_{self.anchor.index}"


def normal(graph: Graph) -> Graph:
    """The graph as it is lowered. TFLite's tensors keep their layout.

    Raises: UnsupportedError naming every operator of a TFLite graph that ONNX has no words for.
    """
    graph = to_onnx(graph, keep_layout=True)
    found, _ = pipeline.run(graph, [p for p in pipeline.PASSES if p.name in PASSES])
    return found


def attributes(n: Node) -> Mapping[str, object]:
    return n.op.attributes if isinstance(n.op, OnnxOp) else {}


def opset(graph: Graph) -> int:
    """Of ONNX's own operators."""
    return max((v for d, v in graph.header.opsets if d in ("", "ai.onnx")), default=1) if graph.header else 1


def is_factor(c: float) -> bool:
    """Whether kernels have the number: one of float32, and no part of it lost."""
    return c == 0 or SMALLEST <= abs(c) <= LARGEST


def constant(graph: Graph, value: int) -> NDArray[np.generic] | None:
    if value < 0 or not graph.values[value].is_constant or graph.values[value].dtype.numpy is None:
        return None
    return graph.values[value].array()


def scalar(graph: Graph, value: int) -> float | None:
    found = constant(graph, value)
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 and found.dtype.kind in "fiu" else None


def limits(graph: Graph, n: Node) -> tuple[float, float] | None:
    """What a Clip clips to; None if that is computed."""
    own = attributes(n)
    found = []
    for i, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        v = n.inputs[i] if i < len(n.inputs) else -1
        number = own.get(name, default) if v < 0 else scalar(graph, v)
        if not isinstance(number, int | float):
            return None
        found.append(float(number))
    return found[0], found[1]


def activation(graph: Graph, n: Node) -> tuple[Activation, float] | None:
    """(activation, slope) that kernels have for a node; None for other operators, and for other numbers in them."""
    own = attributes(n)

    def is_(name: str, default: float, wanted: float) -> bool:
        found = own.get(name, default)
        return isinstance(found, int | float) and math.isclose(found, wanted, rel_tol=LIMIT)

    if isinstance(n.op, OnnxOp) and n.op.domain:
        return None
    plain: dict[str, Activation] = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "HardSwish": "hardswish"}
    match n.op.name:
        case "Relu" | "Sigmoid" | "Tanh" | "HardSwish":
            return plain[n.op.name], 0.01
        case "Clip":
            bounds = limits(graph, n)
            names: dict[tuple[float, float], Activation] = {(0.0, 6.0): "relu6", (0.0, math.inf): "relu"}
            return (names[bounds], 0.01) if bounds in names else None
        case "Swish" if is_("alpha", 1.0, 1.0):
            return "silu", 0.01
        case "HardSigmoid" if is_("alpha", 0.2, 1 / 6) and is_("beta", 0.5, 0.5):
            return "hardsigmoid", 0.01
        case "Gelu" if own.get("approximate", "none") in ("none", b"none"):
            return "gelu", 0.01
        case "LeakyRelu":
            slope = own.get("alpha", 0.01)
            return ("leaky", slope) if isinstance(slope, float) and is_factor(slope) else None
    return None


class _Looking:
    """A graph, and who reads what in it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def next(self, value: int) -> Node | None:
        """The only reader of a value that is no output, if it reads it once."""
        readers = self.graph.consumers.get(value, ())
        alone = len(readers) == 1 and value not in self.graph.outputs and readers[0].inputs.count(value) == 1
        return readers[0] if alone else None

    def maker(self, value: int, *names: str) -> Node | None:
        n = self.graph.producer.get(value)
        return n if n is not None and isinstance(n.op, OnnxOp) and not n.op.domain and n.op.name in names else None

    def factor(self, n: Node, value: int) -> float | None:
        """c where a node computes c times a value, by a number or through one."""
        if not is_own(n, "Mul", "Div") or self.shape(n.outputs[0]) != self.shape(value):
            return None
        at = n.inputs.index(value)
        number = scalar(self.graph, n.inputs[1 - at])
        if number is None or (n.op.name == "Div" and (at or not number)):
            return None
        c = number if n.op.name == "Mul" else 1 / number
        return c if is_factor(c) else None

    def scaled(self, value: int) -> tuple[int, float, list[Node]]:
        """(x, c, nodes) with value = c x, through products and quotients by numbers."""
        c, nodes = 1.0, []
        while (n := self.maker(value, "Mul", "Div")) is not None:
            found = next(((x, f) for x in n.inputs if (f := self.factor(n, x)) is not None), None)
            if found is None:
                break
            value, c = found[0], c * found[1]
            nodes.append(n)
        return value, c, nodes

    # groups

    def attention(self, last: Node) -> Group | None:
        """softmax(q k c + mask) v; the mask none, or that of causal attention."""
        if len(last.inputs) < 2:
            return None
        softmax = self.maker(last.inputs[0], "Softmax")
        if softmax is None or self.next(last.inputs[0]) is not last or attributes(softmax).get(
                "axis", -1 if opset(self.graph) >= 13 else 1) not in (-1, len(self.shape(softmax.inputs[0])) - 1):
            return None
        value, causal, inside = softmax.inputs[0], False, [softmax, last]
        if self.next(value) is None:
            return None
        mask = self.maker(value, "Add")
        if mask is not None:
            found = next(((x, constant(self.graph, m)) for x, m in (mask.inputs, mask.inputs[::-1])
                          if constant(self.graph, m) is not None), None)
            if found is None or found[1] is None or self.shape(found[0]) != self.shape(value) or not is_causal(
                    found[1], self.shape(value)):
                return None
            value, causal = found[0], True
            inside.append(mask)
        value, scale, nodes = self.scaled(value)
        inside += nodes
        product = self.maker(value, "MatMul")
        if product is None or any(self.next(n.outputs[0]) is None for n in (product, *nodes)):
            return None
        inside.append(product)
        (query, c, before), (key, d, under) = (self.scaled(v) for v in product.inputs)
        # a factor that somebody else reads, too, is computed anyway; here it is a number all the same
        inside += [n for n in (*before, *under) if self.next(n.outputs[0]) is not None]
        shapes = [self.shape(v) for v in (query, key, last.inputs[1])]
        if len({len(s) for s in shapes}) != 1 or len(shapes[0]) < 3 or len({s[:-2] for s in shapes}) != 1 or (
                not is_factor(scale * c * d)):
            return None
        nodes = sorted(inside, key=lambda n: n.index)
        return Group("attention", tuple(nodes), product, inputs=(query, key, last.inputs[1]), scale=scale * c * d,
                     causal=causal)

    def followed(self, kind: str, n: Node, taken: Collection[int]) -> Group:
        """A convolution or product with the factor, the sum and the activation behind it, as far as nobody has taken
        them."""
        nodes, value, bias, residual, scale = [n], n.outputs[0], -1, -1, 1.0
        has_bias = len(n.inputs) > 2 and n.inputs[2] >= 0
        rank = len(self.shape(n.outputs[0]))
        by_vector = is_own(n, "MatMul") and len(self.shape(n.inputs[1])) == 1  # there is one column, and no axis of it
        channel = 1 if kind == "convolution" else rank - 1 if not by_vector else rank
        acted: tuple[Activation, float] = ("none", 0.01)
        while (m := self.next(value)) is not None and m.index not in taken:
            if (found := activation(self.graph, m)) is not None:
                nodes.append(m)
                acted = found
                break
            if is_own(n, "MatMul") and bias < 0 and residual < 0 and (
                    c := self.factor(m, value)) is not None and is_factor(scale * c):
                nodes.append(m)
                scale *= c
                value = m.outputs[0]
                continue
            if not is_own(m, "Add") or residual >= 0 or attributes(m):
                break
            other = m.inputs[1] if m.inputs[0] == value else m.inputs[0]
            if self.shape(m.outputs[0]) != self.shape(value):
                break
            if not has_bias and bias < 0 and self._is_bias(channel, other, value):
                bias = other
            elif self.shape(other) == self.shape(value) and not self.graph.values[other].is_constant:
                residual = other
            else:
                break
            nodes.append(m)
            value = m.outputs[0]
        return Group(kind, tuple(nodes), n, bias, residual, *acted, scale=scale)

    def _is_bias(self, channel: int, other: int, value: int) -> bool:
        """Whether a value is a constant for each place along the axis `channel`."""
        found = constant(self.graph, other)
        if found is None or found.dtype != np.float32:
            return False
        shape = self.shape(value)
        wide = (1,) * (len(shape) - found.ndim) + found.shape
        return found.ndim <= len(shape) and all(
            a == (n if i == channel else 1) for i, (a, n) in enumerate(zip(wide, shape, strict=True)))


def is_causal(mask: NDArray[np.generic], shape: Sequence[int]) -> bool:
    """Whether a mask of scores lets each query see the keys up to its own, and nothing else."""
    queries, keys = shape[-2:]
    if queries != keys or mask.shape[-2:] != (queries, keys) or mask.size != queries * keys:
        return False
    square = mask.reshape(queries, keys).astype(np.float64)
    lower = np.tril(np.ones((queries, keys), bool))
    return bool((square[lower] == 0).all() and (square[~lower] <= MASKED).all())


def groups(graph: Graph, fuse_attention: bool = True) -> list[Group]:
    """Every node that outputs need, once, in the order in which the groups can be computed. Without `fuse_attention`
    attention stays products, sums and a softmax."""
    look = _Looking(graph)
    made: dict[int, Group] = {}  # by the last node
    taken: set[int] = set()

    def take(g: Group) -> None:
        made[g.nodes[-1].index] = g
        taken.update(n.index for n in g.nodes)

    for n in graph.nodes:
        if fuse_attention and is_own(n, "MatMul") and (found := look.attention(n)) is not None:
            take(found)
    for n in graph.nodes:
        if n.index in taken:
            continue
        kind = "convolution" if is_own(n, "Conv") else "product" if is_own(n, "Gemm", "MatMul") else ""
        group = look.followed(kind, n, taken) if kind else None
        # of two convolutions that are added, the later one takes the sum: the other is there by then
        while group is not None and group.residual >= 0 and not _ready(graph, group, made):
            group = _shorter(group)
        take(group if group is not None else Group("single", (n,), n))
    needed = set(graph.outputs)
    kept: list[Group] = []
    for i in sorted(made, reverse=True):
        g = made[i]
        if needed.intersection(v for n in g.nodes for v in n.outputs):
            kept.append(g)
            needed.update(g.reads)
    return kept[::-1]


def is_own(n: Node, *names: str) -> bool:
    return isinstance(n.op, OnnxOp) and not n.op.domain and n.op.name in names


def _ready(graph: Graph, group: Group, made: Mapping[int, Group]) -> bool:
    """Whether the residual is computed by nodes that are in no later group than this one: it is an input, or its group
    is formed."""
    maker = graph.producer.get(group.residual)
    return maker is None or any(maker in g.nodes for g in made.values())


def _shorter(group: Group) -> Group | None:
    """The group without its sum and what is behind it."""
    cut = next(i for i, n in enumerate(group.nodes) if group.residual in n.inputs and i)
    return Group(group.kind, group.nodes[:cut], group.anchor, group.bias, scale=group.scale)


def is_float(graph: Graph, value: int) -> bool:
    """float16 is what a Cast rounds to."""
    return graph.values[value].dtype in (DType.FLOAT32, DType.FLOAT16)
