"""A quantized network computed layer by layer for all samples at once, so that a layer may be changed before the next
one sees what it gives. Between layers the tensors of all samples wait, as integers where they are integers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from npulab.errors import UsageError
from npulab.quantization.chains import Floats, channel_axis
from npulab.quantization.emit import bias_codes, bias_params, integer_model
from npulab.quantization.network import Layer, Network
from npulab.quantization.session import Progress, in_order, runner
from npulab.quantization.types import Array, Feeds, ListedSamples, Samples

Kept = dict[str, Array]
Visit = Callable[[Layer, Floats], None]
"""Called with a layer and its results' means by sample and channel (samples, channels); may change the layer's bias."""


def sequential(net: Network, layers: Sequence[Layer], samples: Samples, visit: Visit, most: int, cache: int,
               progress: Progress | None = None) -> int:
    """Visit the layers in the order in which they are computed, each behind those that were visited, as they are then.

    most    samples taken.    cache  bytes of waiting tensors; samples are dropped, the last first, where all need more.
    Gives the number of samples that all visits saw. Raises: UsageError without samples.
    """
    plan = _Plan(net, layers)
    kept: list[Kept] = [{k: np.array(v) for k, v in feeds.items()} for feeds in islice(samples, most)]
    if not kept:
        raise UsageError("there are no samples to correct biases with", got=samples.origin)
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        for number, layer in enumerate(plan.order):
            means = []
            work = plan.stage(number, kept[0])
            for i, (one, mean) in enumerate(in_order(pool, work, ListedSamples(kept), 3)):
                kept[i] = one
                means.append(mean)
                if (i + 2) * sum(a.nbytes for a in one.values()) > cache:
                    del kept[i + 1:]
                    break
            visit(layer, np.stack(means))
            plan.write_bias(layer)
            if progress:
                progress(number + 1, len(plan.order))
    return len(kept)


class _Plan:
    """The integer network's file, and where it is cut: in front of what gives each layer's result before the clamp."""

    def __init__(self, net: Network, layers: Sequence[Layer]) -> None:
        import onnx

        self.net = net
        self.proto = onnx.ModelProto.FromString(integer_model(net))
        self.nodes = list(self.proto.graph.node)
        self.constants = {t.name: t for t in self.proto.graph.initializer}
        self.producer = {name: i for i, n in enumerate(self.nodes) for name in n.output if name}
        self.constant_nodes: set[int] = set()
        for i, n in enumerate(self.nodes):
            if all(self._is_constant(name) for name in n.input):
                self.constant_nodes.add(i)
        self.linear = {layer.node: self._float_of(net.name(layer.linear)) for layer in layers}
        self.order = sorted(layers, key=lambda layer: self.producer[self.linear[layer.node]])

    def _is_constant(self, name: str) -> bool:
        return not name or name in self.constants or self.producer.get(name, -1) in self.constant_nodes

    def _float_of(self, name: str) -> str:
        """A tensor before its integers: an output of the graph has its name behind them."""
        made = self.nodes[self.producer[name]]
        if made.op_type == "DequantizeLinear":
            made = self.nodes[self.producer[made.input[0]]]
            return str(made.input[0])
        if made.op_type == "QuantizeLinear":
            return str(made.input[0])
        return name

    def _kept_as(self, name: str) -> str:
        """The integers that a tensor is made of, else the tensor."""
        i = self.producer.get(name)
        return str(self.nodes[i].input[0]) if i is not None and self.nodes[i].op_type == "DequantizeLinear" else name

    def live(self, number: int) -> list[str]:
        """What must be there for layer `number` of the order, and those behind it, to be computed."""
        cut = self.producer[self.linear[self.order[number].node]]
        found: dict[str, None] = {}
        done: set[str] = set()
        stack = [self.linear[layer.node] for layer in self.order[number:]]
        while stack:
            name = stack.pop()
            if name in done or self._is_constant(name):
                continue
            done.add(name)
            i = self.producer.get(name, -1)
            if i < cut:
                found[self._kept_as(name)] = None
            else:
                stack += self.nodes[i].input
        return sorted(found)

    def stage(self, number: int, have: Kept) -> Callable[[Feeds], tuple[Kept, Floats]]:
        """What takes a sample's tensors to those that layer `number` needs, and the layer's means by channel."""
        layer = self.order[number]
        linear = self.linear[layer.node]
        wanted = self.live(number)
        new = [name for name in wanted if name not in have]
        model, inputs = self._cut([*new, linear], have)
        run = runner(model, [*new, linear])
        axis = channel_axis(layer, len(self.net.graph.values[layer.linear].shape))

        def work(one: Feeds) -> tuple[Kept, Floats]:
            *made, result = run({name: one[name] for name in inputs})
            others = tuple(i for i in range(result.ndim) if i != axis)
            kept = {name: one[name] for name in wanted if name in one} | dict(zip(new, made, strict=True))
            return kept, np.asarray(result.mean(axis=others, dtype=np.float64))

        return work

    def _cut(self, outputs: Sequence[str], have: Kept) -> tuple[bytes, list[str]]:
        """The file of the nodes between, and the tensors that it reads."""
        from onnx import helper

        nodes: set[int] = set()
        inputs: set[str] = set()
        constants: set[str] = set()
        stack, done = list(outputs), set[str]()
        while stack:
            name = stack.pop()
            if name in done or not name:
                continue
            done.add(name)
            if name in have:
                inputs.add(name)
            elif name in self.constants:
                constants.add(name)
            else:
                nodes.add(self.producer[name])
                stack += self.nodes[self.producer[name]].input
        graph = helper.make_graph(
            [self.nodes[i] for i in sorted(nodes)], "stage",
            [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(have[name].dtype), have[name].shape)
             for name in sorted(inputs)], [], [self.constants[name] for name in sorted(constants)])
        model = helper.make_model(graph, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)
        return model.SerializeToString(), sorted(inputs)

    def write_bias(self, layer: Layer) -> None:
        """The layer's bias as it is now, into the file."""
        from onnx import numpy_helper

        assert layer.bias is not None
        node = self.nodes[self.producer[self.linear[layer.node]]]
        name = str(next(n for n in node.input if self._is_constant(n)) if layer.added >= 0 else node.input[2])
        made = self.producer.get(name)
        array: Array = layer.bias
        if made is not None:
            name = str(self.nodes[made].input[0])
            data = self.net.of[layer.data].params
            assert data is not None
            array = bias_codes(layer.bias, bias_params(layer, data))
        self.constants[name] = numpy_helper.from_array(array, name)
