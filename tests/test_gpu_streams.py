"""What is concluded of streams, and of curves of footprints where times are disturbed, by benches written out."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from npulab.errors import CapacityError
from npulab.gpu.analysis import groups, rates
from npulab.gpu.analysis.caches import Hierarchy, Level
from npulab.gpu.analysis.cliffs import Cliff
from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.analysis.statistics import Estimate
from npulab.gpu.types import Limits, Timing


class InParts:
    """16 bytes a load reach 10 GB/s, 32 and 64 bytes 20 and, in eight parts, 27."""

    identity, limits = None, Limits(2, 256, 1 << 14, 1 << 30, frozenset(("float32",)))

    def chain(self, *_):
        return Timing((1e-3,) * 9, {"operations": 1e6})

    def stream(self, footprint, stride, width, way):
        return Timing((1e-3,) * 9, {"bytes": 10e6 * width / 16})

    def stream_parts(self, footprint, width, way, parts, own=False):
        return Timing((1e-3,) * 9, {"bytes": 27e6 if parts > 1 else 20e6})


def test_the_fastest_shape_of_a_stream_is_kept_and_said():
    found = rates.memory_bandwidth(Meter(InParts(), quick=True), None, "read")
    assert found.value == pytest.approx(27.0)
    assert found.why.startswith("read, 64 bytes a load in 8 parts at once, through ")
    narrow = rates.memory_bandwidth(Meter(InParts(), quick=True), None, "read", 4)
    assert (narrow.value, "4 bytes a load" in narrow.why) == (pytest.approx(2.5), True)
    level = Level(Cliff(1 << 15, None, "step", ""), 64, Estimate(1e-9, 1e-9, 1e-9), "")
    found = rates.level_bandwidth(Meter(InParts(), quick=True), Hierarchy((level,), None), 0)
    assert found.value == pytest.approx(27.0)


def test_a_bench_without_parts_is_asked_for_16_bytes(monkeypatch):
    monkeypatch.delattr(InParts, "stream_parts")
    monkeypatch.setattr(InParts, "identity", SimpleNamespace(api="simulated"))
    found = rates.memory_bandwidth(Meter(InParts(), quick=True), None, "read")
    assert found.value == pytest.approx(10.0)
    assert found.why.startswith("read, 16 bytes a load, through ")


@pytest.mark.parametrize(("bursts", "waited", "refused"), [
    (0, [], False), (1, [0.5], False), (3, [0.5, 1.0, 2.0], False), (4, [0.5, 1.0, 2.0], True)])
def test_the_first_references_wait_for_a_quieter_moment(monkeypatch, bursts, waited, refused):
    """They are compared with to the end: scattered by a neighbour, they had every rate refused."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    busy = iter([1, 3, 1, 1, 3] * bursts)
    monkeypatch.setattr(Meter, "_reference", lambda self, kind: 1e-9 * (next(busy, 1) if kind == "core" else 1))
    meter = Meter(InParts(), quick=True)
    assert slept == waited
    ask = lambda: meter.seconds(lambda: Timing((1e-3,) * 9, {"operations": 1e6}), "operations")  # noqa: E731
    if refused:
        with pytest.raises(Refused, match="the first references scatter by"):
            ask()
    else:
        assert ask().value == pytest.approx(1e-9)


def disturbed(monkeypatch, times, largest=1 << 30):
    """A bench whose streams through half of the footprint take `times` of their time."""
    each = itertools.chain(times, itertools.repeat(times[-1]))
    monkeypatch.delattr(InParts, "stream_parts")
    monkeypatch.setattr(InParts, "identity", SimpleNamespace(api="simulated"))
    monkeypatch.setattr(InParts, "stream", lambda _, footprint, *more: Timing(
        (1e-3 * (next(each) if footprint == 1 << 26 else 1.0),) * 9, {"bytes": 10e6}))
    monkeypatch.setattr(rates, "_shaped", lambda m, f, *_, **__: Estimate(*(m.bench.stream(f).seconds[0],) * 3))
    meter = Meter(InParts(), quick=True)
    return rates._memory_bandwidth(meter, None, "read", 4, 1, "memory bandwidth", largest)


def test_a_comparison_that_something_disturbed_is_done_again(monkeypatch):
    assert disturbed(monkeypatch, (1.0, 1.6, 1.0)).value


def test_a_bandwidth_that_does_not_stay_is_not_put_down_to_caches(monkeypatch):
    with pytest.raises(Refused, match="it does not stay: 67108864 bytes"):
        disturbed(monkeypatch, (1.6,))


@pytest.mark.parametrize(("share", "refused"), [(1.04, None), (0.96, None), (0.93, "caches help"),
                                                (1.08, "it does not stay")])
def test_a_bandwidth_that_others_disturb_has_an_interval_with_both(monkeypatch, share, refused):
    """What is half as large takes 4 % more or less, time and again; of 8 % nothing is said."""
    if refused:
        with pytest.raises(Refused, match=refused):
            disturbed(monkeypatch, (share,), 1 << 27)
    else:
        found = disturbed(monkeypatch, (share,), 1 << 27)
        assert found.value == pytest.approx(1e-6)  # these answer in seconds, as of one byte
        assert found.interval == pytest.approx(tuple(sorted((1e-6, 1e-6 / share))))


@pytest.mark.parametrize(("later", "want"), [
    ((1.15,), 1.15), ((1.9, 1.15), 1.15), ((1.9, 1.9, 1.9), "it does not stay: 1 GB/s, and 0.5263 a little later")])
def test_narrow_loads_that_something_disturbed_are_asked_again(monkeypatch, later, want):
    """By the cores' clock they took nearly twice what they took by memory's, which is 1.1 of it: no clock does that."""
    each = iter(later)
    monkeypatch.setattr(rates, "_shaped", lambda *_: Estimate(0.5e-9, 0.5e-9, 0.5e-9))
    meter = SimpleNamespace(pace={"core": 1.1, "memory": 1.0}.get, seen={}, bench=None,
                            seconds=lambda *_: Estimate(*(next(each) * 1e-9,) * 3))
    ask = lambda: rates._either(meter, None, 1 << 28, 8, 1, Estimate(1e-9, 1e-9, 1e-9))  # noqa: E731
    if isinstance(want, str):
        with pytest.raises(Refused, match=want):
            ask()
    else:
        assert ask().value == pytest.approx(want * 1e-9)


def test_caches_that_help_are_named(monkeypatch):
    with pytest.raises(Refused, match="caches help: 67108864 bytes"):
        disturbed(monkeypatch, (0.5,), 1 << 27)


def test_caches_of_unknown_size_are_left_behind(monkeypatch):
    """64 MiB take half of the time that 128 and more do: 256 and 128 MiB agree."""
    assert "through 268435456 bytes" in disturbed(monkeypatch, (0.5,), 1 << 28).why


def level(size, shape="gradual"):
    return Level(Cliff(size, None, shape, ""), 64, Estimate(1e-9, 1e-9, 1e-9), "")


GRADUAL = Hierarchy((level(1 << 15), level(1 << 20), level(1 << 25)), None)


def test_cores_store_to_memory_of_their_own(monkeypatch):
    """Two cores that store to the same lines take them from each other: 26 GB/s of 470 on one processor. The last cache
    is shared: all of them together go through a footprint; not where a share would fit in a cache before."""
    monkeypatch.setattr(InParts, "stream", lambda *_: Timing((1e-3,) * 9, {"bytes": 10e6}))
    sizes = set()

    def parts(_, footprint, width, way, parts, own):
        sizes.add((footprint, own))
        return Timing((1e-3,) * 9, {"bytes": 200e6 if own or way == "read" else 20e6})

    monkeypatch.setattr(InParts, "stream_parts", parts)
    for index, way, units, want, share in ((0, "write", 2, 200, 1), (1, "write", 2, 200, 1), (2, "write", 2, 200, 2),
                                           (2, "write", 64, 20, 0), (1, "read", 2, 200, 0)):
        monkeypatch.setattr(InParts, "limits", replace(InParts.limits, compute_units=units))
        meter = Meter(InParts(), quick=True)
        sizes.clear()
        found = rates.level_bandwidth(meter, GRADUAL, index, way)
        assert found.value == pytest.approx(want)
        last = int(found.why.split(" bytes again")[0].split()[-1])
        assert (last // max(share, 1), bool(share)) in sizes
        assert found.why.endswith(f"each thread {last // share} of its own" if share else "again and again")
    monkeypatch.delattr(InParts, "stream_parts")
    monkeypatch.setattr(InParts, "identity", SimpleNamespace(api="simulated"))
    monkeypatch.setattr(InParts, "limits", replace(InParts.limits, compute_units=2))
    monkeypatch.setattr(InParts, "stream", lambda _, footprint, *more: (
        sizes.add(footprint), Timing((1e-3,) * 9, {"bytes": 10e6}))[1])
    meter = Meter(InParts(), quick=True)
    sizes.clear()
    assert rates.level_bandwidth(meter, GRADUAL, 2, "write").value == pytest.approx(10)
    assert min(sizes) > 3 << 20


def test_a_shared_level_is_asked_in_the_middle_and_its_interval_says_how_even_it_is(monkeypatch):
    """Neighbours have half of the last cache: a footprint of half of it misses."""
    asked = set()

    def stream(_, footprint, *more):
        asked.add(footprint)
        return Timing((1e-3,) * 9, {"bytes": 50e6 if footprint > 1 << 24 else 100e6 if footprint > 5 << 20 else 107e6})

    monkeypatch.delattr(InParts, "stream_parts")
    monkeypatch.setattr(InParts, "identity", SimpleNamespace(api="simulated"))
    monkeypatch.setattr(InParts, "stream", stream)
    found = rates.level_bandwidth(Meter(InParts(), quick=True), GRADUAL, 2)
    assert 100 <= found.value <= 107
    assert found.interval == pytest.approx((100, 107), rel=5e-3)
    footprints = asked - {Meter(InParts(), quick=True)._streamed}
    assert min(footprints) > 3 << 20
    assert max(footprints) < 7 << 20


@pytest.mark.parametrize(("reached", "want"), [((357, 357, 440), 440), ((184, 165, 175), 177), ((400, 350, 300), None)])
def test_a_smaller_footprint_reaches_what_a_larger_one_does(monkeypatch, reached, want):
    """Its pages lay badly, or a neighbour had the cache; the other way round the cache before it helps."""
    asked = []
    monkeypatch.delattr(InParts, "stream_parts")
    monkeypatch.setattr(InParts, "identity", SimpleNamespace(api="simulated"))
    meter = Meter(InParts(), quick=True)

    def stream(_, footprint, *more):
        if footprint not in asked:
            asked.append(footprint)
        return Timing((1e-3,) * 9, {"bytes": 1e6 * reached[asked.index(footprint)]})

    monkeypatch.setattr(InParts, "stream", stream)
    if want is None:
        with pytest.raises(Refused, match=r"no plateau: .* reach 400, 350, 300 GB/s"):
            rates.level_bandwidth(meter, GRADUAL, 1)
    else:
        found = rates.level_bandwidth(meter, GRADUAL, 1)
        assert found.value == pytest.approx(want, rel=0.05)
        told = int(found.why.split(" bytes again")[0].split()[-1])  # where it was reached, not where it would be
        assert reached[asked.index(told)] == pytest.approx(found.value, rel=1e-6)


def test_a_shape_that_was_slow_once_is_not_given_up(monkeypatch):
    """A neighbour took half of the core at the first of the turns."""
    each = iter([5e-3, 1e-3])
    monkeypatch.setattr(InParts, "stream_parts", lambda _, footprint, width, way, parts, own: Timing(
        (next(each, 1e-3) if parts == 8 else 1e-3,) * 9, {"bytes": 27e6 if parts > 1 else 20e6}))
    assert rates._shape(Meter(InParts(), quick=True), 1 << 26, "read", True) == (64, 8)


@pytest.mark.parametrize(("rate", "room", "largest", "said"), [
    (10e9, True, 1 << 29, "536870912 bytes against 134217728"), (5e9, True, 1 << 26, "67108864 bytes against 16777216"),
    (10e9, False, 1 << 26, "67108864 bytes against 16777216")])
def test_transfers_are_as_large_as_is_brief_and_has_room(monkeypatch, rate, room, largest, said):
    asked = []

    def transfer(_, size, to_device):
        if size > 1 << 26 and not room:
            raise CapacityError("the host has no room for a transfer")
        asked.append(size)
        return Timing((20e-6 + size / rate,) * 9, {"bytes": size})

    monkeypatch.setattr(InParts, "transfer", transfer, raising=False)
    monkeypatch.setattr(InParts, "limits", replace(InParts.limits, buffer_max=1 << 31))
    bandwidth, cost = rates.transfers(Meter(InParts(), quick=True), True)
    assert (bandwidth.value, bandwidth.why) == (pytest.approx(rate / 1e9, rel=1e-6), said)
    assert (cost.value, max(asked)) == (pytest.approx(20e-6, rel=0.03), largest)


class Copying(InParts):
    """Transfers of 20 us and then 20 GB/s, of less than 128 MiB at `slow` of it."""

    def __init__(self, slow):
        self.slow = slow

    def transfer(self, size, to_device):
        return Timing((20e-6 + size / 20e9 / (self.slow if size < 1 << 27 else 1),) * 9, {"bytes": size})


@pytest.mark.parametrize("slow", [1.0, 0.6, 1.7])
def test_transfers_of_what_is_copied_in_two_ways_are_no_faster_than_the_large_one(slow):
    """The difference of a large one and its quarter says another where these are copied at different rates."""
    bandwidth, cost = rates.transfers(Meter(Copying(slow), quick=True), True)
    assert bandwidth.value == pytest.approx(20, rel=1e-3)
    assert cost.value == pytest.approx(20e-6, rel=0.03)
    assert ("not in proportion" in bandwidth.why) == (slow != 1)


@pytest.mark.parametrize(("slow", "said"), [(lambda period, asked: period < 32, None),
                                            (lambda period, asked: asked <= 4, "the step does not stay: .* once more")])
def test_a_device_that_was_slow_at_first_has_no_warps(monkeypatch, slow, said):
    """What a neighbour took while the first turns were timed looks as warps do."""
    asked = itertools.count(1)
    monkeypatch.setattr(InParts, "diverge", lambda _, period: Timing(
        ((2e-3 if slow(period, next(asked)) else 1e-3),) * 9, {"operations": 1e6}), raising=False)
    meter = Meter(InParts(), quick=True)
    if said:
        with pytest.raises(Refused, match=said):
            groups.warp_width(meter)
    else:
        assert groups.warp_width(meter).value == 32
