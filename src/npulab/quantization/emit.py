"""Networks written: the float network with the weights that it has now, and the integer one between Q and DQ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from npulab.errors import UnsupportedError
from npulab.exporters.onnx import to_thin, to_view
from npulab.importers.onnx_parts import LARGE, Thin
from npulab.ir.types import packed as packed_bits
from npulab.program.pages import Buffer, content_of, let_go
from npulab.quantization.network import Layer, Network
from npulab.quantization.ranges import params_of
from npulab.quantization.types import Array, Params

if TYPE_CHECKING:
    import onnx

PER_CHANNEL_OPSET = 13
"""From which QuantizeLinear and DequantizeLinear have `axis`; from 21 on they take 16, from 25 on 2 bits (ONNX)."""
OPSETS = {16: 21, 4: 21, 2: 25}


def float_model(net: Network, changed: bool = True) -> Buffer:
    """The ONNX file of the float network, with the layers' weights and biases as they are now."""
    if not changed:
        return to_view(net.graph, shapes=False)
    model = _thin(net)
    for layer in net.layers:
        _replace_weights(model, net, layer, layer.weight)
    return model.file()


def _thin(net: Network) -> Thin:
    """The network's file without the layers' weights. Constants that were inputs, too, as before ONNX's IR 4, are not
    any more: what becomes of them is no caller's to replace."""
    model = to_thin(net.graph, shapes=False, without=own_weights(net))
    computed = {net.name(v) for v in net.graph.inputs}
    graph = model.proto.graph
    inputs = [i for i in graph.input if i.name in computed]
    del graph.input[:]
    graph.input.extend(inputs)
    return model


def own_weights(net: Network) -> set[int]:
    """Constants that nothing but layers read, as weights: what is written has the layers' own instead."""
    layers = {layer.node for layer in net.layers}
    found = {layer.weight_value for layer in net.layers} - set(net.graph.outputs)
    return {v for v in found if all(n.index in layers and [i for i, u in enumerate(n.inputs) if u == v] == [1]
                                    for n in net.readers(v))}


def _replace_weights(model: Thin, net: Network, layer: Layer, weight: Array) -> None:
    """The layer's own initializers instead of those that it had, which others may read too."""
    node = model.proto.graph.node[layer.node]
    node.input[1] = _initializer(model, f"{layer.name}_weight", weight)
    if layer.bias is not None and layer.added < 0:
        name = _initializer(model, f"{layer.name}_bias", layer.bias)
        if len(node.input) > 2:
            node.input[2] = name
        else:
            node.input.append(name)
    elif layer.bias is not None:
        adder = model.proto.graph.node[layer.added]
        old = net.name(layer.bias_value)
        name = _initializer(model, f"{layer.name}_bias", layer.bias)
        for i, n in enumerate(adder.input):
            if n == old:
                adder.input[i] = name


def _initializer(model: Thin, name: str, array: Array) -> str:
    """A new constant; names of layers are their nodes' own, so that no other constant has this one."""
    model.constant(f"{name}_now", array)
    return f"{name}_now"


def integer_model(net: Network, integer_ends: bool = False, packed: bool = False) -> Buffer:
    """The ONNX file with QuantizeLinear and DequantizeLinear around what is computed in integers.

    Biases of integer layers are 32-bit sums in the scale of the products. Opset 13, 21 where 16 or 4 bits need it.
    `integer_ends`: inputs and outputs that are quantized come and go as integers. `packed`: weights of 4 and 2 bits as
    such; without they have 8 bits and the same numbers, which ONNX Runtime has more kernels for.
    """
    return _Writer(net, integer_ends, packed).model()


def shown_model(net: Network) -> tuple[Buffer, dict[str, str]]:
    """The same, and under which name the model has each quantized tensor as its integers show it."""
    writer = _Writer(net, False, False)
    return writer.model(), writer.seen


class _Writer:
    def __init__(self, net: Network, integer_ends: bool, packed: bool) -> None:
        self.net = net
        self.integer_ends, self.packed = integer_ends, packed
        self.thin = _thin(net)
        self.proto = self.thin.proto
        self.nodes = list(self.proto.graph.node)
        del self.proto.graph.node[:]
        self.seen: dict[str, str] = {}  # a tensor's name -> the name of what its integers show
        self.names = {v.name for v in net.graph.values} | {n.name for n in self.nodes}
        self.bits = {16 for p in net.points if p.scheme and p.scheme.bits == 16}
        self.bits |= {layer.scheme.bits for layer in net.layers if layer.scheme and (packed or layer.scheme.bits == 16)}
        self.constants: dict[tuple[object, ...], tuple[str, str]] = {}

    def model(self) -> Buffer:
        net, graph = self.net, self.net.graph
        outputs = {graph.values[v].name for v in graph.outputs}
        for v in graph.inputs:
            self._point(v, outputs)
        layers = {layer.node: layer for layer in net.layers}
        adders = {layer.added: layer for layer in net.layers if layer.added >= 0}
        for n, node in zip(graph.nodes, self.nodes, strict=True):
            layer = layers.get(n.index)
            for i, name in enumerate(node.input):
                if name in self.seen:
                    node.input[i] = self.seen[name]
            if layer is not None:
                self._layer(layer, node)
            elif n.index in adders:
                self._bias_of(adders[n.index], node)
            else:
                for i, v in enumerate(n.inputs):
                    if v in net.operands and self._runs_in_integers(n.outputs[0]):
                        node.input[i] = self._operand(v)
            renamed = [self._inner_name(name) if self._is_point(v) and name in outputs else name
                       for v, name in zip(n.outputs, node.output, strict=True)]
            originals = list(node.output)
            del node.output[:]
            node.output.extend(renamed)
            self.proto.graph.node.append(node)
            for v, made, name in zip(n.outputs, renamed, originals, strict=True):
                if self._is_point(v):
                    self._pair(v, made, name)
        self._tidy()
        self._opset()
        return self.thin.file()

    def _is_point(self, v: int) -> bool:
        return v >= 0 and v in self.net.of and self.net.of[v].params is not None and self.net.of[v].scheme is not None

    def _runs_in_integers(self, out: int) -> bool:
        """Whether the result becomes integers, maybe behind a clamp."""
        if self._is_point(out):
            return True
        return any(self._is_point(n.outputs[0]) for n in self.net.readers(out) if n.op.name in ("Relu", "Clip"))

    def _inner_name(self, name: str) -> str:
        found = f"{name}_float"
        while found in self.names:
            found += "_"
        self.names.add(found)
        return found

    def _point(self, v: int, outputs: set[str]) -> None:
        """A graph input as its integers show it."""
        if self._is_point(v):
            name = self.net.name(v)
            self._pair(v, name, name)

    def _pair(self, v: int, made: str, name: str) -> None:
        """QuantizeLinear and DequantizeLinear behind the tensor `made`; if an output of the graph has `name`, then what
        comes out of the pair."""
        from onnx import helper

        params = self.net.of[v].params
        assert params is not None
        scale, zero = self._parameters(name, params)
        ends = self.proto.graph.input if v in self.net.graph.inputs else self.proto.graph.output
        end = next((e for e in ends if e.name == name), None) if self.integer_ends else None
        if end is not None:
            end.type.tensor_type.elem_type = _onnx_type(params.scheme.dtype)
        codes = name if end is not None else self._unused(f"{name}_quantized")
        shown = name if made != name and end is None else self._unused(f"{name}_dequantized")
        if end is None or made != name:
            self.proto.graph.node.append(helper.make_node("QuantizeLinear", [made, scale, zero], [codes],
                                                          self._unused(f"{name}_Q")))
        self.proto.graph.node.append(helper.make_node("DequantizeLinear", [codes, scale, zero], [shown],
                                                      self._unused(f"{name}_DQ")))
        self.seen[name] = shown

    def _unused(self, name: str) -> str:
        found, k = name, 1
        while found in self.names:
            k += 1
            found = f"{name}_{k}"
        self.names.add(found)
        return found

    def _parameters(self, name: str, p: Params) -> tuple[str, str]:
        """Scale and zero point as constants; equal ones are there once."""
        one = p.axis is None
        key = (p.scheme.dtype, one, p.scales.tobytes(), p.zeros.tobytes())
        if key not in self.constants:
            scale = self._constant(f"{name}_scale", p.scales.reshape(()) if one else p.scales)
            zeros = p.zeros.astype(p.scheme.holder)
            self.constants[key] = scale, self._constant(f"{name}_zero_point", zeros.reshape(()) if one else zeros, p)
        return self.constants[key]

    def _constant(self, name: str, array: Array, p: Params | None = None) -> str:
        """A constant under a name of its own; its integers those of `p`, if told."""
        found = self._unused(name)
        if p is not None and self._is_packed(p):
            self.thin.packed(found, array.shape, _onnx_type(p.scheme.dtype), packed_bits(array, p.scheme.bits))
        else:
            self.thin.constant(found, array)
        return found

    def _is_packed(self, p: Params) -> bool:
        return self.packed and p.scheme.bits in (2, 4)

    def _dequantized(self, name: str, real: Array, codes: Array | None, p: Params, scale: str, zero: str) -> str:
        """`codes`: of the constant `real`; None: rounded to the nearest, once they are written."""
        from onnx import helper

        def made() -> memoryview:
            found = codes_of()
            let_go(real)
            return memoryview(packed_bits(found, p.scheme.bits)) if small else content_of(found)

        def codes_of() -> Array:
            return p.codes(real) if codes is None else codes

        small = self._is_packed(p)
        size = -(-real.size * p.scheme.bits // 8)
        if size < LARGE:
            kept = self._constant(f"{name}_quantized", codes_of(), p)
            let_go(real)
        else:
            kept = self._unused(f"{name}_quantized")
            dtype = helper.np_dtype_to_tensor_dtype(p.scheme.holder)
            self.thin.later(kept, real.shape, _onnx_type(p.scheme.dtype) if small else int(dtype),
                            size if small else real.size * p.scheme.holder.itemsize, made)
        out = self._unused(f"{name}_dequantized")
        node = helper.make_node("DequantizeLinear", [kept, scale, zero], [out], self._unused(f"{name}_DQ"))
        if p.axis is not None:
            node.attribute.append(helper.make_attribute("axis", p.axis))
        self.proto.graph.node.append(node)
        return out

    def _layer(self, layer: Layer, node: onnx.NodeProto) -> None:
        if layer.scheme is None or layer.params is None:
            node.input[1] = self._constant(f"{layer.name}_weight", layer.weight)
        else:
            scale, zero = self._parameters(f"{layer.name}_weight", layer.params)
            node.input[1] = self._dequantized(f"{layer.name}_weight", layer.weight, layer.codes, layer.params, scale,
                                              zero)
        if layer.bias is not None and layer.added < 0:
            name = self._bias(layer)
            if len(node.input) > 2:
                node.input[2] = name
            else:
                node.input.append(name)

    def _bias_of(self, layer: Layer, node: onnx.NodeProto) -> None:
        old = self.net.name(layer.bias_value)
        name = self._bias(layer)
        for i, n in enumerate(node.input):
            if n == old:
                node.input[i] = name

    def _bias(self, layer: Layer) -> str:
        """The bias as integers in the products' scale if the layer is computed in integers; else in floats."""
        assert layer.bias is not None
        data = self.net.of.get(layer.data)
        if layer.scheme is None or layer.params is None or data is None or data.params is None or data.scheme is None:
            return self._constant(f"{layer.name}_bias", layer.bias)
        p = bias_params(layer, data.params)
        scale = self._constant(f"{layer.name}_bias_scale", p.scales if p.axis is not None else p.scales.reshape(()))
        zeros = np.zeros(p.scales.shape if p.axis is not None else (), np.int32)
        zero = self._constant(f"{layer.name}_bias_zero_point", zeros)
        codes = self._constant(f"{layer.name}_bias_quantized", bias_codes(layer.bias, p))
        from onnx import helper

        out = self._unused(f"{layer.name}_bias_dequantized")
        node = helper.make_node("DequantizeLinear", [codes, scale, zero], [out], self._unused(f"{layer.name}_bias_DQ"))
        if p.axis is not None:
            node.attribute.append(helper.make_attribute("axis", 0))
        self.proto.graph.node.append(node)
        return out

    def _operand(self, v: int) -> str:
        """A constant beside tensors, quantized like an activation."""
        name = self.net.name(v)
        if name not in self.seen:
            array = np.asarray(self.net.graph.values[v].array(), np.float32)
            p = self.net.operands[v] or params_of((float(array.min(initial=0)), float(array.max(initial=0))),
                                                  self.net.rules.activations[0])
            scale, zero = self._parameters(name, p)
            self.seen[name] = self._dequantized(name, array, None, p, scale, zero)
        return self.seen[name]

    def _tidy(self) -> None:
        """Constants that nothing reads any more."""
        used = {i for n in self.proto.graph.node for i in n.input} | {o.name for o in self.proto.graph.output}
        kept = [t for t in self.proto.graph.initializer if t.name in used]
        del self.proto.graph.initializer[:]
        self.proto.graph.initializer.extend(kept)

    def _opset(self) -> None:
        wanted = max([PER_CHANNEL_OPSET, *(OPSETS[b] for b in self.bits if b in OPSETS)])
        own = next((o for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), None)
        assert own is not None
        if own.version >= wanted:
            return
        from onnx import version_converter

        try:
            self.thin.proto = version_converter.convert_version(self.proto, wanted)
        except Exception as e:  # the converter is C++
            raise UnsupportedError(f"'{self.net.graph.name}' is of opset {own.version} and cannot be written as of "
                                   f"{wanted}", got=str(e).strip()[:200]) from None


def _onnx_type(dtype: str) -> int:
    import onnx

    return int(onnx.TensorProto.DataType.Value(dtype.upper()))


def bias_params(layer: Layer, data: Params) -> Params:
    """Scales of a layer's sums: input scale * weight scale, as float32."""
    assert layer.params is not None
    scales = (data.scales[0].astype(np.float64) * layer.params.scales.astype(np.float64)).astype(np.float32)
    return Params(layer.params.scheme, scales, np.zeros(scales.size, np.int32), 0 if scales.size > 1 else None)


def bias_codes(bias: Array, p: Params) -> Array:
    steps = np.rint(bias.astype(np.float64) / p.scales.astype(np.float64))
    return np.clip(steps, -(2**31) + 1, 2**31 - 1).astype(np.int32)
