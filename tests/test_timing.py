"""The timing model: its counts against the virtual NPU and a tile-by-tile walk, its laws, and the published ladder."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npulab
from layers import Layers, litert
from npulab import api
from npulab.errors import ModelError, UsageError
from npulab.profiling.join import as_data, by_bound, gains
from npulab.profiling.types import span_ns
from npulab.program.types import Choice, NpuStep
from npulab.targets.target import PlanOptions, find_target
from npulab.targets.vivante import best, cascade, order, search, timing
from npulab.targets.vivante.chips import A311D, LIMITS
from npulab.targets.vivante.machine import VirtualNPU
from npulab.targets.vivante.nn import NNDescriptor
from npulab.targets.vivante.options import FEATURES
from scripts import loaded
from shared import MODELS, model_files, needs_shared

pytest.importorskip("ai_edge_litert", reason="host steps run in LiteRT: pip install 'npulab[litert]'")

SAMPLE = Path(npulab.__file__).parent / "samples" / "digits.tflite"
SWITCHES = [
    PlanOptions(zero_runs=False), PlanOptions(kernel_cache=False), PlanOptions(image_cache=False),
    PlanOptions(zero_runs=False, kernel_cache=False, image_cache=False), PlanOptions(channels="multiple-of-cores"),
]


def network(seed: int, signed: bool = False) -> Layers:
    """A little of everything: stride 2, depthwise, pointwise, odd channels, an addition, a concatenation."""
    n = Layers(seed, signed)
    rng = np.random.default_rng(seed)
    x = n.input(1, int(rng.integers(9, 40)), int(rng.integers(9, 40)), 3)
    a = n.conv(x, int(rng.integers(9, 40)), (3, 3), stride=2, activation="RELU")
    b = n.depthwise(a, (3, 3), activation="RELU6")
    c = n.conv(b, n.shapes[a][3], (1, 1), sparse=0.3)
    d = n.add(a, c)
    e = n.depthwise(d, (5, 5), stride=2)
    n.outputs = [n.average(n.concat(e, e)), d]
    return n


def tame(seed: int) -> Layers:
    """What the open driver does right: square images of even size, stride 2 from SAME 3x3, no average."""
    n = Layers(seed, False)
    rng = np.random.default_rng(seed)
    x = n.input(1, 32, 32, 3)
    a = n.conv(x, 8 * int(rng.integers(4, 9)), (3, 3), stride=2, activation="RELU")
    b = n.depthwise(a, (3, 3))
    c = n.conv(b, 128, (1, 1), sparse=0.3)
    d = n.depthwise(c, (3, 3), stride=2)
    e = n.conv(d, 128, (1, 1))
    f = n.conv(e, 21, (1, 1))
    n.outputs = [n.add(d, e), f]
    return n


def graph_of(make, seed):
    n = make(seed)
    return npulab.load(n.build(*n.outputs))


class Recorder(VirtualNPU):
    """A virtual NPU that keeps the traces of all submissions."""

    def __init__(self, chip):
        super().__init__(chip)
        self.kept = []

    def submit(self, words):
        faults = super().submit(words)
        self.kept.append(list(self.trace))
        return faults


def touched_by_the_machine(program, inputs):
    """Per job: what its descriptors' traces add up to."""
    device = Recorder(A311D)
    api.open_session(program, device).run(inputs)
    out = []
    for step, trace in zip([s for s in program.steps if isinstance(s, NpuStep)], device.kept[1:], strict=True):
        at = 0
        for job in step.jobs:
            works = [t.work for t in trace[at : at + len(job.descriptors)]]
            at += len(job.descriptors)
            out.append((job.kind, sum(w.weights for w in works), sum(w.read for w in works),
                        sum(w.written for w in works)))
        assert at == len(trace)
    return out


@pytest.mark.parametrize(("plan", "make", "seed"), [
    *(("best", network, seed) for seed in range(6)), *(("best", tame, seed) for seed in range(2)),
    *(("reference", tame, seed) for seed in range(3))])
def test_bytes_equal_those_that_the_virtual_npu_touches(plan, make, seed):
    n = make(seed)
    program = api.compile(npulab.load(n.build(*n.outputs)), plan=plan)

    counts = [c for c in timing.count(program, A311D) if c.job is not None]

    assert [(c.unit, c.touched.get("weights", 0), c.touched["input"], c.touched["output"]) for c in counts] \
        == touched_by_the_machine(program, n.samples())


@needs_shared
@pytest.mark.parametrize("plan", ["best", "reference"])
def test_bytes_of_a_real_network_equal_those_that_the_virtual_npu_touches(plan):
    program = api.compile(MODELS / "quantized" / "mobilenet_v1_0.25_128_quant.tflite", plan=plan)
    inputs = {0: np.random.default_rng(1).integers(0, 256, (1, 128, 128, 3)).astype("uint8")}

    counts = [c for c in timing.count(program, A311D) if c.job is not None]

    assert [(c.unit, c.touched.get("weights", 0), c.touched["input"], c.touched["output"]) for c in counts] \
        == touched_by_the_machine(program, inputs)


# traffic, tile by tile


def walked(d, streams, chip):
    """(input bytes, coefficient bytes, tiles) by walking every tile and superblock without any cache."""
    per_core = -(-d.out_z_size // chip.nn_cores)
    blocks = -(-per_core // d.kernels_per_core)
    read = weights = tiles = 0
    for y in range(0, d.out_y_size, d.out_tile_y):
        for x in range(0, d.out_x_size, d.out_tile_x):
            tiles += 1
            rows = [r for r in range(y + d.in_y_offset, min(y + d.out_tile_y, d.out_y_size) + d.kernel_y - 1
                                     + d.in_y_offset) if 0 <= r < d.in_y_size]
            columns = [c for c in range(x + d.in_x_offset, min(x + d.out_tile_x, d.out_x_size) + d.kernel_x - 1
                                        + d.in_x_offset) if 0 <= c < d.in_x_size]
            read += len(rows) * len(columns) * d.kernel_z * blocks
            weights += streams.size
    return read, weights, tiles


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 5, 8]),
       st.integers(1, 64), st.integers(1, 20), st.integers(1, 6), st.integers(-3, 0))
def test_traffic_is_that_of_a_walk_over_tiles(x, y, in_c, out_c, kernel, tile_x, tile_y, per_core, offset):
    d = NNDescriptor(kernel_x=kernel, kernel_y=kernel, kernel_z=in_c, kernels_per_core=per_core, in_x_size=x,
                     in_y_size=y,
                 in_x_stride=x, in_y_stride=y, out_x_size=x, out_y_size=y, out_z_size=out_c, out_x_stride=x,
                 out_y_stride=y, out_tile_x=tile_x, out_tile_y=tile_y, in_x_offset=offset, in_y_offset=offset,
                 kernel_address=0x1000000, in_image_address=0x2000000, out_image_address=0x3000000, in_border_const=0,
                 coef_zero_point=0, out_zero_point=0, post_multiplier=0, post_shift=15)
    streams = timing.Streams(1000, 500, 1000)
    read, weights, tiles = walked(d, streams, A311D)

    c = timing.count_nn(d, streams, A311D, 0)

    assert c.dram == {"weights": weights, "input": read, "output": x * y * out_c}
    assert not c.sram
    assert all(n >= 0 for n in c.waste.values())
    assert c.macs == c.macs_useful + sum(c.waste.values())
    assert c.cycles >= tiles  # a tile takes a cycle at least


# laws


def program_of(seed, plan="best"):
    return api.compile(graph_of(network, seed), plan=plan)


@pytest.mark.parametrize("plan", ["best", "reference"])
def test_rows_add_up_to_the_total_exactly(plan):
    p = api.profile(program_of(3, plan))
    data = as_data(p)

    assert sum(r.ns for r in p.rows) == sum(s.ns for s in p.spans) == p.total_ns
    assert sum(r.dram_bytes for r in p.rows) == p.dram_bytes
    assert sum(r.sram_bytes for r in p.rows) == p.sram_bytes
    assert sum(by_bound(p).values()) == p.total_ns
    assert [r.node for r in p.rows if r.node is not None] == list(range(7))
    assert sum(n["ms"] for n in data["nodes"]) == pytest.approx(data["total_ms"], abs=1e-9)
    assert data["interval_ms"][0] < data["total_ms"] < data["interval_ms"][1]
    assert {"target", "plan", "options", "total_ms", "interval_ms", "dram_bytes", "sram_bytes", "nodes",
            "witness"} <= data.keys()
    assert {"node", "op", "unit", "ms", "bound", "macs", "macs_useful", "dram_bytes"} <= data["nodes"][0].keys()


def test_gains_are_what_a_free_resource_would_save():
    p = api.profile(program_of(4))

    for term, gain in gains(p).items():
        assert gain == p.total_ns - sum(span_ns({**s.terms, term: 0}) for s in p.spans)
        assert gain >= 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.floats(1.0, 50.0), st.sampled_from(["dram_bandwidth", "clock"]),
       st.floats(1e8, 1e10), st.sampled_from(["best", "reference"]))
def test_time_never_falls_when_bandwidth_or_clock_shrink(seed, factor, name, value, plan):
    program = programs[seed, plan]

    assert api.profile(program, what_if={name: value / factor}).total_ns \
        >= api.profile(program, what_if={name: value}).total_ns


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3), st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.sampled_from(["best", "reference"]))
def test_time_never_falls_when_sram_shrinks(seed, a, b, plan):
    small, large = sorted((a, b))

    assert api.profile(graphs[seed], plan=plan, what_if={"sram": small}).total_ns \
        >= api.profile(graphs[seed], plan=plan, what_if={"sram": large}).total_ns


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3), st.integers(1, 16), st.integers(1, 16))
def test_fewer_cores_never_do_the_same_multiplications_faster(seed, a, b):
    few, many = sorted((a, b))

    def macs_ns(cores):
        p = api.profile(graphs[seed], plan="reference", what_if={"nn_cores": cores, "dram_bandwidth": 1e12})
        return max(r.terms.get("macs", 0) for r in p.rows)

    assert macs_ns(few) >= macs_ns(many)


@pytest.mark.parametrize(("make", "seed"), [(tame, seed) for seed in range(12)])
def test_the_search_is_never_slower_than_the_driver(make, seed):
    """Where that driver computes what the model says: elsewhere it is quick because it is wrong."""
    g = graph_of(make, seed)

    assert api.profile(g).total_ns <= api.profile(g, plan="reference").total_ns


graphs = {seed: graph_of(tame if seed % 2 else network, seed) for seed in range(4)}
programs = {(seed, plan): api.compile(g, plan=plan) for seed, g in graphs.items() for plan in ("best", "reference")}


# options


@pytest.mark.parametrize("options", SWITCHES, ids=lambda o: ",".join(o.as_text()))
@pytest.mark.parametrize("plan", ["best", "reference"])
def test_a_switch_changes_the_program_and_never_the_answer(options, plan):
    n = tame(5)
    g, inputs = npulab.load(n.build(*n.outputs)), n.samples()
    plain, other = api.compile(g, plan=plan), api.compile(g, plan=plan, options=options)

    assert (plain.sections, plain.steps) != (other.sections, other.steps)
    assert other.options == options.as_text()
    want, got = api.open_session(plain).run(inputs), api.open_session(other).run(inputs)
    uneven = options.channels != "any"  # the host rounds some elements otherwise
    for name in want:
        assert np.abs(want[name].astype(int) - got[name].astype(int)).max() <= (2 if uneven else 0)
    if plan == "reference" and not uneven:
        assert api.profile(other).total_ns >= api.profile(plain).total_ns


@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_a_feature_never_changes_the_answer_and_is_reported(feature):
    n = network(6)
    g, inputs = npulab.load(n.build(*n.outputs)), n.samples()
    plain, other = api.compile(g), api.compile(g, options=PlanOptions(features=frozenset({feature})))

    want, got = api.open_session(plain).run(inputs), api.open_session(other).run(inputs)
    assert all((want[name] == got[name]).all() for name in want)
    assert api.profile(other).total_ns <= api.profile(plain).total_ns
    assert api.profile(other).features == {feature: "inferred"}


def deep(seed: int) -> Layers:
    """Convolutions in a row over an image that does not fit on-chip SRAM, with stride 2 and 5x5 among them."""
    n = Layers(seed, False)
    rng = np.random.default_rng(seed)
    h = n.conv(n.input(1, 70 + seed, 90, 8), 96, (3, 3), activation="RELU")
    for _ in range(3):
        kernel = [(1, 1), (3, 3), (5, 5)][int(rng.integers(3))]
        h = n.depthwise(h, (3, 3), stride=int(rng.integers(1, 3))) if rng.random() < 0.5 else n.conv(h, 64, kernel)
    n.outputs = [n.conv(h, 10, (1, 1))]
    return n


@pytest.mark.parametrize("seed", range(6))
def test_stripes_through_on_chip_sram_give_the_same_bytes(seed, monkeypatch):
    n = deep(seed)
    g, inputs = npulab.load(n.build(*n.outputs)), n.samples()
    monkeypatch.setattr("npulab.targets.vivante.on_chip._resident", _nothing_but_stripes)
    plain, other = api.compile(g), api.compile(g, options=PlanOptions(features=frozenset({"cascade"})))

    want, got = api.open_session(plain).run(inputs), api.open_session(other).run(inputs)
    assert all((want[name] == got[name]).all() for name in want)
    assert any(c.feature == "cascade" for c in other.choices)
    assert api.profile(other).dram_bytes < api.profile(plain).dram_bytes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 40),
       st.integers(1, 40), st.sampled_from(["SAME", "VALID"]), st.booleans(), st.booleans())
def test_either_way_to_a_stride_of_2_gives_the_same_bytes(seed, signed, kernel, h, w, padding, depthwise, first_pixel):
    n = Layers(seed, signed)
    x = n.input(1, h + kernel[0], w + kernel[1], int(n.rng.integers(1, 20)))
    if depthwise:
        y = n.depthwise(x, kernel, stride=2, padding=padding)
    else:
        y = n.conv(x, int(n.rng.integers(1, 20)), kernel, stride=2, padding=padding)
    g, inputs = npulab.load(n.build(y)), n.samples()
    plain = api.compile(g)
    with pytest.MonkeyPatch.context() as patch:
        real = best._Lowering.strided
        patch.setattr(best._Lowering, "strided", lambda self, node, source, _: real(self, node, source, first_pixel))
        other = api.compile(g)

    want, got = api.open_session(plain).run(inputs), api.open_session(other).run(inputs)
    assert all((want[name] == got[name]).all() for name in want)


def test_a_stride_of_2_without_space_to_depth_is_taken_where_it_is_faster():
    n = Layers(0, False)
    g = npulab.load(n.build(n.conv(n.input(1, 224, 224, 3), 32, (3, 3), stride=2)))
    plain, other = api.profile(g), api.profile(g, options=PlanOptions(features=frozenset({"stride-2"})))

    (found,) = [d for d in other.decisions if d.feature == "stride-2"]
    assert found.choice == "every other pixel of a full convolution"
    assert plain.total_ns - other.total_ns == pytest.approx(found.saved_ns, rel=0.01)  # streams are estimated there
    assert other.features == {"stride-2": "inferred"}


def forked(seed: int) -> Layers:
    """A tensor that two or three branches read, of which some go on, with strides among them."""
    n = Layers(seed, False)
    rng = np.random.default_rng(seed)
    trunk = n.conv(n.input(1, 40 + seed, 30, 8), 24, (3, 3), activation="RELU")
    n.outputs = []
    for kernel in ((1, 1), (3, 3), (5, 5))[: int(rng.integers(2, 4))]:
        h = n.conv(trunk, int(rng.integers(8, 24)), kernel)
        n.outputs.append(n.depthwise(h, (3, 3), stride=2) if rng.random() < 0.4 else h)
    return n


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(6))
def test_stripes_across_branches_give_the_same_bytes(seed, count, monkeypatch):
    """The largest tree there is, whatever it costs."""
    n = forked(seed)
    g, inputs = npulab.load(n.build(*n.outputs)), n.samples()
    sizes = []

    def forced(now, tensors, search, capacity, alignment):
        group = max(cascade.groups(now.jobs, tensors.shared), key=len)
        cut = cascade.striped(now.jobs, group, count, len(now.sizes))
        sizes.append((len(group), len({s.source for s in group})))
        monkeypatch.setattr("npulab.targets.vivante.on_chip._one_group_more", lambda *_: (None, 1))
        jobs = [*now.jobs[: group[0].first], *cut.jobs, *now.jobs[group[-1].last :]]
        found = _nothing_but_stripes(jobs, [*now.sizes, *cut.sizes], tensors, search, capacity, alignment)
        return replace(found, choices=(Choice(0, "stripes", "none", 1, "cascade", "inferred"),)), 1

    monkeypatch.setattr("npulab.targets.vivante.on_chip._resident", _nothing_but_stripes)
    monkeypatch.setattr("npulab.targets.vivante.on_chip._one_group_more", forced)
    plain, other = api.compile(g), api.compile(g, options=PlanOptions(features=frozenset({"cascade"})))

    want, got = api.open_session(plain).run(inputs), api.open_session(other).run(inputs)
    assert all((want[name] == got[name]).all() for name in want)
    assert [stages > sources for stages, sources in sizes] == [True]  # a tensor that two of them read


def test_stripes_across_branches_are_taken_where_they_save_time():
    n = Layers(0, False)
    trunk = n.conv(n.input(1, 120, 200, 8), 48, (1, 1), activation="RELU")
    g = npulab.load(n.build(*(n.conv(trunk, 8, (1, 1)) for _ in range(2))))
    sram, stripes = (api.profile(g, options=PlanOptions(features=frozenset({f}))) for f in ("axi-sram", "cascade"))

    assert any(d.choice.startswith("operators 0, 1, 2 in") for d in stripes.decisions)
    assert stripes.total_ns < sram.total_ns
    assert stripes.dram_bytes < sram.dram_bytes


@pytest.mark.parametrize("seed", range(8))
def test_jobs_in_another_order_give_the_same_bytes(seed, monkeypatch):
    """Taken whatever it costs; the model's order would be kept where it is as fast."""
    n = (forked, network)[seed % 2](seed)
    g, inputs = npulab.load(n.build(*n.outputs)), n.samples()
    orders = []

    def as_ordered(jobs, extent):
        orders.append((list(jobs), order.depth_first(jobs, extent)))
        jobs[:] = orders[-1][1]
        return list(jobs)

    monkeypatch.setattr("npulab.targets.vivante.on_chip.depth_first", as_ordered)
    plain, other = api.compile(g), api.compile(g, options=PlanOptions(features=frozenset({"axi-sram"})))

    want, got = api.open_session(plain).run(inputs), api.open_session(other).run(inputs)
    assert all((want[name] == got[name]).all() for name in want)
    assert orders
    assert all(sorted(map(id, a)) == sorted(map(id, b)) for a, b in orders)
    if seed % 2 == 0:
        assert any(a != b for a, b in orders)


def test_a_fully_connected_layer_of_many_zeros_is_a_kernel_over_an_image():
    """A 1x1 kernel has no zero runs in its stream; the driver's fully connected layers are wide kernels too."""
    n = Layers(0, False)
    x = n.input(1, 4, 8, 32)
    weights, scale = n._weights((64, 1024), sparse=0.9)
    out = n._tensor((1, 64), n.scale(), n.zero())
    n.model.op("FULLY_CONNECTED", [n.reshape(x, 1, 1024), weights, n._bias(64, n.scales[x] * scale)], [out],
               fused_activation_function="NONE")
    model, inputs = n.build(out), n.samples()

    p = api.profile(npulab.load(model))
    plain = api.profile(npulab.load(model), options=PlanOptions(zero_runs=False))
    assert [d.choice for d in p.decisions] == ["a kernel of 8x8 with zero runs"]
    assert p.dram_bytes < 0.6 * plain.dram_bytes
    got = api.open_session(api.compile(npulab.load(model))).run(inputs)
    assert all(np.abs(got[k].astype(int) - v.astype(int)).max() <= 1 for k, v in litert(model, inputs).items())


def test_another_order_is_taken_where_it_keeps_more_in_sram():
    """Two branches begun side by side, each too large to wait for the other in SRAM."""
    n = Layers(0, False)
    x = n.input(1, 64, 64, 8)
    begun = [n.conv(x, 128, (3, 3), activation="RELU") for _ in range(3)]
    g = npulab.load(n.build(*[n.conv(b, 8, (1, 1)) for b in begun]))

    p = api.profile(g, options=PlanOptions(features=frozenset({"axi-sram"})))
    assert "jobs right behind what they read" in [d.choice for d in p.decisions]


def _nothing_but_stripes(jobs, sizes, tensors, search, capacity, alignment):
    """Small tensors side by side in SRAM, as if capacity were no question of time: so that chains are worth cutting."""
    from npulab.targets.vivante.on_chip import Arrangement, _costs

    lives = tensors.lives(jobs, sizes)
    resident, at = {}, 0
    for r in sorted(lives):
        if r not in tensors.fixed and lives[r].size < 400_000 and at + lives[r].size <= capacity:
            resident[r] = at
            at += -(-lives[r].size // alignment) * alignment
    return Arrangement(jobs, sizes, resident, sum(_costs(jobs, resident, tensors, search)))


def test_the_search_says_what_it_chose_and_what_that_saves():
    n = Layers(1, False)
    x = n.input(1, 14, 14, 256)
    g = npulab.load(n.build(n.depthwise(x, (3, 3))))
    p = api.profile(g)

    (decision,) = p.decisions
    assert (decision.node, decision.instead, decision.state) == (0, "one job", "witnessed")
    assert decision.choice.startswith("pieces of")
    assert decision.saved_ns > 20_000
    whole = api.profile(g, plan="reference")
    assert p.rows[0].macs < whole.rows[0].macs / 1.9


def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch):
    log = tmp_path / "log"
    plain = api.compile(graphs[1])
    asked = []
    real = search.search
    monkeypatch.setattr(search, "search", lambda *a: asked.append(1) or real(*a))
    options = PlanOptions(search_log=str(log))

    assert api.compile(graphs[1], options=options) == plain
    questions, whole = len(asked), log.read_bytes()
    lines = whole.splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed in the middle of a line
    asked.clear()
    assert api.compile(graphs[1], options=options) == plain
    assert len(asked) == questions - 2
    assert log.read_bytes() == whole
    asked.clear()
    assert api.compile(graphs[1], options=options) == plain
    assert not asked


def test_a_search_log_that_lies_is_not_believed(tmp_path):
    log = tmp_path / "log"
    options = PlanOptions(search_log=str(log))
    plain = api.compile(graphs[1], options=options)
    log.write_bytes(b"".join(msgspec.json.encode(msgspec.json.decode(line) | {"piece": 8, "tile": [1, 1, 99]}) + b"\n"
                             for line in log.read_bytes().splitlines()))

    assert api.compile(graphs[1], options=options) == plain


@pytest.mark.parametrize("content", [b"a text\n", b"\x00" * 2000, b'{"key": 3}\n'])
def test_a_file_that_is_no_search_log_is_refused_and_kept(content, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(content)

    with pytest.raises(UsageError, match="is not a search log"):
        api.compile(graphs[1], options=PlanOptions(search_log=str(log)))
    assert log.read_bytes() == content


def test_the_host_can_be_measured_here():
    g = graph_of(tame, 1)
    options = PlanOptions(channels="multiple-of-cores")
    modelled = api.profile(g, options=options)
    measured = api.profile(g, options=options, measure_host=True)

    host = [s for s in measured.spans if s.unit == "host"]
    assert host
    assert measured.host == "this machine, measured"
    assert "measured on this machine" in measured.witness
    assert [s for s in measured.spans if s.unit != "host"] == [s for s in modelled.spans if s.unit != "host"]
    assert sum(r.ns for r in measured.rows) == measured.total_ns
    low, high = measured.interval_ns
    assert low <= measured.total_ns <= high


# errors


@pytest.mark.parametrize(("what_if", "message"), [
    ({"clock": 0}, "no chip has this clock\n  got     0 Hz\n  want    1e+06 to 1e+10 Hz"),
    ({"sram": -1}, "no chip has this sram"), ({"sram": 0.5}, "a whole number"), ({"nn_cores": 17}, "1 to 16 cores"),
    ({"dram_bandwidth": float("nan")}, "no chip has this dram_bandwidth"),
    ({"dram_bandwidth": float("inf")}, "no chip has this dram_bandwidth"),
    ({"colour": 1}, "there is no setting 'colour'\n  want    dram_bandwidth, clock, sram, nn_cores"),
])
def test_impossible_what_ifs_are_refused(what_if, message):
    with pytest.raises(UsageError) as e:
        api.profile(SAMPLE, what_if=what_if)
    assert message in str(e.value)


def test_a_program_keeps_what_it_was_compiled_for():
    program = api.compile(SAMPLE)

    with pytest.raises(UsageError, match="a compiled program cannot have another sram"):
        api.profile(program, what_if={"sram": 0})
    with pytest.raises(UsageError, match="keeps the options"):
        api.profile(program, options=PlanOptions(zero_runs=False))
    assert api.profile(program, what_if={"clock": 4e8}).constant("clock").state == "set"


def test_unknown_features_and_features_of_the_reference_are_refused():
    with pytest.raises(UsageError, match="a311d has no feature 'magic'"):
        api.compile(SAMPLE, options=PlanOptions(features=frozenset({"magic"})))
    with pytest.raises(UsageError, match="plan reference does what the open driver does"):
        api.compile(SAMPLE, plan="reference", options=PlanOptions(features=frozenset({"tiles"})))


def test_a_stream_that_starts_other_jobs_is_an_error_of_the_file():
    program = api.compile(SAMPLE)
    step = next(s for s in program.steps if isinstance(s, NpuStep))
    broken = msgspec.structs.replace(program, steps=(msgspec.structs.replace(step, words=step.words[:8]),))

    with pytest.raises(ModelError, match="does not start the jobs that the program lists"):
        timing.count(broken, A311D)


def test_every_setting_has_limits_and_a_constant():
    names = {c.name for c in timing.Speeds.of(A311D).constants()}

    assert LIMITS.keys() <= names
    assert all(c.source for c in timing.Speeds.of(A311D).constants())


# the ladder

PUBLISHED = {  # the two blog posts; the rows are in the atlas too
    "a311d-mesa-mobilenet_v1-before-zero-runs": 15.7, "a311d-mesa-mobilenet_v1-zero-runs": 9.9,
    "a311d-mesa-mobilenet_v1-input-cache": 6.6, "a311d-mesa-mobiledet-before-zero-runs": 56.1,
    "a311d-mesa-mobiledet-zero-runs": 32.7, "a311d-mesa-mobiledet-any-channels": 27.0,
    "a311d-mesa-mobiledet-input-cache": 24.8,
}


def test_the_published_ladder_is_reproduced():
    found = {row: find_target("a311d").predict(row) for row in PUBLISHED}
    errors = {row: found[row].ms / ms - 1 for row, ms in PUBLISHED.items()}

    assert np.mean(np.abs(list(errors.values()))) <= 0.08
    assert max(np.abs(list(errors.values()))) <= 0.15
    for row, ms in PUBLISHED.items():
        assert found[row].interval_ms[0] <= ms <= found[row].interval_ms[1]
        assert found[row].role == ("fit" if "mobilenet_v1" in row else "test")


def test_at_most_three_constants_are_fitted():
    fitted = [c.name for c in timing.Speeds.of(A311D).constants() if c.state == "fitted"]

    assert fitted == ["dram_bandwidth", "zero_cost"]


def test_other_rows_are_not_predicted():
    assert find_target("a311d").predict("coral-mobilenet") is None


@needs_shared
def test_recorded_counts_are_those_of_the_models():
    with loaded("scripts/calibrate.py") as calibrate:
        ladder = calibrate.LADDER
    speeds = timing.Speeds.of(A311D)
    for row, (model, options, published) in ladder.items():
        assert published == PUBLISHED[row]
        p = api.profile(MODELS / "quantized" / f"{model}.tflite", plan="reference", options=options)
        assert p.total_ns / 1e6 == timing.predict(row, speeds).ms


@needs_shared
@pytest.mark.parametrize("file", [p for p in model_files() if p.parent.name == "quantized"], ids=lambda p: p.stem)
def test_no_real_network_is_slower_than_under_the_driver(file):
    """By the model."""
    g = npulab.load(file)

    assert api.profile(g).total_ns <= api.profile(g, plan="reference").total_ns


@needs_shared
def test_the_best_plan_beats_the_proprietary_driver_by_the_model():
    """The proprietary driver's published 5.5 and 19.5 ms, with witnessed features alone."""
    v1 = api.profile(MODELS / "quantized" / "mobilenet_v1_1.0_224_quant.tflite")
    det = MODELS / "quantized" / "ssdlite_mobiledet_coco_qat_postprocess.tflite"
    best, reference = api.profile(det), api.profile(det, plan="reference")

    assert v1.total_ns <= 5.5e6
    assert best.total_ns <= 19.5e6
    assert not v1.features
    assert not best.features
    assert best.dram_bytes <= 0.8 * reference.dram_bytes


def test_replacing_a_speed_changes_only_its_terms():
    speeds = timing.Speeds.of(A311D)
    c = next(c for c in timing.count(programs[0, "best"], A311D) if c.unit == "nn")

    slow = replace(speeds, dram_bandwidth=speeds.dram_bandwidth / 2).terms(c)
    assert slow["activations"] == pytest.approx(2 * speeds.terms(c)["activations"], abs=2)
    assert slow["macs"] == speeds.terms(c)["macs"]


@pytest.mark.parametrize("options", [PlanOptions(), PlanOptions(features=frozenset(FEATURES))], ids=["plain", "all"])
@pytest.mark.parametrize("plan", ["best", "reference"])
def test_useful_multiplications_are_those_of_the_source_operators(plan, options):
    if plan == "reference":
        options = PlanOptions()
    n = Layers(2, False)
    a = n.conv(n.input(1, 96, 96, 3), 48, (3, 3), stride=2)
    b = n.depthwise(a, (3, 3), stride=2)
    c = n.conv(n.conv(b, 40, (1, 1)), 64, (5, 5))
    p = api.profile(npulab.load(n.build(c)), plan=plan, options=options)

    assert [r.macs_useful for r in p.rows if r.node is not None] == [
        48 * 48 * 48 * 27, 24 * 24 * 48 * 9, 24 * 24 * 40 * 48, 24 * 24 * 64 * 40 * 25]


def test_stripes_do_not_count_their_seams_as_useful(monkeypatch):
    monkeypatch.setattr("npulab.targets.vivante.on_chip._resident", _nothing_but_stripes)
    g = graph_of(deep, 1)
    plain, other = api.profile(g), api.profile(g, options=PlanOptions(features=frozenset({"cascade"})))

    assert len(other.spans) > len(plain.spans)
    assert [r.macs_useful for r in plain.rows] == [r.macs_useful for r in other.rows]
