"""The float network cut between its operators, so that a tensor can be replaced without computing what precedes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from npulab.quantization.emit import float_model
from npulab.quantization.network import Layer, Network
from npulab.quantization.parts import reads_of
from npulab.quantization.session import runner
from npulab.quantization.types import F32, Array, Feeds

if TYPE_CHECKING:
    import onnx

Job = Callable[[Feeds], list[Array]]


class Cuts:
    """A cut is behind an operator, by its number; -1 is in front of all. `outputs`: values that count as the network's
    outputs; none: its own."""

    def __init__(self, net: Network, outputs: Sequence[int] = ()) -> None:
        import onnx

        self.net = net
        self.proto = onnx.ModelProto.FromString(float_model(net))
        self.nodes = list(self.proto.graph.node)
        self.constants = {t.name: t for t in self.proto.graph.initializer}
        self.born = {name: i for i, n in enumerate(self.nodes) for name in n.output if name}
        self.born |= {i.name: -1 for i in self.proto.graph.input if i.name not in self.constants}
        self.read: dict[str, int] = {}  # a tensor -> the last operator that reads it
        for i, n in enumerate(self.nodes):
            self.read.update((name, i) for name in reads_of(n) if name in self.born)
        self.read |= {net.name(v): len(self.nodes) for v in (outputs or net.graph.outputs)}
        self.held = dict(self.read)  # the same, layers' data until their results are there
        for layer in net.layers:
            name = net.name(layer.data)
            self.held[name] = max(self.held.get(name, -1), self.position(layer.result))

    def position(self, value: int) -> int:
        """The operator that makes a value; -1: an input."""
        made = self.net.graph.producer.get(value)
        return -1 if made is None else made.index

    def live(self, cut: int, used: Mapping[str, int]) -> list[str]:
        """Tensors that are there and still wanted."""
        return sorted(name for name, born in self.born.items() if born <= cut < used.get(name, -1))

    def whole(self, have: Feeds, ends: Sequence[str]) -> Job:
        """From inputs to outputs."""
        return self.rest(-1, have, ends)

    def rest(self, cut: int, have: Feeds, ends: Sequence[str]) -> Job:
        """From the tensors in the cut to the outputs. `have`: such tensors, for their types and sizes."""
        names = self.live(cut, self.read)
        run = runner(self._model(self.nodes[cut + 1 :], {n: have[n] for n in names}, ends), ends)
        return lambda feeds: run({n: feeds[n] for n in names})

    def segment(self, front: int, cut: int, have: Feeds, layers: Mapping[int, tuple[Layer, F32]], value: int
                ) -> tuple[Job, list[str]]:
        """From the tensors in the cut `front` to those in `cut`, whose names come along, and behind these the value as
        it is with each of the other weights, in their order. `value` itself is always among the tensors."""
        wanted = sorted({*self.live(cut, self.held), self.net.name(value)})
        copies: list[onnx.NodeProto] = []
        constants: list[onnx.TensorProto] = []
        ends = [self._copied(layer, f"{bits}", weight, copies, constants) for bits, (layer, weight) in layers.items()]
        names = sorted(have)
        nodes = [*self.nodes[front + 1 : cut + 1], *copies]
        run = runner(self._model(nodes, {n: have[n] for n in names}, [*wanted, *ends], constants), [*wanted, *ends])
        return (lambda feeds: run({n: feeds[n] for n in names})), wanted

    def _copied(self, layer: Layer, mark: str, weight: F32, nodes: list[onnx.NodeProto],
                constants: list[onnx.TensorProto]) -> str:
        """The layer once more, with its added bias and its clamp, and other weights; the name of its result."""
        import onnx
        from onnx import numpy_helper

        chain = sorted({layer.node, self.position(layer.linear), self.position(layer.result)})
        renamed: dict[str, str] = {}
        for i in chain:
            node = onnx.NodeProto()
            node.CopyFrom(self.nodes[i])
            node.name = f"{node.name}\t{mark}"  # a tab: no other name has one
            for k, name in enumerate(node.input):
                node.input[k] = renamed.get(name, name)
            for k, name in enumerate(node.output):
                renamed[name] = node.output[k] = f"{name}\t{mark}"
            if i == layer.node:
                node.input[1] = f"{layer.name}\t{mark} weights"
                constants.append(numpy_helper.from_array(weight, node.input[1]))
            nodes.append(node)
        return renamed[self.net.name(layer.result)]

    def _model(self, nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Array], outputs: Sequence[str],
               constants: Sequence[onnx.TensorProto] = ()) -> bytes:
        """The file of these operators, as far as the outputs need them."""
        from onnx import helper

        needed, kept = set(outputs), []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(reads_of(node))
        graph = helper.make_graph(
            kept[::-1], "cut",
            [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
             for name, a in inputs.items()], [],
            [*(t for name, t in self.constants.items() if name in needed), *constants])
        model = helper.make_model(graph, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)
        return bytes(model.SerializeToString())
