"""Bandwidths by width and stride: what simulated GPUs hide, what is refused, what a processor's kernels really load and
store, and how all of it is shown."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest

from npulab.cli.probe import show
from npulab.errors import UnsupportedError
from npulab.gpu import bounds, extras, kernels, opencl
from npulab.gpu.analysis import conclude, rates, widths
from npulab.gpu.analysis.caches import Hierarchy, Level
from npulab.gpu.analysis.cliffs import Cliff
from npulab.gpu.analysis.meter import Meter
from npulab.gpu.analysis.statistics import Estimate
from npulab.gpu.ceilings import read_result
from npulab.gpu.simulated import Cache, Simulated, random_hidden, streamed, truth
from npulab.gpu.types import Limits, Quantity, Timing

SHAPES = [(4, 1), (8, 1), (4, 2), (4, 4), (4, 8), (4, 16)]


def quiet(*caches, **more):
    return replace(random_hidden(3), caches=caches, clock=1e9, jitter=0.0, outliers=0.0, throttle_after=float("inf"),
                   throttle_to=1.0, tick=1e-9, translation=None, memory_latency=300e-9, memory_bandwidth=30e9, **more)


HIDDEN = quiet(Cache(32 << 10, 64, 30, 512, narrow=(0.3, 0.7), sector=32),
               Cache(1 << 20, 64, 90, 200, narrow=(0.2, 0.9)), local_wide=(2.0, 3.0), constant_wide=(1.5, 2.0),
               image_texels=(0.4, 0.8), image_orders=(0.2, 0.6))


def level(size, line=64):
    return Level(Cliff(size, None, "step", ""), line, Estimate(1e-9, 1e-9, 1e-9), "")


def hierarchy(hidden):
    return Hierarchy(tuple(level(c.size, c.line) for c in hidden.caches), None)


def asked(bench, found, index, way, *shapes):
    """What is found of one level, in shapes, after its fastest."""
    meter = Meter(bench, quick=True)
    best = rates.level_bandwidth(meter, found, index, way)
    return widths.of_level(meter, found, index, way, {best.name: best}.get, shapes)


# what simulated GPUs hide


@pytest.mark.parametrize("way", ["read", "write"])
@pytest.mark.parametrize("index", [0, 1])
def test_each_level_has_its_own_widths_and_sectors(index, way):
    known = truth(HIDDEN)
    found = asked(Simulated(HIDDEN), hierarchy(HIDDEN), index, way, *SHAPES)
    assert [q.value for q in found] == pytest.approx([known[q.name] for q in found], rel=0.01)
    assert len({round(q.value, 6) for q in found}) >= 5


def test_a_sector_is_what_a_level_gives_at_least():
    """Of 32 of 64 bytes four words are used with a stride of 2, one with a stride of 8, and of 16 no less."""
    four, *apart = (asked(Simulated(HIDDEN), hierarchy(HIDDEN), 0, "read", (4, stride))[0].value
                    for stride in (1, 2, 8, 16))
    assert [four / x for x in apart] == pytest.approx([2, 8, 8], rel=0.01)


def test_every_shape_is_among_the_findings_and_a_quick_run_leaves_them_out():
    found = {q.name: q for q in conclude(Simulated(HIDDEN))}
    assert len([q for q in found.values() if "bytes a" in q.name]) == 2 * 2 * 6 + 14 + 4 + 2 + 2
    for name, want in truth(HIDDEN).items():
        if name.endswith(" bandwidth") or "," in name:
            assert found[name].value == pytest.approx(want, rel=0.03), name
    assert not [q.name for q in conclude(Simulated(HIDDEN), quick=True) if "," in q.name]


def test_a_run_that_was_stopped_goes_on_with_the_shapes():
    whole = conclude(Simulated(HIDDEN))
    first = [q for q in whole if "bytes a" not in q.name]
    resumed = {q.name: q for q in conclude(Simulated(HIDDEN), known=first)}
    for q in whole:
        assert resumed[q.name].value == pytest.approx(q.value, rel=0.02) if q.value else resumed[q.name] == q


# what is refused


def test_a_stride_that_leaves_lines_out_is_not_of_the_level():
    """Half of the lines of what misses L1 fit in it: by their times alone L2 would be three times as fast."""
    h = quiet(Cache(32 << 10, 32, 30, 512), Cache(80 << 10, 64, 90, 40))
    footprint = int(0.65 * h.caches[1].size)
    assert streamed(h, footprint, 16, 4, "read")[0] < streamed(h, footprint, 8, 4, "read")[0]
    *fine, refused = asked(Simulated(h), hierarchy(h), 1, "read", (4, 4), (4, 8), (4, 16))
    assert [q.value for q in fine] == pytest.approx([truth(h)[q.name] for q in fine], rel=0.01)
    assert (refused.status, refused.name) == ("refused", "L2 bandwidth, 4 bytes a load, stride 16")
    assert "loads 64 bytes apart leave out lines of 32 bytes" in refused.why
    assert refused.name not in truth(h)


def test_memory_by_stride_is_not_of_the_lines_that_caches_keep():
    """Of 1 GiB every second line of 32 bytes is read, of 2 MiB as well: the caches have twice the room."""
    h = quiet(Cache(32 << 10, 32, 30, 512), Cache(12 << 20, 32, 90, 200, "random"))
    found = rates.memory_bandwidth(Meter(Simulated(h)), hierarchy(h), "read", 4, 16)
    assert found.value == pytest.approx(truth(h)[found.name], rel=0.01)
    assert f"through {int(2.6 * 8 * (12 << 20))} bytes" in found.why


def test_without_the_fastest_shape_there_is_no_other():
    meter = Meter(Simulated(HIDDEN), quick=True)
    refused = Quantity("L2 bandwidth", None, "GB/s", None, "refused", "no plateau")
    for named in ({}.get, {refused.name: refused}.get):
        found = widths.of_level(meter, hierarchy(HIDDEN), 1, "read", named)
        assert {(q.value, q.why) for q in found} == {(None, "needs the L2 bandwidth, which was refused")}
        assert len(found) == len(SHAPES)


def test_one_shape_that_is_refused_does_not_touch_the_others(monkeypatch):
    """What becomes slow for a while is asked again."""
    bench = Simulated(HIDDEN)

    def stream(footprint, stride, width, way, real=bench.stream):
        t = real(footprint, stride, width, way)
        if stride == 2:
            return replace(t, wrong="thread 3 did not read what is there")
        return replace(t, seconds=tuple(s * (next(slow) if width == 8 else 1) for s in t.seconds[:1]) * 9)

    found = hierarchy(HIDDEN)
    meter = Meter(bench, quick=True)
    best = rates.level_bandwidth(meter, found, 0)
    monkeypatch.setattr(bench, "stream", stream)
    monkeypatch.setattr(meter, "_look", lambda kind: 1.0)
    slow = iter([3, 3, 1, 1, 1])
    four, eight, two = widths.of_level(meter, found, 0, "read", {best.name: best}.get, ((4, 1), (8, 1), (4, 2)))
    assert two.why == "thread 3 did not read what is there"
    assert [q.value for q in (four, eight)] == pytest.approx([truth(HIDDEN)[q.name] for q in (four, eight)], rel=0.01)


LIMITS = Limits(4, 256, 32768, 1 << 30, frozenset(("float32",)), 1e9)


@pytest.mark.parametrize(("name", "value", "said"), [
    ("L2 bandwidth, 4 bytes a load", 51, "above that of L1 bandwidth, 4 bytes a load, 40"),
    ("memory bandwidth, 4 bytes a load", 51, "above that of L1 bandwidth, 4 bytes a load, 40"),
    ("L2 bandwidth, 4 bytes a load", 49, ""), ("L2 bandwidth, 8 bytes a load", 76, "above that of L2 bandwidth, 60"),
    ("L2 bandwidth, 8 bytes a load", 74, ""), ("L2 bandwidth, 4 bytes a load, stride 2", 51, ""),
    ("L2 write bandwidth, 4 bytes a store", 51, "above that of L2 write bandwidth, 30"),
    ("local memory bandwidth, 16 bytes a load", 500, ""), ("image bandwidth, columns", 500, "")])
def test_no_shape_is_faster_than_the_fastest_nor_than_the_level_before(name, value, said):
    others = [Quantity(n, v, "GB/s") for n, v in {
        "L1 bandwidth": 100.0, "L2 bandwidth": 60.0, "L1 bandwidth, 4 bytes a load": 40.0, "L2 write bandwidth": 30.0,
        "local memory bandwidth": 50.0, "image bandwidth": 50.0}.items()]
    assert said in bounds.objection(Quantity(name, float(value), "GB/s"), LIMITS, others)
    assert bool(said) == bool(bounds.objection(Quantity(name, float(value), "GB/s"), LIMITS, others))


# what is asked for


class Asked:
    """A processor whose cores store to memory of their own. Each byte takes a nanosecond."""

    identity, limits = SimpleNamespace(api="x"), replace(LIMITS, compute_units=2)

    def __init__(self):
        self.calls = []

    def chain(self, *_):
        return Timing((1e-3,) * 9, {"operations": 1e6})

    def stream(self, *a):
        self.calls.append(a)
        return Timing((1e-3,) * 9, {"bytes": 1e6})

    def stream_parts(self, *a):
        self.calls.append(a)
        return Timing((1e-3,) * 9, {"bytes": 1e6 * (2 if a[1] == 64 else 1)})


@pytest.mark.parametrize(("index", "way", "want"), [
    (0, "read", (16384, 2, 4, "read")), (0, "write", (16384, 4, "write", 1, True, 2)),
    (1, "read", (681_984, 2, 4, "read")), (1, "write", (340_992, 4, "write", 1, True, 2))])
def test_a_level_is_asked_where_its_fastest_shape_was(index, way, want):
    """Of the last level each core stores to its share."""
    bench = Asked()
    found = Hierarchy((level(1 << 15), level(1 << 20)), None)
    meter = Meter(bench, quick=True)
    best = rates.level_bandwidth(meter, found, index, way)
    footprint, own = meter.plateaus[index, way]
    assert f"{footprint * (2 if own and index else 1)} bytes again and again" in best.why
    bench.calls.clear()
    widths.of_level(meter, found, index, way, {best.name: best}.get, ((4, 2),))
    streams = {c for c in bench.calls if c != (meter._streamed, 1, 16, "read")}
    assert streams == {(footprint, *want[1:])}
    assert footprint in (want[0], 22 << 10, 768 << 10, 384 << 10, 870 << 10, 435 << 10, 665 << 10)


# a processor's kernels


@pytest.fixture
def bench(opencl_bench, monkeypatch):
    monkeypatch.setattr(opencl, "SCALES", 0.0)
    monkeypatch.setattr(opencl, "ENOUGH", 1e-4)
    monkeypatch.setattr(opencl, "REPEATS", 2)
    return opencl_bench


@pytest.mark.parametrize("way", ["read", "write", "copy"])
@pytest.mark.parametrize(("width", "stride"), [(4, 1), (8, 1), (4, 2), (4, 16), (16, 4)])
def test_loads_and_stores_are_as_wide_as_is_said(bench, way, width, stride):
    if "PoCL" not in bench.identity.platform:
        pytest.skip("counts PoCL's machine code")
    pytest.importorskip("capstone", reason="reads machine code: pip install 'npulab[gpu]'")
    t = extras.stream_parts(bench, 100_000, width, way, 1, way == "write", stride)
    assert (t.wrong, t.counted) == ("", "work counted in x86-64 machine code")
    mix = bench._count()[0].mix
    for what in ("load",) * (way != "write") + ("store",) * (way != "read"):
        assert mix[f"{what} bytes"] == kernels.IN_TURN * width
        assert mix[f"{what}s"] == kernels.IN_TURN


def test_narrow_and_strided_streams_of_a_processor_are_not_bound_by_arithmetic(bench, monkeypatch):
    """Places in memory that wait for each other took 4 bytes a load to 8 GB/s where the caches gave 100."""
    if not bench.one_by_one:
        pytest.skip("for devices that do a group's threads one by one")
    taken = []
    monkeypatch.setattr(extras, "stream_parts", lambda b, *a, **more: taken.append((a, more)))
    for width, stride in SHAPES:
        bench.stream(1 << 18, stride, width, "read")
    assert taken == [((1 << 18, width, "read", 1), {"stride": stride}) for width, stride in SHAPES]


def test_streams_of_all_strides_share_a_memory_that_is_filled_once(bench, monkeypatch):
    if not bench.one_by_one:
        pytest.skip("for devices that do a group's threads one by one")
    sizes = set()
    real = bench.filled
    monkeypatch.setattr(bench, "filled", lambda b, way, parts, size, lanes: (
        sizes.add((parts, size, lanes)), real(b, way, parts, size, lanes))[1])
    for stride in (1, 2, 4, 8, 16):
        assert bench.stream(3_333_333, stride, 4, "read").wrong == ""
    assert sizes == {(1, 3_325_952 // 4, 1)}


@pytest.mark.parametrize("order", ["rows", "columns", "tiles"])
def test_texels_come_in_their_order(order):
    picture = np.arange(64, dtype=np.uint32).reshape(8, 8)
    first = {"rows": [0, 1, 2, 3, 4], "columns": [0, 8, 16, 24, 32], "tiles": [0, 1, 2, 3, 8]}[order]
    found = extras.in_order(picture, order)
    assert found[:5].tolist() == first
    assert sorted(found.tolist()) == list(range(64))
    if order == "tiles":
        assert found[16:20].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("texel", "order"), [(4, "rows"), (16, "columns"), (4, "columns"), (16, "tiles")])
def test_images_are_read_in_each_order_and_counted(bench, texel, order):
    t = bench.image(10_000, texel, order)
    assert t.wrong == ""
    if "PoCL" in bench.identity.platform:
        pytest.importorskip("capstone", reason="reads machine code: pip install 'npulab[gpu]'")
        assert t.counted == "work counted in x86-64 machine code"
        assert bench._count()[0].mix["load bytes"] == 4 * texel


def test_an_image_of_a_format_that_the_device_has_not_is_refused(bench, monkeypatch):
    monkeypatch.setattr(bench.cl, "get_supported_image_formats", lambda *_: [])
    with pytest.raises(UnsupportedError, match="no images of 2 32-bit integers a texel"):
        bench.image(10_000, 8)


# what is shown


def result(found):
    return {"identity": asdict(Simulated(HIDDEN).identity), "quantities": [asdict(q) for q in found]}


def test_the_terminal_has_a_row_for_each_level_and_80_columns(capsys):
    found = conclude(Simulated(quiet(Cache(32 << 10, 32, 30, 64e3), Cache(1 << 20, 32, 90, 20e3))))
    show(result(found))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if line.startswith("bandwidth "))
    assert lines[head].split() == ["bandwidth", "4", "B", "8", "B", "16", "B", "2", "4", "8", "16", "32"]
    rows = [line[:18].rstrip() for line in lines[head + 1:lines.index("", head)]]
    assert rows == ["L1", "L1 write", "L2", "L2 write", "constant", "local memory", "local memory write", "memory",
                    "memory copy", "memory write"]
    assert lines[head + 3].split()[-1] == "-"  # L2, 16 words apart: refused
    text = "\n".join(lines[:head])
    assert "L1 bandwidth " in text
    assert "image bandwidth, columns" in text
    assert "4 bytes a load" not in text


def test_shapes_that_were_refused_alike_are_one_row(capsys):
    why = "needs the L2 bandwidth, which was refused"
    found = [Quantity("L2 bandwidth" + rates.shaped_as("read", *s), None, "GB/s", None, "refused", why) for s in SHAPES]
    show(result([*found, replace(found[0], name="L1 bandwidth, 8 bytes a load", why="another")]))
    out = capsys.readouterr().out
    assert out.count(why) == 1
    assert f"L2 bandwidth, {len(SHAPES)} shapes" in out
    assert "L1 bandwidth, 8 bytes a load  another" in out


def test_a_roofline_takes_the_fastest_shape(tmp_path):
    found = [Quantity("L1 bandwidth, 4 bytes a load", 900.0, "GB/s"), Quantity("L1 bandwidth", 100.0, "GB/s"),
             Quantity("memory bandwidth, 4 bytes a load, stride 2", 800.0, "GB/s"),
             Quantity("memory bandwidth", 50.0, "GB/s"), Quantity("memory write bandwidth", 700.0, "GB/s")]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(result(found)))
    assert {c.resource: c.value for c in read_result(file).ceilings} == {"L1": 100e9, "DRAM": 50e9}
