"""Experiments on a Vulkan device: lavapipe, which computes on the CPU, or whatever device is number 0."""

import math
import shutil
import struct
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

from npulab.cli.probe import probe as command
from npulab.cli.probe import show
from npulab.errors import CapacityError, DeviceError, UnsupportedError, UsageError
from npulab.gpu import devices, opencl, shaders, vulkan
from npulab.gpu.analysis.conclude import Meter, conclude
from npulab.gpu.spirv_builder import Shader, Type
from npulab.gpu.spirv_words import MAGIC
from npulab.gpu.types import Identity
from npulab.gpu.vulkan_more import MAPPABLE
from scripts import loaded

with loaded("bench/gpu_sabotage.py") as sabotage:
    pass


@pytest.fixture
def bench(vulkan_bench):
    """Without shaders of other tests, which may have been tampered with."""
    vulkan_bench._pipeline.cache_clear()
    yield vulkan_bench
    vulkan_bench._pipeline.cache_clear()


@pytest.fixture
def unhurried(monkeypatch):
    """A busy machine is not to decide: times are not compared."""
    monkeypatch.setattr(opencl, "SCALES", 0.0)
    monkeypatch.setattr(opencl, "REPEATS", 2)


def recipes():
    yield "chase", shaders.CHASE, "chase"
    yield "launch", shaders.LAUNCH, "launch"
    yield "barrier", shaders.barrier(64), "meet"
    yield "diverge", shaders.DIVERGE, "diverge"
    yield "hold", shaders.hold(64), "hold"
    for texel, order in ((16, "rows"), (4, "rows"), (8, "columns"), (4, "tiles")):
        yield f"image {texel} {order}", shaders.image(64, texel, order), "image"
    for spread, width in ((False, 4), (True, 4), (False, 16)):
        yield f"constant {spread} {width}", shaders.constant(1024, spread, width), "constant"
    for width in (4, 8, 16):
        yield f"local {width}", shaders.local(4096, width), "local_loads"
        yield f"local write {width}", shaders.local_write(4096, width), "local_stores"
        for way in ("read", "write", "copy"):
            yield f"{way} {width}", shaders.stream(width), way
    for element in ("float32", "float16", "int32"):
        for operation in ("fma", "mul", "add", "special"):
            if element != "int32" or operation != "special":
                for width in (1, 2, 4):
                    yield f"{operation} {element} {width}", shaders.chain(operation, element, width, 2), "chain"


# modules


def instructions(module):
    """(opcode, operands) of each instruction."""
    words = struct.unpack(f"<{len(module) // 4}I", module)
    assert words[0] == MAGIC
    at = 5
    while at < len(words):
        length = words[at] >> 16
        assert length
        yield words[at] & 0xFFFF, words[at + 1:at + length]
        at += length
    assert at == len(words)


@pytest.mark.skipif(not shutil.which("spirv-val"), reason="needs spirv-val: apt install spirv-tools")
def test_all_shaders_are_valid_for_vulkan(tmp_path):
    files = []
    for name, recipe, entry in recipes():
        for group in (1, 256):
            files.append(tmp_path / f"{name} {group}.spv")
            files[-1].write_bytes(recipe.make(entry, group))
    for file in files:
        run = subprocess.run(["spirv-val", "--target-env", "vulkan1.1", file], capture_output=True, text=True)
        assert run.returncode == 0, f"{file.stem}: {run.stderr}{run.stdout}"


def test_a_module_is_made_the_same_each_time():
    for name, recipe, entry in recipes():
        module = recipe.make(entry, 64)
        assert module == recipe.make(entry, 64), name
        assert list(instructions(module)), name


@pytest.mark.parametrize(("operation", "opcode"), [("mul", 133), ("add", 129)])
def test_a_chain_holds_the_steps_that_are_counted(operation, opcode):
    """FMul, FAdd: 16 steps of three chains in the loop, and what adds the chains up."""
    module = shaders.chain(operation, "float32", 2, 3).make("chain", 64)
    outside = {"mul": 0, "add": 3 + 2 + 1}[operation]  # starts of the chains, chains, lanes
    assert sum(code == opcode for code, _ in instructions(module)) == shaders.STEPS * 3 + outside


@pytest.mark.parametrize(("operation", "opcode"), [("mul", 132), ("add", 128)])
def test_a_chain_of_two_integers_holds_the_steps_that_are_counted(operation, opcode):
    """IMul, IAdd: as above, of three chains."""
    module = shaders.chain(operation, "int32", 2, 3).make("chain", 64)
    outside = {"mul": 1 + 3, "add": 1 + 3 + 1 + 2 + 1}[operation]
    # what is read by a, starts by two; beside what is read, starts, the loop's count, chains, lanes
    assert sum(code == opcode for code, _ in instructions(module)) == shaders.STEPS * 3 + outside


# what is computed


def test_arithmetic_control_flow_and_memory(bench):
    """All that the builder has, against NumPy."""
    def make(_, group):
        s = Shader(group, ("uint", Type("float", 4), "float"), ("uint", "float"))
        many, scale = s.arguments
        x = s.load(0, s.global_id)
        cells = s.shared("uint", group)
        s.shared_store(cells, s.local_id, x)
        s.barrier()
        total = s.variable(s.constant(0))
        with s.loop(many, 2, 1) as i, s.when(i.differs(3)):
            total.set(total.get() + s.shared_load(cells, (s.local_id + i) % group) * i)
        s.either((x & 1).same(0), lambda: total.set(total.get() // 3), lambda: total.set(total.get() >> 2))
        picked = s.select(x < 1000, total.get(), total.get() - 5)
        s.store(0, s.global_id, picked)
        v = s.load(1, s.global_id)
        half = s.convert(s.convert(s.spread(scale, 4), "half"), "float") if "float16" in bench.limits.elements else \
            s.spread(scale, 4)
        v = s.fma(v, half, s.builtin("FMax", v, s.constant(0, "float", 4))) * 2 - 1
        s.store(1, s.global_id, v)
        s.store(2, s.global_id, s.sum(v) + s.convert(s.local_id, "float") + s.convert(s.group_y, "float"))
        return s.assemble()

    r = np.random.default_rng(0)
    a, f = r.integers(0, 2000, 128, np.uint32), r.integers(-8, 8, (128, 4)).astype(np.float32)
    buffers = [bench._buffer(x) for x in (a, f, np.zeros(128, np.float32))]
    bench._time(bench._kernel(shaders.Recipe("all", (), make), "main"), (128,), (64,), *buffers, np.uint32(8),
                np.float32(0.5))
    total = np.zeros(128, np.uint32)
    for i in (1, 5, 7):
        total += np.concatenate([np.roll(a[:64], -i), np.roll(a[64:], -i)]) * np.uint32(i)
    total = np.where(a & 1, total >> 2, total // 3)
    np.testing.assert_array_equal(bench._read(buffers[0], 128), np.where(a < 1000, total, total - np.uint32(5)))
    want = (f * 0.5 + np.maximum(f, 0)) * 2 - 1
    np.testing.assert_array_equal(bench._read(buffers[1], 512, np.float32).reshape(128, 4), want)
    np.testing.assert_array_equal(bench._read(buffers[2], 128, np.float32), want.sum(1) + np.arange(128) % 64)


def test_every_experiment_computes_what_it_is_to(bench, unhurried):
    for name, run in sabotage.honest(bench):
        t = run()
        assert t.wrong == "", name
        assert len(t.seconds) >= 2, name
        assert all(s >= 0 for s in t.seconds), name
        assert max(t.seconds) > 0, name
        assert all(v > 0 for v in t.work.values()), name


def extras(bench):
    for stride, width in ((1, 4), (4, 4), (33, 4), (1, 8), (1, 16), (3, 16)):
        yield f"local write {stride} {width}", lambda s=stride, w=width: bench.local_write(s, w)
        yield f"local {stride} {width}", lambda s=stride, w=width: bench.local(s, w)
    for footprint, texel, order in ((1 << 14, 16, "rows"), (100_000, 16, "rows"), (100_000, 4, "rows"),
                                    (100_000, 8, "columns"), (1 << 14, 4, "columns"), (100_000, 16, "tiles")):
        yield f"image {texel} {order}", lambda f=footprint, t=texel, o=order: bench.image(f, t, o)
    for spread, width in ((False, 4), (True, 4), (False, 16), (True, 16)):
        yield f"constant {spread} {width}", lambda s=spread, w=width: bench.constant(s, w)
    for way in ("read", "write", "copy"):
        for width, stride in ((4, 1), (8, 1), (4, 2), (4, 16)):
            yield f"{way} {width} {stride}", lambda a=(1 << 16, stride, width, way): bench.stream(*a)


def test_experiments_that_not_every_bench_does(bench, unhurried):
    for name, run in extras(bench):
        t = run()
        assert t.wrong == "", name
        assert max(t.seconds) > 0, name
        assert all(v > 0 for v in t.work.values()), name
    if MAPPABLE in bench.adapter.features:
        t = bench.map(1 << 20)
        assert (t.wrong, t.work) == ("", {"bytes": 1 << 20})
        assert all(s > 0 for s in t.seconds)


def test_with_the_hosts_clock_too(bench, unhurried, monkeypatch):
    monkeypatch.setattr(bench, "clocked", False)
    assert bench.chain("fma", "int32", 4, 2, 64).wrong == ""
    assert bench._empty > 0


def test_with_guarded_shaders_too(bench, unhurried, monkeypatch):
    """A wgpu that cannot be told to leave guards out."""
    monkeypatch.setitem(sys.modules, "wgpu.backends.wgpu_native._ffi", None)
    assert bench.local(1).wrong == ""
    assert bench.stream(1 << 18, 1, 16, "read").wrong == ""


@contextmanager
def one_turn(self, turns, step=1, start=0, real=Shader.loop):
    with real(self, 1, step, start) as i:
        yield i


@contextmanager
def half_the_turns(self, turns, step=1, start=0, real=Shader.loop):
    with real(self, turns >> 1, step, start) as i:
        yield i


SABOTAGED = {
    "chase, half the loads": (shaders, "CHASED", 4, lambda b: b.chase(1 << 16, 64)),
    "chase, one place": (Shader, "load", lambda s, b, i, real=Shader.load: real(s, b, s.constant(0)),
                         lambda b: b.chase(1 << 16, 64)),
    "read, always the first": (Shader, "load", lambda s, b, i, real=Shader.load: real(s, b, s.constant(0)),
                               lambda b: b.stream(1 << 18, 1, 4, "read")),
    "read, once": (Shader, "loop", one_turn, lambda b: b.stream(1 << 18, 1, 16, "read")),
    "read, three of four": (shaders, "STREAMED", {"read": 3}, lambda b: b.stream(1 << 18, 1, 8, "read")),
    "write, once": (Shader, "loop", one_turn, lambda b: b.stream(1 << 18, 1, 4, "write")),
    "write, three of four": (shaders, "STREAMED", {"write": 3}, lambda b: b.stream(1 << 18, 1, 4, "write")),
    "diverge, one way": (Shader, "either", lambda s, c, then, otherwise: then(), lambda b: b.diverge(1)),
    "diverge, fewer steps": (shaders, "DIVERGED", 3, lambda b: b.diverge(4)),
    "local, from registers": (Shader, "shared_load", lambda s, a, i: i, lambda b: b.local(1)),
    "local, fewer loads": (shaders, "LOADED", 3, lambda b: b.local(4)),
    "local, other words": (Shader, "shared_store", lambda s, a, i, v, real=Shader.shared_store: real(s, a, i, i),
                           lambda b: b.local(1)),
    "local stores, one word": (Shader, "shared_store", lambda s, a, i, v, real=Shader.shared_store:
                               real(s, a, s.constant(0), v), lambda b: b.local_write(1)),
    "constants, always the first": (Shader, "load_constant", lambda s, i, lane, real=Shader.load_constant:
                                    real(s, s.constant(0), lane), lambda b: b.constant(True)),
    "constants, one word of four": (Shader, "load_constant", lambda s, i, real=Shader.load_constant: s.spread(
        real(s, i, s.constant(0)), 4), lambda b: b.constant(False, 16)),
    "local, one word of four": (Shader, "shared_load", lambda s, a, i, real=Shader.shared_load: s.spread(
        s.lane(real(s, a, i), 0), 4), lambda b: b.local(1, 16)),
    "image, always the first": (Shader, "texel", lambda s, x, y, real=Shader.texel: real(s, s.constant(0), y),
                                lambda b: b.image(1 << 16)),
    "image, columns for rows": (Shader, "texel", lambda s, x, y, real=Shader.texel: real(s, y, x),
                                lambda b: b.image(1 << 16, 4, "columns")),
    "image, once": (Shader, "loop", one_turn, lambda b: b.image(1 << 14)),
    "constants, once": (Shader, "loop", one_turn, lambda b: b.constant(False)),
    "barrier, nobody waits": (Shader, "barrier", lambda s: None, lambda b: b.barrier()),
    "barrier, half the turns": (Shader, "loop", half_the_turns, lambda b: b.barrier()),
    "barrier, the own word": (Shader, "shared_load", lambda s, a, i, real=Shader.shared_load:
                              real(s, a, s.local_id), lambda b: b.barrier()),
    "chain, half the steps": (shaders, "STEPS", 8, lambda b: b.chain("fma", "float32", 1, 1, 64)),
    "chain, a step less": (shaders, "STEPS", 15, lambda b: b.chain("fma", "int32", 4, 2, 64)),
    "chain, a sum less": (shaders, "STEPS", 15, lambda b: b.chain("add", "int32", 4, 2, 64)),
    "chain, a product less": (shaders, "STEPS", 15, lambda b: b.chain("mul", "int32", 1, 2, 64)),
    "chain, integers added once": (Shader, "loop", one_turn, lambda b: b.chain("add", "int32", 2, 1, 64)),
    "chain, added once": (Shader, "loop", one_turn, lambda b: b.chain("add", "float32", 4, 2, 64)),
    "chain, another product of float16": (Shader, "fma", lambda s, a, b, c: a * b,
                                          lambda b: b.chain("fma", "float16", 1, 1, 64)),
}


@pytest.mark.parametrize("name", SABOTAGED)
def test_sabotaged_shaders_are_not_believed(bench, unhurried, monkeypatch, name):
    where, what, new, run = SABOTAGED[name]
    if "float16" in name and "float16" not in bench.limits.elements:
        pytest.skip("the device has no float16")
    monkeypatch.setattr(where, what, new)
    assert run(bench).wrong != ""


def test_a_driver_that_ends_loops_early_is_noticed(bench, unhurried, monkeypatch):
    """llvmpipe does after 65535 turns; whatever a driver does, loops of `turns_max` turns are whole."""
    kernel, out = bench._kernel(shaders.CHASE, "chase"), bench._buffer(np.zeros(1, np.uint32))
    ring = bench._buffer(np.roll(np.arange(1 << 20, dtype=np.uint32), -1))
    bench._time(kernel, (1,), (1,), ring, out, np.uint32(bench.turns_max))
    assert int(bench._read(out, 1)[0]) == bench.turns_max * shaders.CHASED % (1 << 20)
    if "llvmpipe" in bench.identity.name:
        assert bench.turns_max == 1 << 15
        monkeypatch.setattr(bench, "turns_max", 1 << 20)
        monkeypatch.setattr(opencl, "ENOUGH", 10.0)
        assert "ended with" in bench.chain("fma", "int32", 1, 1, 1).wrong


@pytest.mark.parametrize("cores", [1, 3, 20, 132])
def test_cores_are_counted_by_groups_that_do_not_wait_for_each_other(bench, monkeypatch, cores):
    """On a device that has so many and starts in 5 us, with times that scatter by 5 %."""
    r = np.random.default_rng(cores)

    def took(kernel, size, group, out, turns, *numbers):
        return (5e-6 + math.ceil(size[0] // group[0] / cores) * int(turns) * 2e-7) * r.uniform(1, 1.05)

    monkeypatch.setattr(bench, "_time", took)
    assert bench._cores() == cores


def test_a_device_that_does_not_run_loops(bench, monkeypatch):
    monkeypatch.setattr(bench, "_time", lambda *a: 1.0)
    with pytest.raises(DeviceError, match="does not run a loop"):
        bench._longest_loop()


# what goes wrong


def test_without_wgpu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wgpu", None)
    vulkan._adapters.cache_clear()
    with pytest.raises(UsageError, match="the package wgpu is not installed") as e:
        vulkan.devices()
    assert e.value.facts["try"] == "pip install 'npulab[vulkan]'"


def test_a_device_that_is_not_there(bench):
    with pytest.raises(DeviceError, match="there is no Vulkan device 99") as e:
        vulkan.open_device(99)
    assert bench.identity.name in e.value.facts["got"]
    with pytest.raises(DeviceError):
        vulkan.open_device(-1)


def test_without_a_driver_packages_are_named(monkeypatch):
    monkeypatch.setattr(vulkan, "_adapters", lambda: [])
    with pytest.raises(DeviceError, match="there is no Vulkan device 0") as e:
        vulkan.open_device(0)
    assert e.value.facts == {"got": "none", "try": f"install a driver: {vulkan.DRIVERS}"}


@pytest.mark.parametrize("module", [struct.pack("<5I", MAGIC, 0x10300, 0, 1, 0),
                                    struct.pack("<6I", MAGIC, 0, 0, 0, 0, 7)])
def test_a_shader_that_does_not_compile(bench, module):
    broken = shaders.Recipe("broken", (module,), lambda entry, group: module)
    with pytest.raises(DeviceError, match="does not compile the kernel 'main'"):
        bench._time(bench._kernel(broken, "main"), (1,), (1,), bench._buffer(np.zeros(1, np.uint32)), np.uint32(1))


def test_what_a_device_has_not(bench):
    with pytest.raises(UnsupportedError, match="does not compute on int8x4"):
        bench.chain("fma", "int8x4", 1, 1, 1)
    with pytest.raises(UnsupportedError, match="shaders have no vectors of 8"):
        bench.chain("fma", "float32", 8, 1, 1)
    with pytest.raises(UnsupportedError, match="there is no chain of special on int32"):
        bench.chain("special", "int32", 1, 1, 1)
    with pytest.raises(UnsupportedError, match="an image has no such size"):
        bench.image(1 << 40)
    with pytest.raises(UnsupportedError, match="one word of them is loaded, or all four"):
        bench.constant(False, 8)
    with pytest.raises(CapacityError, match="has no buffers of this size"):
        bench._buffer(np.broadcast_to(np.uint32(0), (1 << 40,)))
    with pytest.raises(UnsupportedError, match="starts at most 65535 groups at once"):
        bench._time(bench._kernel(shaders.LAUNCH, "launch"), (1 << 20,), (1,), bench._buffer(np.zeros(1, np.uint32)),
                    np.uint32(0))


def test_a_device_that_is_lost(bench):
    """A device of its own, taken away."""
    other = vulkan.open_device(0)
    other.device.destroy()
    with pytest.raises(DeviceError, match=r"failed in an experiment|does not compile"):
        other.barrier()
    assert bench.launch().wrong == ""  # the others go on


# the list of all devices


WHO = [Identity(api, "a platform", name, "nobody", "1", "1") for api, name in (
    ("opencl", "first"), ("opencl", "second"), ("vulkan", "third"))]


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(opencl, "devices", lambda: WHO[:2])
    monkeypatch.setattr(vulkan, "devices", lambda: WHO[2:])


def test_devices_have_one_number_each(three):
    assert [(d.name, d.identity.name) for d in devices.devices()] == [
        ("opencl:0", "first"), ("opencl:1", "second"), ("vulkan:0", "third")]
    for asked, name in ((0, "first"), ("1", "second"), ("2", "third"), ("opencl:1", "second"), ("vulkan:0", "third")):
        assert devices.find(asked).identity.name == name


def test_a_number_of_opencl_does_not_ask_for_vulkan(three, monkeypatch):
    monkeypatch.setattr(vulkan, "devices", lambda: pytest.fail("Vulkan was asked"))
    assert devices.find(1).name == "opencl:1"


def test_a_number_that_no_device_has(three):
    with pytest.raises(DeviceError) as e:
        devices.find(3)
    assert str(e.value) == ("there is no device 3\n"
                            "  got     0: first (opencl:0); 1: second (opencl:1); 2: third (vulkan:0)\n"
                            "  try     one of these")


@pytest.mark.parametrize("name", ["x", "cuda:0", "vulkan:", "-1", "vulkan:0 "])
def test_a_name_that_is_none(three, name):
    with pytest.raises(UsageError, match="is no device"):
        devices.find(name)


def missing(package):
    def devices_of():
        raise UsageError(f"the package {package} is not installed", try_="pip")

    return devices_of


def test_one_package_is_enough(three, monkeypatch):
    monkeypatch.setattr(opencl, "devices", missing("pyopencl"))
    faults = []
    assert [d.name for d in devices.devices(faults)] == ["vulkan:0"]
    assert faults == ["the package pyopencl is not installed: pip"]
    assert devices.find(0).name == "vulkan:0"
    monkeypatch.setattr(vulkan, "devices", missing("wgpu"))
    with pytest.raises(UsageError, match="no package that reaches a GPU is installed") as e:
        devices.find(0)
    assert e.value.facts["try"] == devices.INSTALL


def test_no_device_at_all(monkeypatch):
    monkeypatch.setattr(opencl, "devices", list)
    monkeypatch.setattr(vulkan, "devices", list)
    with pytest.raises(DeviceError, match="there is no device 0") as e:
        devices.find(0)
    assert e.value.facts == {"got": "none", "try": f"install a driver: {devices.DRIVERS}"}


def test_the_list_names_devices_and_what_is_not_installed(three, monkeypatch, capsys):
    command(device="0", quick=False, list_=True, json=None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["device", "or", "name", "driver"], ["0", "opencl:0", "first", "a", "platform,", "1"],
        ["1", "opencl:1", "second", "a", "platform,", "1"], ["2", "vulkan:0", "third", "a", "platform,", "1"]]
    monkeypatch.setattr(vulkan, "devices", missing("wgpu"))
    command(device="0", quick=False, list_=True, json=None)
    assert capsys.readouterr().out.splitlines()[-1] == "the package wgpu is not installed: pip."


@pytest.mark.parametrize(("version", "said"), [("CPU, subgroups of 8", True), ("DiscreteGPU, subgroups of 32", False)])
def test_a_cpu_behind_vulkan_is_called_one(capsys, version, said):
    who = {"api": "vulkan", "name": "x", "platform": "y", "driver": "z", "version": version}
    show({"identity": who, "quantities": []})
    assert ("A CPU behind Vulkan" in capsys.readouterr().out) == said


def test_help_does_not_need_the_packages():
    code = ("import sys, npulab.cli, npulab.cli.probe, npulab.gpu.devices\n"
            "assert not {'wgpu', 'pyopencl', 'cffi'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


# all of it


def test_the_analysis_comes_to_its_end(bench, monkeypatch):
    """In ten seconds, in which it finds little: each quantity is a number or has a reason against it."""
    class Short(Meter):
        def __init__(self, *a):
            super().__init__(*a)
            self.until = time.monotonic() + 8

    monkeypatch.setattr(sys.modules[conclude.__module__], "Meter", Short)
    monkeypatch.setattr(opencl, "ENOUGH", 2e-4)
    monkeypatch.setattr("npulab.gpu.analysis.meter.MEMORY_FOOTPRINT", 1 << 22)
    found = conclude(bench, quick=True)
    names = [q.name for q in found]
    assert len(names) == len(set(names)) >= 20
    for q in found:
        if q.status == "measured":
            assert math.isfinite(q.value), q
            assert q.value > 0, q
        else:
            assert q.why, q
    assert any(q.status == "measured" for q in found)
