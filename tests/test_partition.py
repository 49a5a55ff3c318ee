"""Regions: maximal, without cycles, and what `check` says of each node."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers import Layers
from npulab.errors import UnsupportedError
from npulab.importers import load
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import Generic
from npulab.plan.partition import fewest_regions, partition
from npulab.targets.target import find_target


def graph_of(edges, count):
    """`count` nodes; node i computes value i + 1 from the values of `edges[i]`; value 0 is the input."""
    values = tuple(Value(i, f"v{i}", (1,), DType.UINT8) for i in range(count + 1))
    nodes = tuple(Node(i, Generic("X", {}), tuple(edges[i]), (i + 1,)) for i in range(count))
    return Graph("g", values, nodes, (0,), (count,), memoryview(b""), "", "tflite")


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 14))
    edges = [draw(st.lists(st.integers(0, i), min_size=1, max_size=3)) for i in range(count)]
    return graph_of(edges, count), [draw(st.booleans()) for _ in range(count)]


@given(graphs())
def test_regions_hold_every_node_once_and_only_read_what_earlier_regions_made(case):
    graph, npu = case

    parts = partition(graph, lambda n: npu[n.index])

    assert sorted(n.index for p in parts for n in p.nodes) == list(range(len(graph.nodes)))
    ready = {0}
    for p in parts:
        assert {npu[n.index] for n in p.nodes} == {p.on_npu}
        assert set(p.inputs) <= ready
        made = set(p.inputs)
        for n in p.nodes:
            assert set(n.inputs) <= made
            made |= set(n.outputs)
        ready |= set(p.outputs)


@given(graphs())
def test_no_region_could_take_in_the_next_one_of_its_kind(case):
    """Maximal: between two regions of one kind lies one of the other that the second waits for."""
    graph, npu = case

    parts = fewest_regions(graph, lambda n: npu[n.index])

    for i, first in enumerate(parts):
        for second in parts[i + 2 :: 2]:
            between = {v for p in parts[i + 1 :] if p.on_npu != first.on_npu for n in p.nodes for v in n.outputs}
            waits, todo = False, [v for n in second.nodes for v in n.inputs]
            while todo:
                v = todo.pop()
                waits = waits or v in between
                todo += graph.producer[v].inputs if v in graph.producer else ()
            assert waits


def test_every_broken_rule_is_told_with_what_was_found_and_what_to_try():
    n = Layers(1, True)
    x = n.input(1, 20, 20, 4)
    y = n.conv(x, 8, (12, 3), stride=3, activation="RELU_N1_TO_1")
    verdict, = find_target("a311d").check(load(n.build(y)), "best")

    assert verdict.where == "host"
    assert [str(r) for r in verdict.reasons] == [
        "Strides are equal in both directions, and 1 or 2. Found: stride 3x3. "
        "Try: use stride 1 or 2, or a convolution and a pooling.",
        "A fused activation is none, RELU or RELU6. Found: fused RELU_N1_TO_1. Try: use RELU or RELU6.",
        "A kernel, dilation included, is at most 11 by 11. Found: 12x3. "
        "Try: split the kernel into parts of at most 11x11.",
    ]


@pytest.mark.parametrize("plan", ["reference", "best"])
def test_per_channel_weights_go_to_the_host_and_the_reason_says_why(plan):
    n = Layers(1, True)
    x = n.input(1, 8, 8, 4)
    import numpy as np

    w = n.model.tensor("w", (3, 1, 1, 4), "int8", scales=[0.1, 0.2, 0.3], zero_points=[0, 0, 0], axis=0,
                       data=np.zeros((3, 1, 1, 4), np.int8))
    out = n.model.tensor("y", (1, 8, 8, 3), "int8", scale=0.5, zero_point=0)
    n.model.op("CONV_2D", [x, w], [out], padding="SAME", stride_w=1, stride_h=1)
    verdict, = find_target("a311d").check(load(n.model.build([x], [out])), plan)

    assert "Found: weights have 3 scales, one for each output channel." in str(verdict.reasons[0])


def test_the_reference_refuses_a_relu6_that_ends_above_six_and_best_takes_it():
    n = Layers(1, False)
    x = n.input(1, 8, 8, 4)
    model = load(n.build(n.conv(x, 8, (3, 3), activation="RELU6", out_scale=6.00001 / 255, out_zero=0)))
    target = find_target("a311d")

    reference, = target.check(model, "reference")
    best, = target.check(model, "best")
    assert reference.reasons[0].found.startswith("the range ends at 6.0000")
    assert best.where == "npu"


def test_an_output_that_the_file_stores_is_refused_by_name():
    n = Layers(1, False)
    x = n.input(1, 4, 4, 2)
    n.conv(x, 3, (1, 1))
    model = load(n.model.build([x], [3, 1]))

    with pytest.raises(UnsupportedError) as e:
        find_target("a311d").compile(model, "best")

    assert str(e.value) == (
        "output 't1' is stored in the file of 'model'\n"
        "  rule    Outputs of a program are computed tensors.\n"
        "  try     take it out of the outputs"
    )
