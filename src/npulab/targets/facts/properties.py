"""What predicates read of a node: names of the facts format -> values, of TFLite and ONNX alike, in NCHW order.

Each value is worked out when it is asked for. A name that does not apply to the node has no value (None); one that
applies and is not known, such as a size along a dynamic axis, has none either and is kept in `unknown`. A dynamic batch
(axis 0) has the size that the shape states. What a DequantizeLinear of an ONNX graph makes counts as quantized, with
the type that it reads; so do weights that a TFLite file stores as float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from npulab.errors import ModelError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import Conv2D, Custom, DepthwiseConv2D, Elementwise, Generic, OnnxOp, Pad, Pool2D, Softmax
from npulab.targets.facts import operands
from npulab.targets.facts.names import ACTIVATIONS, TFLITE, words

NCHW = (0, 2, 3, 1)
"""Where the axes of NHWC go: axis 3 becomes axis 1. Read the other way, NCHW's axes out of NHWC's are (0, 3, 1, 2)."""
NUMBERS_MAX = 64
"""Elements of a constant that is shown as a list."""
FLOATS = (DType.FLOAT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)

Dims = list[int | None]
"""Sizes, None where one is not known."""


class Unknown(Exception):  # noqa: N818 (it is no error)
    """A value applies to the node, and the file does not tell it."""


class Properties:
    """The names of one node. `assume`: the element type that the vendor's tool gives to floating point data, or ""."""

    def __init__(self, graph: Graph, node: Node, assume: str = "") -> None:
        self.graph = graph
        self.node = node
        self.assume = assume
        self.unknown: set[str] = set()
        op = node.op
        self.onnx = isinstance(op, OnnxOp)
        self.kind = op.name.removeprefix("QLinear") if self.onnx else TFLITE.get(op.name, op.name)
        self._values: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """The value of a name, or None."""
        if name not in self._values:
            try:
                value = self._attribute(name[5:]) if name.startswith("attr_") else _NAMES[name](self)
            except Unknown:
                value = None
                self.unknown.add(name)
            except (ModelError, ValueError, TypeError, LookupError, ArithmeticError):
                value = None  # attributes or constants that the operator cannot have: the file is wrong, not the board
            self._values[name] = value
        return self._values[name]

    # operands

    def input(self, i: int) -> Value | None:
        return self.graph.value(self.node, i)

    @property
    def operands(self) -> list[Value]:
        """The inputs that are there."""
        return [self.graph.values[v] for v in self.node.inputs if v >= 0]

    @property
    def data(self) -> Value | None:
        """The input that is worked on: the first computed one of operators whose inputs are alike."""
        op = self.node.op
        if not self.onnx:
            if op.name in ("TRANSPOSE_CONV", "CONV_3D_TRANSPOSE"):
                return self.input(2)
            if op.name == "SPLIT":
                return self.input(1)
        first = self.input(0)
        if first is not None and first.is_constant and self.kind not in ("Gather", "GatherND", "GatherElements"):
            return next((v for v in self.operands if not v.is_constant), first)
        return first

    @property
    def weights(self) -> Value | None:
        if self.kind in WEIGHTED:
            return self.input(3 if self.node.op.name in ("QLinearConv", "QLinearMatMul") else 1)
        return None

    @property
    def bias(self) -> Value | None:
        if self.kind not in WEIGHTED:
            return None
        if self.node.op.name == "QLinearConv":
            return self.input(8)
        return self.input(3 if self.kind in ("LSTM", "GRU", "RNN") or (not self.onnx and self.kind == "ConvTranspose")
                          else 2)

    @property
    def output(self) -> Value | None:
        return next((self.graph.values[v] for v in self.node.outputs if v >= 0), None)

    # shapes

    def moves(self, value: Value | None) -> bool:
        """Whether the tensor's axes are NHWC's."""
        return not self.onnx and value is not None and len(value.shape) == 4

    def dims(self, value: Value | None) -> Dims | None:
        """Sizes in NCHW order; None without a tensor. Raises Unknown if not even the rank is known."""
        if value is None:
            return None
        if not value.has_shape:
            raise Unknown
        found: Dims = [None if i in value.dynamic_axes and i else n for i, n in enumerate(value.shape)]
        if self.moves(value):
            return [found[0], found[3], found[1], found[2]]
        if not self.onnx and len(found) == 5 and self.node.op.name in ("CONV_3D", "CONV_3D_TRANSPOSE"):
            return [found[0], found[4], *found[1:4]]
        return found

    def sizes(self, value: Value | None) -> list[int] | None:
        """All sizes. Raises Unknown if one is not known."""
        dims = self.dims(value)
        return None if dims is None else [sure(n) for n in dims]

    def spatial(self, value: Value | None) -> Dims | None:
        """Sizes behind batch and channels of data that has such: (d, h, w), (h, w) or (w)."""
        dims = self.dims(value)
        if dims is None or not 3 <= len(dims) <= 5 or (not self.onnx and len(dims) == 3):
            return None
        return dims[2:]

    def channel(self, value: Value | None) -> int | None:
        dims = self.dims(value)
        if not dims:
            return None
        last = self.kind in ("Gemm", "MatMul") and not self.moves(value)
        last = last or len(dims) < 2 or (not self.onnx and len(dims) not in (4, 5))
        return sure(dims[-1] if last else dims[1])

    def axis_of(self, axis: int, rank: int) -> int:
        """An axis of a tensor of that rank: non-negative, in NCHW order."""
        axis = axis + rank if axis < 0 else axis
        return NCHW[axis] if not self.onnx and rank == 4 and 0 <= axis < 4 else axis

    def rank(self, value: Value | None) -> int | None:
        if value is None:
            return None
        if not value.has_shape:
            raise Unknown
        return len(value.shape)

    # attributes

    def own(self, name: str, default: Any = None) -> Any:
        """An attribute as the file has it; of ONNX with the default of the operator's version."""
        op = self.node.op
        if isinstance(op, OnnxOp):
            if name in op.attributes:
                return plain(op.attributes[name])
            found = onnx_default(op.name, op.domain, _version(self.graph, op.domain), name)
            return default if found is None else found
        if isinstance(op, Generic):
            return plain(op.attributes.get(name, default))
        if isinstance(op, Custom):
            return default
        return plain(getattr(op, name, default))

    def _attribute(self, name: str) -> Any:
        """attr_NAME: ONNX's attribute; where a later version has an input for it, that; of TFLite what is the same."""
        value = self.own(name)
        if value is None and (found := _MOVED.get((self.kind, name))) is not None and self.onnx:
            value = numbers(self.input(found))
            return value[0] if value and name in ("min", "max", "k") else value
        if value is None and self.onnx and self.kind == "MatMul" and name in ("transA", "transB"):
            return 0
        if value is not None or self.onnx:
            return value
        if name == "direction" and self.kind in ("LSTM", "RNN"):
            return "bidirectional" if self.node.op.name.startswith("BIDIRECTIONAL") else "forward"
        if (self.kind, name) in _FIXED:
            return _FIXED[self.kind, name]
        if self.node.op.name in _CLIPS and name in ("min", "max"):
            return _CLIPS[self.node.op.name][name == "max"]
        if name in _SPELT:
            return _SPELT[name](self)
        return None

    def window(self) -> list[int] | None:
        """The kernel's sizes: (d, h, w), (h, w) or (w)."""
        op = self.node.op
        if isinstance(op, Pool2D):
            return list(op.window)
        if isinstance(op, Generic) and op.name == "L2_POOL_2D":
            return [int(self.own("filter_height")), int(self.own("filter_width"))]
        if self.kind.startswith("Global"):
            dims = self.spatial(self.data)
            return None if dims is None else [sure(n) for n in dims]
        if self.kind in CONVOLUTIONS:
            if self.onnx and (found := self.own("kernel_shape")):
                return [int(n) for n in found]
            if self.weights is None or not self.weights.has_shape:
                return None
            shape = list(self.weights.shape)
            if self.onnx:
                return shape[2:]
            return shape[:3] if len(shape) == 5 else shape[1:3] if len(shape) == 4 else None
        if self.onnx and (found := self.own("kernel_shape")):
            return [int(n) for n in found]
        return None

    def per_axis(self, onnx: str, tflite: str) -> list[int] | None:
        """Strides or dilations, as many as the kernel has axes."""
        op = self.node.op
        if isinstance(op, Conv2D | DepthwiseConv2D | Pool2D):
            found = getattr(op, tflite, None)
            return [1, 1] if found is None else list(found)
        window = self.window()
        if window is None:
            return None
        if self.onnx:
            return [int(n) for n in self.own(onnx) or [1] * len(window)]
        suffix = "_factor" if tflite == "dilation" else ""
        return [int(self.own(f"{tflite}_{axis}{suffix}", 1) or 1) for axis in "dhw"[-len(window):]]

    def strides(self) -> list[int] | None:
        return self.per_axis("strides", "stride")

    def dilations(self) -> list[int] | None:
        return self.per_axis("dilations", "dilation")

    def pads(self) -> tuple[list[int], list[int]] | None:
        """Padding before and behind each axis of the window; of Pad, of height and width. Raises Unknown."""
        if self.kind == "Pad":
            return self._pad_amounts()
        window, strides, dilations = self.window(), self.strides(), self.dilations()
        if window is None or strides is None or dilations is None:
            return None
        n = len(window)
        auto = self.stated_pad() or "NOTSET"
        if self.kind.startswith("Global") or auto == "VALID":
            return [0] * n, [0] * n
        given = self.own("pads") if self.onnx else None
        if auto == "NOTSET" and not (self.kind == "ConvTranspose" and self.onnx and self.own("output_shape")):
            given = [int(p) for p in given or [0] * 2 * n]
            return (given[:n], given[n:]) if len(given) == 2 * n else None
        totals = self._same_totals(window, strides, dilations)
        if totals is None:
            return None
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (small, large) if auto == "SAME_UPPER" else (large, small)

    def _same_totals(self, window: list[int], strides: list[int], dilations: list[int]) -> list[int] | None:
        big, small = self.spatial(self.data), self.spatial(self.output)
        if big is None or small is None:
            return None
        if self.kind == "ConvTranspose":
            extra = self.own("output_padding") if self.onnx else None
            return [max((sure(i) - 1) * s + (k - 1) * d + 1 + e - sure(o), 0) for i, o, k, s, d, e in
                    zip(big, small, window, strides, dilations, extra or [0] * len(window), strict=True)]
        return [max((-(-sure(i) // s) - 1) * s + (k - 1) * d + 1 - sure(i), 0)
                for i, k, s, d in zip(big, window, strides, dilations, strict=True)]

    def _pad_amounts(self) -> tuple[list[int], list[int]] | None:
        rank = self.rank(self.data)
        if rank != 4:
            return None
        if self.onnx:
            given = self.own("pads") or (self.input(3) is None and numbers(self.input(1)))
            if not given:
                raise Unknown
            return ([int(n) for n in given[2:4]], [int(n) for n in given[6:8]]) if len(given) == 8 else None
        given = numbers(self.input(1))
        if given is None:
            raise Unknown
        return ([int(given[2]), int(given[4])], [int(given[3]), int(given[5])]) if len(given) == 8 else None

    def stated_pad(self) -> str | None:
        """How the file states the padding, in ONNX's word."""
        if self.window() is None:
            return None
        if self.onnx:
            return str(self.own("auto_pad") or "NOTSET")
        return {"same": "SAME_UPPER", "valid": "VALID"}.get(str(self.own("padding")).lower())

    def auto_pad(self) -> str | None:
        """ONNX's attribute; NOTSET of TFLite, whose padding every importer writes out in numbers."""
        found = self.stated_pad()
        return "NOTSET" if found is not None and not self.onnx else found

    # types

    def source(self, value: Value | None) -> tuple[Value, Node | None] | None:
        """A tensor, or what the DequantizeLinear that made it read, and that node."""
        if value is None:
            return None
        maker = self.graph.producer.get(value.index)
        if maker is None or maker.op.name not in ("DequantizeLinear", "DEQUANTIZE") or not maker.inputs \
                or maker.inputs[0] < 0 or self.node.op.name == "QuantizeLinear":
            return value, None
        before = self.graph.values[maker.inputs[0]]
        if not self.onnx:  # weights that the file stores smaller than it computes with them
            return (before, None) if before.is_constant else (value, None)
        return before, maker

    def type_of(self, value: Value | None, out: bool = False) -> str | None:
        """The element type, with `assume` in place of floating point."""
        found = self.source(value)
        if found is None:
            return None
        dtype = found[0].dtype
        if self.onnx and found[1] is None and value is not None and self.kind != "DequantizeLinear" \
                and (out or (self.kind in FOLLOWERS and self._alone(value))):
            dtype = self._quantized_as(value.index, FOLLOWERS_MAX) or dtype
        if dtype.value == "unknown":
            raise Unknown
        return self.assume if self.assume and dtype in FLOATS else dtype.value

    def _alone(self, value: Value) -> bool:
        """Whether the node alone reads what another one has made."""
        return value.index in self.graph.producer and len(self.graph.consumers.get(value.index, ())) == 1

    def _quantized_as(self, value: int, steps: int) -> DType | None:
        """The type that QuantizeLinear gives to a value, behind activations that become part of what made it."""
        readers = self.graph.consumers.get(value, ())
        if not readers or value in self.graph.outputs:
            return None
        if all(n.op.name == "QuantizeLinear" for n in readers):
            made = {self.graph.values[n.outputs[0]].dtype for n in readers if n.outputs}
            return made.pop() if len(made) == 1 else None
        follows = len(readers) == 1 and readers[0].op.name in FOLLOWERS and readers[0].outputs
        return self._quantized_as(readers[0].outputs[0], steps - 1) if follows and steps else None

    def quantized(self) -> bool | None:
        data = self.source(self.data)
        if data is None:
            return None
        if self.assume and data[0].dtype in FLOATS:
            return "int" in self.assume
        if self.onnx and self.kind in FOLLOWERS and self._alone(data[0]) \
                and self._quantized_as(data[0].index, FOLLOWERS_MAX) is not None:
            return True
        return data[0].quantization is not None or data[1] is not None or self.node.op.name.startswith("QLinear")

    def zero_point(self) -> int | None:
        data = self.source(self.data)
        if data is None:
            return None
        value, marker = data
        if value.quantization is not None:
            return value.quantization.zero_point if value.quantization.per_tensor else None
        if marker is not None:
            zero = self.graph.value(marker, 2)
        elif self.node.op.name in ("QLinearConv", "QLinearMatMul"):
            zero = self.input(2)
        elif self.assume:
            raise Unknown
        else:
            return None
        if zero is None:
            return 0
        found = numbers(zero)
        if found is None:
            raise Unknown
        return int(found[0]) if len(found) == 1 else None

    def per_channel(self) -> bool | None:
        """Of weights; of data where there are no weights."""
        found = self.source(self.weights if self.weights is not None else self.data)
        if found is None:
            return None
        value, marker = found
        if value.quantization is not None:
            return not value.quantization.per_tensor
        scale = (self.graph.value(marker, 1) if marker is not None
                 else self.input(4) if self.node.op.name in ("QLinearConv", "QLinearMatMul") else None)
        if scale is not None:
            return scale.elements > 1
        if self.assume and self.weights is None:
            return False if self.quantized() else None  # what converters do
        if self.assume:
            raise Unknown
        return None


WEIGHTED = ("Conv", "DepthwiseConv", "ConvTranspose", "ConvInteger", "Gemm", "MatMul", "MatMulInteger", "LSTM", "GRU",
            "RNN", "SVDF")
FOLLOWERS = ("Relu", "Clip", "LeakyRelu", "PRelu", "BatchNormalization")
"""Operators that quantizers of ONNX leave in floats between a convolution and its QuantizeLinear."""
FOLLOWERS_MAX = 2
CONVOLUTIONS = ("Conv", "DepthwiseConv", "ConvTranspose", "ConvInteger")
_CLIPS = {"RELU6": (0, 6), "RELU_N1_TO_1": (-1, 1), "RELU_0_TO_1": (0, 1)}
_MOVED = {("Clip", "min"): 1, ("Clip", "max"): 2, ("TopK", "k"): 1, ("Split", "split"): 1, ("Slice", "starts"): 1,
          ("Slice", "ends"): 2, ("Slice", "steps"): 4, ("Pad", "pads"): 1, ("Tile", "repeats"): 1}
"""(operator, attribute of an old version) -> the input that newer versions have for it."""
_FIXED = {("MaxPool", "storage_order"): 0, ("Gemm", "transA"): 0, ("Gemm", "transB"): 1,
          ("ArgMax", "select_last_index"): 0,
          ("ArgMin", "select_last_index"): 0, ("Resize", "antialias"): 0, ("ReduceMean", "noop_with_empty_axes"): 0,
          ("ReduceMax", "noop_with_empty_axes"): 0, ("ReduceMin", "noop_with_empty_axes"): 0,
          ("ReduceSum", "noop_with_empty_axes"): 0, ("LpPool", "p"): 2, ("LpNormalization", "p"): 2,
          ("Reshape", "allowzero"): 0, ("DepthToSpace", "mode"): "DCR", ("Mod", "fmod"): 0}
"""What TFLite's operators do, in ONNX's attributes."""
_SPELT: dict[str, Callable[[Properties], Any]] = {
    "kernel_shape": Properties.window, "strides": Properties.strides, "dilations": Properties.dilations,
    "pads": lambda p: None if (found := p.pads()) is None else [*found[0], *found[1]],
    "group": lambda p: p.get("groups"), "axis": lambda p: p.get("axis"), "axes": lambda p: p.get("axes"),
    "perm": lambda p: p.get("perm"), "keepdims": lambda p: p.get("keepdims"),
    "blocksize": lambda p: p.own("block_size"),
    "alpha": lambda p: p.get("alpha"), "beta": lambda p: p.get("beta"), "auto_pad": Properties.auto_pad,
    "ceil_mode": lambda p: p.get("ceil_mode"), "count_include_pad": lambda p: p.get("count_include_pad"),
}


def sure(n: int | None) -> int:
    """A size. Raises Unknown without one."""
    if n is None:
        raise Unknown
    return n


def plain(value: Any) -> Any:
    """An attribute as predicates read it: lists, numbers, texts, or None."""
    if isinstance(value, tuple | list):
        return [plain(v) for v in value[:NUMBERS_MAX]]
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if hasattr(value, "tolist") and hasattr(value, "size"):
        return value.tolist() if value.size <= NUMBERS_MAX else None
    return None


def numbers(value: Value | None) -> list[Any] | None:
    """The elements of a small constant, in order; None of anything else."""
    if value is None or not value.is_constant or value.elements > NUMBERS_MAX or value.dtype.numpy is None:
        return None
    found: list[Any] = value.array().reshape(-1).tolist()
    return found


def _version(graph: Graph, domain: str) -> int:
    """The version of an operator set that an ONNX file states; the newest where nothing is stated."""
    header = graph.header
    stated = dict(header.opsets) if header is not None else {}
    return stated.get(domain, 0) or (stated.get("ai.onnx", 0) if not domain else 0)


@lru_cache(4096)
def onnx_default(operator: str, domain: str, version: int, attribute: str) -> Any:
    """What ONNX says an attribute is where a node does not state it; None without a default or without the package."""
    try:
        from onnx import defs, helper
    except ImportError:
        return None
    try:
        schema = defs.get_schema(operator, version or defs.onnx_opset_version(), domain)
    except Exception:  # onnx raises what its C++ raises: there is no such operator
        return None
    found = schema.attributes.get(attribute)
    if found is None or not found.default_value.type:
        return None
    return plain(helper.get_attribute_value(found.default_value))


# names


def _nth(which: Callable[[Properties], list[int] | None], axis: str) -> Callable[[Properties], int | None]:
    """One of (d, h, w), (h, w), (w); a window of one axis is one pixel high."""
    back = "whd".index(axis)

    def find(p: Properties) -> int | None:
        values = which(p)
        if values is not None and len(values) == 1 and axis == "h":
            return 1
        return None if values is None or len(values) <= back else values[-1 - back]
    return find


def _pair(which: Callable[[Properties], list[int] | None]) -> Callable[[Properties], list[int] | None]:
    """[h, w]."""
    return lambda p: None if (values := which(p)) is None or not values else [1, *values][-2:]


def _pad(end: int, axis: str) -> Callable[[Properties], int | None]:
    def find(p: Properties) -> int | None:
        values = p.pads()
        back = "wh".index(axis)
        if values is not None and len(values[end]) == 1 and back:
            return 0
        return None if values is None or len(values[end]) <= back else values[end][-1 - back]
    return find


def _size(out: bool, axis: str) -> Callable[[Properties], int | None]:
    def find(p: Properties) -> int | None:
        dims = p.spatial(p.output if out else p.data)
        back = "wh".index(axis)
        if dims is not None and len(dims) == 1 and back and p.window() is not None:
            return 1
        return None if dims is None or len(dims) <= back else sure(dims[-1 - back])
    return find


def _padding(p: Properties) -> str | None:
    """SAME, VALID or EXPLICIT. Pads in ONNX that are those of SAME are SAME."""
    auto = p.stated_pad()
    if auto is None or auto == "VALID":
        return auto
    if auto.startswith("SAME"):
        return "SAME"
    pads, window, strides, dilations = p.pads(), p.window(), p.strides(), p.dilations()
    if pads is None or window is None or strides is None or dilations is None:
        return None
    if not any(pads[0] + pads[1]):
        return "VALID"
    totals = p._same_totals(window, strides, dilations)
    same = totals is not None and pads == ([t // 2 for t in totals], [t - t // 2 for t in totals])
    return "SAME" if same else "EXPLICIT"


def _groups(p: Properties) -> int | None:
    if p.kind not in CONVOLUTIONS:
        return None
    if p.onnx:
        return int(p.own("group") or 1)
    channels = p.channel(p.data)
    if p.kind == "DepthwiseConv":
        return channels
    if p.kind == "Conv" and p.weights is not None and channels and p.weights.shape and p.weights.shape[-1] > 0:
        return max(channels // p.weights.shape[-1], 1)
    return 1


def _out_channels(p: Properties) -> int | None:
    return p.channel(p.output)


def _multiplier(p: Properties) -> int | None:
    channels, groups, out = p.get("channels"), p.get("groups"), p.get("out_channels")
    return out // channels if channels and out and groups == channels else None


def _batch(p: Properties) -> int | None:
    dims = p.dims(p.data)
    return sure(dims[0]) if dims and len(dims) >= 2 else None


def _axis(p: Properties) -> int | None:
    if not p.onnx:
        name = p.node.op.name
        if name in ("SOFTMAX", "LOG_SOFTMAX", "L2_NORMALIZATION"):
            axis: Any = -1
        elif name in ("SPLIT", "SPLIT_V", "ARG_MAX", "ARG_MIN", "CUMSUM"):
            given = numbers(p.input({"SPLIT": 0, "SPLIT_V": 2}.get(name, 1)))
            if not given:
                raise Unknown
            axis = given[0]
        else:
            axis = p.own("axis")
        if axis is None:
            return None
        rank = p.rank(p.output if name == "PACK" else p.data)
        return None if rank is None else p.axis_of(int(axis), rank)
    axis = p.own("axis")
    if p.kind == "CumSum":
        given = numbers(p.input(1))
        axis = given[0] if given else None
    if not isinstance(axis, int):
        return None
    rank = p.rank(p.data)
    return None if rank is None else p.axis_of(axis, rank)


def _axes(p: Properties) -> list[int] | None:
    if p.kind in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        return list(range(2, p.rank(p.data) or 2))
    if not (p.kind.startswith("Reduce") or p.kind in ("Squeeze", "Unsqueeze", "MeanVarianceNormalization", "Slice")):
        return None
    rank = p.rank(p.output if p.kind == "Unsqueeze" else p.data)
    if rank is None:
        return None
    given = p.own("axes") if p.onnx else None
    place = p.input(3 if p.kind == "Slice" else 1)
    if given is None and place is not None:
        given = numbers(place) if p.onnx or p.kind.startswith("Reduce") or p.kind == "Unsqueeze" else None
        if given is None:
            raise Unknown
    if given is None:
        if not p.onnx or p.kind == "Squeeze":
            return None
        given = [] if p.own("noop_with_empty_axes") else range(rank)
    return sorted(p.axis_of(int(a), rank) for a in given)


def _constant_inputs(p: Properties) -> int:
    return sum(p.source(v)[0].is_constant for v in p.operands)  # type: ignore[index]  # an operand has a source


def _same_shapes(p: Properties) -> bool | None:
    shapes = [p.sizes(v) for v in p.operands]
    return all(s == shapes[0] for s in shapes) if shapes else None


def _broadcast(p: Properties) -> str | None:
    """How the second of two inputs spreads over the first, or the other way round."""
    if p.kind not in BROADCASTS or len(p.operands) < 2:
        return None
    shapes = []
    rank = max(p.rank(v) or 0 for v in p.operands)
    for v in p.operands:
        p.sizes(v)
        shape = [1] * (rank - len(v.shape)) + list(v.shape)
        shapes.append([shape[0], shape[3], shape[1], shape[2]] if rank == 4 and not p.onnx else shape)
    full = [max(sizes) if 0 not in sizes else 0 for sizes in zip(*shapes, strict=True)]
    small = [s for s in shapes if s != full]
    if not small:
        return "none"
    if all(max(s, default=1) == 1 for s in small):
        return "scalar"
    channel = 1 if rank in (4, 5) or (rank == 3 and p.onnx) else rank - 1
    if all(n == 1 or (i == channel and n == full[i]) for s in small for i, n in enumerate(s)):
        return "channel"
    return "other"


BROADCASTS = words("""
    Add Sub Mul Div Pow Max Min Mean Sum Mod And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual BitShift
    BitwiseAnd BitwiseOr BitwiseXor PRelu Where SQUARED_DIFFERENCE FLOOR_DIV NOT_EQUAL""")


def _scale(axis: str) -> Callable[[Properties], float | None]:
    def find(p: Properties) -> float | None:
        if p.kind not in ("Resize", "Upsample"):
            return None
        back = -1 - "wh".index(axis)
        if p.onnx:
            given = p.own("scales") or numbers(p.input(1 if p.kind == "Upsample" or len(p.node.inputs) == 2 else 2))
            if given and len(given) >= 3:
                return _whole(given[back])
        before, after = p.spatial(p.data), p.spatial(p.output)
        if before is None or after is None or len(before) < -back or len(after) < -back:
            return None
        size = sure(before[back])
        return _whole(sure(after[back]) / size) if size else None
    return find


def _whole(n: float) -> float:
    return int(n) if math.isfinite(n) and n == int(n) else n


def _mode(p: Properties) -> str | None:
    name = p.node.op.name
    if not p.onnx:
        if isinstance(p.node.op, Pad):
            return p.node.op.mode
        found = {"RESIZE_BILINEAR": "linear", "RESIZE_NEAREST_NEIGHBOR": "nearest", "DEPTH_TO_SPACE": "dcr"}.get(name)
        return found or (str(own).lower() if (own := p.own("mode")) is not None else None)
    found = p.own("mode")
    return found.lower() if isinstance(found, str) else None


def _coordinates(p: Properties) -> str | None:
    """ONNX's word for how Resize maps positions."""
    if p.kind == "Upsample":
        return "asymmetric"
    if p.kind != "Resize":
        return None
    if p.onnx:
        return str(p.own("coordinate_transformation_mode") or "asymmetric").lower()
    return "align_corners" if p.own("align_corners") else "half_pixel" if p.own("half_pixel_centers") else "asymmetric"


def _flag(name: str, mode: str) -> Callable[[Properties], bool | None]:
    """A flag of TFLite's Resize, which may state two that exclude each other; ONNX has a word for each."""
    def find(p: Properties) -> bool | None:
        found = _coordinates(p)
        return None if found is None else mode in found if p.onnx else bool(p.own(name))
    return find


def _perm(p: Properties) -> list[int] | None:
    if p.kind != "Transpose":
        return None
    if p.onnx:
        given = p.own("perm")
        rank = p.rank(p.data)
        return given or (None if rank is None else list(range(rank))[::-1])
    given = numbers(p.input(1))
    if given is None:
        raise Unknown
    if len(given) != 4 or sorted(given) != [0, 1, 2, 3]:
        return given
    out = [0] * 4
    for to, from_ in enumerate(given):
        out[NCHW[to]] = NCHW[from_]
    return out


def _keepdims(p: Properties) -> bool | None:
    if not (p.kind.startswith("Reduce") or p.kind in ("ArgMax", "ArgMin")):
        return True if p.kind.startswith("Global") else None
    if p.onnx:
        return bool(p.own("keepdims"))
    return bool(p.own("keep_dims")) if p.kind.startswith("Reduce") else False


def _fused(p: Properties) -> str | None:
    if p.onnx:
        return "none"
    found = p.own("activation", p.own("fused_activation_function", "none"))
    return ACTIVATIONS.get(str(found).lower(), "none")


def _beta(p: Properties) -> Any:
    if p.kind in _PLAIN and not (p.onnx and p.kind == "Gemm"):
        return 1.0
    return p.node.op.beta if isinstance(p.node.op, Softmax) else p.own("beta")


_PLAIN = ("Gemm", "MatMul")
"""Products: what is no Gemm of ONNX has no factors, so they are 1."""


def _alpha(p: Properties) -> Any:
    op = p.node.op
    if p.kind in _PLAIN and not (p.onnx and p.kind == "Gemm"):
        return 1.0
    if isinstance(op, Elementwise):
        return op.alpha if op.name == "LEAKY_RELU" else 1.0 if op.name == "ELU" else None
    return p.own("alpha")


def _pool_flag(name: str) -> Callable[[Properties], bool | None]:
    def find(p: Properties) -> bool | None:
        if p.kind not in ("AveragePool", "MaxPool", "LpPool"):
            return None
        return bool(p.own(name)) if p.onnx else False
    return find


def _weight_bits(p: Properties) -> int | None:
    name = p.type_of(p.weights)
    digits = "".join(c for c in name or "" if c.isdigit())
    return int(digits) if digits else None


def _bias_dtype(p: Properties) -> str | None:
    found = p.type_of(p.bias)
    return "int32" if p.assume and p.bias is not None and "int" in p.assume and found == p.assume else found


def _weights_constant(p: Properties) -> bool | None:
    found = p.source(p.weights)
    return None if found is None else found[0].is_constant


def _out_shape(p: Properties) -> list[int] | None:
    return p.sizes(p.output)


_NAMES: Mapping[str, Callable[[Properties], Any]] = {
    **{f"kernel_{a}": _nth(Properties.window, a) for a in "hwd"},
    **{f"stride_{a}": _nth(Properties.strides, a) for a in "hwd"},
    **{f"dilation_{a}": _nth(Properties.dilations, a) for a in "hwd"},
    "stride": _pair(Properties.strides),
    "dilation": _pair(Properties.dilations),
    "pad_top": _pad(0, "h"), "pad_left": _pad(0, "w"), "pad_bottom": _pad(1, "h"), "pad_right": _pad(1, "w"),
    "padding": _padding,
    "auto_pad": Properties.auto_pad,
    "groups": _groups,
    "multiplier": _multiplier,
    "channels": lambda p: p.channel(p.data),
    "out_channels": _out_channels,
    "height": _size(False, "h"), "width": _size(False, "w"),
    "out_height": _size(True, "h"), "out_width": _size(True, "w"),
    "rank": lambda p: p.rank(p.data),
    "batch": _batch,
    "shape": lambda p: p.sizes(p.data),
    "out_shape": _out_shape,
    "elements": lambda p: None if (sizes := p.sizes(p.data)) is None else math.prod(sizes),
    "axis": _axis,
    "axes": _axes,
    "dtype": lambda p: p.type_of(p.data),
    "out_dtype": lambda p: p.type_of(p.output, out=True),
    "weight_dtype": lambda p: p.type_of(p.weights),
    "weight_bits": _weight_bits,
    "weights_constant": _weights_constant,
    "bias_dtype": _bias_dtype,
    "inputs": lambda p: len(p.operands),
    "outputs": lambda p: sum(v >= 0 for v in p.node.outputs),
    "constant_inputs": _constant_inputs,
    "same_shapes": _same_shapes,
    "broadcast": _broadcast,
    "scale_h": _scale("h"), "scale_w": _scale("w"),
    "mode": _mode,
    "coordinate_mode": _coordinates,
    "align_corners": _flag("align_corners", "align_corners"),
    "half_pixel_centers": _flag("half_pixel_centers", "half_pixel"),
    "perm": _perm,
    "keepdims": _keepdims,
    "epsilon": lambda p: p.own("epsilon"),
    "alpha": _alpha,
    "beta": _beta,
    "fused": _fused,
    "count_include_pad": _pool_flag("count_include_pad"),
    "ceil_mode": _pool_flag("ceil_mode"),
    "zero_point": Properties.zero_point,
    "quantized": Properties.quantized,
    "per_channel": Properties.per_channel,
    **operands.NAMES,
}


def tensor_names(graph: Graph, value: Value, properties: Properties) -> Callable[[str], Any]:
    """The names that rules about tensors read, of one tensor. Sizes that are not known have no value."""
    def find(name: str) -> Any:
        p = properties
        try:
            match name:
                case "shape" | "elements":
                    sizes = p.sizes(value)
                    return sizes if name == "shape" or sizes is None else math.prod(sizes)
                case "rank":
                    return p.rank(value)
                case "batch":
                    dims = p.dims(value)
                    return sure(dims[0]) if dims and len(dims) >= 2 else None
                case "channels":
                    return p.channel(value)
                case "height" | "width":
                    spatial = p.spatial(value)
                    back = -1 if name == "width" else -2
                    return sure(spatial[back]) if spatial and len(spatial) >= -back else None
                case "dtype":
                    return p.type_of(value)
                case "quantized":
                    return value.quantization is not None
                case "zero_point":
                    q = value.quantization
                    return q.zero_point if q is not None and q.per_tensor else None
                case "per_channel":
                    return None if value.quantization is None else not value.quantization.per_tensor
        except Unknown:
            pass
        return None
    return find


def macs(p: Properties) -> int:
    """Multiplications and additions of a node, for batch and shapes as they stand; 0 of what has no weights.

    Sizes that are not known count as 1. Recurrent layers: every constant matrix once a step.
    """
    out, data, weights = p.output, p.data, p.weights
    if out is None or data is None or weights is None:
        return 0
    if p.kind in ("LSTM", "GRU", "RNN", "SVDF"):
        matrices = sum(v.elements for v in p.operands if v.is_constant and len(v.shape) >= 2)
        return matrices * max(data.elements // (data.shape[-1] or 1), 1) if data.shape else 0
    if p.kind == "ConvTranspose":
        return data.elements * weights.elements // max(p.get("channels") or 1, 1)
    if p.kind in ("Conv", "ConvInteger"):
        return out.elements * weights.elements // max(weights.shape[0] if weights.shape else 1, 1)
    if p.kind == "DepthwiseConv":
        return out.elements * (p.get("kernel_h") or 0) * (p.get("kernel_w") or 0)
    if p.kind == "Gemm":
        across = p.onnx and p.own("transA")
        return out.elements * (data.shape[0 if across else -1] if data.shape else 0)
    return out.elements * (data.shape[-1] if data.shape else 0)

