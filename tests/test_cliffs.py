"""The search for cliffs: synthetic ones exactly where they are, known ones of the chip, and what the command prints."""

import json
import re
from pathlib import Path

import pytest

from layers import Layers
from npulab import PlanOptions, api
from npulab.cli.cliffs import parse_range, plot, print_walk
from npulab.cliffs import Part, Point, Walk, by_channels, by_resolution, cliffs_between, slack, walk, why
from npulab.errors import CapacityError, UnsupportedError, UsageError
from npulab.importers import load
from npulab.profiling.types import Span
from shared import MODELS, needs_shared

DIGITS = str(Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples" / "digits.tflite")


def part(node, ns, unit="nn", term="macs", **counts):
    return Part(node, "CONV_2D", (Span(unit, "nn", (node,), 0, 0, {term: ns}, **counts),))


def point(size, *times, work=None, problem=""):
    """A point whose operators 0, 1, .. take these times."""
    parts = {i: part(i, ns) for i, ns in enumerate(times)}
    return Point(size, work or size * size, sum(times), parts, problem)


def linear(start, *steps):
    """A measure: `start` ns, 1000 a pixel, and what each (size, ns) of `steps` adds from that size on; counts calls."""
    seen = []

    def measure(n):
        seen.append(n)
        ns = start + 1000 * n * n
        return point(n, ns, 10_000_000 + sum(extra for size, extra in steps if n >= size))

    return measure, seen


@pytest.mark.parametrize("at", [101, 160, 301, 302, 555, 998, 1000])
def test_a_lone_step_is_found_exactly_within_few_measurements(at):
    measure, seen = linear(500, (at, 80_000_000))
    found = walk("x", range(1, 1001), (1, 250, 500, 750, 1000), measure, most=25)

    assert [(c.node, c.low, c.high, c.exact) for c in found.cliffs if c.exact] == [(1, at - 1, at, True)]
    assert len(seen) == len(set(seen)) == len(found.points) <= 25
    assert found.skipped == 1000 - len(seen)
    assert found.cliffs[0].excess_ns == pytest.approx(80_000_000, rel=0.01)


def test_few_sizes_are_all_measured_and_all_their_cliffs_found():
    measure, seen = linear(0, (7, 10_000_000), (15, 50_000_000))
    found = walk("x", range(2, 22), (), measure, most=20)

    assert seen == list(range(2, 22))
    assert [(c.low, c.high) for c in found.cliffs] == [(14, 15), (6, 7)]  # the most expensive first
    assert found.skipped == 0


def test_a_smooth_axis_has_no_cliffs_and_needs_no_more_than_the_coarse_points():
    measure, seen = linear(10_000)
    found = walk("x", range(10, 500), (10, 100, 200, 499), measure, most=60)

    assert found.cliffs == ()
    assert seen == [10, 100, 200, 499]


def test_an_axis_that_flattens_out_is_looked_at_only_where_it_begins():
    seen = []

    def measure(n):
        seen.append(n)
        return point(n, round(1000 * n**1.8))

    assert walk("x", range(10, 1001), (10, 200, 400, 600, 800, 1000), measure, most=60).cliffs == ()
    assert not [n for n in seen if n > 200 and n % 200]


def test_a_search_that_runs_out_says_between_which_sizes_the_cliff_lies():
    measure, seen = linear(0, (333, 10**9))
    found = walk("x", range(1, 1001), (1, 500, 1000), measure, most=5)

    assert len(seen) == 5
    cliff = found.cliffs[0]
    assert not cliff.exact
    assert cliff.low < 333 <= cliff.high


@pytest.mark.parametrize(("before", "after", "count"), [
    ((1000, 9000), (1240, 9000), 0),  # not by a quarter
    ((1000, 9000), (1260, 9000), 1),
    ((50, 9950), (150, 9950), 0),  # tripled, and 1 % of the whole just not reached
    ((50, 9950), (160, 9950), 1),
    ((2000, 8000), (1000, 9000), 0),
])
def test_an_operator_is_a_cliff_by_its_jump_and_by_what_that_costs_the_whole(before, after, count):
    found = [c for c in cliffs_between(point(10, *before, work=100), point(11, *after, work=100)) if c.node is not None]

    assert len(found) == count


def test_many_small_jumps_are_a_cliff_of_the_network():
    many = [1000] * 50
    a, b = point(10, *many, work=100), point(11, *[1040] * 50, work=100)
    (found,) = cliffs_between(a, b)

    assert (found.node, found.excess_ns, round(found.jump, 3)) == (None, 2000, 1.04)
    assert found.why.startswith("50 operators take more, most of all CONV_2D (node 0), 0.001 -> 0.001 ms: ")
    assert cliffs_between(a, point(11, *[1020] * 50, work=100)) == []
    assert slack(1.25) == pytest.approx(1.025)
    assert [c.node for c in cliffs_between(a, point(11, 4000, *many[1:], work=100))] == [0]  # explained by one


def test_time_that_grows_with_the_work_is_no_cliff():
    assert cliffs_between(point(10, 1000, 5000, work=100), point(20, 4000, 20_000, work=400)) == []


def test_an_operator_that_leaves_the_npu_and_a_size_without_a_program_are_cliffs():
    a = point(8, 1000, 1000, work=64)
    host = Part(0, "ADD", part(0, 1000, "host", "host").spans, ("Rule. Found: x. Try: y.", "Another."))
    b = Point(9, 64, 2000, {0: host, 1: part(1, 1000)})
    (found,) = cliffs_between(a, b)

    assert (found.kind, found.op) == ("host", "ADD")
    assert found.why == "leaves the NPU: Rule. Found: x. Try: y. And 1 more."
    (none,) = cliffs_between(b, point(10, problem="too large"))
    assert (none.kind, none.why, none.before_ns) == ("none", "too large", 2000)
    assert cliffs_between(point(10, problem="too large"), a) == []
    assert cliffs_between(b, a) == []  # coming back to the NPU is none


@pytest.mark.parametrize(("before", "after", "text"), [
    ({"term": "activations", "dram": {"input": 100}, "sram": {"input": 300}, "touched": {"input": 100}},
     {"term": "activations", "dram": {"input": 350}, "touched": {"input": 100}},
     "input read 1 -> 3.5 times from DRAM, no longer kept on chip; bound by activation bytes from DRAM"),
    ({"term": "macs", "dram": {"weights": 100}, "touched": {"weights": 100}},
     {"term": "weights", "dram": {"weights": 400}, "touched": {"weights": 200}},
     "weights read 1 -> 2 times from DRAM; bound by weight bytes from DRAM, before by multiply-accumulates"),
    ({"macs": 640, "waste": {"cores": 0}}, {"macs": 720, "waste": {"cores": 70}},
     "idle cores 0% -> 10%; bound by multiply-accumulates"),
])
def test_the_reason_is_what_changed(before, after, text):
    assert why(part(0, 100, **before), part(0, 200, **after)) == text


def test_more_jobs_are_a_reason():
    one, three = part(0, 100), Part(0, "ADD", part(0, 70).spans * 3)

    assert why(one, three) == "1 job becomes 3; bound by multiply-accumulates"


def convolution(h, w, inputs, outputs, kernel=(1, 1)):
    n = Layers(1, False)
    x = n.input(1, h, w, inputs)
    return load(n.build(n.conv(x, outputs, kernel)))


def test_on_eight_cores_the_65th_channel_costs_as_much_as_eight():
    (found,) = by_channels(convolution(28, 28, 64, 64, (3, 3)), "a311d", limits=(57, 73, 1),
                           settings={"dram_bandwidth": 1e11})

    first, second = sorted(found.cliffs, key=lambda c: c.low)
    assert [(c.low, c.high) for c in (first, second)] == [(64, 65), (72, 73)]
    assert first.why == "idle cores 0% -> 6%; bound by multiply-accumulates"
    ns = {p.size: p.ns for p in found.points}
    assert ns[57] == ns[64] < ns[65] == ns[72] < ns[73]


def test_on_four_cores_the_61st_does():
    (found,) = by_channels(convolution(28, 28, 64, 64, (3, 3)), "a311d", limits=(59, 63, 1),
                           settings={"dram_bandwidth": 1e11, "nn_cores": 4})

    assert [(c.low, c.high) for c in found.cliffs] == [(60, 61)]


def test_the_tile_that_no_longer_fits_on_chip_is_a_cliff():
    (found,) = by_resolution(convolution(20, 20, 1024, 256), "a311d", limits=(18, 26, 1))

    assert [(c.node, c.low, c.high) for c in found.cliffs] == [(0, 22, 23)]  # 22 * 22 * 1024 bytes fit into 512 KiB
    assert re.match(r"input read 1 -> [23]\.\d+ times from DRAM, no longer kept on chip; bound by activation bytes",
                    found.cliffs[0].why)


@pytest.mark.parametrize("plan", ["best", "reference"])
def test_an_image_too_wide_for_the_engine_leaves_the_npu_with_the_rules_reason(plan):
    (found,) = by_resolution(convolution(4, 8000, 4, 8), "a311d", plan, limits=(3, 6, 1))

    assert [p.work for p in found.points] == [3 * 6000, 4 * 8000, 5 * 10_000, 6 * 12_000]
    assert [(c.kind, c.low, c.high) for c in found.cliffs][:1] == [("host", 4, 5)]
    assert found.cliffs[0].why.startswith("leaves the NPU: Image width and height are at most 8184 ")
    assert "Found: 't0' is 5x10000x4." in found.cliffs[0].why


def test_points_are_what_the_timing_model_says_of_the_resized_network():
    from npulab.passes.resize import with_input_size

    graph = load(DIGITS)
    (found,) = by_resolution(graph, "a311d", limits=(40, 44, 4), settings={"clock": 4e8})

    assert [(p.size, p.work, p.ns) for p in found.points] == [
        (n, n * n, api.profile(with_input_size(graph, n, n), what_if={"clock": 4e8}).total_ns) for n in (40, 44)]


def test_the_width_keeps_its_proportion_and_divides_as_often_as_it_did():
    (found,) = by_resolution(convolution(20, 26, 2, 2), "a311d", limits=(20, 40, 4))

    assert [p.work // p.size for p in found.points] == [26, 32, 36, 42, 46, 52]


def test_operators_on_the_host_come_with_the_plans_own_reasons():
    graph = load(DIGITS)
    for plan in ("best", "reference"):
        (found,) = by_resolution(graph, "a311d", plan, limits=(32, 36, 4))
        want = {v.node: tuple(map(str, v.reasons)) for v in api.check(graph, "a311d", plan) if v.where == "host"}
        assert want
        assert {p.node: p.reasons for p in found.points[0].parts.values() if p.on_host} == want


def test_the_step_is_one_that_the_network_can_follow():
    n = Layers(2, False)
    x = n.input(1, 32, 32, 3)
    a = n.conv(x, 4, (3, 3), stride=2, out_scale=0.1, out_zero=7)
    b = n.conv(n.conv(a, 4, (3, 3), stride=2), 4, (3, 3), stride=2, out_scale=0.1, out_zero=7)
    import numpy as np

    target = n._tensor((2,), None, None, np.array((16, 16), "int32"), "int32")
    up = n._tensor((1, 16, 16, 4), 0.1, 7)
    n.model.op("RESIZE_NEAREST_NEIGHBOR", [b, target], [up], align_corners=False, half_pixel_centers=False)
    (found,) = by_resolution(load(n.build(n.add(a, up))), "a311d")

    assert [p.size for p in found.points] == [16, 24, 32, 40, 48, 56, 64]
    assert not any(p.problem for p in found.points)


def test_a_network_that_cannot_follow_at_all_says_which_operator():
    n = Layers(1, False)
    x = n.input(1, 8, 8, 3)
    out = n.dense(n.reshape(n.conv(x, 4, (3, 3)), 1, 256), 10)

    with pytest.raises(UnsupportedError, match=r"FULLY_CONNECTED \(node 2\) of 'model' cannot follow"):
        by_resolution(load(n.build(out)), "a311d")


def test_sizes_that_do_not_compile_are_points_with_a_problem(monkeypatch):
    real = api.profile

    def profile(graph, *arguments):
        if graph.values[0].shape[1] > 20:
            raise CapacityError("the model needs too much memory")
        return real(graph, *arguments)

    monkeypatch.setattr(api, "profile", profile)
    (found,) = by_resolution(convolution(16, 16, 4, 8), "a311d", limits=(16, 24, 4))

    assert [p.problem for p in found.points] == ["", "", "the model needs too much memory"]
    assert [(c.kind, c.low, c.high, c.why) for c in found.cliffs] == \
        [("none", 20, 24, "the model needs too much memory")]


# the command


def test_the_command_says_where_how_much_why_and_what_to_use_instead(npulab):
    code, out, err = npulab("cliffs", DIGITS, "--target", "a311d", "--range", "30:34")

    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith("digits on a311d, plan best; times by the timing model\n\n"
                          "digits, input height: 5 sizes from 30 to 34\n")
    assert re.search(r"^  32  33  node 6 ADD +0\.\d+ -> 0\.\d+ +x1\.\d+  1 job becomes 2", out, re.M)
    assert "\nUse 32, not 33.\n" in out


def test_options_of_the_plan_change_what_is_walked(npulab):
    arguments = "cliffs", DIGITS, "--target", "a311d", "--range", "31:33"
    options = PlanOptions(zero_runs=False, features=frozenset({"axi-sram"}))
    code, out, _ = npulab(*arguments, "--no-zero-runs", "--feature", "axi-sram", "--json")
    (found,) = by_resolution(load(DIGITS), "a311d", options=options, limits=(31, 33, None))
    _, text, _ = npulab(*arguments, "--no-zero-runs")

    assert code == 0
    assert json.loads(out)["options"] == {"no-zero-runs": "on", "features": "axi-sram"}
    assert [p["ms"] for p in json.loads(out)["walks"][0]["points"]] == [p.ns / 1e6 for p in found.points]
    assert text.startswith("digits on a311d, plan best, no-zero-runs; times by the timing model\n")


def test_the_commands_json_has_every_point_and_cliff(npulab):
    code, out, _ = npulab("cliffs", DIGITS, "--target", "a311d", "--range", "31:33", "--set", "nn_cores=4", "--json")
    data = json.loads(out)
    (found,) = by_resolution(load(DIGITS), "a311d", limits=(31, 33, None), settings={"nn_cores": 4})

    assert code == 0
    assert {k: data[k] for k in ("model", "target", "plan", "settings", "axis", "measured", "most", "left_out")} == {
        "model": "digits", "target": "a311d", "plan": "best", "settings": {"nn_cores": 4}, "axis": "resolution",
        "measured": 3, "most": 60, "left_out": []}
    assert [(p["size"], p["ms"]) for p in data["walks"][0]["points"]] == [(p.size, p.ns / 1e6) for p in found.points]
    assert [(c["node"], c["from"], c["to"], c["why"]) for c in data["walks"][0]["cliffs"]] == \
        [(c.node, c.low, c.high, c.why) for c in found.cliffs]


def test_channels_of_the_heaviest_convolutions_or_of_those_asked_for(npulab):
    code, out, _ = npulab("cliffs", DIGITS, "--target", "a311d", "--axis", "channels", "--json", "--most", "31")
    walks = json.loads(out)["walks"]
    profile = api.profile(DIGITS)
    heaviest = [r for r in sorted(profile.rows, key=lambda r: -r.ns) if r.op.endswith("CONV_2D")][:3]

    assert code == 0
    assert [w["title"] for w in walks] == [f"{r.op} (node {r.node}), output channels" for r in heaviest]
    assert sum(len(w["points"]) for w in walks) <= 30
    _, out, _ = npulab("cliffs", DIGITS, "--target", "a311d", "--axis", "channels", "--node", "1", "--range", "8:16:8")
    assert "DEPTHWISE_CONV_2D (node 1), output channels: 2 sizes from 8 to 16\n" in out


def test_the_search_never_compiles_more_often_than_it_may(npulab, monkeypatch):
    real, calls = api.profile, []
    monkeypatch.setattr(api, "profile", lambda *a: calls.append(a) or real(*a))
    for axis, most in (("resolution", 7), ("resolution", 2), ("channels", 9)):
        calls.clear()
        code, _, _ = npulab("cliffs", DIGITS, "--target", "a311d", "--axis", axis, "--most", most)
        assert code == 0
        assert len(calls) <= most


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (("--target", "z80"), 2, "there is no target 'z80'\n  want    a311d"),
    (("--target", "a311d", "--axis", "time"), 2, "'time'"),
    (("--target", "a311d", "--range", "1-2"), 2, "--range is not LOW:HIGH or LOW:HIGH:STEP\n  got     '1-2'\n"),
    (("--target", "a311d", "--range", "0:5"), 2, "that is no range of sizes\n  got     0:5\n  want    LOW:HIGH[:STEP]"),
    (("--target", "a311d", "--range", "9:5"), 2, "that is no range of sizes"),
    (("--target", "a311d", "--range", "5:9:0"), 2, "that is no range of sizes\n  got     5:9:0"),
    (("--target", "a311d", "--range", "5:5"), 2, "the range 5:5 holds 1 size\n  want    2 sizes or more"),
    (("--target", "a311d", "--factor", "1"), 2, "--factor must be more than 1\n  got     1.0"),
    (("--target", "a311d", "--factor", "nan"), 2, "--factor must be more than 1"),
    (("--target", "a311d", "--most", "1"), 2, "a search needs at least 2 compilations\n  got     --most 1"),
    (("--target", "a311d", "--node", "1"), 2, "--node is for --axis channels"),
    (("--target", "a311d", "--axis", "channels", "--node", "99"), 2, "'digits' has no node 99\n  want    0..18"),
    (("--target", "a311d", "--axis", "channels", "--node", "6"), 1,
     "ADD (node 6) of 'digits' has no channels to change"),
    (("--target", "a311d", "--axis", "channels", "--most", "4"), 2,
     "4 compilations are too few for the channels of 3 convolutions\n  want    7 or more"),
    (("--target", "a311d", "--set", "x=3"), 2, "--set does not know 'x'"),
])
def test_mistakes_are_told(npulab, arguments, code, text):
    got, out, err = npulab("cliffs", DIGITS, *arguments)

    assert (got, out) == (code, "")
    assert text in err
    assert "Traceback" not in err


def test_what_is_not_exact_or_costs_nothing_is_no_advice(capsys):
    a, b, c = point(8, 1000, 1000, work=64), point(9, 1000, 5000, work=64), point(12, 1000, 50_000, work=64)
    free = point(13, 500, 50_000, work=64)
    free = Point(13, 64, free.ns, {**free.parts, 0: part(0, 500, "host", "host")})
    found = [*cliffs_between(a, b), *cliffs_between(b, c, exact=False), *cliffs_between(c, free)]
    print_walk(Walk("an axis", (a, b, c, free), tuple(found), 2), "pixel")
    out = capsys.readouterr().out

    assert out.startswith("an axis: 4 sizes from 8 to 13, 2 between them not looked at\n")
    assert re.search(r"^   8    9  node 1 CONV_2D  0\.001 -> 0\.005 +x5!  ", out, re.M)
    assert re.search(r"^   9  12\?  node 1 CONV_2D  0\.005 -> 0\.050 +x10!  ", out, re.M)
    assert re.search(r"^  12   13  node 0 CONV_2D  .*leaves the NPU: the host", out, re.M)
    assert out.endswith("! at least doubles. ? somewhere between the two; --most allows more\ncompilations.\n"
                        "Use 8, not 9.\n")


def test_a_range_without_a_program_says_why(capsys):
    print_walk(Walk("an axis", (point(8, problem="too large"), point(9, problem="larger")), (), 0), "pixel")

    assert capsys.readouterr().out == "an axis: 2 sizes from 8 to 9\n\nNo size gives a program: too large\n"


def test_ranges_are_low_high_and_step():
    assert parse_range(None) is None
    assert parse_range("128:320") == (128, 320, None)
    assert parse_range("128:320:32") == (128, 320, 32)
    for wrong in ("", "128", "a:b", "1:2:3:4", "-1:4", "1:1000000", "１:２x"):
        with pytest.raises(UsageError):
            parse_range(wrong)


def test_the_plot_puts_each_point_at_its_height_and_marks_cliffs():
    points = (point(0, 0, work=1), point(50, 1_000_000), point(100, 7_000_000))
    (cliff,) = cliffs_between(point(50, 1_000_000, work=1), point(100, 7_000_000, work=1))
    lines = plot(Walk("x", points, (cliff,), 0), width=40, rows=8)
    left = lines[0].index("|") + 1

    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("7 ms |")
    assert lines[0].rindex("*") == 39
    assert lines[7].startswith("0 ms |*")
    assert lines[6][left + round((39 - left) / 2)] == "*"
    assert lines[9].rindex("^") == 39
    assert lines[10].split() == ["0", "100"]
    assert plot(Walk("x", (point(3, problem="no"), point(4, problem="no")), (), 0)) == []


@needs_shared
def test_mobilenet_is_best_at_multiples_of_its_stride():
    (found,) = by_resolution(load(MODELS / "quantized" / "mobilenet_v1_1.0_224_quant.tflite"), "a311d",
                             limits=(220, 262, None), most=12)

    assert {(224, 225), (256, 257)} <= {(c.low, c.high) for c in found.cliffs if c.node is None and c.exact}
