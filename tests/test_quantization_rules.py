"""What targets take of a network of integers: facts against each other, and the formats' rules against LiteRT."""

import numpy as np
import pytest

from layers import litert
from npulab.doors.catalog import board_doors, find_door
from npulab.errors import ModelError, UsageError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.targets.facts import quantization as q
from npulab.targets.facts import schema

NAMES = q.names()
BOARDS = [n for n in NAMES if q.board_of(n)]


# the data


@pytest.mark.parametrize("name", NAMES)
def test_every_target_has_rules_that_can_be_obeyed(name):
    r = q.rules_of(name)
    assert r.name == name
    assert r.title
    assert r.file in ("tflite", "onnx")
    assert r.activations
    assert r.weights
    assert not any(s.per_channel or s.narrow for s in r.activations), "data has one scale, and the whole range"
    assert all(s.low <= 0 <= s.high and s.low < s.high for s in (*r.activations, *r.weights, *r.depthwise_weights))
    assert set(r.sources) <= {f.name for f in q.fields(r)}
    assert all(r.sources.values())
    assert r.same_scale == (q.SAME_TFLITE if r.file == "tflite" else frozenset())


def test_what_each_format_and_chip_is_known_for():
    def of(name):
        r = q.rules_of(name)
        return [str(s) for s in r.activations], [str(s) for s in r.weights], r.arithmetic

    assert of("generic-int8") == (
        ["int8 asymmetric per tensor", "int16 symmetric per tensor"],
        ["int8 symmetric per channel", "int8 symmetric per tensor", "int4 symmetric per channel",
         "int4 symmetric per tensor", "int2 symmetric per channel", "int2 symmetric per tensor"], "tflite")
    assert of("a311d")[1][0] == "uint8 asymmetric per tensor"  # one multiplier a job
    assert of("esp32s3") == of("esp32_espdl") == (
        ["int8 symmetric per tensor power of two", "int16 symmetric per tensor power of two"],
        ["int8 symmetric per tensor power of two", "int16 symmetric per tensor power of two"], "esp32s3")
    assert of("esp32p4")[1][0] == "int8 symmetric per channel power of two"
    assert of("esp32p4")[2] == "esp32p4"
    assert of("nvidia_tensorrt")[0] == of("nvidia_dla_orin")[0] == ["int8 symmetric per tensor"]
    assert {s.bits for s in q.rules_of("sony_imx500").weights} == {2, 4, 8}
    assert q.rules_of("sony_imx500").activations[0].power_of_two
    assert not any(s.power_of_two for s in q.rules_of("sony_imx500").weights)
    assert q.rules_of("axis_artpec9").requantize_below == 65536
    assert q.entry_of("axis_artpec9").concat_ratio_max == 128
    assert {q.rules_of(f"ethos_u{n}5").weight_sum_max for n in (5, 6, 8)} == {127 * 65536}
    assert q.rules_of("qualcomm_htp").fixed == {("Sigmoid", "uint16"): (1 / 65536, 0),
                                                ("Tanh", "uint16"): (1 / 32768, 32768)}
    assert [s.narrow for s in q.rules_of("generic-int8").weights] == [True] * 6


@pytest.mark.parametrize("name", BOARDS)
def test_rules_agree_with_the_boards_other_facts(name):
    """Facts that were written down for `check`, by other people at another time."""
    r, facts = q.rules_of(name), schema.load_one(q.board_of(name)).facts

    def stated(key):
        found = facts.get(key)
        return None if found is None else found.value if isinstance(found.value, tuple) else (found.value,)

    quantized = {t for t in stated("dtypes") or () if t.startswith(("int", "uint"))}
    if quantized and "activations" in r.sources:
        assert r.activations[0].dtype in quantized, "the default type of data"
    if quantized and r.sources.get("activations") == schema.load_one(q.board_of(name)).title(facts["dtypes"].source):
        unsaid = {"uint8"} if name == "sony_imx500" else set()  # unsigned from 0, which no scheme expresses
        assert {s.dtype for s in r.activations} == quantized - unsaid, "types of data by one source"
    if (widths := stated("quantized_dtypes")) is not None:
        assert any(f"w{w.bits}a{a.bits}" in widths or f"w{w.bits}a{a.bits}i" in widths
                   for w in r.weights[:1] for a in r.activations[:1])
        assert {s.bits for s in r.activations} <= {int(t.partition("a")[2].partition("i")[0].split("_")[0])
                                                   for t in widths}
    if (grain := stated("weight_granularity")) is not None and q.board_of(name) != "esp32_espdl":
        assert any(s.per_channel for s in r.weights) == ("per-channel" in grain)
        assert "per-channel" in grain or not any(s.per_channel for s in r.weights)
    if stated("scale_kind") == ("power-of-two",):
        assert all(s.power_of_two for s in r.activations)
    for key in ("weights_bits", "weight_bits"):
        if (bits := stated(key)) is not None:
            assert {s.bits for s in r.weights} <= set(bits)
    if stated("quantization") == ("symmetric",):
        assert all(s.symmetric for s in (*r.activations, *r.weights))
    rounding = {"esp32s3": "half up", "esp32p4": "half to even"}
    for chip, how in rounding.items():
        assert facts.get(f"rounding_{chip}") is None or facts[f"rounding_{chip}"].value == how
    for entry in schema.load_one(q.board_of(name)).op:
        for rule in entry.rule:
            if "weight_sum <=" in rule.require and "int16" not in rule.require:
                assert f"weight_sum <= {r.weight_sum_max}" in rule.require


@pytest.mark.parametrize("board", [b for b in schema.ids() if b in board_doors()])
def test_files_and_imports_agree_with_the_vendors_converters(board):
    door, r, e = find_door(board_doors()[board][0]), q.rules_of(board), q.entry_of(board)
    assert r.file in door.takes
    if door.integer:
        assert e.imports == "yes"
    if door.floats and door.name not in ("axera", "ncnn"):  # Pulsar2 takes QuantONNX too; ncnn is of a GPU
        assert e.imports == "no"


def test_what_nothing_published_states_is_called_assumed():
    assert q.assumed(q.rules_of("generic-int8")) == ()
    r = q.rules_of("axelera_metis")
    assert {"activations", "weights"} <= set(q.assumed(r))
    assert "fixed" not in q.assumed(r)
    assert "activations" not in q.assumed(q.rules_of("nvidia_tensorrt"))
    assert q.rules_of("nvidia_tensorrt").sources["activations"].startswith("TensorRT 10")
    assert q.rules_of("coral_edgetpu").sources["fixed"] == q.LITERT


def test_an_unknown_name_is_told_the_close_ones():
    with pytest.raises(UsageError, match="no target 'ethos_u56'") as e:
        q.rules_of("ethos_u56")
    assert "ethos_u55" in e.value.facts["want"]
    with pytest.raises(UsageError, match="no target"):
        q.entry_of("esp32p5")


HEAD = 'id = "x"\nvendor = "V"\nname = "X"\nunlisted = "host"\n[[quantization]]\n'


@pytest.mark.parametrize(("text", "want"), [
    ('key = "activation"\nvalue = "int8 symmetric"', ["quantization activation", "file, import, activations"]),
    ('key = "activations"\nvalue = ["int8"]', ["quantization activations", "texts of the form"]),
    ('key = "weights"\nvalue = "int3 symmetric"', ["texts of the form", "int3 symmetric"]),
    ('key = "file"\nvalue = "pt"', ["tflite or onnx", "pt"]),
    ('key = "float_islands"\nvalue = "yes"', ["True or False"]),
    ('key = "bias_bits"\nvalue = true', ["a number above 0"]),
    ('key = "weight_sum_max"\nvalue = 0', ["a number above 0"]),
    ('key = "fixed"\nvalue = ["Sigmoid 1/256"]', ["texts of the form"]),
    ('key = "file"\nvalue = "onnx"\n[[quantization]]\nkey = "file"\nvalue = "onnx"', ["a subject once"]),
    ('key = "file"\nvalue = "onnx"\nvariant = "A b"', ["quantization file.variant", "small letters"]),
    ('key = "file"\nvalue = "onnx"\nsource = "S1"', ["quantization file.source", "S1"]),
    ('key = "file"\nvalue = "onnx"\nscale = 1', ["quantization[0] (file)", "unknown field `scale`"])])
def test_a_wrong_fact_is_refused_with_its_place(text, want):
    with pytest.raises(ModelError) as e:
        schema.parse((HEAD + text).encode(), "x", "x.toml")
    assert all(w in str(e.value) for w in want), e.value


# LiteRT as a witness of what the format demands

POOL = {"filter_height": 2, "filter_width": 2, "stride_h": 2, "stride_w": 2, "padding": "VALID"}
COPIES = {  # operator -> shapes of data and result, constant operands, options, ONNX's name
    "MAX_POOL_2D": ((1, 4, 4, 2), (1, 2, 2, 2), [], POOL, "MaxPool"),
    "AVERAGE_POOL_2D": ((1, 4, 4, 2), (1, 2, 2, 2), [], POOL, "AveragePool"),
    "CONCATENATION": ((1, 4), (1, 4), [], {"axis": 1}, "Concat"),
    "RESHAPE": ((1, 4), (2, 2), [[2, 2]], {}, "Reshape"),
    "PAD": ((1, 4), (1, 6), [[[0, 0], [1, 1]]], {}, "Pad"),
    "MIRROR_PAD": ((1, 4), (1, 6), [[[0, 0], [1, 1]]], {"mode": "REFLECT"}, "Pad"),
    "TRANSPOSE": ((2, 3), (3, 2), [[1, 0]], {}, "Transpose"),
    "SLICE": ((1, 4), (1, 2), [[0, 1], [1, 2]], {}, "Slice"),
    "STRIDED_SLICE": ((1, 4), (1, 2), [[0, 0], [1, 4], [1, 2]], {}, "Slice"),
    "GATHER": ((4, 2), (2, 2), [[0, 2]], {}, "Gather"),
    "GATHER_ND": ((4, 2), (2, 2), [[[0], [2]]], {}, "GatherND"),
    "EXPAND_DIMS": ((2, 2), (1, 2, 2), [[0]], {}, "Unsqueeze"),
    "SQUEEZE": ((1, 2, 2), (2, 2), [], {"squeeze_dims": [0]}, "Squeeze"),
    "TILE": ((1, 2), (2, 4), [[2, 2]], {}, "Tile"),
    "DEPTH_TO_SPACE": ((1, 2, 2, 4), (1, 4, 4, 1), [], {"block_size": 2}, "DepthToSpace"),
    "SPACE_TO_DEPTH": ((1, 4, 4, 1), (1, 2, 2, 4), [], {"block_size": 2}, "SpaceToDepth"),
    "RESIZE_NEAREST_NEIGHBOR": ((1, 2, 2, 1), (1, 4, 4, 1), [[4, 4]], {}, "Resize"),
    "RESIZE_BILINEAR": ((1, 2, 2, 1), (1, 4, 4, 1), [[4, 4]], {}, "Resize"),
    "REDUCE_MAX": ((1, 4), (1,), [[1]], {}, "ReduceMax"),
    "REDUCE_MIN": ((1, 4), (1,), [[1]], {}, "ReduceMin"),
    "SPLIT": ((1, 4), (1, 4), "axis", {"num_splits": 1}, "Split"),
    "MAXIMUM": ((1, 4), (1, 4), "twice", {}, "Max"),
    "MINIMUM": ((1, 4), (1, 4), "twice", {}, "Min"),
    "MEAN": ((1, 4), (1,), [[1]], {}, ""),
    "LEAKY_RELU": ((1, 4), (1, 4), [], {"alpha": 0.1}, ""),
    "ADD": ((1, 4), (1, 4), "twice", {}, ""),
}


def one(op, dtype, scale, result_scale, zero=0, result_zero=0):
    """A model of one operator, and its data."""
    shape, result, more, options, _ = COPIES[op]
    m = ModelBuilder(op)
    x = m.tensor("x", shape, dtype, scale=scale, zero_point=zero)
    y = m.tensor("y", result, dtype, scale=result_scale, zero_point=result_zero)

    def constant(name, value):
        array = np.array(value, np.int32)
        return m.tensor(name, array.shape, "int32", data=array)

    inputs = [constant("axis", 1), x] if more == "axis" else [x, x] if more == "twice" else \
        [x, *(constant(f"p{i}", a) for i, a in enumerate(more))]
    m.op(op, inputs, [y], **options)
    return m.build([x], [y])


def result(model, data):
    """What LiteRT computes, or None where it refuses the model."""
    try:
        return litert(model, {"x": data})["y"]
    except (RuntimeError, ValueError):
        return None


@pytest.mark.parametrize("op", COPIES)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_operators_of_one_scale_are_those_whose_kernels_refuse_or_ignore_another(op, dtype):
    zero = 128 if dtype == "uint8" else 0
    data = np.random.default_rng(3).integers(zero + 8, zero + 100, COPIES[op][0]).astype(dtype)
    same = result(one(op, dtype, 0.5, 0.5, zero, zero), data)
    assert same is not None
    other = result(one(op, dtype, 0.5, 1.0, zero, zero), data)
    ignored = other is None or bool((same == other).all())
    assert ignored == (COPIES[op][4] in q.SAME_TFLITE and (op, dtype) != ("CONCATENATION", "uint8"))


@pytest.mark.parametrize(("key", "want"), q.FIXED_TFLITE.items())
def test_prescribed_scales_are_those_that_kernels_demand(key, want):
    name = {"Softmax": "SOFTMAX", "Sigmoid": "LOGISTIC", "Tanh": "TANH", "LogSoftmax": "LOG_SOFTMAX",
            "LpNormalization": "L2_NORMALIZATION"}[key[0]]
    zero = 128 if key[1] == "uint8" else 0
    data = np.arange(-2, 2).astype(np.int32)[None] * 9 + zero

    def model(scale, zero_point):
        m = ModelBuilder(name)
        x = m.tensor("x", (1, 4), key[1], scale=1 / 2048 if key[1] == "int16" else 1 / 16, zero_point=zero)
        y = m.tensor("y", (1, 4), key[1], scale=scale, zero_point=zero_point)
        m.op(name, [x], [y], version=3 if key[1] == "int16" else 2, **({"beta": 1.0} if name == "SOFTMAX" else {}))
        return m.build([x], [y])

    scale, zero_point = want
    good = result(model(scale, zero_point), data.astype(key[1]))
    assert good is not None
    bad = result(model(scale * 2, zero_point), data.astype(key[1]))
    ignored = bad is None or bool((bad == good).all())
    assert ignored or key == ("Tanh", "int8")  # prescribed by the specification; the kernel takes any
