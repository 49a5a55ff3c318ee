"""ONNX files as Graphs and back: nothing is lost, ONNX Runtime agrees, and no file is believed."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import ModelError, UnsupportedError, UsageError
from npulab.exporters.onnx import to_onnx
from npulab.importers import load
from npulab.ir import DType
from npulab.ir.ops import Embedded, OnnxOp
from npulab.targets.target import PlanOptions, find_target
from shared import MODELS, needs_shared

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)


def tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model(nodes, inputs, outputs, constants=(), opset=17, **rest):
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
                              [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs], list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9, **rest)


def small(**rest):
    """A convolution and a RELU."""
    weights = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
    return model([helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", pads=[1, 1, 1, 1], strides=[2, 2]),
                  helper.make_node("Relu", ["y"], ["z"], "relu")],
                 [("x", FLOAT, ["n", 3, 16, 16])], [("z", FLOAT, None)],
                 [tensor("w", weights), tensor("b", np.arange(4, dtype=np.float32))], **rest)


def same(a, b):
    """Equal to the last byte, but for the file they came from."""
    def value(v):
        return v.name, v.shape, v.dtype, v.dynamic_axes, v.has_shape, v.constant

    def attribute(x):
        return (x.dtype.str, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else (type(x), x)

    def node(n):
        return (n.index, n.name, n.op.name, n.op.domain, n.inputs, n.outputs,
                {k: attribute(x) for k, x in n.op.attributes.items()})

    assert [value(v) for v in a.values] == [value(v) for v in b.values]
    assert [node(n) for n in a.nodes] == [node(n) for n in b.nodes]
    assert (a.inputs, a.outputs, a.header) == (b.inputs, b.outputs, b.header)


def runtime(data, inputs):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, inputs)


# what is read


def test_a_graph_has_the_file_s_names_operators_and_sizes():
    g = load(small().SerializeToString())

    assert (g.format, [str(n) for n in g.nodes], [n.name for n in g.nodes]) == (
        "onnx", ["Conv (node 0)", "Relu (node 1)"], ["conv", "relu"])
    conv = g.nodes[0].op
    assert isinstance(conv, OnnxOp)
    assert (conv.domain, conv.attributes) == ("", {"pads": (1, 1, 1, 1), "strides": (2, 2)})
    assert [str(v) for v in g.values] == ["x: float32[1, 3, 16, 16]", "w: float32[4, 3, 3, 3]", "b: float32[4]",
                                          "y: float32[1, 4, 8, 8]", "z: float32[1, 4, 8, 8]"]
    assert [v.is_constant for v in g.values] == [False, True, True, False, False]
    assert g.values[2].array().tolist() == [0, 1, 2, 3]
    assert g.header.opsets == (("", 17),)
    assert [g.values[v].name for v in (*g.inputs, *g.outputs)] == ["x", "z"]


def test_sizes_are_bound_by_name_or_by_axis():
    net = model([helper.make_node("Relu", ["x"], ["y"])], [("x", FLOAT, ["batch", 3, "height", None])],
                [("y", FLOAT, None)]).SerializeToString()

    assert load(net).values[0].shape == (1, 3, 1, 1)
    assert load(net).values[1].dynamic_axes == (2, 3)
    assert load(net, {"height": 20}).values[1].shape == (1, 3, 20, 1)
    bound = load(net, {"batch": 2, "height": 20, "x.3": 30}).values[1]
    assert (bound.shape, bound.dynamic_axes) == ((2, 3, 20, 30), ())
    same(load(net, {"height": 20}), load(to_onnx(load(net, {"height": 20}))))
    with pytest.raises(UsageError, match="has no dynamic dimension 'width'"):
        load(net, {"width": 20})
    with pytest.raises(UsageError, match="cannot be 0"):
        load(net, {"height": 0})


def test_constants_in_every_form_are_the_same_values():
    forms = {
        "raw": tensor("raw", np.array([1, -2, 300], np.int32)),
        "typed": helper.make_tensor("typed", TensorProto.INT32, [3], [1, -2, 300]),
        "half": helper.make_tensor("half", TensorProto.FLOAT16, [2], [1.5, -0.25]),
        "flag": helper.make_tensor("flag", TensorProto.BOOL, [2], [True, False]),
        "words": helper.make_tensor("words", TensorProto.STRING, [2], ["ab", "c"]),
        "four": helper.make_tensor("four", TensorProto.INT4, [3], [1, -2, 7]),
    }
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in forms]
    nodes += [helper.make_node("Constant", [], ["ints"], value_ints=[1, 2]),
              helper.make_node("Constant", [], ["one"], value_float=0.5),
              helper.make_node("Constant", [], ["t"], value=tensor("", np.arange(3.0))),
              helper.make_node("Identity", ["ints"], ["i"]), helper.make_node("Identity", ["t"], ["u"]),
              helper.make_node("Identity", ["one"], ["o"])]
    g = load(model(nodes, [], [("i", TensorProto.INT64, [2])], forms.values(), opset=21).SerializeToString())
    by_name = {v.name: v for v in g.values}

    assert by_name["raw"].array().tolist() == by_name["typed"].array().tolist() == [1, -2, 300]
    assert by_name["half"].array().tolist() == [1.5, -0.25]
    assert by_name["flag"].array().tolist() == [True, False]
    assert by_name["ints"].array().tolist() == [1, 2]
    assert by_name["one"].array() == np.float32(0.5)
    assert by_name["t"].array().tolist() == [0, 1, 2]
    assert (by_name["four"].dtype, bytes(by_name["four"].constant)) == (DType.INT4, bytes([0xE1, 0x07]))
    assert {n.op.name for n in g.nodes} == {"Identity"}
    same(g, load(to_onnx(g)))


def test_nodes_out_of_order_are_put_in_order():
    net = model([helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Neg", ["a"], ["b"])], [("a", FLOAT, [2])],
                [("c", FLOAT, [2])])

    assert [n.op.name for n in load(net.SerializeToString()).nodes] == ["Neg", "Relu"]


def test_absent_outputs_and_inputs_keep_their_places():
    net = model([helper.make_node("LSTM", ["x", "w", "r", "", "", "h"], ["", "", "c"], hidden_size=2)],
                [("x", FLOAT, [3, 1, 4]), ("h", FLOAT, [1, 1, 2])], [("c", FLOAT, [1, 1, 2])],
                [tensor("w", np.zeros((1, 8, 4), np.float32)), tensor("r", np.zeros((1, 8, 2), np.float32))])
    g = load(net.SerializeToString())

    (node,) = g.nodes
    assert [i < 0 for i in node.inputs] == [False, False, False, True, True, False]
    assert [i < 0 for i in node.outputs] == [True, True, False]
    same(g, load(to_onnx(g)))


def test_bodies_are_handed_on_and_what_they_read_is_known():
    def branch(op):
        return helper.make_graph([helper.make_node(op, ["x"], ["r"])], op, [],
                                 [helper.make_tensor_value_info("r", FLOAT, [2])])
    net = model([helper.make_node("If", ["c"], ["y"], then_branch=branch("Neg"), else_branch=branch("Abs"))],
                [("c", TensorProto.BOOL, []), ("x", FLOAT, [2])], [("y", FLOAT, [2])])
    g = load(net.SerializeToString())

    bodies = g.nodes[0].op.attributes.values()
    assert all(isinstance(b, Embedded) and [g.values[v].name for v in b.captures] == ["x"] for b in bodies)
    assert [n.op.name for n in g.consumers[g.inputs[1]]] == ["If"]
    same(g, load(to_onnx(g)))
    x = {"c": np.array(True), "x": np.array([1, -2], np.float32)}
    assert runtime(to_onnx(g), x)[0].tolist() == [-1, 2]


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_versions_metadata_and_attributes_of_every_kind_come_back(opset):
    net = small(opset=opset, producer_name="p", doc_string="d", model_version=3)
    net.metadata_props.add(key="names", value="{0: 'a'}")
    net.graph.node[0].attribute.append(helper.make_attribute("weird", [1.5, 2.0]))
    for value in (1.25, "text", [b"\xff", "s"], np.array([[1, 2]], np.int8)):
        attribute = helper.make_attribute(f"a{len(net.graph.node[0].attribute)}",
                                          tensor("", value) if isinstance(value, np.ndarray) else value)
        net.graph.node[0].attribute.append(attribute)
    net.graph.node[0].domain = "mine"
    net.opset_import.append(helper.make_opsetid("mine", 1))
    g = load(net.SerializeToString())

    back = onnx.ModelProto.FromString(to_onnx(g))
    same(g, load(to_onnx(g)))
    for field in ("producer_name", "doc_string", "model_version", "opset_import", "metadata_props"):
        assert getattr(back, field) == getattr(net, field)
    assert back.graph.node[0] == net.graph.node[0]


@needs_shared
@pytest.mark.parametrize(("path", "dims"), [
    ("float/ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x.2": 48, "x.3": 192}),
    ("float/efficientnet_lite0_imagenet_float.onnx", {}), ("float/yolov5n_coco_float.onnx", {})])
def test_a_real_network_comes_back_whole(path, dims):
    g = load(MODELS / path, dims)
    data = to_onnx(g)

    same(g, load(data))
    assert to_onnx(load(data)) == data
    onnx.checker.check_model(data)
    (v,) = (g.values[i] for i in g.inputs)
    inputs = {v.name: np.random.default_rng(1).random(v.shape, np.float32)}
    for want, got in zip(runtime((MODELS / path).read_bytes(), inputs), runtime(data, inputs), strict=True):
        assert (want == got).all()


def test_many_joints_of_data_do_not_hide_the_shapes_behind_them():
    """Shapes are followed through constants, but not where those grow without bound: data is neither."""
    joints = [helper.make_node("Concat", [f"v{i}", f"v{i}"], [f"w{i}"], axis=1) for i in range(20)]
    halves = [helper.make_node("MaxPool", [f"w{i}"], [f"v{i + 1}"], kernel_shape=[1, 1], strides=[2, 1])
              for i in range(20)]
    nodes = [n for pair in zip(joints, halves, strict=True) for n in pair]
    nodes += [helper.make_node("Shape", ["v0"], ["s"]), helper.make_node("Reshape", ["v0", "s"], ["y"])]
    net = helper.make_model(helper.make_graph(
        nodes, "n", [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [1, 1, 2**20, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
         helper.make_tensor_value_info("v20", TensorProto.FLOAT, None)]),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    g = load(net.SerializeToString())

    assert [g.values[v].shape for v in g.outputs] == [(1, 1, 2**20, 1), (1, 2**20, 1, 1)]
    assert not any(v.dynamic_axes for v in g.values)


# weights outside the file


def outside(folder, location="weights.bin"):
    net = small()
    inside = net.SerializeToString()
    onnx.save_model(net, folder / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    stored = onnx.load(folder / "net.onnx", load_external_data=False)
    for t in stored.graph.initializer:
        for entry in t.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "net.onnx").write_bytes(stored.SerializeToString())
    return folder / "net.onnx", inside


def test_weights_outside_the_file_are_mapped(tmp_path):
    path, inside = outside(tmp_path)
    g = load(path)

    assert [v.constant for v in g.values] == [v.constant for v in load(inside).values]
    before = g.digest
    (tmp_path / "weights.bin").write_bytes(bytes(len((tmp_path / "weights.bin").read_bytes())))
    assert load(path).digest != before


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "", "a/../../secret", "gone.bin", ".", "link"])
def test_only_files_beside_the_model_are_opened(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(10_000))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    path, _ = outside(folder, location)

    with pytest.raises(ModelError, match=r"lies outside the model's folder|which is not there"):
        load(path)
    with pytest.raises(ModelError, match="has no folder"):
        load(path.read_bytes())


@pytest.mark.parametrize(("key", "value", "text"), [
    ("offset", "9999999999", "lies outside"), ("offset", "-8", "lies outside"), ("length", "7", "wrong length"),
    ("length", "99999999999999999999", "lies outside"), ("offset", "x", "no number")])
def test_places_outside_the_weights_are_refused(tmp_path, key, value, text):
    path, _ = outside(tmp_path)
    stored = onnx.load(path, load_external_data=False)
    for entry in stored.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(stored.SerializeToString())

    with pytest.raises(ModelError, match=text):
        load(path)


# wrong files


def in_a_body(node):
    """A node that only one branch of a condition has."""
    bodies = [helper.make_graph([n], "body", [], [helper.make_tensor_value_info(n.output[0], FLOAT, None)])
              for n in (node, helper.make_node("Identity", ["y"], ["v"]))]
    return helper.make_node("If", ["x"], ["z"], "if", then_branch=bodies[0], else_branch=bodies[1])


def broken(edit):
    net = small()
    edit(net.graph)
    return net.SerializeToString()


@pytest.mark.parametrize(("edit", "text"), [
    (lambda g: g.node[1].input.__setitem__(0, "nothing"), "Relu 'relu' of 'model' reads 'nothing', which nothing"),
    (lambda g: g.node[0].input.__setitem__(0, "z"), "has a cycle: Conv 'conv' waits for its own result"),
    (lambda g: g.node[1].output.__setitem__(0, "y"), "writes 'y' a second time"),
    (lambda g: g.node[1].output.__setitem__(0, "x"), "writes 'x' a second time"),
    (lambda g: g.output[0].__setattr__("name", "no"), "an output of 'model' is 'no', which nothing computes"),
    (lambda g: g.initializer[0].__setattr__("raw_data", b"123"), "constant 'w' has data of the wrong length"),
    (lambda g: g.initializer[0].dims.__setitem__(0, -4), "negative extent"),
    (lambda g: g.initializer[0].dims.__setitem__(0, 2**60), "too large"),
    (lambda g: g.initializer[0].__setattr__("data_type", 17), "elements that npulab does not read"),
    (lambda g: g.initializer[1].__setattr__("name", "w"), "two constants called 'w'"),
    (lambda g: g.sparse_initializer.add(), "sparse constants"),
    (lambda g: g.node[0].__setattr__("op_type", ""), "has no operator"),
    (lambda g: g.ClearField("node") or g.ClearField("initializer"), "without a graph"),
    (lambda g: g.node[0].attribute[1].ints.__setitem__(0, 0),
     "Conv 'conv' of 'model' has strides 0, 2\n  want    at least 1"),
    (lambda g: g.node[0].attribute[1].ints.__setitem__(1, -2), "has strides 2, -2"),
    (lambda g: g.node[0].attribute.append(helper.make_attribute("dilations", [0, 0])), "has dilations 0, 0"),
    (lambda g: g.node[0].attribute.append(helper.make_attribute("kernel_shape", [3, 0])), "has kernel_shape 3, 0"),
    (lambda g: g.node[0].attribute.append(helper.make_attribute("group", 0)), "has group 0"),
    (lambda g: g.node[0].attribute.append(helper.make_attribute("group", -1)), "has group -1"),
    (lambda g: g.node[1].CopyFrom(in_a_body(helper.make_node(
        "ConvTranspose", ["y", "w"], ["v"], "deep", group=0))), "ConvTranspose 'deep' of 'model' has group 0"),
    (lambda g: g.node[1].CopyFrom(helper.make_node("MaxPool", ["y"], ["z"], "pool", kernel_shape=[2, 2],
                                                   strides=[0, 1])), "MaxPool 'pool' of 'model' has strides 0, 1"),
    (lambda g: g.node[0].attribute.append(helper.make_attribute("group", 2)),
     "Conv 'conv' of 'model' has filters for another number of channels, or of groups\n  got     "),
])
def test_what_is_wrong_with_a_file_is_said_with_the_node(edit, text):
    with pytest.raises(ModelError) as e:
        load(broken(edit))
    assert text in str(e.value)


@pytest.mark.parametrize(("op", "channels", "groups", "filters", "right"), [
    ("Conv", 4, 1, (6, 4, 3, 3), True), ("Conv", 4, 2, (6, 2, 3, 3), True), ("Conv", 4, 4, (8, 1, 3, 3), True),
    ("Conv", 4, 3, (6, 1, 3, 3), False), ("Conv", 4, 2, (5, 2, 3, 3), False), ("Conv", 4, 1, (6, 3, 3, 3), False),
    ("ConvTranspose", 4, 1, (4, 6, 3, 3), True), ("ConvTranspose", 4, 2, (4, 3, 3, 3), True),
    ("ConvTranspose", 4, 3, (4, 2, 3, 3), False), ("ConvTranspose", 4, 1, (6, 4, 3, 3), False)])
def test_groups_divide_channels_and_filters_have_theirs(op, channels, groups, filters, right):
    """ONNX Runtime takes the same files."""
    import onnxruntime

    net = model([helper.make_node(op, ["x", "w"], ["y"], "conv", group=groups)], [("x", FLOAT, [1, channels, 9, 9])],
                [("y", FLOAT, None)], [tensor("w", np.ones(filters, np.float32))])
    if right:
        assert load(net.SerializeToString()).nodes[0].inputs
        onnxruntime.InferenceSession(net.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"x": np.ones((1, channels, 9, 9), np.float32)})
        return
    with pytest.raises(ModelError, match="filters for another number of channels, or of groups") as e:
        load(net.SerializeToString())
    assert e.value.facts["got"] == (f"{channels} channels, {groups} groups, "
                                    f"filters {'x'.join(map(str, filters))}")
    with pytest.raises(Exception, match=r"(?i)channel|group|shape"):
        onnxruntime.InferenceSession(net.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"x": np.ones((1, channels, 9, 9), np.float32)})


def test_another_domain_s_strides_are_its_own():
    net = model([helper.make_node("Walk", ["x"], ["y"], domain="own", strides=[0], group=0)], [("x", FLOAT, [1])],
                [("y", FLOAT, [1])])
    net.opset_import.append(helper.make_opsetid("own", 1))

    assert load(net.SerializeToString()).nodes[0].op.attributes == {"strides": (0,), "group": 0}


def test_a_graph_of_100_000_nodes_and_a_cycle_of_as_many_take_seconds():
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(100_000)]
    long = model(nodes, [("v0", FLOAT, [1, 8])], [("v100000", FLOAT, [1, 8])]).SerializeToString()
    nodes[0].input[0] = "v100000"
    cycle = model(nodes, [], [("v100000", FLOAT, [1, 8])]).SerializeToString()

    start = time.process_time()
    g = load(long)
    with pytest.raises(ModelError, match="100000 nodes in or behind cycles"):
        load(cycle)
    assert time.process_time() - start < 30
    assert len(g.nodes) == 100_000
    assert g.values[-1].shape == (1, 8)


def test_memory_is_a_few_times_the_file_s():
    net = model([helper.make_node("Add", ["x", "w"], ["y"])], [("x", FLOAT, [1])], [("y", FLOAT, None)],
                [tensor("w", np.zeros(5_000_000, np.float32))]).SerializeToString()

    tracemalloc.start()
    load(net)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(net)


def test_bodies_in_bodies_end_somewhere():
    body = b"\x0a\x00"
    for _ in range(200):  # graph { node { attribute { g } } }
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            body = tag + _varint(len(body)) + body
    data = b"\x08\x08\x3a" + _varint(len(body)) + body

    with pytest.raises(ModelError, match="not an ONNX model, or damaged"):
        load(data)


def _varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


DAMAGED = small().SerializeToString()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DAMAGED) - 1), st.integers(0, 255)), min_size=1, max_size=6),
       st.integers(8, len(DAMAGED)))
def test_damaged_files_are_refused_or_read(changes, size):
    data = bytearray(DAMAGED)
    for at, byte in changes:
        data[at] = byte
    data[:3] = DAMAGED[:3]
    try:
        g = load(bytes(data[:size]))
    except (ModelError, UsageError):
        return
    g.verify()


def test_a_target_that_compiles_tflite_says_so():
    with pytest.raises(UnsupportedError, match="'model' is an ONNX model, and a311d compiles TFLite models so far"):
        find_target("a311d").check(load(small().SerializeToString()), "best", PlanOptions())
