"""Networks trained with quantization taken apart: the float network, and what training says of each of its tensors.

A pair of QuantizeLinear and DequantizeLinear behind a tensor says how it is stored; it goes, and its scale and zero
point are kept under the tensor's name. Constants between such operators, or behind DequantizeLinear alone, become the
floats that their integers stand for, and the integers are kept. Integers that are moved (a MaxPool of codes) become
moved floats. Where a tensor's zero point is its lowest code, the pair is a ReLU as well: quantizers leave the operator
out, and it is written out here, which changes no result and keeps the float network the one that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from npulab.dialects.prepare import prepared
from npulab.dialects.quantities import ACTIVATIONS, DOMAINS, SMALL, is_op
from npulab.dialects.quantities import MOVES as INTEGER_MOVES
from npulab.errors import UnsupportedError
from npulab.exporters.onnx import to_onnx
from npulab.importers.onnx import read_onnx
from npulab.ir import DType, Graph, Node
from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.quantization.types import F32, Array, Params, Scheme

MOVES = (*INTEGER_MOVES, "Pad", "Resize")
"""Operators that are the same on integers and on what they stand for."""
RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
POSITIVE = frozenset(("Relu", "Sigmoid", "Softmax", "Exp", "Sqrt", "Abs", "HardSigmoid", "Softplus"))
"""Operators whose results are never below 0."""
KEEPS_SIGN = frozenset((*MOVES, "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "Add",
                        "Mul", "Max", "Min", "Dropout", "Clip", "Upsample", "ReduceSum", "Sum"))
"""Operators whose results are not below 0 if no operand is."""
CLAMPED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "BatchNormalization")
"""Operators behind which a ReLU is left out where the integers end at 0 anyway."""
ON_INTEGERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QGemm",
               "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention", "QEmbedLayerNormalization")


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A constant as training left it: its integers and what they mean. `real`: those as floats."""

    codes: Array
    params: Params

    @property
    def real(self) -> F32:
        return self.params.real(self.codes)


@dataclass(eq=False)
class Trained:
    """What training with quantization says of a float network.

    tensors    by the names of computed tensors and inputs.    constants   by the names of constants.
    weights_of     names of results of layers, also behind a batch normalization -> the name of the weights.
    aliases    names of results of operators that may be folded away -> of what they read.
    inputs     those that the file has as integers, by name.
    notes      what could not be kept, for people.
    """

    tensors: dict[str, Params] = field(default_factory=dict)
    constants: dict[str, Stored] = field(default_factory=dict)
    weights_of: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Params] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_trained(graph: Graph) -> bool:
    """Whether an ONNX graph says how any of its tensors are stored in integers."""
    return any(_on_integers(n) for n in graph.nodes)


def as_trained(graph: Graph) -> tuple[Graph, Trained]:
    """The float network of a quantized ONNX graph, and what is known of its tensors.

    Raises: UnsupportedError for quantization that has no place in Params: chosen at run time, in blocks, of tensors by
    channel, in floats of 8 bits; and for operators on integers that are not taken apart.
    """
    ready = prepared(graph)
    r = Rewrite(ready)
    work = _Unpairing(r)
    for n in r.live():
        work.visit(n)
    found = work.found()
    bare = r.graph()
    assert bare.header is not None
    types = {v: t for v, t in bare.header.types.items() if bare.values[v].name not in found.tensors}  # floats now
    bare = replace(bare, header=replace(bare.header, types=types))
    left = sorted({n.op.name for n in bare.nodes if _on_integers(n)})
    if left:
        raise UnsupportedError(f"'{graph.name}' has operators on integers that are not taken apart",
                               got=", ".join(left), want="QuantizeLinear and DequantizeLinear around float operators",
                               try_="the float network, or the quantizer's QDQ format")
    return read_onnx(to_onnx(bare, shapes=False), graph.name), found


def same_levels(a: Params, b: Params) -> bool:
    """Whether two stand for the same numbers: equal, or shifted from signed to unsigned."""
    return (a.scheme.bits == b.scheme.bits and np.array_equal(a.scales, b.scales)
            and np.array_equal(a.zeros - a.scheme.low, b.zeros - b.scheme.low))


def _on_integers(n: Node) -> bool:
    op = n.op
    return isinstance(op, OnnxOp) and op.domain in DOMAINS and (op.name in ON_INTEGERS or op.name.startswith("QLinear"))


class _Unpairing:
    """Nodes are visited in order; what they read has been taken apart by then.

    tensors  values that stand for a pair's result -> how that is stored.    stored  constants likewise.
    codes    computed integers -> the value that stands for them, and what they mean.
    positive values that are never below 0.    written  value -> the one with its ReLU written out.
    """

    def __init__(self, r: Rewrite) -> None:
        self.r = r
        self.tensors: dict[int, Params] = {}
        self.stored: dict[int, Stored] = {}
        self.codes: dict[int, tuple[int, Params]] = {}
        self.positive: set[int] = set()
        self.written: dict[int, int] = {}
        self.inputs: dict[int, Params] = {}
        self.weights_of: dict[int, int] = {}
        self.aliases: dict[int, int] = {}
        self.notes: list[str] = []

    def found(self) -> Trained:
        """What is known, by the names that values have at the end."""
        def name(v: int) -> str:
            return self.r.values[v].name

        return Trained({name(v): p for v, p in self.tensors.items()}, {name(v): s for v, s in self.stored.items()},
                       {name(v): name(w) for v, w in self.weights_of.items()},
                       {name(v): name(w) for v, w in self.aliases.items()},
                       {name(v): p for v, p in self.inputs.items()}, self.notes)

    def visit(self, n: Node) -> None:
        r = self.r
        if is_op(n, "QuantizeLinear"):
            self._quantize(n)
        elif is_op(n, "DequantizeLinear"):
            self._dequantize(n)
        elif is_op(n, "Clip") and r.values[n.outputs[0]].dtype.value in ACTIVATIONS:
            self._clip_codes(n)
        elif n.inputs and n.inputs[0] in self.stored and is_op(n, "Transpose", *RESHAPES):
            self._move_constant(n)
        else:
            self._move(n)
            self._remember(n)

    def _quantize(self, n: Node) -> None:
        r, x, out = self.r, n.inputs[0], n.outputs[0]
        params = self._parameters(n, r.values[out].dtype)
        constant = r.constant(x)
        if constant is not None:
            codes = params.codes(np.asarray(constant, np.float32))
            r.substitute(out, r.add_constant(f"{r.values[x].name}_codes", codes))
            return
        self._per_tensor(n, params)
        y = self.written.get(x, x)
        if y == x and x not in self.tensors and self._ends_at_zero(params) and self._may_be_negative(x):
            y = self.written[x] = self._clamp(n, x, params)
        known = self.tensors.setdefault(y, params)
        if not same_levels(known, params) and not self._is_joined(out, params):
            self.notes.append(f"'{r.values[x].name}' was quantized twice, and keeps the first: steps of "
                              f"{known.scales[0]:.4g}, not {params.scales[0]:.4g}")
        if known.scheme.low == known.zeros[0]:
            self.positive.add(y)
        self.codes[out] = y, params
        if out in r.outputs:
            self._instead(n, out, y)

    def _is_joined(self, codes: int, params: Params) -> bool:
        """Whether integers of another scale than their tensor's are only moved, or joined with others, to a tensor of
        that scale: then the pair behind that does the same."""
        r = self.r
        behind = [x for n in r.readers(codes) for x in (r.readers(n.outputs[0]) if is_op(n, "DequantizeLinear")
                                                        else [n])]
        after = [q for n in behind for q in r.readers(n.outputs[0])]
        return bool(after) and all(self._commutes(n) for n in behind) and all(
            is_op(q, "QuantizeLinear") and same_levels(self._parameters(q, r.values[q.outputs[0]].dtype), params)
            for q in after)

    def _commutes(self, n: Node) -> bool:
        """Whether rounding before an operator is rounding behind it."""
        op = n.op
        return is_op(n, *MOVES) and isinstance(op, OnnxOp) and not (
            op.name == "Resize" and op.attributes.get("mode", "nearest") not in ("nearest", b"nearest"))

    def _dequantize(self, n: Node) -> None:
        r, x, out = self.r, n.inputs[0], n.outputs[0]
        v = r.values[x]
        if v.is_constant:
            params = self._parameters(n, v.dtype)
            codes = v.integers()
            axis = params.axis
            if axis is not None and (axis >= codes.ndim or codes.shape[axis] != params.scales.size):
                raise UnsupportedError(f"'{v.name}' of '{r.source.name}' has scales that do not fit it",
                                       got=f"{params.scales.size} along axis {axis} of {list(codes.shape)}")
            self._constant(out, v.name, Stored(codes, params))
        elif x in self.codes:
            y, written = self.codes[x]
            params = self._parameters(n, None, written.scheme)
            self._per_tensor(n, params)
            if not same_levels(params, written):
                raise UnsupportedError(f"'{v.name}' of '{r.source.name}' is read as something else than was written",
                                       got=f"scale {params.scales[0]:.6g}", want=f"{written.scales[0]:.6g}")
            self._instead(n, out, y)
        elif x in r.source.inputs and v.dtype.value in ACTIVATIONS:
            params = self._parameters(n, v.dtype)
            self._per_tensor(n, params)
            self.tensors[x] = self.inputs[x] = params
            self.codes[x] = x, params
            r.values[x] = replace(v, dtype=DType.FLOAT32)
            if params.scheme.low == params.zeros[0]:
                self.positive.add(x)
            self._instead(n, out, x)

    def _instead(self, n: Node, out: int, value: int) -> None:
        """Readers of `out` read `value`; an output of the graph stays one, under its name."""
        r = self.r
        if out in r.outputs and (value in r.outputs or value in r.source.inputs):
            params = self.tensors[value]
            value = r.add(n, f"{n.name or 'pair'}_copy", "Identity", [value])
            self.tensors[value] = params
        r.substitute(out, value)

    def _constant(self, out: int, name: str, stored: Stored) -> None:
        made = self.r.add_constant(f"{name}_real", np.asarray(stored.real, np.float32))
        self.stored[made] = stored
        self.r.substitute(out, made)

    def _clip_codes(self, n: Node) -> None:
        """Integers that use a part of their type: PyTorch's reduced range."""
        r, x = self.r, n.inputs[0]
        limits = [r.constant(v) if v >= 0 else None for v in (*n.inputs[1:3], -1, -1)[:2]]
        low, high = (None if c is None else int(c.reshape(-1)[0]) for c in limits)
        constant = r.constant(x)
        if constant is not None:
            codes = np.clip(constant, low, high).astype(constant.dtype)
            r.substitute(n.outputs[0], r.add_constant(f"{r.values[x].name}_clipped", codes))
        elif x in self.codes:
            y, params = self.codes[x]
            s = params.scheme
            used = max(s.low, low if low is not None else s.low), min(s.high, high if high is not None else s.high)
            if used != (s.low, s.high):
                self.notes.append(f"'{r.values[y].name}' had codes {used[0]}..{used[1]} in training, and has "
                                  f"{s.low}..{s.high} with the same steps: what training clipped goes on")
            self.codes[n.outputs[0]] = y, params

    def _move_constant(self, n: Node) -> None:
        """Transposed or reshaped weights keep their integers."""
        r, stored = self.r, self.stored[n.inputs[0]]
        shape = r.values[n.outputs[0]].shape
        p = stored.params

        def moved(array: Array) -> Array:
            op = n.op
            assert isinstance(op, OnnxOp)
            if op.name != "Transpose":
                return array.reshape(shape)
            perm: Any = op.attributes.get("perm")
            return np.ascontiguousarray(array.transpose(perm))

        codes = moved(stored.codes)
        axis = None
        if p.axis is not None:
            numbers = np.arange(p.scales.size)
            where = moved(np.broadcast_to(numbers.reshape(p.along(stored.codes.ndim)), stored.codes.shape))
            axis = next((a for a in range(codes.ndim) if codes.shape[a] == numbers.size
                         and (np.moveaxis(where, a, -1) == numbers).all()), None)
            if axis is None:
                return  # folded as floats
        self._constant(n.outputs[0], r.values[n.inputs[0]].name, Stored(codes, replace(p, axis=axis)))

    def _move(self, n: Node) -> None:
        """What moved codes moves real numbers now."""
        r = self.r
        op = n.op
        if not n.inputs or not n.outputs or r.values[n.outputs[0]].dtype.value not in ACTIVATIONS:
            return
        known = next((self.codes[v][1] for v in n.inputs if v in self.codes), None)
        if known is None or not isinstance(op, OnnxOp) or op.domain or op.name not in MOVES:
            return
        inputs = [self.codes[v][0] if v in self.codes else v for v in n.inputs]
        data = range(len(inputs)) if op.name == "Concat" else (0, 2) if op.name == "Pad" else (0,)
        for i in data:
            constant = r.constant(inputs[i]) if i < len(inputs) and inputs[i] >= 0 else None
            if constant is not None and constant.dtype.kind in "iu":
                inputs[i] = r.add_constant(f"{r.values[inputs[i]].name}_real", known.real(constant))
        if op.name == "Pad" and len(inputs) < 3 and "value" not in op.attributes:  # 0 codes, not 0
            inputs = [*inputs[:2], r.add_constant("pad_real", known.real(np.zeros((), known.scheme.holder)))]
        r.change(n, inputs=inputs)
        for v in n.outputs[:1 if op.name == "MaxPool" else None]:
            r.values[v] = replace(r.values[v], dtype=DType.FLOAT32)
            self.tensors[v] = known
            self.codes[v] = v, known

    def _remember(self, n: Node) -> None:
        """What is needed later of a float operator."""
        op = n.op
        if not isinstance(op, OnnxOp) or not n.outputs:
            return
        out = n.outputs[0]
        if op.name in ("Conv", "ConvTranspose", "Gemm", "MatMul") and len(n.inputs) > 1 and n.inputs[1] in self.stored:
            self.weights_of[out] = n.inputs[1]
        if op.name in ("BatchNormalization", "Identity", "Dropout"):
            self.aliases[out] = n.inputs[0]
            if n.inputs[0] in self.weights_of:
                self.weights_of[out] = self.weights_of[n.inputs[0]]
        if op.name in POSITIVE or (op.name == "Clip" and self._clips_below_zero(n)) or (
                op.name in KEEPS_SIGN and all(self._is_positive(v) for v in self._operands(n))):
            self.positive.update(n.outputs)

    def _operands(self, n: Node) -> list[int]:
        """The numbers among an operator's inputs."""
        many = n.op.name in ("Add", "Mul", "Max", "Min", "Concat", "Sum")
        return [v for v in (n.inputs if many else n.inputs[:1]) if v >= 0]

    def _is_positive(self, value: int) -> bool:
        constant = self.r.constant(value)
        return value in self.positive or (constant is not None and bool((constant >= 0).all()))  # type: ignore[operator]

    def _clips_below_zero(self, n: Node) -> bool:
        op = n.op
        assert isinstance(op, OnnxOp)
        low: Any = op.attributes.get("min", -np.inf)
        if len(n.inputs) > 1 and n.inputs[1] >= 0:
            c = self.r.constant(n.inputs[1])
            low = float(c.reshape(-1)[0]) if c is not None else -np.inf
        return bool(low >= 0)

    # a ReLU that is left to the integers

    def _ends_at_zero(self, p: Params) -> bool:
        return bool(p.zeros[0] == p.scheme.low)

    def _may_be_negative(self, value: int) -> bool:
        return value not in self.positive and self.r.maker(value, *CLAMPED) is not None

    def _clamp(self, n: Node, value: int, p: Params) -> int:
        """The value behind a ReLU, or a ReLU6 where the integers end at 6."""
        r = self.r
        top = float(p.scales[0]) * (p.scheme.high - p.scheme.low)
        name = f"{r.values[value].name}_clamp"
        opset = max((v for domain, v in r.source.header.opsets if not domain), default=0) if r.source.header else 0
        if abs(top - 6) < 1e-5 and opset >= 11:
            ends = [r.add_constant(f"{name}_{x}", np.array(x, np.float32)) for x in (0, 6)]
            return r.add(n, name, "Clip", [value, *ends])
        return r.add(n, name, "Relu", [value])

    # scales and zero points

    def _parameters(self, n: Node, dtype: DType | None, scheme: Scheme | None = None) -> Params:
        """Of a Quantize- or DequantizeLinear. `dtype`: of the integers; or their `scheme`, where that is known."""
        r, op = self.r, n.op
        assert isinstance(op, OnnxOp)
        what, name = r.source.name, r.values[n.outputs[0]].name
        scale = r.constant(n.inputs[1])
        zero_value = n.inputs[2] if len(n.inputs) > 2 else -1
        zero = r.values[zero_value].integers() if zero_value >= 0 and r.values[zero_value].is_constant and (
            r.values[zero_value].dtype.numpy is not None or r.values[zero_value].dtype in SMALL) else None
        if scale is None or (zero_value >= 0 and zero is None):
            raise UnsupportedError(f"'{name}' of '{what}' has a scale that is computed when the network runs",
                                   want="constant scales and zero points", try_="static quantization")
        if scale.ndim > 1 or op.attributes.get("block_size"):
            raise UnsupportedError(f"'{name}' of '{what}' is quantized in blocks", want="one scale, or one a channel")
        scales = np.asarray(scale, np.float32).reshape(-1)
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise UnsupportedError(f"'{name}' of '{what}' has a scale that is none", want="finite and above 0",
                                   got=str(float(scales[~(np.isfinite(scales) & (scales > 0))][0])))
        if scheme is None:
            assert dtype is not None
            if dtype.value not in (*ACTIVATIONS, "int32") and dtype not in SMALL:
                raise UnsupportedError(f"'{name}' of '{what}' is stored in a type that is not taken", got=dtype.value,
                                       want=f"{', '.join(ACTIVATIONS)}, or 4 and 2 bits for weights")
            scheme = Scheme(32 if dtype is DType.INT32 else SMALL.get(dtype, 0) or int(dtype.value.lstrip("uint")),
                            not dtype.value.startswith("u"))
        zeros = np.zeros(scales.size, np.int32) if zero is None else np.asarray(zero, np.int32).reshape(-1)
        zeros = np.broadcast_to(zeros, scales.shape).copy()
        many = scales.size > 1
        axis: Any = op.attributes.get("axis", 1)
        rank = len(r.values[n.inputs[0]].shape)
        scheme = replace(scheme, symmetric=bool((zeros == scheme.middle).all()), per_channel=many)
        return Params(scheme, scales, zeros, (axis + rank if axis < 0 else axis) if many else None)

    def _per_tensor(self, n: Node, p: Params) -> None:
        if p.axis is not None:
            name = self.r.values[n.inputs[0]].name
            raise UnsupportedError(f"'{name}' of '{self.r.source.name}' is a computed tensor with a scale for each "
                                   "channel", want="one scale", got=f"{p.scales.size} scales")
