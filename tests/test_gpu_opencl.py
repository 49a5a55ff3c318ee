"""Experiments on an OpenCL device: PoCL, which computes on the CPU, or whatever device is number 0."""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from npulab.errors import CapacityError, DeviceError, UnsupportedError, UsageError
from npulab.gpu import counting, extras, filled, kernels, opencl
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.types import Buffer, Kernel, Launch
from npulab.gpu.exact import DOTTED, chained, congruential, dotted, operands


@pytest.fixture(scope="module")
def bench(opencl_bench):
    return opencl_bench


@pytest.fixture
def unhurried(monkeypatch):
    """A busy machine is not to decide: times are not compared."""
    monkeypatch.setattr(opencl, "SCALES", 0.0)
    monkeypatch.setattr(opencl, "REPEATS", 2)


# what chains compute


@pytest.mark.parametrize("operation", ["fma", "mul", "add"])
@pytest.mark.parametrize("element", ["float32", "float16"])
def test_chains_of_floats_are_exact(operation, element):
    """The oracle goes through all steps in the element type."""
    kind = np.dtype(element).type
    a, b = (kind(v) for v in operands(operation, element))
    for start, turns in ((1, 3), (5, 300)):
        x = kind(1 if operation == "mul" else start)
        for s in range(turns * kernels.STEPS):
            if operation == "fma":
                x = kind(x * a + b)
            elif operation == "mul":
                x = kind(x * (b if s % 2 else a))
            else:
                x = kind(x + (b if s % 2 else a))
        assert chained(operation, element, start, turns) == float(x)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 77, 5000])
@pytest.mark.parametrize("operation", ["mul", "add"])
def test_chains_of_two_integers_are_exact(operation, turns):
    """The oracle goes through all steps."""
    for start in (1, 2, 24):
        x = y = 2 * start + 1 if operation == "mul" else start
        for _ in range(turns * kernels.STEPS // 2):
            x = (x * y if operation == "mul" else x + y) % (1 << 32)
            y = (y * x if operation == "mul" else y + x) % (1 << 32)
        assert chained(operation, "int32", start, turns) == x ^ y


@pytest.mark.parametrize(("source", "name"), [
    *((kernels.chain(o, "float32", w, 2), "chain") for o in ("fma", "mul", "add", "special") for w in (1, 4)),
    *((kernels.chain(o, "int32", 1, 2), "chain") for o in ("fma", "mul", "add")), (kernels.hold(16), "hold")])
def test_no_two_threads_are_known_to_compute_the_same(device, source, name):
    """Else a compiler may do it once for both: Intel's did it once for 16. What a thread computes is its own: hangs on
    its place in a buffer, or on its number."""
    kind = np.uint32 if "__global uint *out" in source else np.float32
    before = np.array([10, 20, 30, 40], kind) if kind is np.uint32 else np.array([0, -.5, -.75, -.875], kind) * 2 ** 100
    given = [kind(1)] * 3 if kind is np.uint32 else [kind(x) for x in (0.5, 0.5, 2.0 ** 100)]
    given = given[:2] if name == "hold" else given
    out = device.upload(before)
    device.run([Launch(Kernel(source, name), (4,), (4,), (Buffer("out"), np.uint32(1), *given), name)], {"out": out})
    found = device.download(out, (4,), kind)
    assert len(set(found.tolist())) == 4, found


def test_many_turns_of_two_integers_are_taken_at_once():
    """Sums come round after 3 * 2**31 steps, exponents of products a quarter as soon (D. D. Wall, Fibonacci series
    modulo m, American Mathematical Monthly 67, 1960: of 2**k after 3 * 2**(k - 1))."""
    for operation, steps in (("add", 3 << 31), ("mul", 3 << 29)):
        for turns in (5, 777):
            again = chained(operation, "int32", 1, turns + steps // kernels.STEPS)
            assert again == chained(operation, "int32", 1, turns)
            assert again != chained(operation, "int32", 1, turns + steps // kernels.STEPS // 3)


@pytest.mark.parametrize("times", [0, 1, 2, 15, 16, 1000])
def test_congruential_steps_are_taken_at_once(times):
    x = 12345
    for _ in range(times):
        x = (1664525 * x + 1013904223) % (1 << 32)
    assert congruential(1664525, 1013904223, 12345, times) == x


@pytest.mark.parametrize("times", [0, 1, 2, 300, 5000])
def test_dot_products_of_bytes_are_taken_at_once(times):
    a, b = DOTTED
    x = 3
    for _ in range(times):
        x = (sum((x >> s & 255) * (a >> s & 255) for s in (0, 8, 16, 24)) + b) % (1 << 32)
    assert dotted(a, b, 3, times) == x


@pytest.mark.parametrize(("places", "piece"), [(10, 100), (1000, 64), (1000, 1), (7, 7)])
def test_an_order_in_pieces_has_all_places_and_each_piece_together(places, piece):
    order = opencl.shuffled(places, piece)
    assert sorted(order) == list(range(places))
    assert len([i for i in range(1, places) if order[i] // piece != order[i - 1] // piece]) == -(-places // piece) - 1


# experiments; that honest ones are believed is in test_gpu_sabotage.py


SABOTAGED = {
    "chase, half the loads": ("CHASE", "p = next[p]; p = next[p]; p = next[p]; p = next[p];\n        p = next[p]; p",
                              "p = next[p]; p = next[p]; p = next[p];\n        p = next[p]; p",
                              lambda b: b.chase(1 << 16, 64)),
    "chase, one place": ("CHASE", "out[0] = p", "out[0] = next[0]", lambda b: b.chase(1 << 16, 64)),
    "read, always the first": ("STREAM", "x += data[at]; at += step", "x += data[0]; at += step",
                               lambda b: b.stream(1 << 18, 1, 4, "read")),
    "read, once": ("STREAM", "i < turns; i++) {{\n        x +=", "i < 1; i++) {{\n        x +=",
                   lambda b: b.stream(1 << 18, 1, 4, "read")),
    "write, one of four": ("STREAM", "data[at] = x; at += step; at -= at >= size ? size : 0;\n        data[at] = x;",
                           "data[at] = x;\n        data[at] = x;", lambda b: b.stream(1 << 18, 1, 4, "write")),
    "diverge, one way": ("DIVERGE", "(lid / period) & 1", "0", lambda b: b.diverge(1)),
    "diverge, fewer steps": ("DIVERGE", "x = x * b + a; x = x * b + a; }", "x = x * b + a; }", lambda b: b.diverge(4)),
    "local, from registers": ("LOCAL", "x += cells[at & (CELLS - 1)];", "x += at;", lambda b: b.local(1)),
    "local, another stride": ("LOCAL", "lid * stride", "lid", lambda b: b.local(4)),
}


@pytest.mark.parametrize("name", SABOTAGED)
def test_sabotaged_kernels_are_not_believed(bench, unhurried, monkeypatch, name):
    what, old, new, run = SABOTAGED[name]
    source = getattr(kernels, what)
    assert source.count(old) >= 1
    monkeypatch.setattr(kernels, what, source.replace(old, new))
    monkeypatch.setattr(bench, "one_by_one", False)  # a processor has streams of its own
    assert run(bench).wrong != ""


@pytest.mark.parametrize(("operation", "element"), [("fma", "float32"), ("add", "float32"), ("fma", "int32"),
                                                     ("mul", "int32"), ("add", "int32")])
def test_a_chain_with_steps_missing_is_not_believed(bench, unhurried, monkeypatch, operation, element):
    monkeypatch.setattr(kernels, "chain", lambda *a, real=kernels.chain: real(*a).replace("i < turns", "i < turns / 2"))
    assert "ended with" in bench.chain(operation, element, 1, 1, 64).wrong


@pytest.mark.parametrize(("what", "old", "new", "run"), [
    ("IMAGE", "x += TEXEL(at)", "x += TEXEL(0)", lambda b: b.image(1 << 16)),
    ("CONSTANT", "cells[at & {last}]", "cells[0]", lambda b: b.constant(True)),
    ("CONSTANT", "* spread", "* 0", lambda b: b.constant(True)),
    ("LOCAL_WRITE", "at += 4;", "", lambda b: b.local_write(1)),
    ("LOCAL_WRITE", "cells[w] = (T)(w * 2654435761u);", "", lambda b: b.local_write(1))])
def test_sabotage_of_the_extras_is_not_believed(bench, unhurried, monkeypatch, what, old, new, run):
    source = getattr(extras, what)
    assert old in source
    monkeypatch.setattr(extras, what, source.replace(old, new))
    assert run(bench).wrong != ""


@pytest.mark.parametrize(("old", "new", "way", "reason"), [
    ("x1 += data[at + 1u * size + 0u];", "x1 += data[at + 0u * size + 0u];", "read", "did not read what is there"),
    ("at = at >= size ? 0 : at;", "at = 0;", "read", "did not read what is there"),
    ("i < turns", "i < turns / 2", "read", "did not read what is there"),
    ("x1 += data[at + 1u * size + 0u];", "", "read", "did not read what is there"),
    ("data[at + 1u * size + 0u] = x;", "", "write", "960 store bytes a turn, not 1024: stores were left out"),
    ("at += 2;", "at += 1;", "write", "did not go where it was to"),
    ("data[8u * size + at + 1u * size + 0u] = data[at + 1u * size + 0u];", "", "copy", "960 load bytes a turn")])
def test_sabotaged_streams_in_parts_are_not_believed(bench, unhurried, monkeypatch, old, new, way, reason):
    if not bench.one_by_one or "PoCL" not in bench.identity.platform:
        pytest.skip("for PoCL, which does a group's threads one by one")
    pytest.importorskip("capstone", reason="reads machine code: pip install 'npulab[gpu]'")
    source = kernels.parts(64, 8)
    assert old in source
    monkeypatch.setattr(kernels, "parts", lambda *_: source.replace(old, new))
    assert reason in bench.stream_parts(100_352, 64, way, 8).wrong


def test_loads_of_64_bytes_are_one_instruction_where_a_processor_has_it(bench, unhurried, monkeypatch):
    """Of a turn's 16 and no more; the counted instructions say nothing of their width."""
    if "avx512" not in bench.identity.version:
        pytest.skip("for PoCL on a processor with AVX-512")
    capstone = pytest.importorskip("capstone", reason="reads machine code: pip install 'npulab[gpu]'")
    binaries = []
    monkeypatch.setattr(counting.opencl.pocl, "count", lambda binary, *more, real=counting.opencl.pocl.count: (
        binaries.append(binary), real(binary, *more))[1])
    monkeypatch.setattr(bench, "_counts", {})
    assert bench.stream_parts(1 << 14, 64, "read", 1).wrong == ""
    code = binaries[0][binaries[0].index(b"\x7fELF"):]
    reader = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    reader.skipdata = True
    loads = [i.op_str for i in reader.disasm(code, 0) if i.mnemonic == "vpaddd" and "zmmword ptr" in i.op_str]
    assert len(loads) >= kernels.IN_TURN


def test_streams_on_a_processor_are_in_parts_where_they_can_be(bench, unhurried, monkeypatch):
    if not bench.one_by_one:
        pytest.skip("for devices that do a group's threads one by one")
    asked = []
    monkeypatch.setattr(kernels, "parts", lambda *a, real=kernels.parts: asked.append(a) or real(*a))
    runs = ((1 << 14, 1, 16), (1 << 14, 1, 64), (1 << 14, 1, 4), (1 << 14, 2, 16), ((1 << 14) + 64, 1, 64))
    for footprint, stride, width in runs:
        assert bench.stream(footprint, stride, width, "read").wrong == ""
    assert asked == [(16, 1), (64, 1)]
    with pytest.raises(UnsupportedError, match="has no room"):
        bench.stream_parts(64, 64, "read", 8)
    with pytest.raises(UnsupportedError, match="has no room"):
        bench.stream_parts(1 << 14, 4, "read", 8)
    monkeypatch.setattr(bench, "one_by_one", False)
    with pytest.raises(UnsupportedError, match="parts are for devices without"):
        bench.stream_parts(1 << 14, 64, "read", 8)


@pytest.mark.parametrize("rounds", [0, 3, 64])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 16, 41])
def test_what_places_add_up_to_is_as_if_each_were_gone_to(step, rounds, monkeypatch):
    """One by one, or by a list of places."""
    monkeypatch.setattr(filled, "ROUNDS", rounds)
    sums = np.random.default_rng(0).integers(0, 1 << 32, 7 * 6, np.uint32)
    for first in (0, 1, 30, 41):
        for count in (0, 1, 11, 12, 41, 42, 200):
            want = sum(int(sums[(first + i * step) % 42]) for i in range(count))
            assert filled.Sums(sums).along(first, step, count) == want % (1 << 32)


def test_threads_that_store_go_through_memory_of_their_own(bench, unhurried, monkeypatch):
    """All of it is 7, what the kernel stores."""
    if not bench.one_by_one:
        pytest.skip("for devices that do a group's threads one by one")
    buffers = []
    monkeypatch.setattr(bench, "_buffer", lambda x, real=bench._buffer: buffers.append(real(x)) or buffers[-1])
    size = 1 << 14
    assert bench.stream_parts(size, 64, "write", 1, True).wrong == ""
    cells = bench._read(buffers[0], bench.limits.compute_units * size // 4)
    assert (cells == 7).all()
    for way in ("read", "copy"):
        with pytest.raises(UnsupportedError, match="memory of their own is for stores"):
            bench.stream_parts(size, 64, way, 1, True)


def test_streams_take_as_many_turns_as_memory_needs(bench, unhurried, monkeypatch):
    """4 bytes a load through 324 MB need more turns than anything else takes."""
    monkeypatch.setattr(opencl, "TURNS_MAX", 16)
    assert bench.stream(1 << 20, 1, 4, "read").wrong == ""


def test_memory_that_takes_more_turns_than_others_is_gone_through(bench, unhurried, monkeypatch):
    """By loads of 4 bytes of few threads; only a driver that ends loops early is asked for fewer."""
    asked = []
    monkeypatch.setattr(bench, "_time", lambda kernel, size, group, *a: asked.append(
        int(a[-2 if bench.one_by_one else -1])) or 1.0)
    monkeypatch.setattr(bench, "_checked", lambda *_: "")
    monkeypatch.setattr(bench, "_count", lambda: (counting.Counted({"load bytes": 16.0}), 1))
    monkeypatch.setattr(bench, "filled", lambda *_: (None, None))
    each = 4 * bench.full_groups * (2 * kernels.IN_TURN if bench.one_by_one else
                                    kernels.STREAMED["read"] * bench.group)
    assert "cached" not in bench.stream(5 * opencl.TURNS_MAX // 4 * each, 2, 4, "read").wrong
    assert max(asked) == 5 * opencl.TURNS_MAX // 4
    monkeypatch.setattr(bench, "turns_max", 1 << 15)
    assert "a cached buffer: 32768 turns" in bench.stream(5 * opencl.TURNS_MAX // 4 * each, 2, 4, "read").wrong


def test_large_memory_is_filled_once(bench, unhurried, monkeypatch):
    made = []
    monkeypatch.setattr(bench, "filled", filled.Filled())
    monkeypatch.setattr(bench, "_buffer", lambda x, real=bench._buffer: made.append(x.nbytes) or real(x))

    def large():
        return [size for size in made if size >= filled.WORTH]

    for _ in range(2):
        for way in ("read", "write", "copy"):
            assert bench.stream(filled.WORTH, 1, 64, way).wrong == ""
        assert bench.stream(filled.WORTH, 2, 4, "read").wrong == ""
        assert bench.stream(filled.WORTH // 2, 1, 64, "read").wrong == ""
    assert large() == [filled.WORTH, filled.WORTH, 2 * filled.WORTH, filled.WORTH]
    assert made.count(filled.WORTH // 2) == 2
    monkeypatch.setattr(bench, "limits", replace(bench.limits, buffer_max=2 * filled.WORTH))
    assert bench.stream(2 * filled.WORTH, 1, 64, "read").wrong == ""  # no room beside it
    assert bench.stream(filled.WORTH, 1, 64, "read").wrong == ""
    assert large()[4:] == [2 * filled.WORTH, filled.WORTH]


def test_no_more_is_kept_than_a_quarter_of_the_memory_that_is_there(bench, monkeypatch):
    """A device may allow half of the host's for a buffer: kept together they were 6.7 GB."""
    monkeypatch.setattr(filled, "available", lambda: 8 * filled.WORTH)
    kept = filled.Filled()
    for way in ("read", "write"):
        kept(bench, way, 1, filled.WORTH // 4, 1)
    assert len(kept._kept) == 2
    kept(bench, "read", 2, filled.WORTH // 8, 1)
    assert [key[:2] for key in kept._kept] == [("write", 1), ("read", 2)]


def test_memory_that_is_kept_is_given_back_where_there_is_no_room(bench, monkeypatch):
    kept = filled.Filled()
    monkeypatch.setattr(bench, "filled", kept)
    kept(bench, "read", 1, filled.WORTH // 4, 1)

    def make():
        if kept._kept:
            raise bench.cl.MemoryError(SimpleNamespace(code=lambda: -4, routine=lambda: "", what=lambda: "no room"))
        return "made"

    assert bench._do(make) == "made"
    kept(bench, "read", 1, filled.WORTH // 4, 1)
    monkeypatch.setattr(kept, "clear", lambda: False)
    with pytest.raises(CapacityError, match="has no room for an experiment"):
        bench._do(make)


@pytest.mark.parametrize("way", ["read", "copy"])
@pytest.mark.parametrize("footprint", [(1 << 18) + 4, (1 << 18) + 3])
def test_a_stream_through_part_of_a_load_leaves_it_out(bench, unhurried, footprint, way):
    """A gradual cliff is at no multiple of anything, nor are footprints that are made of it."""
    assert bench.stream(footprint, 1, 16, way).wrong == ""


@pytest.mark.parametrize(("footprint", "most", "pages"), [(1 << 20, 8, 256), (3 << 20, 8, 768), (1 << 26, 3, 768)])
def test_a_sample_is_of_lines_whose_pages_were_touched_before(footprint, most, pages):
    order = extras.samples(footprint, most)
    assert len(set(order)) == len(order) == pages * (1 + extras.A_PAGE)
    assert (order % (extras.LINE // 4) == 0).all()
    of = (order // (extras.PAGE // 4)).reshape(pages // 256, -1)
    assert of.max() < footprint // extras.PAGE
    for sample in of:
        touched, loaded = sample[:256], sample[256:]
        assert (np.bincount(loaded)[touched] == extras.A_PAGE).all()
    assert len(np.unique(of)) == pages


def test_a_sample_of_what_all_threads_read_is_timed(bench, unhurried, monkeypatch):
    if not bench.one_by_one:
        pytest.skip("for devices that do a group's threads one by one")
    for behind in (0, 1 << 20):
        found = bench.primed(1 << 21, behind)
        assert (found.wrong, found.work, len(found.seconds)) == ("", {"loads": extras.SAMPLED}, 2)
    with pytest.raises(UnsupportedError, match="has no room"):
        bench.primed(1 << 16, 0)
    monkeypatch.setattr(bench, "one_by_one", False)
    with pytest.raises(UnsupportedError, match="no single one"):
        bench.primed(1 << 21, 0)


@pytest.mark.parametrize(("module", "what", "old", "new"), [
    (extras, "PRIME", "x1 += data[at + k + 1];", ""), (extras, "PRIME", "i < turns", "i < turns / 2"),
    (extras, "PRIME", "at += 16", "at += 0"), (kernels, "CHASE", "out[0] = p", "out[0] = next[0]")])
def test_a_sample_of_what_was_not_read_is_not_believed(bench, unhurried, monkeypatch, module, what, old, new):
    if not bench.one_by_one:
        pytest.skip("for devices that do a group's threads one by one")
    source = getattr(module, what)
    assert old in source
    monkeypatch.setattr(module, what, source.replace(old, new))
    assert bench.primed(1 << 21, 1 << 20).wrong != ""


def test_the_devices_own_dot_product_is_used(bench, unhurried, monkeypatch):
    """PoCL has none: one in plain C stands for it, whose result is right and whose code has no such product. Drivers
    that have one have it in OpenCL C 3.0 alone, and take 1.2 unless they are told."""
    import pyopencl as cl

    def build(self, options=(), real=cl.Program.build, **more):
        return real(self, [*options] or ["-cl-std=CL1.2"], **more)

    if "int8x4" in bench.limits.elements:
        for width, chains, threads in ((1, 1, 1), (4, 2, 256)):
            assert "ended with" not in bench.chain("fma", "int8x4", width, chains, threads).wrong
        return
    monkeypatch.setattr(cl.Program, "build", build)
    own = ("#if __OPENCL_C_VERSION__ >= 300\n"
           "uint dot_4x8packed_uu_uint(uint x, uint y) { uchar4 a = as_uchar4(x), b = as_uchar4(y);"
           " return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }\n#endif\n")
    monkeypatch.setattr(kernels, "chain", lambda *a, real=kernels.chain: own + real(*a))
    monkeypatch.setattr(bench, "limits", replace(bench.limits, elements=frozenset({"int8x4"})))
    one, more = bench.chain("fma", "int8x4", 1, 1, 1), bench.chain("fma", "int8x4", 4, 2, 256)
    assert f"has 0 fma int8 a turn, not {4 * kernels.STEPS}" in one.wrong
    assert f"has 0 fma int8 a turn, not {4 * kernels.STEPS * 4 * 2}" in more.wrong
    monkeypatch.setattr(kernels, "chain", lambda *a, all=kernels.chain: all(*a).replace("a.w * b.w", "0"))
    assert "ended with" in bench.chain("fma", "int8x4", 1, 1, 2).wrong


def test_a_device_that_overstates_its_groups_is_asked_for_smaller_ones(opencl_bench, unhurried, monkeypatch):
    """It takes 64 threads at most, and 512 words of local memory."""
    device = opencl.open_device(0)  # of its own: its limits are changed
    real = device._time

    def stingy(kernel, size, group, *arguments):
        if group[0] > 64 or device.words > 512:
            raise opencl.Overstated("it does not take what its limits allow")
        return real(kernel, size, group, *arguments)

    monkeypatch.setattr(device, "_time", stingy)
    assert device.local(1).wrong == device.image(1 << 14).wrong == device.diverge(1).wrong == ""
    assert (device.group, device.words) == (64, 256)
    monkeypatch.setattr(device, "_time", lambda *_: (_ for _ in ()).throw(opencl.Overstated("nothing goes")))
    with pytest.raises(CapacityError, match="nothing goes"):
        device.local(1)


def test_work_that_takes_no_time_is_not_believed(bench, monkeypatch):
    """A clock that says the same of 32 turns and of all that are more."""
    def told(*launch, real=bench._time):
        real(*launch)
        return opencl.ENOUGH * (2 if int(launch[4]) >= 32 else 1 / 16)

    monkeypatch.setattr(bench, "_time", told)
    assert "do not take longer in proportion" in bench.chain("special", "float32", 1, 1, 64).doubtful


# what goes wrong


def test_without_pyopencl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    with pytest.raises(UsageError, match="pyopencl, which is not installed") as e:
        opencl.devices()
    assert e.value.facts["try"] == "pip install 'npulab[gpu]'"


def test_a_device_that_is_not_there(bench):
    with pytest.raises(DeviceError, match="there is no OpenCL device 99") as e:
        opencl.open_device(99)
    assert bench.identity.name in e.value.facts["got"]
    with pytest.raises(DeviceError):
        opencl.open_device(-1)


def test_a_kernel_that_does_not_compile(bench, monkeypatch):
    monkeypatch.setattr(kernels, "BARRIER", "__kernel void meet(int) {{ nonsense }}")
    with pytest.raises(DeviceError, match="does not compile the kernel 'meet'"):
        bench.barrier()


@pytest.mark.parametrize(("lies", "refused"), [(10**9, True), (2, False)])
def test_a_clock_that_stands_still_is_an_error(unhurried, monkeypatch, lies, refused):
    """Events that took a nanosecond whatever they did, always or twice: somebody may have stopped the machine."""
    bench = opencl.open_device(0)  # of its own: its clock is changed
    real, said = bench._time, itertools.count()

    def stands(*arguments):
        seconds = real(*arguments)
        bench.waited = 1.0 if (wrong := next(said) < lies) else seconds
        return 1e-9 if wrong else seconds

    monkeypatch.setattr(bench, "_time", stands)
    if refused:
        with pytest.raises(DeviceError, match="has no clock that can be believed") as e:
            bench.chain("add", "float32", 1, 2, 8)
        assert e.value.facts["got"] == "1e-09 s by its events, 1 s by the host's clock"
    else:
        assert not bench.chain("add", "float32", 1, 2, 8).wrong


def test_a_driver_that_ends_loops_early_is_noticed(bench, unhurried, monkeypatch):
    """llvmpipe does, over Vulkan and OpenCL, and says nothing: nothing is asked for more, and no network computed."""
    assert bench.turns_max == opencl.TURNS_MAX or "llvmpipe" in bench.identity.name
    monkeypatch.setattr(opencl.OpenCL, "_time", lambda self, kernel, size, group, *a, real=opencl.OpenCL._time: real(
        self, kernel, size, group, *(np.uint32(min(x, 70000)) if isinstance(x, np.uint32) else x for x in a)))
    early = opencl.open_device(0)
    assert early.turns_max == 1 << 16
    asked = []
    monkeypatch.setattr(opencl, "ENOUGH", 1e9)
    early._measured(lambda turns: (asked.append(turns) or 1e-6 * turns, ""), counting.Asked("loads"))
    assert max(asked) == 1 << 16
    monkeypatch.setattr(opencl, "open_device", lambda number: early)
    with pytest.raises(UnsupportedError, match="ends loops after 65536 turns"):
        Device(0)


def test_a_driver_need_not_say_what_a_kernel_is_of(opencl_bench, device, unhurried, monkeypatch):
    """Intel's for processors has programs of its own in its answers, which its other calls do not take."""
    import pyopencl as cl

    def refused(self, what, real=cl.Kernel.get_info):
        if what == cl.kernel_info.PROGRAM:
            raise cl.LogicError("clRetainProgram", cl.status_code.INVALID_PROGRAM)
        return real(self, what)

    monkeypatch.setattr(cl.Kernel, "get_info", refused)
    assert not opencl_bench.chain("add", "float32", 1, 2, 8).wrong
    launch = Launch(Kernel(kernels.LAUNCH, "launch"), (1,), (1,), (Buffer("out"), np.uint32(3)), "one")
    out = device.allocate(4)
    assert len(device.prepared([launch], {"out": out})()) == 1
    assert device.download(out, (1,), np.uint32) == 3


def test_what_a_device_has_not(bench, monkeypatch):
    monkeypatch.setattr(bench, "limits", replace(bench.limits, elements=bench.limits.elements - {"int8x4"}))
    with pytest.raises(UnsupportedError, match="does not compute on int8x4"):
        bench.chain("fma", "int8x4", 1, 1, 1)
    with pytest.raises(UnsupportedError, match="there is no chain of special on int32"):
        bench.chain("special", "int32", 1, 1, 1)
    with pytest.raises(CapacityError, match="has no buffers of this size"):
        bench._buffer(SimpleNamespace(nbytes=1 << 62))
