"""Which shapes of threads are tried, in which order, by what is known of a Vulkan device; and the tuner."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from npulab.errors import InvariantError
from npulab.gpu.compute import modules_shapes, modules_trials, modules_tuner, modules_winograd, tuner
from npulab.gpu.compute.modules_convolution import convolution, is_depthwise, is_gathered
from npulab.gpu.compute.modules_products import product
from npulab.gpu.compute.modules_shapes import Fewer, Shape, candidates, first, work_of
from npulab.gpu.compute.modules_traits import traits_of
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.types import Traits
from npulab.gpu.types import Identity, Limits
from test_gpu_kernels import script, stored
from test_gpu_modules import SHAPES

GRAPHICS = Traits("a GPU", False, 16, 1, 32, 32, 32 << 10, 256, (16 << 10,))
PROCESSOR = Traits("a CPU", True, 2, 1, 16, 8, 32 << 10, 1024, (32 << 10, 512 << 10))
SQUARE = Product(1, 256, 256, 256)
IMAGE = Convolution(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1))
EACH = replace(IMAGE, groups=64)


def direct(what, traits):
    return next(c for c in candidates(what, traits) if isinstance(c, Shape))


def test_where_no_device_is_known_it_is_what_it_was():
    for what in (SQUARE, IMAGE, EACH):
        assert first(what) == Shape() == Shape(4, (8, 8))
        assert direct(what, GRAPHICS) == Shape()  # nothing of it measured but its cores


def test_a_processor_does_eight_rows_first():
    """Measured on lavapipe; depthwise, where rows share less, four."""
    assert (direct(SQUARE, PROCESSOR), direct(IMAGE, PROCESSOR)) == (Shape(8), Shape(8))
    assert direct(EACH, PROCESSOR) == Shape(4)


def test_what_is_measured_changes_the_order():
    assert direct(SQUARE, replace(GRAPHICS, registers=64)).rows == 8
    assert direct(SQUARE, replace(GRAPHICS, registers=16)).rows < 4
    assert direct(SQUARE, replace(GRAPHICS, compute_units=100)).rows < 4  # all cores have work
    big = replace(SQUARE, rows=1 << 16)
    small, large = (direct(big, replace(GRAPHICS, registers=64, caches=(c,))) for c in (16 << 10, 128 << 10))
    assert small.rows * small.group[1] < large.rows * large.group[1]
    row = replace(SQUARE, rows=1, columns=1 << 16)  # threads of other rows would be idle
    assert direct(row, replace(GRAPHICS, warp=64)).group == (64, 1)


@pytest.mark.parametrize("traits", [GRAPHICS, PROCESSOR, replace(GRAPHICS, group_max=64, warp=64),
                                    replace(GRAPHICS, group_max=16), replace(PROCESSOR, caches=())])
@pytest.mark.parametrize("what", [SQUARE, IMAGE, EACH, *SHAPES.values(), Product(3, 9, 16, 24, batched=True),
                                  Product(1, 1, 7, 3), replace(IMAGE, number="int8")])
def test_candidates_are_within_limits_and_always_in_this_order(what, traits):
    found = candidates(what, traits)
    assert found == candidates(what, traits)
    assert len(set(found)) == len(found) > 0
    shapes = [c.shape if isinstance(c, Fewer) else c for c in found]
    assert all(s.threads <= traits.group_max for s in shapes)
    assert any(isinstance(c, Shape) for c in found)
    fewer = {c.size for c in found if isinstance(c, Fewer)}
    assert fewer in ({2, 4}, set())
    assert not fewer or (isinstance(what, Convolution) and what.kernel == (3, 3) and what.number != "int8")


def test_candidates_are_started_within_the_groups_there_are():
    what = Product(1, 1 << 21, 4, 4)
    for shape in candidates(what, GRAPHICS):
        assert max(product(what, shape=shape).modules[0].groups) <= 65535
    assert Shape(1, (64, 1)) not in candidates(what, GRAPHICS)


@pytest.mark.parametrize("what", [SQUARE, IMAGE, EACH, *SHAPES.values(), Product(3, 9, 16, 24, batched=True)])
def test_the_model_counts_the_loops_that_there_are(what):
    work = work_of(what)
    layer = (product(what) if isinstance(what, Product) else
             convolution(what, np.zeros((what.filters, *what.kernel, what.channels // what.groups))))
    assert work.steps <= layer.modules[0].turns
    if isinstance(what, Convolution):
        assert (work.deep == 1) == (is_depthwise(what) or is_gathered(what))
    across, down = layer.modules[0].groups
    tiles = -(-work.rows // Shape().tall(work.rows)) * work.batch
    assert (across, down) == (-(-work.columns // 32), -(-tiles // 8))


def test_the_model_counts_the_products_of_winograd(monkeypatch):
    seen = []
    monkeypatch.setattr(modules_shapes, "_cycles", lambda work, *_: seen.append(work) or 1.0)
    candidates(IMAGE, GRAPHICS)
    for size in (2, 4):
        middle = modules_winograd.convolution(IMAGE, np.zeros((64, 3, 3, 64)), size=size).modules[1]
        work = next(w for w in seen if w.batch == (size + 2) ** 2)
        assert middle.operations == 8.0 * work.rows * work.columns * work.batch * work.steps


# what is known of a device


def bench(processor=False, low=32, high=32, cores=16):
    return SimpleNamespace(
        identity=Identity("vulkan", "a platform", "a GPU", "a vendor", "its driver", "1"),
        adapter=SimpleNamespace(info={"subgroup_min_size": low, "subgroup_max_size": high}),
        limits=Limits(cores, 256, 32 << 10, 1 << 27, frozenset({"float32"}), processor=processor))


def probed(**quantities):
    units = {"memory bandwidth": "GB/s"}
    return {"identity": {"name": "a GPU", "driver": "its driver"}, "quantities": [
        {"name": n.replace("_", " "), "value": v, "unit": units.get(n.replace("_", " "), ""), "status": "measured"}
        for n, v in quantities.items()]}


def test_traits_are_measured_stated_or_assumed():
    plain = traits_of(bench())
    assert (plain.warp, plain.registers, plain.compute_units, plain.group_max) == (32, 32, 16, 256)
    assert {k: plain.sources[k] for k in ("warp", "registers", "caches", "compute_units", "group_max")} == {
        "warp": "stated", "registers": "assumed", "caches": "assumed", "compute_units": "measured",
        "group_max": "stated"}
    assert traits_of(bench(low=8, high=32)).sources["warp"] == "assumed"  # which of them is not known
    found = traits_of(bench(), probed(warp_width=64, register_file=256 << 10, resident_threads=1024, L1_size=65536,
                                      memory_bandwidth=20))
    assert (found.warp, found.registers, found.caches, found.bandwidth) == (64, 64, (65536,), 2e10)
    assert {found.sources[k] for k in ("warp", "registers", "caches", "bandwidth")} == {"measured"}
    assert found.sources["operations"] == "assumed"


def test_a_processors_threads_are_lanes():
    found = traits_of(bench(processor=True, low=4, high=128))
    assert (found.cpu, found.warp, found.registers) == (True, 8, 16)
    assert found.sources["warp"] == found.sources["registers"] == "assumed"


@pytest.mark.parametrize("result", [{}, [], {"identity": None}, probed(warp_width=64) | {"identity": {
    "name": "a GPU", "driver": "another"}}])
def test_a_probe_of_another_device_is_not_used(result):
    assert traits_of(bench(), result) == traits_of(bench())


def test_traits_of_the_device_that_is_here(vulkan_bench):
    found = traits_of(vulkan_bench)
    assert found.name == vulkan_bench.identity.name
    assert found.group_max == vulkan_bench.limits.group_max
    assert set(found.sources) == {"cpu", "compute_units", "vector", "registers", "warp", "local_bytes", "group_max",
                                  "caches", "operations", "bandwidth", "halves"}


# the tuner

SMALL = Product(1, 8, 8, 16)
WAYS = [Shape(2), Shape(4), Shape(1, (16, 4))]


@pytest.fixture
def few(monkeypatch):
    """Three candidates."""
    monkeypatch.setattr(modules_shapes, "candidates", lambda what, traits: WAYS)
    return WAYS


def answers(*seconds):
    """A worker that measures so much for the three."""
    return script(f"import sys, json\ntimes = dict(zip((2, 4, 1), {seconds}))\n"
                  "sys.stdin.readline()\n"
                  "for line in sys.stdin:\n"
                  "    a = json.loads(line)\n"
                  "    took = [times[a[k].get('rows', 4)] if a[k] else 1 for k in ('choice', 'rival')]\n"
                  "    print(json.dumps({'seconds': [took[0]] * 3, 'rival': [took[1]] * 3}), flush=True)\n")


def tuned(bench, store, what=SMALL, seconds=60, **more):
    return modules_tuner.tune(bench, PROCESSOR, what, store, seconds, **more)


def test_the_tuner_finds_and_keeps_a_shape(vulkan_bench, few, tmp_path):
    heard = []
    found = tuned(vulkan_bench, tmp_path, tell=heard.append)
    assert found in few
    assert modules_tuner.best(tmp_path, vulkan_bench, PROCESSOR, SMALL) == found
    kept = stored(tmp_path)[1]
    assert [t.choice for t in kept.tried] == few
    assert all(t.seconds > 0 and not t.why for t in kept.tried)
    assert len(heard) == 3
    assert modules_tuner.best(tmp_path, vulkan_bench, PROCESSOR, replace(SMALL, rows=9)) is None
    assert tuned(vulkan_bench, tmp_path, worker=script("raise SystemExit(1)")) == found  # nothing is tried again


def test_the_quickest_wins(vulkan_bench, few, tmp_path):
    assert tuned(vulkan_bench, tmp_path, worker=answers(3e-6, 1e-6, 2e-6)) == few[1]


@pytest.mark.parametrize("what", [
    SMALL, Product(2, 7, 13, 10, batched=True, residual=True, activation="tanh", number="float16"),
    Convolution(1, 7, 6, 5, 9, (3, 3), pads=(1, 1, 1, 1), residual=True, activation="gelu"),
    Convolution(1, 7, 6, 8, 8, (3, 3), groups=8, activation="silu", number="float16"),
    Convolution(1, 6, 7, 5, 12, (3, 3), pads=(1, 1, 1, 1), number="int8"),
    Convolution(1, 1, 9, 33, 14, number="int8")])
def test_all_candidates_are_right(vulkan_bench, what):
    trials, rival = modules_trials.Trials(vulkan_bench, what), None
    ways = modules_shapes.candidates(what, PROCESSOR)
    assert len(ways) > 20
    for choice in (*(c for c in ways if isinstance(c, Shape)), *[c for c in ways if isinstance(c, Fewer)][::9]):
        found = trials.answer(modules_trials.Asked(choice, rival))
        assert found.why == ""
        assert len(found.seconds) == 11
        assert len(found.rival) == (0 if rival is None else 11)
        rival = choice


@pytest.mark.parametrize(("module", "function", "change", "what"), [
    ("modules_products", "product", "a[1] = a[1].copy(); a[1][-1] = 0", SMALL),
    ("modules_integers", "convolution", "a[6] += 1", Convolution(1, 1, 8, 8, 16, number="int8"))],
    ids=["floats", "bytes"])
def test_a_wrong_candidate_is_left_out(vulkan_bench, few, tmp_path, module, function, change, what):
    """It leaves out a term; it is one off."""
    wrong = script(f"from npulab.gpu.compute import {module} as m, modules_trials\n"
                   f"real = m.{function}\n"
                   "def changed(*a, shape):\n"
                   "    a = list(a)\n"
                   f"    if shape.rows == 4: {change}\n"
                   "    return real(*a, shape=shape)\n"
                   f"m.{function} = changed\n"
                   "modules_trials.main()")
    assert tuned(vulkan_bench, tmp_path, what, worker=wrong) != few[1]
    kept = stored(tmp_path)[1]
    assert "numbers are wrong" in kept.tried[1].why
    assert not kept.tried[0].why
    assert not kept.tried[2].why


def test_a_candidate_that_the_device_does_not_take_is_left_out(vulkan_bench):
    trials = modules_trials.Trials(vulkan_bench, SMALL)
    found = trials.answer(modules_trials.Asked(Shape(1, (1 << 20, 1))))
    assert "no work groups of so many threads" in found.why


def test_a_worker_that_dies_costs_its_candidate_alone(vulkan_bench, few, tmp_path):
    dies = script("import sys, json\nsys.stdin.readline()\n"
                  "for line in sys.stdin:\n"
                  "    if json.loads(line)['choice']['rows'] == 2: sys.exit(1)\n"
                  "    print(json.dumps({'seconds': [1e-6]}), flush=True)")
    assert tuned(vulkan_bench, tmp_path, worker=dies) == few[1]
    assert stored(tmp_path)[1].tried[0].why == "the process died of it"


def test_the_time_is_kept_whatever_a_candidate_does(vulkan_bench, few, tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "FAIR", 0.0)
    start = time.monotonic()
    for _ in range(tuner.ATTEMPTS):
        assert tuned(vulkan_bench, tmp_path, seconds=0.5, worker=script("import time; time.sleep(60)")) == few[0]
    assert time.monotonic() - start < 20  # not 60; a busy machine is given time
    assert tuned(vulkan_bench, tmp_path, worker=answers(3e-6, 1e-6, 2e-6)) == few[1]
    assert stored(tmp_path)[1].tried[0].why == "the tuner ended while it was tried"


def test_a_tuner_that_is_killed_goes_on(vulkan_bench, few, tmp_path):
    """Killed while the second candidate is tried, by a signal that nothing can catch."""
    code = f"""
import sys, pathlib
from npulab.gpu import vulkan
from npulab.gpu.compute import modules_shapes, modules_tuner
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.problems import Product
from npulab.gpu.compute.types import Traits
modules_shapes.candidates = lambda *a: {WAYS!r}
worker = (sys.executable, "-c", '''
import sys, json
sys.stdin.readline(); sys.stdin.readline()
print(json.dumps({{"seconds": [1e-6]}}), flush=True)
sys.stdin.readline(); sys.stdin.readline()
''')
modules_tuner.tune(vulkan.open_device(0), {PROCESSOR!r}, {SMALL!r}, pathlib.Path(sys.argv[1]), 60,
                   lambda s: print(s, flush=True), worker)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
    assert b"1 of 3" in child.stdout.readline()
    deadline = time.monotonic() + 30
    while stored(tmp_path)[1].trying is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    kept = stored(tmp_path)[1]
    assert ([t.choice for t in kept.tried], kept.trying) == (few[:1], few[1])
    assert tuned(vulkan_bench, tmp_path, worker=answers(3e-6, 1e-6, 2e-6)) == few[1]
    assert [t.choice for t in stored(tmp_path)[1].tried] == few


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"key": {}, "tried": []}'])
def test_a_damaged_store_is_as_good_as_none(vulkan_bench, few, tmp_path, damage):
    tuned(vulkan_bench, tmp_path, worker=answers(1e-6, 2e-6, 3e-6))
    stored(tmp_path)[0].write_bytes(damage)
    assert modules_tuner.best(tmp_path, vulkan_bench, PROCESSOR, SMALL) is None
    assert tuned(vulkan_bench, tmp_path, worker=answers(2e-6, 1e-6, 3e-6)) == few[1]


def test_a_product_of_bytes_is_tuned_as_a_convolution(vulkan_bench, tmp_path):
    with pytest.raises(InvariantError, match="tuned as a convolution"):
        tuned(vulkan_bench, tmp_path, replace(SMALL, number="int8"))
