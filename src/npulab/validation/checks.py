"""Every rule of a target, checked on the finished file. Shares only the record of rules with npulab.quantization.

What is checked of float operators that may stay: their constants, where these are integers, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from npulab.ir import Graph, Value
from npulab.quantization.types import Rules, Scheme
from npulab.targets.facts.board import find_board
from npulab.targets.facts.quantization import board_of, entry_of, rules_of
from npulab.validation.view import FLOATS, INTEGERS, MARKS, PLAIN, Layer, Stored, View, view
from npulab.validation.view import label as node_label

CLOSE = 1e-6
"""Of scales that are to be equal, relative: float32 products and quotients are this exact."""
ASSUMED = "assumed: nothing published says so"
MIXED_TYPES = ("QuantizeLinear", "DequantizeLinear", *PLAIN, "Gather", "Where", "LSTM", "If", "Loop")
"""Operators whose operands and results may differ in type."""
RESCALED_UINT8 = ("Concat",)
"""Operators that LiteRT's kernels rescale where data is uint8."""
SHOWN = 80
"""Characters of a tensor's name."""


@dataclass(frozen=True, slots=True)
class Violation:
    """What a target does not take. `rule`: one sentence; `source`: where it is published, or that it is assumed.

    kind  "integers": how tensors are stored and summed; "operators": what the target has no operator for, which no
          other integers change: floats that may not stay, and what a board's list refuses.
    """

    where: str
    rule: str
    found: str
    allowed: str
    source: str
    kind: Literal["integers", "operators"] = "integers"

    def __str__(self) -> str:
        return f"{self.where}: {self.rule} found {self.found}, allowed {self.allowed} ({self.source})"


def violations(graph: Graph, rules: Rules | str) -> list[Violation]:
    """Everything about a finished network that a target does not take, in the order of its operators.

    `graph` is TFLite's, or ONNX with QuantizeLinear and DequantizeLinear; `rules` may be a name (`rules_of`). Of a
    described board, what its operator rules refuse is among them.

    Raises: UsageError for a name that does not exist; ModelError for constants that are damaged.
    """
    rules = rules_of(rules) if isinstance(rules, str) else rules
    with np.errstate(all="ignore"):  # scales of 0 are violations, and what follows from them too
        return [*_Checks(graph, rules).all(), *_refused(graph, rules)]


Faults = Iterator[tuple[str, str, str]]
"""(rule, found, allowed)."""


class _Checks:
    """One network against one target's rules."""

    def __init__(self, graph: Graph, rules: Rules) -> None:
        self.graph = graph
        self.rules = rules
        self.concat_ratio = entry_of(rules.name).concat_ratio_max if board_of(rules.name) else None
        self.seen: set[int] = set()

    def all(self) -> Iterator[Violation]:
        if self.graph.format != self.rules.file:
            yield self._of("file", "the file", "The target's tools read one format.", self.graph.format,
                           self.rules.file)
        seen: View = view(self.graph)
        for layer in seen.layers:
            yield from self._unmarked(layer)
            yield from self._floats(layer, seen)
            for tensor in (*layer.data, *layer.results):
                if layer.node.index not in seen.ends or not self._outer(tensor):
                    yield from self._activation(tensor, layer)
            yield from self._types(layer)
            if layer.weights is not None:
                yield from self._weights(layer)
                yield from self._bias(layer)
                yield from self._sums(layer)
            yield from self._prescribed(layer)
            yield from self._one_scale(layer)
            yield from self._joined(layer)

    def _of(self, field: str, where: str, rule: str, found: object, allowed: object) -> Violation:
        return Violation(where, rule, str(found), str(allowed), self.rules.sources.get(field, ASSUMED))

    # operators

    def _unmarked(self, layer: Layer) -> Iterator[Violation]:
        """ONNX's operators on integers have parameters of their own, which no check here reads."""
        name = layer.op.rpartition(":")[2]
        if self.graph.format == "onnx" and (name.startswith("QLinear") or name.endswith("Integer")):
            yield self._of("file", layer.label, "Integers are marked by QuantizeLinear and DequantizeLinear.", layer.op,
                           "the float operator between such marks")

    def _floats(self, layer: Layer, seen: View) -> Iterator[Violation]:
        if layer.floats and not self.rules.float_islands and layer.node.index not in seen.ends:
            yield replace(self._of("float_islands", layer.label, "No operator computes on floats.", "floats",
                                   "integers only"), kind="operators")

    def _types(self, layer: Layer) -> Iterator[Violation]:
        found = {s.dtype for s in (*layer.data, *layer.results) if isinstance(s, Stored) and s.dtype in INTEGERS}
        if self.rules.file == "tflite" and len(found) > 1 and layer.op not in MIXED_TYPES \
                and not layer.op.startswith("tflite:"):
            yield self._of("activations", layer.label, "Operands and results have one element type.",
                           " and ".join(sorted(found)), "one type")

    # tensors

    def _outer(self, s: Stored | Value) -> bool:
        """Whether a tensor is handed to the network, or by it, and has a type that its user wants."""
        i = (s.value if isinstance(s, Stored) else s).index
        return i in self.graph.outputs or (i in self.graph.inputs and len(self.graph.consumers.get(i, ())) == 1)

    def _activation(self, s: Stored | Value, layer: Layer) -> Iterator[Violation]:
        v = s.value if isinstance(s, Stored) else s
        if v.index in self.seen:
            return
        self.seen.add(v.index)
        if isinstance(s, Value):
            if s.dtype.value in ("int8", "uint8", "int16", "uint16", "int4", "uint4", "int2") \
                    and layer.op not in (*PLAIN, "Gather", "Where", "DequantizeLinear") and self.rules.file == "tflite":
                yield self._of("activations", _named(s.name), "Integers have a positive, finite scale.", "none",
                               "a scale")
            return
        if s.dtype not in INTEGERS:
            return
        for rule, found, allowed in self._fitting(s, self.rules.activations, None, "Data"):
            yield self._of("activations", _named(s.name), rule, found, allowed)

    def _weights(self, layer: Layer) -> Iterator[Violation]:
        w = layer.weights
        depthwise = layer.op == "DepthwiseConv" and self.rules.depthwise_weights
        field = "depthwise_weights" if depthwise else "weights"
        if isinstance(w, Value):
            if w.dtype.value in INTEGERS:
                yield self._of(field, _named(w.name), "Integers have a positive, finite scale.", "none", "a scale")
            elif not layer.floats and any(isinstance(s, Stored) for s in layer.data) and not (
                    self.graph.format == "onnx" and self.rules.float_islands):  # between marks that is a float operator
                yield self._of(field, _named(w.name), "An operator on integers has weights of integers.",
                               w.dtype.value, _listed(self._schemes(layer)))
            return
        assert w is not None
        if layer.floats and self.rules.file == "tflite":
            yield self._of(field, layer.label, "An operator that has weights of integers has data of integers.",
                           "floats", _listed(self.rules.activations))
        for rule, found, allowed in self._fitting(w, self._schemes(layer), layer.channel, "Weights"):
            yield self._of(field, _named(w.name), rule, found, allowed)

    def _schemes(self, layer: Layer) -> tuple[Scheme, ...]:
        return self.rules.depthwise_weights if layer.op == "DepthwiseConv" and self.rules.depthwise_weights \
            else self.rules.weights

    def _fitting(self, s: Stored, allowed: tuple[Scheme, ...], channel: int | None, what: str) -> Faults:
        """What keeps a tensor from every scheme: the faults against the one that it comes closest to."""
        same = [a for a in allowed if a.dtype == s.dtype]
        if not same:
            yield f"{what} are of these element types.", s.dtype, _listed(allowed)
            return
        low, high = s.range
        if (odd := s.scales[~(s.scales > 0) | ~np.isfinite(s.scales)]).size:
            yield f"{what} have a positive, finite scale.", _some(odd), "a scale above 0"
            return
        if (outside := s.zeros[(s.zeros < low) | (s.zeros > high)]).size:
            yield f"{what}: the zero point is a number of the type.", _some(outside), f"{low}..{high}"
            return
        yield from min((list(self._against(s, a, channel, what)) for a in same), key=len)

    def _against(self, s: Stored, a: Scheme, channel: int | None, what: str) -> Faults:
        shape, count = s.value.shape, s.scales.size
        if channel is None or not a.per_channel:
            if count > 1:
                yield f"{what} have one scale for the whole tensor.", f"{count} scales", str(a)
        else:
            channels = shape[channel] if channel < len(shape) else 1
            if count != channels:
                yield f"{what} have one scale for each output channel.", f"{count} scales", f"{channels} ({a})"
            elif count > 1 and s.axis != channel:
                yield f"{what} have their scales along the output channels.", f"axis {s.axis}", f"axis {channel}"
        if a.symmetric and (s.zeros != a.middle).any():
            yield f"{what} are symmetric: the zero point is {a.middle}.", _some(s.zeros[s.zeros != a.middle]), str(a)
        if a.power_of_two:
            odd = s.scales[(s.scales.view(np.uint32) & 0x7FFFFF) != 0]
            if odd.size:
                yield f"{what} have powers of two as scales.", _some(odd), str(a)
        if s.value.is_constant and a.narrow:
            least = int(s.integers().min(initial=0))
            if least < a.low:
                yield f"{what} leave the lowest number of the type out.", least, f"{a.low}..{a.high}"  # type: ignore[misc]

    # sums of products

    def _bias(self, layer: Layer) -> Iterator[Violation]:
        b, w, x = layer.bias, layer.weights, layer.data[0] if layer.data else None
        if b is None or not isinstance(w, Stored) or not isinstance(x, Stored):
            return
        field = "bias_bits"
        if isinstance(b, Value):
            if b.dtype.value in ("int32", "int64"):
                if b.is_constant and np.any(b.array()):
                    yield self._of(field, _named(b.name), "A bias of integers has the scale of the sums.", "none",
                                   "input scale * weight scale")
            elif b.dtype.value not in FLOATS or self.rules.file == "tflite":
                yield self._of(field, _named(b.name), "Biases are int32.", b.dtype.value, "int32")
            return  # floats in ONNX: the tools quantize them with the scale of the sums
        wide = x.dtype in ("int16", "uint16")
        if b.dtype != "int32" and not (b.dtype == "int64" and (wide or self.rules.bias_bits > 32)):
            yield self._of(field, _named(b.name), "Biases are int32.", b.dtype, "int32")
            return
        if b.scales.size > 1 and not 0 <= b.axis < len(b.value.shape):
            yield self._of(field, _named(b.name), "The axis of scales is one of the tensor's.", f"axis {b.axis}",
                           f"0..{len(b.value.shape) - 1}")
        if b.zeros.any():
            yield self._of(field, _named(b.name), "The zero point of a bias is 0.", _some(b.zeros[b.zeros != 0]), "0")
        want = np.float64(x.scales[0]) * w.scales.astype(np.float64)
        if b.scales.size not in (1, want.size) or (b.scales.size == 1 and want.size > 1 and np.ptp(want) > 0):
            yield self._of(field, _named(b.name), "A bias has as many scales as the weights.",
                           f"{b.scales.size} scales", want.size)
            return
        off = np.abs(b.scales / want - 1) > CLOSE
        if off.any():
            i = int(np.argmax(np.abs(b.scales / want - 1)))
            yield self._of(field, _named(b.name), "The scale of a bias is input scale * weight scale.",
                           f"{b.scales[min(i, b.scales.size - 1)]:.9g}", f"{want[min(i, want.size - 1)]:.9g}")
        bits = self.rules.bias_bits if b.dtype == "int32" or self.rules.bias_bits > 32 else 64
        if b.value.is_constant and b.value.elements and bits < 64:
            largest = max(abs(int(b.integers().max())), abs(int(b.integers().min())))
            if largest >= (limit := 2**(bits - 1)):
                yield self._of(field, _named(b.name), f"Biases fit into {bits} bits.", largest, f"below {limit}")

    def _sums(self, layer: Layer) -> Iterator[Violation]:
        """The worst case of each output channel: |w - zero| summed, times the farthest input, plus |bias|."""
        w, x, b = layer.weights, layer.data[0] if layer.data else None, layer.bias
        if not isinstance(w, Stored) or not w.value.elements or w.dtype not in INTEGERS or not w.value.shape:
            return
        rank = len(w.value.shape)
        channel = min(layer.channel, rank - 1)
        zeros = w.zeros if w.zeros.size == 1 or (w.axis == channel and w.zeros.size == w.value.shape[channel]) \
            else w.zeros[:1]
        per = tuple(-1 if i == channel and zeros.size > 1 else 1 for i in range(rank))
        distance = np.abs(w.integers().astype(np.int32) - zeros.astype(np.int32).reshape(per))
        if layer.groups > 1:  # I,O/groups: a channel sums the inputs of its own group
            distance = distance.reshape(layer.groups, -1, *distance.shape[1:])
            total = distance.sum(axis=(1, *range(3, rank + 1)), dtype=np.int64).reshape(-1)
        else:
            total = distance.sum(axis=tuple(i for i in range(rank) if i != channel), dtype=np.int64).reshape(-1)
        limit = self.rules.weight_sum_max
        if limit is not None and total.max() > limit:
            yield self._of("weight_sum_max", _named(w.name), "The absolute weights of an output channel add up to no "
                           f"more than {limit}.", f"{total.max()} in channel {int(total.argmax())}", f"<= {limit}")
        if not isinstance(x, Stored) or x.dtype not in INTEGERS:
            return
        low, high = x.range
        far = max(high - int(x.zeros[0]), int(x.zeros[0]) - low)
        sums = total.astype(object) * far
        if isinstance(b, Stored) and b.value.is_constant and b.value.elements in (1, total.size):
            sums = sums + np.abs(b.integers().astype(object)).reshape(-1)
        bits = self.rules.accumulator_bits
        if x.dtype in ("int16", "uint16") and not (isinstance(b, Stored) and b.dtype == "int32"):
            bits = max(bits, 64)  # what LiteRT's kernels sum in where the bias is int64
        if max(sums) >= 2**(bits - 1):
            i = int(np.argmax(sums))
            yield self._of("accumulator_bits", layer.label, f"Sums of products fit into {bits} bits whatever the "
                           "input.", f"{sums[i]} in channel {i}", f"below {2**(bits - 1)}")
        out = layer.results[0] if layer.results else None
        below = self.rules.requantize_below
        if below is not None and isinstance(out, Stored):
            ratio = np.float64(x.scales[0]) * w.scales.max() / out.scales[0]
            if not 0 < ratio < below:
                yield self._of("requantize_below", layer.label, "Input scale * weight scale / output scale is below "
                               f"{below:g}.", f"{ratio:g}", f"below {below:g}")

    # scales of operators

    def _prescribed(self, layer: Layer) -> Iterator[Violation]:
        for s in layer.results[:1]:
            want = self.rules.fixed.get((layer.op, s.dtype)) if isinstance(s, Stored) else None
            if want is None:
                continue
            assert isinstance(s, Stored)
            scale, zero = want
            if s.scales.size != 1 or abs(float(s.scales[0]) / scale - 1) > CLOSE or int(s.zeros[0]) != zero:
                yield self._of("fixed", layer.label, f"The result of {layer.op} has a prescribed scale and zero point.",
                               _quantized(s), f"scale {scale:.9g} zero point {zero}")

    def _one_scale(self, layer: Layer) -> Iterator[Violation]:
        if layer.op not in self.rules.same_scale:
            return
        found = [s for s in (*layer.data, *layer.results) if isinstance(s, Stored) and s.dtype in INTEGERS]
        if self.rules.file == "tflite" and layer.op in RESCALED_UINT8 and found and found[0].dtype == "uint8":
            return
        for s in found[1:]:
            first = found[0]
            if s.scales.size != first.scales.size or (np.abs(s.scales / first.scales - 1) > CLOSE).any() \
                    or (s.zeros != first.zeros).any():
                yield self._of("same_scale", layer.label, f"Operands and results of {layer.op} have one scale and zero "
                               "point.", f"{_quantized(s)} of {_named(s.name)}",
                               f"{_quantized(first)} of {_named(first.name)}")
                return

    def _joined(self, layer: Layer) -> Iterator[Violation]:
        ratio, out = self.concat_ratio, layer.results[0] if layer.results else None
        if ratio is None or layer.op != "Concat" or not isinstance(out, Stored):
            return
        for s in layer.data:
            if isinstance(s, Stored) and float(s.scales[0]) > ratio * float(out.scales[0]):
                yield Violation(layer.label, f"Where tensors are joined, the result's scale is at least 1/{ratio:g} of "
                                "each input's.", f"{float(out.scales[0]):.6g} beside {float(s.scales[0]):.6g}",
                                f"at least {float(s.scales[0]) / ratio:.6g}",
                                entry_of(self.rules.name).sources.get("concat_ratio_max", ASSUMED))


def _refused(graph: Graph, rules: Rules) -> Iterator[Violation]:
    """What a described board's rules about operators and the whole graph refuse."""
    board = board_of(rules.name)
    if board is None:
        return
    checked = find_board(board).check(graph)
    nodes = {n.index: n for n in graph.nodes}
    for finding in checked.findings:
        if finding.where == "refused" and finding.op not in MARKS:
            for r in finding.reasons:
                yield Violation(node_label(nodes[finding.node], graph), r.rule, r.found, r.remedy or "see the rule",
                                r.source, "operators")
    for r in checked.graph:
        yield Violation("the network", r.rule, r.found, r.remedy or "see the rule", r.source, "operators")


def _named(name: str) -> str:
    return f"tensor '{name[:SHOWN]}'"


def _some(found: Iterable[object]) -> str:
    items = [f"{x:.9g}" if isinstance(x, np.floating) else str(x) for x in found]
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _listed(allowed: tuple[Scheme, ...]) -> str:
    return " or ".join(map(str, allowed))


def _quantized(s: Stored) -> str:
    return f"scale {float(s.scales[0]):.9g} zero point {int(s.zeros[0])}"
