"""Canonical names of operators: ONNX's, DepthwiseConv and Conv3D for kinds of Conv, and tflite:NAME for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npulab.ir import Node
from npulab.ir.ops import Custom, OnnxOp

if TYPE_CHECKING:
    from npulab.targets.facts.properties import Properties


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TFLITE: dict[str, str] = {
    "ABS": "Abs", "ADD": "Add", "ADD_N": "Sum", "ARG_MAX": "ArgMax", "ARG_MIN": "ArgMin",
    "AVERAGE_POOL_2D": "AveragePool", "BATCH_MATMUL": "MatMul", "BIDIRECTIONAL_SEQUENCE_LSTM": "LSTM",
    "BIDIRECTIONAL_SEQUENCE_RNN": "RNN", "BITWISE_XOR": "BitwiseXor", "BROADCAST_TO": "Expand", "CAST": "Cast",
    "CEIL": "Ceil", "CONCATENATION": "Concat", "CONV_2D": "Conv", "CONV_3D": "Conv",
    "CONV_3D_TRANSPOSE": "ConvTranspose",
    "COS": "Cos", "CUMSUM": "CumSum", "DEPTHWISE_CONV_2D": "DepthwiseConv", "DEPTH_TO_SPACE": "DepthToSpace",
    "DEQUANTIZE": "DequantizeLinear", "DIV": "Div", "ELU": "Elu", "EMBEDDING_LOOKUP": "Gather", "EQUAL": "Equal",
    "EXP": "Exp", "EXPAND_DIMS": "Unsqueeze", "FILL": "Expand", "FLOOR": "Floor", "FLOOR_MOD": "Mod",
    "FULLY_CONNECTED": "Gemm", "GATHER": "Gather", "GATHER_ND": "GatherND", "GELU": "Gelu", "GREATER": "Greater",
    "GREATER_EQUAL": "GreaterOrEqual", "HARD_SWISH": "HardSwish", "IF": "If", "L2_NORMALIZATION": "LpNormalization",
    "L2_POOL_2D": "LpPool", "LEAKY_RELU": "LeakyRelu", "LESS": "Less", "LESS_EQUAL": "LessOrEqual",
    "LOCAL_RESPONSE_NORMALIZATION": "LRN", "LOG": "Log", "LOGICAL_AND": "And", "LOGICAL_NOT": "Not",
    "LOGICAL_OR": "Or", "LOGISTIC": "Sigmoid", "LOG_SOFTMAX": "LogSoftmax", "LSTM": "LSTM", "MAXIMUM": "Max",
    "MAX_POOL_2D": "MaxPool", "MEAN": "ReduceMean", "MINIMUM": "Min", "MIRROR_PAD": "Pad", "MUL": "Mul",
    "MULTINOMIAL": "Multinomial", "NEG": "Neg", "NON_MAX_SUPPRESSION_V4": "NonMaxSuppression",
    "NON_MAX_SUPPRESSION_V5": "NonMaxSuppression", "ONE_HOT": "OneHot", "PAD": "Pad", "PADV2": "Pad", "POW": "Pow",
    "PRELU": "PRelu", "QUANTIZE": "QuantizeLinear", "RANDOM_STANDARD_NORMAL": "RandomNormal",
    "RANDOM_UNIFORM": "RandomUniform", "RANGE": "Range", "REDUCE_MAX": "ReduceMax", "REDUCE_MIN": "ReduceMin",
    "REDUCE_PROD": "ReduceProd", "RELU": "Relu", "RELU6": "Clip", "RELU_0_TO_1": "Clip", "RELU_N1_TO_1": "Clip",
    "RESHAPE": "Reshape", "RESIZE_BILINEAR": "Resize", "RESIZE_NEAREST_NEIGHBOR": "Resize",
    "REVERSE_SEQUENCE": "ReverseSequence", "RIGHT_SHIFT": "BitShift", "RNN": "RNN", "ROUND": "Round",
    "SCATTER_ND": "ScatterND", "SELECT": "Where", "SELECT_V2": "Where", "SHAPE": "Shape", "SIGN": "Sign", "SIN": "Sin",
    "SLICE": "Slice", "SOFTMAX": "Softmax", "SPACE_TO_DEPTH": "SpaceToDepth", "SPLIT": "Split", "SPLIT_V": "Split",
    "SQRT": "Sqrt", "SQUEEZE": "Squeeze", "STABLEHLO_ABS": "Abs", "STABLEHLO_ADD": "Add", "STABLEHLO_AND": "And",
    "STABLEHLO_CLAMP": "Clip", "STABLEHLO_CONCATENATE": "Concat", "STABLEHLO_CONVERT": "Cast",
    "STABLEHLO_CONVOLUTION": "Conv", "STABLEHLO_COSINE": "Cos", "STABLEHLO_DIVIDE": "Div",
    "STABLEHLO_EXPONENTIAL": "Exp", "STABLEHLO_FLOOR": "Floor", "STABLEHLO_LOG": "Log",
    "STABLEHLO_LOGISTIC": "Sigmoid", "STABLEHLO_MAXIMUM": "Max", "STABLEHLO_MINIMUM": "Min",
    "STABLEHLO_MULTIPLY": "Mul", "STABLEHLO_NEGATE": "Neg", "STABLEHLO_OR": "Or", "STABLEHLO_PAD": "Pad",
    "STABLEHLO_POWER": "Pow", "STABLEHLO_RESHAPE": "Reshape", "STABLEHLO_SELECT": "Where", "STABLEHLO_SLICE": "Slice",
    "STABLEHLO_SUBTRACT": "Sub", "STABLEHLO_TANH": "Tanh", "STABLEHLO_TRANSPOSE": "Transpose",
    "STABLEHLO_WHILE": "Loop", "STRIDED_SLICE": "Slice", "SUB": "Sub", "SUM": "ReduceSum", "TANH": "Tanh",
    "TILE": "Tile", "TOPK_V2": "TopK", "TRANSPOSE": "Transpose", "TRANSPOSE_CONV": "ConvTranspose",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN": "RNN", "UNIQUE": "Unique",
    "WHERE": "NonZero", "WHILE": "Loop",
}
"""TFLite's builtin operators -> ONNX's that do the same."""

NONE = words("""
    ASSIGN_VARIABLE ATAN2 BATCH_TO_SPACE_ND BITCAST BROADCAST_ARGS BUCKETIZE CALL CALL_ONCE COMPLEX_ABS
    CONCAT_EMBEDDINGS CUSTOM DELEGATE DENSIFY DILATE DYNAMIC_UPDATE_SLICE EMBEDDING_LOOKUP_SPARSE FAKE_QUANT FLOOR_DIV
    HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_LOOKUP HASHTABLE_SIZE IMAG LSH_PROJECTION MATRIX_DIAG
    MATRIX_SET_DIAG NOT_EQUAL PACK PLACEHOLDER_FOR_GREATER_OP_CODES RANK READ_VARIABLE REAL REDUCE_ALL REDUCE_ANY
    REDUCE_WINDOW REVERSE_V2 RFFT2D RSQRT SEGMENT_SUM SKIP_GRAM SPACE_TO_BATCH_ND SPARSE_TO_DENSE SQUARE
    SQUARED_DIFFERENCE STABLEHLO_BROADCAST_IN_DIM STABLEHLO_CASE STABLEHLO_CBRT STABLEHLO_COMPARE STABLEHLO_COMPOSITE
    STABLEHLO_CUSTOM_CALL STABLEHLO_DOT_GENERAL STABLEHLO_DYNAMIC_SLICE STABLEHLO_DYNAMIC_UPDATE_SLICE
    STABLEHLO_GATHER STABLEHLO_IOTA STABLEHLO_REDUCE STABLEHLO_REDUCE_WINDOW STABLEHLO_REMAINDER
    STABLEHLO_RNG_BIT_GENERATOR STABLEHLO_RSQRT STABLEHLO_SCATTER STABLEHLO_SHIFT_LEFT STABLEHLO_SORT SVDF UNPACK
    UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_MIN UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_SUM VAR_HANDLE
    ZEROS_LIKE""")
"""TFLite's builtin operators that no operator of ONNX is alone: they go by tflite:NAME."""

ACTIVATIONS = {"none": "none", "relu": "Relu", "relu6": "Clip", "relu_n1_to_1": "Clip", "tanh": "Tanh",
               "sign_bit": "tflite:SIGN_BIT"}
"""TFLite's fused activations."""

ALSO = {"DepthwiseConv": ("Conv",), "Conv3D": ("Conv",), "Squeeze": ("Reshape",), "Unsqueeze": ("Reshape",),
        "Flatten": ("Reshape",), "Upsample": ("Resize",)}
"""What a name that a list lacks is a kind of."""

QUANTIZED_FORM = "QLinear"
"""Prefix of names: QLinearConv is a Conv of quantized data."""


def canonical(node: Node, properties: Properties) -> tuple[str, ...]:
    """The names that a list may have the node under, most exact first. Never empty."""
    op = node.op
    if isinstance(op, Custom):
        return (f"tflite:{op.name}",)
    if isinstance(op, OnnxOp):
        return _onnx(op, properties)
    own = f"tflite:{op.name}"
    name = TFLITE.get(op.name)
    if name is None:
        return (own,)
    if op.name == "CONV_3D":
        name = "Conv3D"
    return tuple(dict.fromkeys((own, name, *ALSO.get(name, ()), *_global_pool(name, properties))))


def _onnx(op: OnnxOp, properties: Properties) -> tuple[str, ...]:
    name = op.name
    own = (f"{op.domain}:{name}",) if op.domain else ()
    if name.startswith(QUANTIZED_FORM) and len(name) > len(QUANTIZED_FORM):
        own, name = (*own, name), name.removeprefix(QUANTIZED_FORM)
    if op.domain and name == op.name:
        return own
    if name == "Conv":
        rank, groups = properties.get("rank"), properties.get("groups")
        if groups and groups > 1 and groups == properties.get("channels"):
            own = (*own, "DepthwiseConv")
        elif rank == 5:
            own = (*own, "Conv3D")
    gemm = ("Gemm",) if name == "MatMul" and properties.get("weights_constant") else ()
    return tuple(dict.fromkeys((*own, name, *ALSO.get(name, ()), *gemm, *_global_pool(name, properties))))


def _global_pool(name: str, properties: Properties) -> tuple[str, ...]:
    """A mean over height and width is a global pool, and the other way round."""
    if name == "ReduceMean" and properties.get("rank") == 4 and properties.get("axes") == [2, 3]:
        return ("GlobalAveragePool",)
    return ("ReduceMean",) if name == "GlobalAveragePool" else ()


def label(names: tuple[str, ...]) -> str:
    """A node's name as people read it: ONNX's where there is one."""
    return next((n for n in names if not n.startswith("tflite:")), names[0])
