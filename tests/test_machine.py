"""The virtual NPU against the obvious one and the vendor's self-test, and what it says of wrong streams."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import obvious
from npulab.runtime.device import Fault
from npulab.targets.vivante import commands
from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.coefficients_v7 import Kernels, Streams, Weights, encode
from npulab.targets.vivante.fp21 import fp21_bits, fp21_value
from npulab.targets.vivante.machine import Limits, VirtualNPU, requantize
from npulab.targets.vivante.nn import NNDescriptor
from npulab.targets.vivante.tp import TPDescriptor

IN, OUT, COEF, DESC = 0x10000, 0x20000, 0x30000, 0x40000


def npu_with(descriptor, coefficients=b"\0" * 64, image=None, limits=None):
    npu = VirtualNPU(A311D, limits)
    npu.map("input", IN, 0x4000, np.zeros(0x4000, np.uint8).tobytes() if image is None else image.tobytes())
    npu.map("output", OUT, 0x4000, None)
    npu.map("coefficients", COEF, len(coefficients), coefficients)
    npu.map("descriptor", DESC, len(descriptor), descriptor)
    return npu


def nn(**fields):
    plain = {
        "kernel_x": 1, "kernel_y": 1, "kernel_z": 1, "kernels_per_core": 1, "in_x_size": 4, "in_y_size": 4,
        "in_x_stride": 4, "in_y_stride": 4, "out_x_size": 4, "out_y_size": 4, "out_z_size": 1, "out_x_stride": 4,
        "out_y_stride": 4, "out_tile_x": 4, "out_tile_y": 4, "kernel_address": COEF, "in_image_address": IN,
        "out_image_address": OUT, "in_border_const": 0, "coef_zero_point": 0, "out_zero_point": 0, "post_multiplier": 0,
        "post_shift": 15,
    }
    return NNDescriptor(**(plain | fields))


def test_the_vendors_self_test_gives_what_silicon_gives():
    """NN notes 10.1: 3x2 bytes of 0x33, four weights of 0xff, scale 1/1020. Truncation would give 50, not 51."""
    words = np.zeros(32, "<u4")
    words[:9] = (0xA0100048, 0x001000C0, 0xC8000000, 0x00080080, 0x02084001, 0x037FD200, 0xDFF6F000, 0xDFF6E000,
                 0x00012004)
    words[11:23] = (0x800, 0xA00, 0, 0x800, 0, 0x00020003, 0x01000002, 0, 0x03FFFFFF, 0, 0x03FFFFFF, 0)
    coefficients = bytearray(0x240)
    coefficients[0] = 0x40
    coefficients[0x40:0x4F] = bytes.fromhex("00 01 00 ff 00 00 00 00 ff ff ff 00 00 00 00")
    npu = VirtualNPU(A311D)
    npu.map("descriptor", 0x1000, 128, words.tobytes())
    npu.map("coefficients", 0xDFF48000, 0x240, bytes(coefficients))
    npu.map("input", 0xDFF6F000, 6, b"\x33" * 6)
    npu.map("output", 0xDFF6E000, 2, None)

    assert npu.submit(commands.nn_job(0x1000)) == []
    assert npu.read(0xDFF6E000, 2).tolist() == [0x33, 0x33]


@given(st.lists(st.integers(-(2**24) + 1, 2**24 - 1), min_size=1, max_size=40), st.integers(-(2**31), 2**31 - 1),
       st.integers(0, 2**15 - 1), st.integers(0, 60), st.integers(0, 255), st.booleans(), st.booleans())
def test_requantize_is_its_formula_over_the_rationals(accs, bias, multiplier, shift, zero_point, relu, compiled):
    low = zero_point if relu else 0
    kept = requantize.kernels
    requantize.kernels = kept if compiled else None
    try:
        got = requantize.requantize(np.array([accs], np.float32), np.array([bias], np.int32), multiplier, shift,
                                    zero_point, low)
    finally:
        requantize.kernels = kept

    wrapped = [(a + bias + 2**31) % 2**32 - 2**31 for a in accs]
    assert got[0].tolist() == [obvious.requantize(a, multiplier, shift, zero_point, low) for a in wrapped]


@st.composite
def convolutions(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ky, kx = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    in_c = draw(st.integers(1, 9))
    out_c = draw(st.integers(1, 20))
    in_y, in_x = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    first_pixel = draw(st.booleans())
    out_y, out_x = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    zero = draw(st.integers(0, 255))
    kind = draw(st.sampled_from(["dense", "sparse", "depthwise"]))
    if ky == kx == 1 and in_c == 1:
        ky = kx = 2
    depthwise = kind == "depthwise" and in_c > 1 and (ky, kx) != (1, 1)
    values = rng.integers(0, 256, (out_c, 1 if depthwise else in_c, ky, kx)).astype(np.uint8)
    if kind == "sparse":
        values[rng.random(values.shape) < 0.9] = zero
    first = rng.integers(0, in_c, out_c) if depthwise else np.zeros(out_c, np.int64)
    order = "pointwise" if ky == kx == 1 else "spatial" if in_c > 1 else "single"
    d = dict(
        kernel_x=kx, kernel_y=ky, kernel_z=in_c, in_x_size=in_x, in_y_size=in_y, in_x_stride=in_x + 1,
        in_y_stride=in_y + 1, out_x_size=out_x << first_pixel, out_y_size=out_y << first_pixel,
        out_z_size=out_c, out_x_stride=out_x + 1, out_y_stride=out_y, in_x_offset=draw(st.integers(-4, 3)),
        in_y_offset=draw(st.integers(-4, 3)), in_border_const=draw(st.integers(0, 255)), coef_zero_point=zero,
        out_zero_point=draw(st.integers(0, 255)), relu=draw(st.integers(0, 1)), pooling=3 if first_pixel else 0,
        pooling_xy_size=0 if first_pixel else 1, post_multiplier=draw(st.integers(0, 2**15 - 1)),
        post_shift=draw(st.integers(22, 34)),
    )
    per_core = -(-out_c // min(out_c, 8))
    superblocks = -(-per_core // draw(st.integers(1, per_core)))
    d["kernels_per_core"] = -(-per_core // superblocks)
    kernels = Kernels(
        Weights(values, first, in_c, zero), order, kx > 3, zero, rng.integers(-(10**6), 10**6, out_c),
        np.arange(out_c) * (out_x + 1) * out_y, (out_x + 1) * out_y, 8, superblocks,
    )
    image = rng.integers(0, 256, 0x4000).astype(np.uint8)
    return nn(**d), encode(Streams(kernels), draw(st.integers(0, 5))).data, image


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.booleans())
def test_a_convolution_job_is_the_obvious_one(case, compiled):
    d, coefficients, image = case
    npu = npu_with(d.to_bytes(), coefficients, image)
    from npulab.targets.vivante.machine import convolve

    kept = convolve.kernels, requantize.kernels
    if not compiled:
        convolve.kernels = requantize.kernels = None
    try:
        assert npu.submit(commands.nn_job(DESC)) == []
    finally:
        convolve.kernels, requantize.kernels = kept

    memory = {IN + i: int(b) for i, b in enumerate(image)} | {COEF + i: b for i, b in enumerate(coefficients)}
    before = set(memory)
    obvious.nn_job(memory, d, A311D.nn_cores)
    written = npu.memory.find(OUT, 1, "").written
    assert {OUT + int(i) for i in np.flatnonzero(written)} == set(memory) - before
    for address in set(memory) - before:
        assert npu.read(address, 1)[0] == memory[address]


@st.composite
def walks(draw):
    small = st.integers(1, 6)
    x, y, z = draw(small), draw(small), draw(st.integers(1, 3))
    x0, y0 = draw(st.integers(-3, 2)), draw(st.integers(-3, 2))
    fields = dict(
        in_image_x_size=x, in_image_y_size=y, in_image_z_size=z, in_image_stride=x + draw(st.integers(0, 2)),
        in_window_x_start=x0, in_window_y_start=y0, in_window_x_end=x0 + draw(st.integers(0, 7)),
        in_window_y_end=y0 + draw(st.integers(0, 7)), in_tile_x_size=draw(small), in_tile_y_size=draw(small),
        in_tile_x_inc=draw(small), in_tile_y_inc=draw(small), in_image_base_address=IN, out_image_base_address=OUT,
        in_zp=draw(st.integers(0, 255)), out_zp=draw(st.integers(0, 255)),
        in_window_z_start_overfetch=draw(st.integers(0, 2)), in_window_z_end_overfetch=draw(st.integers(0, 2)),
        in_image_border_const=draw(st.integers(-200, 200)),
        alu_output_post_multiplier=draw(st.sampled_from([0, 0, 12345])),
        alu_output_postshift=draw(st.sampled_from([0, 0, 1, -1])),
        out_loop_1_reset=draw(st.integers(0, 1)), out_loop_2_reset=draw(st.integers(0, 1)),
    )
    fields["in_image_slice"] = fields["in_image_stride"] * y
    for k in range(6):
        fields[f"out_loop_{k}_inc"] = draw(st.sampled_from([0, 1, 2, 7, 20]))
        fields[f"out_loop_{k}_count"] = draw(st.sampled_from([1, 1, 2, 3, 8, 0] if k in (1, 2) else [1, 2, 3, 8]))
    fields["out_loop_6_inc"] = draw(st.sampled_from([1, 50]))
    return TPDescriptor(**fields)


@settings(max_examples=300, deadline=None)
@given(walks(), st.integers(0, 2**32))
def test_any_walk_of_the_tensor_processor_is_the_obvious_one(d, seed):
    image = np.random.default_rng(seed).integers(0, 256, 0x4000).astype(np.uint8)
    npu = npu_with(d.to_bytes(), image=image)
    memory = {IN + i: int(b) for i, b in enumerate(image)}
    before = set(memory)
    obvious.tp_job(memory, d)
    assume(max(set(memory) - before, default=0) < OUT + 0x4000)

    assert npu.submit(commands.tp_job([DESC])) == []

    written = npu.memory.find(OUT, 1, "").written
    assert {OUT + int(i) for i in np.flatnonzero(written)} == set(memory) - before
    for address in set(memory) - before:
        assert npu.read(address, 1)[0] == memory[address]


@given(st.integers(0, 2**21 - 1))
def test_a_21_bit_float_survives_the_way_through_a_number(bits):
    bits &= 0x1F7FFF if bits >> 15 & 31 == 31 else 0x1FFFFF  # exponent 31 is above what is saturated
    assume(bits & 0xFFFFF)  # -0 and 0 are one number
    assert fp21_bits(fp21_value(np.array([bits]))).tolist() == [bits]


FAULTS = {
    "an opcode that does not exist": (
        [0x1F << 27, 0], Fault("bad command", "opcode 31 does not exist (0xf8000000)", 0)),
    "a link out of the stream": (
        [0, 0, 8 << 27, 0], Fault("bad command", "LINK is not for submitted streams (0x40000000)", 2)),
    "an unknown register": (
        [0x08010000 | 0x1234 // 4, 5], Fault("bad command", "register 0x1234 is unknown", 1)),
    "a command cut short": (
        [0x08050000 | 0x393C // 4, 1],
        Fault("bad command", "LOAD_STATE of 5 words runs over the end of the stream", 0)),
    "a descriptor nobody mapped": (
        commands.nn_job(0x5000), Fault("unmapped access", "NN descriptor of 128 bytes is not mapped", 7, 0, 0x5000)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_stream_is_a_fault_that_says_where(name):
    words, expected = FAULTS[name]

    assert npu_with(nn().to_bytes()).submit(words) == [expected]


BAD_JOBS = {
    "max pooling": (dict(pooling=1), "unimplemented feature: NN descriptor field pooling = 1"),
    "another rounding": (dict(rounding_mode=0), "unimplemented feature: NN descriptor field rounding_mode = 0"),
    "an image that leaves its buffer": (
        dict(in_y_size=4000, in_y_stride=4000), "unmapped access: NN input of 16000 bytes"),
    "no stream": (dict(), "undecodable stream: no core has a coefficient stream"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_a_wrong_descriptor_is_a_fault_and_not_a_guess(name):
    fields, text = BAD_JOBS[name]
    good = b"\x40" + bytes(63) + bytes.fromhex("00 01 00 05 00000000 00000000") + bytes(53)
    image = np.zeros(0x4000, np.uint8)
    npu = npu_with(nn(**fields).to_bytes(), bytes(64) if name == "no stream" else good, image)
    if name == "an image that leaves its buffer":
        npu = VirtualNPU(A311D)
        npu.map("input", IN, 100, bytes(100))
        npu.map("coefficients", COEF, len(good), good)
        npu.map("descriptor", DESC, 136, nn(**fields).to_bytes())

    fault, = npu.submit(commands.nn_job(DESC))

    assert str(fault).startswith(text)
    assert "(word 7, job 0" in str(fault)


def test_reading_what_nothing_wrote_is_a_fault_that_names_the_address():
    good = b"\x40" + bytes(63) + bytes.fromhex("00 01 00 05 00000000 00000000") + bytes(53)
    npu = VirtualNPU(A311D)
    npu.map("input", IN, 16, None)
    npu.map("output", OUT, 16, None)
    npu.map("coefficients", COEF, len(good), good)
    npu.map("descriptor", DESC, 136, nn().to_bytes())
    npu.write(IN, np.zeros(9, np.uint8))

    fault, = npu.submit(commands.nn_job(DESC))

    assert str(fault) == ("uninitialised read: NN input reads 'input' where nothing was written "
                          f"(word 7, job 0, address {IN + 9:#010x})")


def test_a_stream_that_claims_more_kernels_than_it_has_bytes_is_a_fault():
    bad = b"\x40" + bytes(63) + b"\x00\xff\xff" + bytes(61)
    fault, = npu_with(nn().to_bytes(), bad).submit(commands.nn_job(DESC))

    assert fault.kind == "undecodable stream"
    assert fault.address == COEF + 64 + 3


def test_work_beyond_the_limit_is_a_fault_and_not_a_wait():
    good = b"\x40" + bytes(63) + bytes.fromhex("00 01 00 05 00000000 00000000") + bytes(53)
    fault, = npu_with(nn().to_bytes(), good, limits=Limits(macs=15)).submit(commands.nn_job(DESC))

    assert str(fault).startswith("work limit: the submission asks for more macs than the virtual NPU grants")
