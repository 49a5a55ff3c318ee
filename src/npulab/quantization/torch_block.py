"""A block of the integer network in PyTorch, with what may be learned of it free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.quantization.network import Layer, Network, Point
from npulab.quantization.ranges import params_of
from npulab.quantization.torch_ops import made, pytorch
from npulab.quantization.types import Array, Params

Tensor = Any
RATES = {"units": 0.02, "scales": 1e-3, "biases": 0.05, "steps": 1e-3, "zeros": 0.02}
"""Learning rates: of weights in steps of their integers, of logarithms of scales of weights and of activations, of
biases in steps of the results' integers, of zero points in integers."""


@dataclass(eq=False)
class Block:
    """Nodes with what they read of others, the results to be compared, and what is theirs: layers in integers, points,
    and of these the ones whose scale and zero point may change."""

    nodes: list[Node]
    inputs: list[int]
    results: list[int]
    layers: list[Layer]
    points: list[Point]
    learning: list[Point]


class Student:
    """The block as a function of batches, with integers as rounded floats. `free`: the tensors to be learned."""

    def __init__(self, net: Network, block: Block, rate: float = 1.0, quantized: bool = True) -> None:
        torch = pytorch()
        self.torch, self.net, self.block, self.rate, self.quantized = torch, net, block, rate, quantized
        self.calls = [made(net.graph, n) for n in block.nodes]
        self.constants = self._constants()
        self.learned: dict[tuple[str, int], Tensor] = {}
        self.fixed: dict[int, Tensor] = {}
        self.unit: dict[int, float] = {}
        if quantized:
            for layer in block.layers:
                self._free_layer(layer)
            for p in block.learning:
                self._free_point(p)
        self.free = list(self.learned.values())

    def _tensor(self, array: Array, free: bool = False) -> Tensor:
        return self.torch.from_numpy(np.array(array, np.float32)).requires_grad_(free)

    def _constants(self) -> dict[tuple[int, int], Tensor]:
        """By node and place: those of computed operators as integers show them."""
        found = {}
        values = self.net.graph.values
        weights = {(layer.node, 1) for layer in self.block.layers}
        for n in self.block.nodes:
            for i, v in enumerate(n.inputs):
                if v < 0 or not values[v].is_constant or (n.index, i) in weights or values[v].dtype.numpy is None:
                    continue
                array = np.asarray(values[v].array())
                if self.quantized and v in self.net.operands and self._in_integers(n):
                    p = self.net.operands[v] or params_of((float(array.min(initial=0)), float(array.max(initial=0))),
                                                          self.net.rules.activations[0])
                    array = p.seen(array)
                found[n.index, i] = self.torch.from_numpy(np.array(array))
        for layer in self.net.layers:  # those in floats, whose weights repairs may have changed
            if (layer.node, 1) in found:
                found[layer.node, 1] = self._tensor(layer.weight)
                if layer.bias is not None:
                    found[self._bias_place(layer)] = self._tensor(layer.bias)
        return found

    def _bias_place(self, layer: Layer) -> tuple[int, int]:
        """(node, input) that the bias is."""
        if layer.added < 0:
            return layer.node, 2
        return layer.added, list(self.net.graph.nodes[layer.added].inputs).index(layer.bias_value)

    def _in_integers(self, n: Node) -> bool:
        """Whether the writer makes integers of a node's constants: its result becomes some, maybe behind a clamp."""
        made_here = [n.outputs[0], *(r.outputs[0] for r in self.net.readers(n.outputs[0]) if r.op.name in ("Relu",
                                                                                                         "Clip"))]
        points = [self.net.of.get(v) for v in made_here]
        return any(p is not None and p.params is not None and p.scheme is not None for p in points)

    def _free_layer(self, layer: Layer) -> None:
        p = layer.params
        assert p is not None
        shape = p.along(layer.weight.ndim)
        zeros = p.zeros.reshape(shape)
        codes = (layer.codes if layer.codes is not None else p.codes(layer.weight)).astype(np.float32) - zeros
        wish = layer.weight / p.scales.reshape(shape)
        n = layer.node
        self.learned["units", n] = self._tensor(codes + np.clip(wish - codes, -0.25, 0.25), True)
        if not p.scheme.power_of_two:
            self.learned["scales", n] = self._tensor(np.zeros(p.scales.shape), True)
        point = self.net.of.get(layer.result)
        if layer.bias is not None or layer.kind != "matmul":
            bias = layer.bias if layer.bias is not None else np.zeros(layer.channels, np.float32)
            step = float(point.params.scales[0]) if point is not None and point.params is not None else \
                max(1e-6, float(np.abs(bias).mean()))
            self.learned["biases", n] = self._tensor(bias / step, True)
            self.unit[n] = step

    def _free_point(self, p: Point) -> None:
        assert p.params is not None
        key = id(p.params)  # those that share params learn the same ones
        if ("steps", key) not in self.learned:
            self.learned["steps", key] = self._tensor(np.zeros(()), True)
            if not p.params.scheme.symmetric:
                self.learned["zeros", key] = self._tensor(p.params.zeros[0], True)

    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer."""
        return [{"params": some, "lr": lr * self.rate} for kind, lr in RATES.items()
                if (some := [t for (k, _), t in self.learned.items() if k == kind])]

    def state(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.free]

    def restore(self, state: Sequence[Tensor]) -> None:
        with self.torch.no_grad():
            for t, s in zip(self.free, state, strict=True):
                t.copy_(s)

    def _rounded(self, x: Tensor) -> Tensor:
        """x rounded, with the gradient of x."""
        return x + (self.torch.round(x) - x).detach()

    def _scales(self, layer: Layer) -> Tensor:
        p = layer.params
        assert p is not None
        scales = self._tensor(p.scales)
        return scales * self.learned["scales", layer.node].exp() if ("scales", layer.node) in self.learned else scales

    def _weight(self, layer: Layer) -> Tensor:
        p = layer.params
        assert p is not None
        shape = p.along(layer.weight.ndim)
        zeros = self._tensor(p.zeros).reshape(shape)
        units = self._rounded(self.learned["units", layer.node])
        low, high = p.scheme.low - zeros, p.scheme.high - zeros
        return self.torch.minimum(self.torch.maximum(units, low), high) * self._scales(layer).reshape(shape)

    def _operands(self) -> dict[tuple[int, int], Tensor]:
        """Weights and biases by node and place."""
        found: dict[tuple[int, int], Tensor] = {}
        for layer in self.block.layers:
            if not self.quantized:
                found[layer.node, 1] = self._tensor(layer.weight)
                bias = None if layer.bias is None else self._tensor(layer.bias)
            else:
                found[layer.node, 1] = self._weight(layer)
                bias = self.learned.get(("biases", layer.node))
                bias = bias if bias is None else bias * self.unit[layer.node]
            if bias is not None:
                found[self._bias_place(layer)] = bias
        return found

    def _steps(self) -> dict[int, tuple[Tensor, Tensor, int, int]]:
        """By value: scale, zero point and limits of its integers."""
        found: dict[int, tuple[Tensor, Tensor, int, int]] = {}
        for p in self.block.points if self.quantized else ():
            assert p.params is not None
            scale, zero, key = self._tensor(p.params.scales[0]), self._tensor(p.params.zeros[0]), id(p.params)
            low, high = p.params.scheme.low, p.params.scheme.high
            if p in self.block.learning:
                scale = scale * self.learned["steps", key].exp()
                if ("zeros", key) in self.learned:
                    zero = self._rounded(self.torch.clamp(self.learned["zeros", key], low, high))
            found.update((v, (scale, zero, low, high)) for v in p.values)
        return found

    def __call__(self, inputs: Sequence[Tensor], masks: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        """Results of a batch (n, *shape). `masks`: by value, which elements of activations become integers."""
        operands = {**self.constants, **self._operands()}
        steps = self._steps()

        def one(read: Sequence[Tensor], keep: Mapping[int, Tensor]) -> list[Tensor]:
            now: dict[int, Tensor] = dict(zip(self.block.inputs, read, strict=True))
            for n, call in zip(self.block.nodes, self.calls, strict=True):
                places = max(len(n.inputs), 3 if (n.index, 2) in operands else 0)
                given = [operands[n.index, i] if (n.index, i) in operands else
                         now[n.inputs[i]] if n.inputs[i] >= 0 and n.inputs[i] in now else None for i in range(places)]
                out = call(*given)
                for v, t in zip(n.outputs, out if isinstance(out, tuple) else (out,), strict=True):
                    now[v] = self._shown(t, *steps[v], keep.get(v)) if v in steps else t
            return [now[v] for v in self.block.results]

        return list(self.torch.vmap(one)(list(inputs), dict(masks or {})))

    def _shown(self, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, keep: Tensor | None) -> Tensor:
        codes = self.torch.clamp(self._rounded(x / scale) + zero, low, high)
        shown = (codes - zero) * scale
        return shown if keep is None else self.torch.where(keep, shown, x)

    def masks(self, count: int, drop: float, rng: np.random.Generator) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Which elements become integers in a batch: of the inputs, and by value of the block's activations."""
        values = self.net.graph.values

        def mask(v: int) -> Tensor:
            return self.torch.from_numpy(rng.random((count, *values[v].shape), np.float32) >= drop)

        made_here = {o for n in self.block.nodes for o in n.outputs}
        inner = [v for p in self.block.points for v in p.values if v in made_here]
        return [mask(v) for v in self.block.inputs], {v: mask(v) for v in inner}

    def layer(self, layer: Layer) -> tuple[Params, Array, Array | None]:
        """Params, codes and bias as learned."""
        p = layer.params
        assert p is not None
        with self.torch.no_grad():
            scales = self._scales(layer).numpy().astype(np.float32)
            units = self.torch.round(self.learned["units", layer.node]).numpy()
            bias = self.learned.get(("biases", layer.node))
            bias = None if bias is None else (bias * self.unit[layer.node]).numpy().astype(np.float32)
        codes = np.clip(units + p.zeros.reshape(p.along(units.ndim)), p.scheme.low, p.scheme.high)
        if layer.bias is None and bias is not None and not bias.any():
            bias = None
        return Params(p.scheme, scales, p.zeros, p.axis), codes.astype(p.scheme.holder), bias

    def point(self, p: Point) -> Params:
        """Scale and zero point as learned."""
        assert p.params is not None
        key = id(p.params)
        with self.torch.no_grad():
            scale = float(p.params.scales[0] * self.learned["steps", key].exp())
            zeros = p.params.zeros
            if ("zeros", key) in self.learned:
                kept = float(self.learned["zeros", key].round())
                zeros = np.array([np.clip(kept, p.params.scheme.low, p.params.scheme.high)], np.int32)
        return Params(p.params.scheme, np.array([scale], np.float32), zeros)
