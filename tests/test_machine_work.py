"""The virtual NPU on printed examples, at the edge of its arithmetic, and on jobs made to cost or to confuse."""

from __future__ import annotations

import time

import numpy as np
import pytest

import obvious
from npulab.targets.vivante import commands
from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.commands import load_state
from npulab.targets.vivante.machine import VirtualNPU, convolve, requantize
from npulab.targets.vivante.nn import NNDescriptor
from npulab.targets.vivante.replay import _Case, _submits
from npulab.targets.vivante.tp import TPDescriptor
from scripts import loaded
from shared import SHARED, needs_shared

INPUT, OUTPUT, COEFFICIENTS, DESCRIPTOR, TABLE = 0x10000000, 0x20000000, 0x30000000, 0x40000000, 0x50000000


@pytest.fixture(params=["compiled", "numpy"])
def loops(request, monkeypatch):
    """Both ways of doing the inner loops."""
    if request.param == "numpy":
        monkeypatch.setattr(requantize, "kernels", None)
        monkeypatch.setattr(convolve, "kernels", None)
    elif requantize.kernels is None:
        pytest.skip("npulab was built without a C compiler")


def nn(**changes):
    plain = dict(
        kernel_x=1, kernel_y=1, kernel_z=1, kernels_per_core=127, in_x_size=4, in_y_size=4, in_x_stride=4,
        in_y_stride=4, out_x_size=4, out_y_size=4, out_x_stride=4, out_y_stride=4, out_z_size=1, out_tile_x=4,
        out_tile_y=4, kernel_address=COEFFICIENTS, in_image_address=INPUT, out_image_address=OUTPUT, in_border_const=0,
        coef_zero_point=0, out_zero_point=0, post_multiplier=0, post_shift=15)
    return NNDescriptor(**(plain | changes))


def tp(**changes):
    plain = dict(
        in_image_x_size=4, in_image_y_size=4, in_image_z_size=1, in_image_stride=4, in_image_slice=16,
        in_window_x_end=3, in_window_y_end=3, in_tile_x_size=4, in_tile_y_size=4, in_tile_x_inc=4, in_tile_y_inc=4,
        out_loop_0_count=16, in_image_base_address=INPUT, out_image_base_address=OUTPUT, in_zp=0, out_zp=0)
    return TPDescriptor(**(plain | changes))


class StreamWriter:
    """One core's bit string, by hand: low bit first."""

    def __init__(self, zero_run_bits, kernels):
        self.z, self.bits = zero_run_bits, []
        self.fields([zero_run_bits, kernels & 0xFF, kernels >> 8], 8)

    def weights(self, values):
        for v in values:
            self.fields([v << self.z], 8 + self.z)

    def zeros(self, count, zero):
        """`count` zero points as the longest runs there are."""
        longest = 1 << self.z
        rest = [count % longest - 1 | zero << self.z] if count % longest else []
        self.fields([longest - 1 | zero << self.z] * (count // longest) + rest, 8 + self.z)

    def words(self, *values):
        self.fields([v & 0xFFFFFFFF for v in values], 32)

    def fields(self, values, width):
        self.bits.append((np.array(values, np.int64)[:, None] >> np.arange(width) & 1).astype(np.uint8).reshape(-1))

    def buffer(self):
        data = np.packbits(np.concatenate(self.bits), bitorder="little").tobytes()
        data = data.ljust(-(-len(data) // 64) * 64, b"\0")
        return len(data).to_bytes(64, "little") + data


def npu(descriptor, out_size, image=b"\0", streams=None):
    machine = VirtualNPU(A311D)
    machine.map("descriptor", DESCRIPTOR, 4096, descriptor.to_bytes() + bytes(64))
    machine.map("output", OUTPUT, out_size, None)
    machine.map("input", INPUT, len(image), image)
    if streams is not None:
        machine.map("coefficients", COEFFICIENTS, len(streams), streams)
    return machine


def start(descriptor):
    nn = isinstance(descriptor, NNDescriptor)
    return commands.batch([commands.nn_job(DESCRIPTOR) if nn else commands.tp_job([DESCRIPTOR])])


def only_fault(machine, words):
    (fault,) = machine.submit(words)
    return str(fault)


def words_of(text):
    return b"".join(int(w, 16).to_bytes(4, "little") for w in text.split())


PRINTED = """
a0100084 00200100 90000000 00200100 08104003 00400080 10000000 10001000 00041004 00000000 00000000 00000800 00000a00
00000000 00000800 0000000c 00040004 00000004 00000000 03ffffff 00000000 03ffffff 00000705 00000000 00000000 00000000
00000000 00000000 03ffffff 7f800000 ff800000 00000000 00000000 00000000"""


def test_two_channels_to_three_as_printed(loops):
    """NN notes 11.1: descriptor and streams as they stand there, against the convolution they were made from."""
    streams = np.zeros(256, np.uint8)
    streams[:12] = list(bytes.fromhex("400000004000000040000000"))
    for at, text in ((0x40, "0001000a280000001400000000"), (0x80, "0001001e84feffff2810000000"),
                     (0xC0, "00010032000000003c20000000")):
        streams[at : at + 13] = list(bytes.fromhex(text))
    image = np.random.default_rng(0).integers(0, 256, (2, 16))
    machine = VirtualNPU(A311D)
    machine.map("input", 0x10000000, 32, image.astype(np.uint8).tobytes())
    machine.map("output", 0x10001000, 48, None)
    machine.map("coefficients", 0x10002000, 256, streams.tobytes())
    machine.map("descriptor", 0x10003000, 136, words_of(PRINTED))
    real = ((np.array([[10, 20], [30, 40], [50, 60]]) - 5) @ (image - 3) + np.array([[100], [-200], [300]])) * 0.125

    assert machine.submit(commands.nn_job(0x10003000)) == []
    assert machine.read(0x10001000, 48).tolist() == np.clip(np.floor(real + 0.5) + 7, 0, 255).reshape(-1).tolist()


def test_a_kernel_with_runs_of_zeros_as_printed(loops):
    """NN notes 11.2: 3x3 on one 6x6 plane, SAME, zero-run width 2."""
    s = StreamWriter(2, 1)
    s.fields([0 | 5 << 2], 10)
    s.words(967)
    s.fields([3 | 9 << 2, 3 | 12 << 2], 10)
    s.words(0)
    assert s.buffer()[64:69] == bytes.fromhex("020100141c")
    d = nn(kernel_x=3, kernel_y=3, in_x_size=6, in_y_size=6, in_x_offset=-1, in_y_offset=-1, out_x_size=6, out_y_size=6,
           out_y_stride=6, out_x_stride=6, in_x_stride=6, in_y_stride=6, in_border_const=3, coef_zero_point=5,
           out_zero_point=100, post_shift=18)
    image = np.random.default_rng(1).integers(0, 256, (6, 6))
    padded = np.pad(image, 1, constant_values=3) - 3
    acc = 1000 + 4 * padded[1:7, 1:7] + 7 * padded[2:8, 2:8]
    machine = npu(d, 36, image.astype(np.uint8).tobytes(), s.buffer())

    assert machine.submit(start(d)) == []
    assert machine.read(OUTPUT, 36).tolist() == np.clip(np.floor(acc / 8 + 0.5) + 100, 0, 255).reshape(-1).tolist()


def test_an_addition_as_printed(loops):
    """NN notes 11.3: two 4x4x2 tensors side by side, as one kernel of 2x2 over two channels of 16 columns."""
    streams = (64).to_bytes(64, "little") + bytes.fromhex("000100ff19ecffff0000007f00000000").ljust(64, b"\0")
    d = nn(kernel_x=2, kernel_y=2, kernel_z=2, in_x_size=16, in_y_size=2, in_x_stride=16, in_y_stride=2, out_x_size=16,
           out_y_size=2, out_x_stride=16, out_y_stride=2, in_border_const=10, out_zero_point=30, post_shift=23)
    a, b = np.random.default_rng(2).integers(0, 256, (2, 32))
    expected = np.clip(np.floor((255 * a + 127 * b - 5095) / 256 + 0.5) + 30, 0, 255)
    machine = npu(d, 32, np.concatenate([a, b]).astype(np.uint8).tobytes(), streams)

    assert machine.submit(start(d)) == []
    assert machine.read(OUTPUT, 32).tolist() == expected.tolist()


def test_a_transpose_there_and_back_as_printed():
    """TP notes 2.8, T and D: 4x6x3 bytes to planes, and to bytes of a pixel side by side again."""
    there = ("3 40006 3 12 0 50002 20000018 0 60001 60001 1000 0 80000002 2000 1 18 30006 6 0 10004 0 0 10001 0 a 0 "
             "3ffffff 0 3ffffff 80000000 80")
    back = ("4 10012 4 48 0 110003 20000018 0 10001 10001 2000 0 80000002 3000 3 0 10006 12 1 30004 48 0 10001 0 a 0 "
            "3ffffff 0 3ffffff 80000000 80")
    image = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    machine = VirtualNPU(A311D)
    machine.map("pixels", 0x1000, 72, image.tobytes())
    machine.map("planes", 0x2000, 72, None)
    machine.map("again", 0x3000, 72, None)
    machine.map("descriptors", 0x4000, 256, words_of(there).ljust(128, b"\0") + words_of(back).ljust(128, b"\0"))

    assert machine.submit(commands.tp_job([0x4000]) + commands.tp_job([0x4080])) == []
    assert machine.read(0x2000, 72).tolist() == image.transpose(2, 0, 1).reshape(-1).tolist()
    assert machine.read(0x3000, 72).tolist() == image.reshape(-1).tolist()


def test_sums_longer_than_float32_holds_are_exact(loops):
    """600 products of up to 255 * 255, and biases at the ends of 32 bits, which wrap."""
    rng = np.random.default_rng(3)
    weights, image = rng.integers(200, 256, (9, 600)), rng.integers(200, 256, 2400).astype(np.uint8)
    biases = [-5000, 7, 0, 1, 2, 3, 4, 2**31 - 1, -(2**31)]
    d = nn(kernel_z=600, in_x_size=2, in_y_size=2, in_x_stride=2, in_y_stride=2, out_x_size=2, out_y_size=2,
           out_x_stride=2, out_y_stride=2, out_z_size=9, post_shift=32)
    s = StreamWriter(0, 9)
    for group in range(0, 600, 6):
        for k in range(9):
            s.weights(weights[k, group : group + 1])
            if group == 0:
                s.words(biases[k])
            s.weights(weights[k, group + 1 : group + 6])
            if group == 594:
                s.words(4 * k)
    memory = {INPUT + i: int(b) for i, b in enumerate(image)} | {
        COEFFICIENTS + i: b for i, b in enumerate(s.buffer())}
    obvious.nn_job(memory, d, 8)
    machine = npu(d, 36, image.tobytes(), s.buffer())

    assert machine.submit(start(d)) == []
    assert machine.read(OUTPUT, 36).tolist() == [memory[OUTPUT + i] for i in range(36)]


def depthwise_blown_up(channels, zero, second):
    """(descriptor, streams): kernel k has taps 1..9 in channel k, and one in channel `second(k)`; the rest is zero."""
    d = nn(kernel_x=3, kernel_y=3, kernel_z=channels, in_x_size=3, in_y_size=3, in_x_stride=3, in_y_stride=3,
           out_x_size=1, out_y_size=1, out_x_stride=1, out_y_stride=1, out_z_size=channels, coef_zero_point=zero,
           kernels_per_core=channels, post_shift=19)
    flat = np.full((channels, channels, 9), zero)
    k = np.arange(channels)
    flat[k, second(k), 0] += 1
    flat[k, k] = zero + np.arange(1, 10)
    values = flat.transpose(1, 0, 2).reshape(-1)
    raws = sorted([(9 * i + 1, 5 * i) for i in k] + [(9 * channels * (channels - 1) + 9 * (i + 1), i) for i in k])
    s, at = StreamWriter(5, channels), 0
    for end, word in raws:
        part = values[at:end]
        while len(part):
            run = int(np.argmax(part != zero)) if (part != zero).any() else len(part)
            take = min(run, 31)
            if run < len(part):
                take = min(run, 31)
                s.fields([take | int(part[take]) << 5], 13)
                part = part[take + 1 :]
            else:
                s.zeros(run, zero)
                part = part[:0]
        s.words(word)
        at = end
    return d, s.buffer(), flat - zero


@pytest.mark.parametrize("second", [lambda k: k, lambda k: k // 2], ids=["one channel each", "two channels"])
def test_kernels_that_are_nearly_all_zero_are_not_written_out(loops, second):
    channels, zero = 40, 100
    d, streams, weights = depthwise_blown_up(channels, zero, second)
    image = np.random.default_rng(4).integers(0, 256, (channels, 9)).astype(np.uint8)
    acc = np.einsum("kcp,cp->k", weights, image.astype(int)) + 5 * np.arange(channels)
    machine = npu(d, channels, image.tobytes(), streams)

    assert machine.submit(start(d)) == []
    assert machine.read(OUTPUT, channels).tolist() == np.clip(np.floor(acc / 16 + 0.5), 0, 255).tolist()


def test_a_hundred_million_zeros_from_a_small_stream_cost_little():
    kernels, depth, zero = 1700, 1 << 13, 7
    d = nn(kernel_x=3, kernel_y=3, kernel_z=depth, in_x_size=1, in_y_size=1, in_x_stride=1, in_y_stride=1, out_x_size=1,
           out_y_size=1, out_x_stride=1, out_y_stride=1, out_z_size=kernels, coef_zero_point=zero)
    s = StreamWriter(5, kernels)
    for first in range(0, kernels, 127):
        n = min(127, kernels - first)
        for _ in range(n):
            s.zeros(1, zero)
            s.words(0)
            s.zeros(8, zero)
        s.zeros((depth - 2) * n * 9, zero)
        for k in range(n):
            s.zeros(9, zero)
            s.words(first + k)
    machine = npu(d, kernels, bytes(depth), s.buffer())

    begin = time.process_time()
    assert machine.submit(start(d)) == []
    assert time.process_time() - begin < 3  # 0.1 s alone


def test_loops_that_resets_end_cost_little():
    """A table function of the newer driver: 64x16 tiles, loops 1 and 2 without a count, 800,000 elements."""
    d = tp(in_image_x_size=64, in_image_y_size=112, in_image_z_size=112, in_image_stride=64, in_image_slice=7168,
           in_window_x_end=63, in_window_y_end=111, in_tile_x_size=64, in_tile_y_size=16, in_tile_x_inc=64,
           in_tile_y_inc=16, out_loop_0_count=1, out_loop_0_inc=0, out_loop_1_count=0, out_loop_1_inc=1,
           out_loop_2_count=0, out_loop_2_inc=64, out_loop_3_inc=64, out_loop_4_count=7, out_loop_4_inc=1024,
           out_loop_6_inc=7168, out_loop_1_reset=1, out_loop_2_reset=1)
    image = np.random.default_rng(5).integers(0, 256, 112 * 7168).astype(np.uint8)
    machine = npu(d, image.size, image.tobytes())

    begin = time.process_time()
    assert machine.submit(start(d)) == []
    assert time.process_time() - begin < 2  # 0.05 s alone
    assert (machine.read(OUTPUT, image.size) == image).all()


def test_where_loops_meet_the_last_store_stays():
    """Loop 0 and loop 1 reach the same bytes: count 4 by 1, and 3 by 2."""
    d = tp(out_loop_0_count=4, out_loop_1_count=3, out_loop_1_inc=2, in_window_y_end=2, in_tile_y_size=3,
           in_tile_y_inc=3)
    image = bytes(range(1, 17))
    memory = {INPUT + i: b for i, b in enumerate(image)}
    obvious.tp_job(memory, d)
    machine = npu(d, 8, image)

    assert machine.submit(start(d)) == []
    assert machine.read(OUTPUT, 8).tolist() == [memory[OUTPUT + i] for i in range(8)] == [1, 2, 5, 6, 9, 10, 11, 12]


def plain():
    s = StreamWriter(0, 1)
    s.weights([2])
    s.words(0, 0)
    return s.buffer()


@pytest.mark.parametrize(("changes", "text"), [
    ({"post_multiplier": 1 << 15}, "bad descriptor: NN descriptor field post_multiplier = 32768, more than 32767"),
    ({"in_border_const": 256}, "bad descriptor: NN descriptor field in_border_const = 256, more than 255"),
    ({"unk_29": 0x3F800000}, "unimplemented feature: NN descriptor field unk_29 = 0x3f800000"),
    ({"depthwise": 1}, "unimplemented feature: NN descriptor field depthwise = 1"),
    ({"no_z_offset": 1}, "unimplemented feature: NN descriptor field no_z_offset = 1"),
    ({"in_circular_buf_size": 64}, "unimplemented feature: NN descriptor field in_circular_buf_size = 64"),
    ({"kernel_z": 0}, "bad descriptor: an NN job has an extent of zero"),
    ({"out_x_stride": 3}, "bad descriptor: output rows overlap: out_x_stride = 3"),
    ({"out_image_address": OUTPUT + 8}, "unmapped access: NN output of 16 bytes runs over the end of 'output'"),
    ({"kernel_z": 16383, "in_x_stride": 0, "out_x_size": 8000, "out_y_size": 8000, "out_x_stride": 8000},
     "undecodable stream: 1 kernels of 16383 weights cannot be in 64 bytes"),
    ({"out_x_size": 8191, "out_y_size": 8191, "out_x_stride": 8191, "out_y_stride": 8191, "in_y_stride": 0},
     "unmapped access: NN output of 67092481 bytes"),
])
def test_an_nn_job_that_would_be_a_guess_is_refused(changes, text):
    d = nn(**changes)

    assert only_fault(npu(d, 16, bytes(16), plain()), start(d)).startswith(text)


@pytest.mark.parametrize(("edit", "text"), [
    ((64, [6]), "undecodable stream: a zero-run width of 6 bits, where the chip takes 5"),
    ((0, [0, 0, 1]), "unmapped access: coefficient buffer of 65600 bytes runs over the end of 'coefficients'"),
    ((65, [0]), "undecodable stream: 0 kernels, 127 in each superblock"),
    ((64, [3, 1, 0, 1]), "undecodable stream: a run of zeros goes on where a raw word must stand"),
    ((72, [1]), "undecodable"),
    ((65, [6]), "undecodable stream: the stream ends before its last weight"),
])
def test_a_damaged_stream_is_refused(edit, text):
    d = nn()
    at, new = edit
    streams = bytearray(plain())
    streams[at : at + len(new)] = bytes(new)
    if at == 72:
        streams[72:76] = bytes([0, 1, 0, 0])
        text = "bad descriptor: every kernel's output plane lies outside the output"
    if new == [6] and at == 65:
        streams[65] = 7  # 3 + 7 * 9 bytes are 66

    assert only_fault(npu(d, 16, bytes(16), bytes(streams)), start(d)).startswith(text)


def test_two_kernels_on_the_same_bytes_are_refused():
    s = StreamWriter(0, 2)
    for _ in range(2):
        s.weights([2])
        s.words(0, 8)
    d = nn(out_z_size=2)

    assert only_fault(npu(d, 64, bytes(16), s.buffer()), start(d)).startswith(
        "bad descriptor: two kernels write to the same output bytes")


@pytest.mark.parametrize(("register", "value", "text"), [
    (commands.GL_OCB_REMAP_START, 0x1000, "unimplemented feature: GL_OCB_REMAP_START = 0x1000 while a job starts"),
    (commands.GL_TP_CONFIG, 1, "unimplemented feature: GL_TP_CONFIG = 0x1 while a job starts"),
    (commands.GL_NN_CONFIG, 0x410, "unimplemented feature: GL_NN_CONFIG asks for 4 NN cores of 8"),
])
def test_modes_that_change_what_a_job_means_are_refused(register, value, text):
    machine = npu(nn(), 16, bytes(16), plain())

    assert only_fault(machine, [*load_state(register, value), *load_state(commands.PS_NN_INST_ADDR, DESCRIPTOR)]
                      ).startswith(text)


def test_changed_coefficients_are_noticed(loops):
    d = nn()
    machine = npu(d, 16, bytes([3] * 16), plain())
    assert machine.submit(start(d)) == []
    before = machine.read(OUTPUT, 1)[0]
    machine.write(COEFFICIENTS + 67, np.array([5], np.uint8))

    assert machine.submit(start(d)) == []
    assert (before, machine.read(OUTPUT, 1)[0]) == (6, 15)


def test_a_stream_ends_at_its_first_fault_and_names_the_job():
    d = nn()
    machine = npu(d, 16, bytes(16), plain())
    good = commands.nn_job(DESCRIPTOR)

    (fault,) = machine.submit(commands.batch([good, commands.nn_job(0x123440), good]))

    assert (fault.kind, fault.job, fault.address) == ("unmapped access", 1, 0x123440)
    assert len(machine.trace) == 1


H4 = {"i8_dw5x5_s2_same_h7_c64", "u8_dw3x3_s2_valid_h7_c64", "u8_dw5x5_s2_same_h7_c64", "u8_dw5x5_s2_valid_h7_c64"}
"""NN notes, H4: weights are lowered for a rearranged input, which nothing rearranges; it is four times as long."""


@needs_shared
def test_recorded_jobs_read_nothing_unwritten_except_where_the_driver_is_wrong():
    """Stricter than a replay: only what the driver maps read-only, and the model's inputs, count as written."""
    faulty = set()
    for path in sorted((SHARED / "golden" / "vivante" / "tiny").glob("*.zip")):
        case = _Case(path, "a311d")
        index = case.index()
        for number, recorded, words, subgraph in _submits(case, index, case.reference(), A311D, None):
            if subgraph is None:
                continue
            read_only = {int(b["va"], 16) for b in index["submits"][number]["bos"] if b["flags"] == 1}
            strict = VirtualNPU(A311D)
            for r in recorded.memory.ranges:
                strict.map(r.name, r.address, len(r.data), r.data.tobytes() if r.address in read_only else None)
            for place in (op[w] for op in subgraph["hw_ops"] for w in ("input", "input2") if w in op):
                if place["tensor"] in subgraph["partition"]["inputs"]:
                    va = int(place["va"], 16)
                    strict.write(va, recorded.read(va, place["size"]))
            if faults := strict.submit(words):
                assert faults[0].kind == "uninitialised read"
                faulty.add(path.stem)
    assert faulty == H4


@needs_shared
def test_damaged_cases_are_refused_or_fault():
    """A sample of bench/fuzz_replay.py."""
    with loaded("bench/fuzz_replay.py") as fuzz:
        found, bad = fuzz.run(fuzz.FOLDER, 600, 7)

    assert bad == []
    assert {"ran", "refused (ModelError)", "fault: unmapped access", "fault: undecodable stream"} <= set(found)
