"""Operations counted in compiled code: the machine that follows it against the processor itself, counts against
Oclgrind's, PTX of our kernels by LLVM, files that are none."""

import ctypes
import math
import mmap
import platform
import re
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from npulab.gpu import counting, kernels, opencl, shaders
from npulab.gpu.counting import SUMS, Asked, Counted, intel, objection, pocl, ptx, source, spirv, work
from npulab.gpu.counting.elf import Elf
from npulab.gpu.counting.mix import MACHINE, NotRead, Picture
from npulab.gpu.counting.opencl import place
from npulab.gpu.counting.turns import of_a_turn
from npulab.gpu.spirv_builder import Shader

# machine code: what the processor makes of it is right


RET, TO_AL = b"\xc3", b"\x0f\xb6\xc0"
FROM_EDI, FROM_RDI = b"\x89\xf8", b"\x48\x89\xf8"
CODES = {
    **{f"{name} eax, esi": FROM_EDI + bytes([op, 0xf0]) for name, op in
       (("add", 1), ("or", 9), ("and", 0x21), ("sub", 0x29), ("xor", 0x31))},
    **{f"{name} rax, rsi": FROM_RDI + bytes([0x48, op, 0xf0]) for name, op in (("add", 1), ("sub", 0x29))},
    **{f"cmp edi, esi; set{cc:x}": b"\x31\xc0\x39\xf7\x0f" + bytes([0x90 | cc, 0xc0]) + TO_AL for cc in range(16)
       if cc not in (10, 11)},
    **{f"cmp dil, sil; set{cc:x}": b"\x31\xc0\x40\x38\xf7\x0f" + bytes([0x90 | cc, 0xc0]) + TO_AL for cc in range(16)
       if cc not in (10, 11)},
    **{f"sub edi, esi; dec edi; set{cc:x}": b"\x31\xc0\x29\xf7\xff\xcf\x0f" + bytes([0x90 | cc, 0xc0]) + TO_AL
       for cc in (2, 3, 4, 5, 8, 9, 12, 13, 14, 15)},
    **{f"cmp edi, esi; cmov{cc:x} eax, esi": FROM_EDI + b"\x39\xf7\x0f" + bytes([0x40 | cc, 0xc6])
       for cc in (2, 6, 12)},
    "cmp edi, esi; adc eax, esi": FROM_EDI + b"\x39\xf7\x11\xf0",
    "cmp edi, esi; sbb eax, esi": FROM_EDI + b"\x39\xf7\x19\xf0",
    "shl eax, cl": b"\x89\xf1" + FROM_EDI + b"\xd3\xe0", "shr eax, cl": b"\x89\xf1" + FROM_EDI + b"\xd3\xe8",
    "sar eax, cl": b"\x89\xf1" + FROM_EDI + b"\xd3\xf8", "rol eax, cl": b"\x89\xf1" + FROM_EDI + b"\xd3\xc0",
    "ror eax, cl": b"\x89\xf1" + FROM_EDI + b"\xd3\xc8", "sar rax, 5": FROM_RDI + b"\x48\xc1\xf8\x05",
    "neg eax": FROM_EDI + b"\xf7\xd8", "not eax": FROM_EDI + b"\xf7\xd0", "inc eax": FROM_EDI + b"\xff\xc0",
    "imul eax, esi": FROM_EDI + b"\x0f\xaf\xc6", "imul eax, esi, -3": b"\x6b\xc6\xfd",
    "mul rsi": FROM_RDI + b"\x48\xf7\xe6", "mul rsi, high": FROM_RDI + b"\x48\xf7\xe6\x48\x89\xd0",
    "div esi": FROM_EDI + b"\x31\xd2\x83\xce\x01\xf7\xf6",
    "rest of esi": FROM_EDI + b"\x31\xd2\x83\xce\x01\xf7\xf6\x89\xd0",
    "lea eax, [rdi + 4 * rsi + 3]": b"\x8d\x44\xb7\x03", "movsx eax, sil": b"\x40\x0f\xbe\xc6",
    "movsxd rax, esi": b"\x48\x63\xc6", "mov al, sil": FROM_RDI + b"\x40\x88\xf0",
    "push, pop": b"\x57\x56\x58\x5e\x48\x01\xf0", "a loop": b"\x31\xc0\x83\xe7\x1f\xff\xc7\x01\xf0\xff\xcf\x75\xfa",
    "on the stack": b"\x48\x89\x7c\x24\xf8\x89\x74\x24\xf8\x48\x8b\x44\x24\xf8",
    "xchg": FROM_RDI + b"\x48\x96\x48\x29\xf0",
    "vmovd; vpinsrd; vpextrd": bytes.fromhex("c5f96ec7c4e37922ce01c4e37916c801"),
    "movd; pinsrd; pextrd": bytes.fromhex("660f6ec7660f3a22c602660f3a16c002"),
    "vmovq; vpinsrq; vmovq; both out": bytes.fromhex("c4e1f96ec7c4e3f922c601c5fa7ec8c4e37916c902c4e3f916c0014801c8"),
    "vmovq; vmovdqa; vpxor": bytes.fromhex("c4e1f96ec7c5f96fd8c4e37916d801c5e1efdbc5f97ed901c8"),
    "movd; movq; pxor": bytes.fromhex("660f6ec766480f6ec6660fefc9660f7ec966480f7ec04801c8"),
}
OF_MASKS = {
    **{f"kortest{kind}; set{cc:x}": bytes.fromhex(f"31c0c5fb92cfc5fb92d6{code}0f{0x90 | cc:x}c00fb6c0")  # kmovd twice
       for kind, code in (("w", "c5f898ca"), ("d", "c4e1f998ca")) for cc in (0, 2, 4, 7, 8)},
    "kmovw": bytes.fromhex("c5fb92cfc5f890c9c5fb93c1"), "kmovd on the stack": bytes.fromhex(
        "c5fb92cfc4e1f9914c24f8c4e1f9905424f8c5fb93c2"),
    "kxnorw": bytes.fromhex("c5fb92cfc5f446c9c5fb93c1"), "kxorw": bytes.fromhex("c5fb92cfc5f447c9c5fb93c1"),
    "vpcmpeqb": bytes.fromhex("62f17d0874c8c5fb93c1"), "vpcmpeqd": bytes.fromhex("62f17d4876c8c5fb93c1")}
"""Of AVX-512BW: edi and esi in masks."""
IN_LANES = bytes.fromhex(
    "62f2fd487cc7c4e1f96ecec4e37122cf0262f37d4838c902c5fb92ce62f16d48efd262f27d487cde")
"""zmm0: rdi in all lanes, zmm1: the same but for rsi and edi in lanes 8 to 11, zmm2: 0, zmm3: esi in all, k1: esi."""
LANES_OUT = bytes.fromhex(
    "62f1fe487f5424fd488b842440ffffff48c1c0074833842448ffffff48c1c0074833842450ffffff48c1c0074833842458ff"
    "ffff48c1c0074833842460ffffff48c1c0074833842468ffffff48c1c0074833842470ffffff48c1c0074833842478ffffff")
MASK_OUT = bytes.fromhex("c5fb93c2")
"""zmm2 to eight words of the stack, and all of these, rolled, to rax; k2 to eax."""
OF_LANES = {
    "vpaddd zmm2, zmm0, zmm1": "62f17d48fed1", "vpaddq zmm2, zmm1, zmm0": "62f1f548d4d0",
    "vpsubd zmm2, zmm0, zmm1": "62f17d48fad1", "vpaddb zmm2, zmm0, zmm1": "62f17d48fcd1",
    "vpsubw zmm2, zmm0, zmm1": "62f17d48f9d1", "vpmulld zmm2, zmm1, zmm3": "62f2754840d3",
    "vpmullw zmm2, zmm1, zmm3": "62f17548d5d3", "vpmuludq zmm2, zmm1, zmm3": "62f1f548f4d3",
    "vpandd zmm2, zmm1, zmm3": "62f17548dbd3", "vpandnq zmm2, zmm1, zmm3": "62f1f548dfd3",
    "vpord zmm2, zmm1, zmm3": "62f17548ebd3", "vpxorq zmm2, zmm1, zmm3": "62f1f548efd3",
    "vxorps xmm2, xmm1, xmm3": "c5f057d3", "vandpd ymm2, ymm1, ymm3": "c5f554d3",
    "vpmaxsd zmm2, zmm1, zmm3": "62f275483dd3", "vpminud zmm2, zmm1, zmm3": "62f275483bd3",
    "vpminsw zmm2, zmm1, zmm3": "62f17548ead3", "vpmaxub zmm2, zmm1, zmm3": "62f17548ded3",
    "vpslld zmm2, zmm1, 5": "62f16d4872f105", "vpsrlq zmm2, zmm1, 33": "62f1ed4873d121",
    "vpsrad zmm2, zmm1, 31": "62f16d4872e11f", "vpsllw zmm2, zmm1, 17": "62f16d4871f111",
    "vpsllvd zmm2, zmm1, zmm3": "62f2754847d3", "vpsrlvq zmm2, zmm1, zmm0": "62f2f54845d0",
    "vpsravd zmm2, zmm1, zmm3": "62f2754846d3", "vpmovzxdq zmm2, ymm1": "62f27d4835d1",
    "vpmovsxdq zmm2, ymm0": "62f27d4825d0", "vpmovzxbd zmm2, xmm1": "62f27d4831d1",
    "vpmovsxbw ymm2, xmm0": "c4e27d20d0", "vpmovsxwq zmm2, xmm0": "62f27d4824d0",
    "vpbroadcastd zmm2, edi": "62f27d487cd7", "vpbroadcastq ymm2, xmm1": "c4e27d59d1",
    "vpbroadcastb zmm2, esi": "62f27d487ad6", "vpbroadcastw zmm2, xmm1": "62f27d4879d1",
    "vmovdqu [rsp - 64], xmm1; vbroadcasti32x4 zmm2, [rsp - 64]": "c5fa7f4c24c062f27d485a5424fc",
    "vbroadcastss zmm2, xmm0": "62f27d4818d0", "vextracti128 xmm2, ymm1, 1": "c4e37d39ca01",
    "vextracti32x4 xmm2, zmm1, 2": "62f37d4839ca02", "vextracti64x4 ymm2, zmm1, 1": "62f3fd483bca01",
    "vinserti64x4 zmm2, zmm0, ymm3, 1": "62f3fd483ad301", "vinserti128 ymm2, ymm0, xmm3, 1": "c4e37d38d301",
    "vpshufd zmm2, zmm1, 0x93": "62f17d4870d193", "vpcmpeqd ymm2, ymm0, ymm1": "c5fd76d1",
    "vpcmpgtd ymm2, ymm0, ymm1": "c5fd66d1", "vpcmpeqd xmm2, xmm2, xmm2": "c5e976d2",
    **{f"vmovdqa64 zmm2, zmm0; vpternlogd zmm2, zmm1, zmm3, {table:#x}": f"62f1fd486fd062f3754825d3{table:02x}"
       for table in (0xec, 0xca, 0x96, 0)},
    "vpternlogq zmm2 {k1}, zmm1, zmm3, 0xd8": "62f3f54925d3d8",
    "vpternlogd zmm2, zmm2, zmm2, 255": "62f36d4825d2ff", "vpaddd zmm2 {k1}, zmm0, zmm1": "62f17d49fed1",
    "vpaddd zmm2 {k1} {z}, zmm1, zmm1": "62f175c9fed1",
    "vpaddq zmm3 {k1}, zmm0, zmm1; vmovdqa64 zmm2, zmm3": "62f1fd49d4d962f1fd486fd3",
    "vmovdqu8 zmm2 {k1} {z}, zmm1": "62f17fc96fd1", "vmovdqu16 zmm2 {k1}, zmm1": "62f1ff496fd1",
    "vmovdqa32 zmm2 {k1}, zmm1": "62f17d496fd1", "vmovapd zmm2 {k1}, zmm1": "62f1fd4928d1",
    "vmovdqu32 [rsp - 64], zmm0; vmovdqu32 [rsp - 64] {k1}, zmm1; vmovdqu64 zmm2, [rsp - 64]":
        "62f17e487f4424ff62f17e497f4c24ff62f1fe486f5424ff",
    "vmovdqu64 [rsp - 64], zmm1; vpaddd zmm2, zmm0, dword ptr [rsp - 36]{1to16}; "
    "vpaddq zmm2, zmm2, qword ptr [rsp - 32]{1to8}":
        "62f1fe487f4c24ff62f17d58fe5424f762f1ed58d45424fc",
    "vmovdqu [rsp - 64], ymm0; vpaddd ymm2, ymm1, [rsp - 64]": "c5fe7f4424c0c5f5fe5424c0",
    "vmovdqu [rsp - 64], xmm1; vpmovzxbd zmm2, [rsp - 64]": "c5fa7f4c24c062f27d48315424fc",
    "vmovdqu [rsp - 64], xmm1; vmovd xmm2, dword ptr [rsp - 60]; vpinsrq xmm2, xmm2, [rsp - 64], 1":
        "c5fa7f4c24c0c5f96e5424c4c4e3e9225424c001",
    "movdqu xmm2, xmm1; paddd xmm2, xmm0; pxor xmm2, xmm3": "f30f6fd1660ffed0660fefd3",
    "vmovdqa64 zmm2, zmm1; movdqa xmm2, xmm0": "62f1fd486fd1660f6fd0",
    "vmovdqa64 zmm2, zmm1; vmovdqa xmm2, xmm2": "62f1fd486fd1c5f96fd2",
    "vmovdqa64 zmm2, zmm1; movd xmm2, edi": "62f1fd486fd1660f6ed7",
    "vmovdqa64 zmm2, zmm1; movq xmm2, xmm0": "62f1fd486fd1f30f7ed0",
    "vmovdqa64 zmm2, zmm1; vmovd xmm2, edi": "62f1fd486fd1c5f96ed7",
    "vmovdqa64 zmm2, zmm1; pinsrd xmm2, edi, 1": "62f1fd486fd1660f3a22d701",
    "movdqa xmm2, xmm1; pslld xmm2, 3; psubq xmm2, xmm0": "660f6fd1660f72f203660ffbd0"}
TO_MASKS = {

    "kmovd k2, edi; ktestd k2, k1; setb al; sete cl; movzx ecx, cl; movzx eax, al; "
    "lea eax, [eax + 2 * ecx]; kmovd k2, eax":
        "c5fb92d7c4e1f999d10f92c00f94c10fb6c90fb6c0678d0448c5fb92d0",
    "vpcmpeqd k2, zmm0, zmm1": "62f17d4876d1", "vpcmpltud k2, zmm1, zmm3": "62f375481ed301",
    "vpcmpled k2, zmm1, zmm3": "62f375481fd302", "vpcmpgtd k2, zmm1, zmm3": "62f1754866d3",
    "vpcmpnltuq k2, zmm1, zmm3": "62f3f5481ed305", "vpcmpneqb k2, ymm1, ymm3": "62f375283fd304",
    "vpcmpnleud k2 {k1}, zmm1, zmm3": "62f375491ed306", "vptestmd k2, zmm1, zmm3": "62f2754827d3",
    "vptestnmd k2 {k1}, zmm1, zmm1": "62f2764927d1", "vpcmpeqd k2 {k1}, zmm1, zmm3": "62f1754976d3",
    "kmovd k2, edi; kandd k2, k2, k1": "c5fb92d7c4e1ed41d1", "kmovd k2, edi; kandnd k2, k2, k1": "c5fb92d7c4e1ed42d1",
    "kmovd k2, edi; korw k2, k2, k1": "c5fb92d7c5ec45d1", "kmovd k2, edi; kxord k2, k2, k1": "c5fb92d7c4e1ed47d1",
    "kmovd k2, edi; kxnorb k2, k2, k1": "c5fb92d7c5ed46d1", "knotw k2, k1": "c5f844d1",
    "kshiftlw k2, k1, 3": "c4e3f932d103", "kshiftrd k2, k1, 5": "c4e37931d105",
    "kmovd k2, edi; kunpckbw k2, k2, k1": "c5fb92d7c5ed4bd1", "kmovd k2, edi; kunpckwd k2, k2, k1": "c5fb92d7c5ec4bd1"}
"""As LLVM's assembler has them."""
ALL = {**CODES, **OF_MASKS, **{name: IN_LANES + bytes.fromhex(code) + out for table, out in (
    (OF_LANES, LANES_OUT), (TO_MASKS, MASK_OUT)) for name, code in table.items()}}
try:
    with open("/proc/cpuinfo") as cpus:
        HAS_MASKS = " avx512bw " in cpus.read()
except OSError:
    HAS_MASKS = False
VALUES = (0, 1, 5, 31, 0x7f, 0x80, 0xff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0x8000_0000_0000_0000, (1 << 64) - 1,
          0xfedc_ba98_7654_3210)


def machine(code):
    from npulab.gpu.counting.x86 import Machine

    def bytes_at(address, size, constant=False):
        at = address - 0x1000
        return code[at:at + size] if at >= 0 and at + size <= len(code) and not constant else None

    return Machine(SimpleNamespace(machine="x86-64", slots={}, elsewhere={}, bytes_at=bytes_at), {}, lanes=True)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compares with an x86-64 processor")
@pytest.mark.skipif(sys.platform == "win32", reason="calls by the System V convention")
@pytest.mark.parametrize("name", ALL)
def test_what_the_machine_computes_the_processor_does(name):
    pytest.importorskip("capstone")
    if name not in CODES and not HAS_MASKS:
        pytest.skip("needs a processor of AVX-512BW")
    code = ALL[name] + RET
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(
        ctypes.addressof(ctypes.c_char.from_buffer(page)))
    follower = machine(code + bytes(32))
    for a in VALUES:
        for b in VALUES:
            follower.follow(0x1000, a, b)
            assert follower.r[0] == function(a, b), (name, a, b)


def test_what_is_not_known_decides_nothing():
    pytest.importorskip("capstone")
    follower = machine(b"\x85\xc0\x74\x01\xc3\xc3" + bytes(32))  # test eax, eax; je
    with pytest.raises(NotRead, match="where the code goes at 0x1002 hangs on data"):
        follower.follow(0x1000)
    follower = machine(b"\xeb\xfe" + bytes(32))
    with pytest.raises(NotRead, match="more than 4194304 instructions"):
        follower.follow(0x1000)


@pytest.mark.parametrize("computed", ["c5f058c8", "c4e27100c8", "62f1744958c8", "62f17549fec8"])
def test_lanes_that_are_computed_otherwise_are_not_known(computed):
    """vaddps, vpshufb xmm1, xmm1, xmm0; vaddps and vpaddd zmm1 {k1}, zmm1, zmm0, of which k1 is not known."""
    pytest.importorskip("capstone")
    for code, known in ((computed, False), ("", True)):
        follower = machine(bytes.fromhex("c5f96ec7c5f96ecf" + code + "c4e37916c800") + RET + bytes(32))
        for value in (7, 8):
            follower.follow(0x1000, value)
            assert follower.r[0] == (value if known else None)


def test_lanes_are_followed_only_when_they_are_asked_for():
    pytest.importorskip("capstone")
    code = machine(bytes.fromhex("c5f96ec7c4e37916c000") + RET + bytes(32)).elf  # vmovd xmm0, edi; vpextrd eax, xmm0, 0
    from npulab.gpu.counting.x86 import Machine

    for lanes in (False, True):
        follower = Machine(code, {}, lanes=lanes)
        follower.follow(0x1000, 7)
        assert follower.r[0] == (7 if lanes else None)


def test_lanes_are_not_known_behind_a_call_of_another_library():
    """It may use every vector register (System V AMD64 ABI, 3.2.1)."""
    pytest.importorskip("capstone")
    code = "c5f96ec7" "e807000000" "c4e37916c000" "c3" "ff25ea0f0000"  # vmovd; call; vpextrd; ret; jmp [0x2000]
    follower = machine(bytes.fromhex(code) + bytes(32))
    follower.elf.slots = {0x2000: None}
    follower.follow(0x1000, 7)
    assert (follower.calls, follower.r[0]) == (1, None)


def test_what_describes_an_image_is_no_work():
    pytest.importorskip("capstone")
    code = bytes.fromhex("8b47048b4608") + RET + bytes(32)  # mov eax, [rdi + 4]; mov eax, [rsi + 8]
    follower = machine(code)
    for described, loads in (([range(0)], 8), ([range(0x8000, 0x8038)], 4)):
        follower = type(follower)(follower.elf, {a: 1 for a in range(0x8000, 0x9000)}, described)
        assert follower.follow(0x1000, 0x8000, 0x8800) == {"load bytes": loads, "loads": loads // 4}


@pytest.mark.parametrize(("code", "mix"), [
    ("c4e279a8c2", {"fma float32": 4}), ("62f27d48a8c2", {"fma float32": 16}), ("c4e279a9c2", {"fma float32": 1}),
    ("c4e2f9a8c2", {"fma float64": 2}), ("c5f858c1", {"add float32": 4}), ("c5fd59c1", {"mul float64": 4}),
    ("c5fa5ec1", {"div float32": 1}), ("c5f851c1", {"sqrt float32": 4}), ("c4e27940c1", {"mul int32": 4}),
    ("c5fdfec1", {"add int32": 8}), ("0fafc6", {"mul int32": 1}), ("8d0437", {"add int32": 1}),
    ("8b0487", {"load bytes": 4, "loads": 1}), ("c5fc1007", {"load bytes": 32, "loads": 1}),
    ("c5fc1107", {"store bytes": 32, "stores": 1}), ("c5fdfe07", {"add int32": 8, "load bytes": 32, "loads": 1}),
    ("0107", {"add int32": 1, "load bytes": 4, "loads": 1, "store bytes": 4, "stores": 1}),
    ("3907", {"load bytes": 4, "loads": 1}), ("c5f8100424", {"spill bytes": 16}), ("c5f8100500000000", {}),
    ("8b048c", {"load bytes": 4, "loads": 1}), ("89d8", {}), ("c4e27958c0", {}), ("62f27d4850c1", {"fma int8": 64}),
    ("62f1744958c2", {"add float32": 16, "masked": 1})])
def test_instructions_are_counted_as_the_manual_has_them(code, mix):
    pytest.importorskip("capstone")
    assert machine(bytes.fromhex(code) + RET + bytes(32)).follow(0x1000) == mix


GATHER, SCATTER = "62f27d49900c97", "62f27d4aa00c97"
"""vpgatherdd zmm1{k1} from and vpscatterdd {k2} to [rdi + zmm2 * 4]."""
OF_EAX = "c5f892c8"
"""kmovw k1, eax."""


@pytest.mark.parametrize(("code", "mix"), [
    (GATHER, {"load bytes": 64, "loads": 16, "masked": 1}),
    ("62f17d0874c8" + GATHER, {"load bytes": 64, "loads": 16}),  # vpcmpeqb k1, xmm0, xmm0
    ("c5f446c9" + GATHER, {"load bytes": 64, "loads": 16}),  # kxnorw
    ("c5f446c9" + 2 * GATHER, {"load bytes": 64, "loads": 16}),  # which clears its mask
    ("62f17d4a76c8" + GATHER, {"load bytes": 64, "loads": 16, "masked": 1}),  # vpcmpeqd k1 {k2}; then of xmm0 and xmm1
    ("62f17d4876c9" + GATHER, {"load bytes": 64, "loads": 16, "masked": 1}),
    ("c5f546c9" + GATHER, {"load bytes": 32, "loads": 8}),  # kxnorb
    ("c5fd46c862f2fd49920cd7", {"load bytes": 64, "loads": 8}),  # vgatherdpd
    ("b8ffff0000c5f892d0" + SCATTER, {"store bytes": 64, "stores": 16}),
    ("b8ff7f0000c5f892d0" + SCATTER, {"store bytes": 60, "stores": 15}),
    ("c5f446c962f37d481ec901" + GATHER, {"load bytes": 64, "loads": 16, "masked": 1}),  # vpcmpltud k1
    ("c5f446c9c5f447c9" + GATHER, {"load bytes": 0, "loads": 0}),  # kxorw
    ("b805000000" + OF_EAX + "62f1744958c2", {"add float32": 2}),  # vaddps zmm0 {k1}, zmm1, zmm2
    ("b805000000" + OF_EAX + "62f17e497f07", {"store bytes": 2 * 4, "stores": 1}),
    ("62f1744958c2", {"add float32": 16, "masked": 1})])
def test_what_is_done_under_a_mask_is_counted_in_its_lanes(code, mix):
    """Where the mask is known; else it is said."""
    pytest.importorskip("capstone")
    follower = machine(bytes.fromhex(code) + RET + bytes(32))
    for _ in range(2):
        assert follower.follow(0x1000) == mix


def test_what_is_stored_on_the_stack_by_an_index_is_no_work():
    """Work items that meet at a barrier keep their numbers there: mov eax, [rsp + rcx * 4 - 64]; mov [...], eax."""
    pytest.importorskip("capstone")
    follower = machine(bytes.fromhex("8b448cc089448cc08b0487890487") + RET + bytes(32))
    assert follower.follow(0x1000, 0x8000, 0, 0, 2) == {"spill bytes": 8, "load bytes": 4, "store bytes": 4, "loads": 1,
                                                        "stores": 1}


@pytest.mark.parametrize(("code", "known"), [
    ("01f8", 1), ("01f0", 0), ("8d0438", 1), ("8d0430", 0), ("ffc0", 1), ("ffc6", 0), ("29c0", 1), ("4801f8", 0),
    ("c5fdfec1", 0), ("897c24f8014424f8", 1), ("897424f8014424f8", 0), ("897424f8034424f8", 0)])
def test_sums_of_what_is_known_are_told_from_others(code, known):
    """eax and edi are known, esi is not: add, lea, inc, sub eax, eax; 64 bits, vectors; on the stack."""
    pytest.importorskip("capstone")
    follower = machine(b"\xb8\x05\0\0\0" + bytes.fromhex(code) + RET + bytes(32))
    for _ in range(2):
        follower.follow(0x1000, 7)
        assert follower.known == known


def test_what_is_no_binary_is_not_read():
    for data, why in ((b"", "no 64-bit ELF"), (b"\x7fELF\x01\x01" + bytes(80), "no 64-bit ELF"),
                      (b"\x7fELF\x02\x01" + bytes(10) + b"\0\0\x3e\0" + b"\xff" * 60, "ends early")):
        with pytest.raises(NotRead, match=why):
            Elf(data)
    arm = b"\x7fELF\x02\x01" + bytes(10) + (3).to_bytes(2, "little") + (183).to_bytes(2, "little") + bytes(60)
    assert Elf(arm).machine == "AArch64"
    assert "none of PoCL's" in pocl.count(b"x", "chain", (1,), (1,), (), 0).why
    assert "no code of chain for work groups of 64-1-1, only of none" in pocl.count(
        pocl.MAGIC + bytes(64), "chain", (64,), (64,), (), 0).why
    one = b"/chain/64-1-1-goffs0/chain.so"
    made = pocl.MAGIC + len(one).to_bytes(4, "little") + one + len(arm).to_bytes(4, "little") + arm
    assert "no function _pocl_kernel_chain_workgroup" in pocl.count(made, "chain", (64,), (64,), (None, None), 1).why


# PoCL, and another witness


@pytest.fixture(scope="module")
def bench(opencl_bench):
    pytest.importorskip("capstone", reason="reads machine code: pip install 'npulab[gpu]'")
    return opencl_bench


WITNESSED = """
import sys, numpy as np, pyopencl as cl
source, name, turns, threads = sys.argv[1], sys.argv[2], np.uint32(sys.argv[3]), int(sys.argv[4])
device = next(d for p in cl.get_platforms() for d in p.get_devices() if "oclgrind" in d.name.lower())
context = cl.Context([device])
queue = cl.CommandQueue(context)
program = cl.Program(context, source).build(cache_dir=False)
data, out = (cl.Buffer(context, cl.mem_flags.READ_WRITE, 1 << 16) for _ in range(2))
u, one = np.uint32, np.float32(1) if "float" in source else np.uint32(3)
arguments = {"chain": (out, turns, one, one, one), "diverge": (out, turns, u(1), u(3), u(5)),
             "chase": (data, out, turns)}.get(name, (data, out, u(256), u(16), u(1), turns))
getattr(program, name)(queue, (threads,), (threads,), *arguments)
queue.finish()
"""


def witnessed(source_, name, threads=4):
    """Oclgrind's histogram of what one turn of a thread's loop adds."""
    seen = []
    for turns in (4, 12):
        text = subprocess.run(["oclgrind", "--inst-counts", sys.executable, "-c", WITNESSED, source_, name, str(turns),
                               str(threads)], capture_output=True, text=True, timeout=60, check=True).stdout
        seen.append({k: (float(n), float(b or 0)) for n, k, b in
                     re.findall(r"(\d+) - ([\w ]+?)(?:\(\))?(?: \((\d+) bytes\))?$", text, re.M)})
    assert seen[0], "Oclgrind says nothing"
    return {k: tuple((b - a) / 8 / threads for a, b in zip(seen[0].get(k, (0.0, 0.0)), v, strict=True))
            for k, v in seen[1].items()}


def counted(bench, run):
    run()
    return bench._count()[0].mix


@pytest.mark.skipif(not shutil.which("oclgrind"), reason="needs the witness: apt install oclgrind")
def test_oclgrind_counts_the_same(bench):
    """It runs a kernel's LLVM code, before any processor's: vectors are one operation of their width there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opencl, "SCALES", 0.0)
        patch.setattr(opencl, "ENOUGH", 1e-5)
        seen = witnessed(kernels.chain("fma", "int32", 4, 2), "chain")
        assert counted(bench, lambda: bench.chain("fma", "int32", 4, 2, 64))["mul int32"] == 4 * seen["mul"][0] == 128
        seen = witnessed(kernels.chain("mul", "int32", 4, 2), "chain")
        assert counted(bench, lambda: bench.chain("mul", "int32", 4, 2, 64))["mul int32"] == 4 * seen["mul"][0] == 128
        seen = witnessed(kernels.chain("add", "int32", 4, 2), "chain")  # and the count of turns
        assert counted(bench, lambda: bench.chain("add", "int32", 4, 2, 64))[SUMS] == 4 * (seen["add"][0] - 1) == 128
        seen = witnessed(kernels.DIVERGE, "diverge")
        mix = counted(bench, lambda: bench.diverge(1))
        both = "Intel" in bench.identity.vendor  # ways for all items of a vector
        assert mix["mul int32"] == (1 + both) * seen["mul"][0] == (1 + both) * 4
        seen = witnessed(kernels.stream(16), "copy")
        patch.setattr(bench, "one_by_one", False)  # a processor has others
        mix = counted(bench, lambda: bench.stream(1 << 16, 2, 16, "copy"))
        assert mix["load bytes"] == seen["load global"][1] == 32
        assert mix["store bytes"] == seen["store global"][1] == 32
        seen = witnessed(kernels.CHASE, "chase", 1)
        assert counted(bench, lambda: bench.chase(1 << 14, 64))["load bytes"] == seen["load global"][1] == 32


def test_what_cannot_be_counted_is_said(bench, monkeypatch):
    monkeypatch.setattr(opencl, "SCALES", 0.0)
    monkeypatch.setattr(opencl, "ENOUGH", 1e-5)
    monkeypatch.setitem(sys.modules, "capstone", None)
    t = bench.chain("fma", "float32", 1, 3, 32)
    assert t.wrong == ""
    assert t.counted == ("work as the source states, not read from compiled code: it is machine code, and the "
                         "package capstone is not installed")
    assert t.work["operations"] % (kernels.STEPS * 3 * 32) == 0
    with pytest.raises(NotRead, match="has no argument turns"):
        place("__kernel void f(__global uint *out) {}", "f")


# Intel's runtime for processors


WORKED = bytes.fromhex(
    "53488b9fb8000000"  # push rbx; mov rbx, [rdi + 0xb8]: work items of the group
    "8b4f0848b800000000000000008b10"  # an item: mov ecx, [rdi + 8]: turns; movabs rax, constant; mov edx, [rax]
    "89d6c5fa59c1ffce75f8ffc975f2"  # a turn: edx times vmulss xmm0, xmm0, xmm1
    "4989fce8000000004c89e748ffcb75d35bc3")  # mov r12, rdi; call far; mov rdi, r12; dec rbx; jnz an item; pop rbx; ret
CONSTANTS = struct.pack("<3I", 1, 3, 5)
AT_CONSTANT, AT_CALL = 0xd, 0x29
ABS64, PC32, PLT32, GOTPCREL = 1, 2, 4, 9
LAUNCHED = ("chain", (8, 1), (4, 1), (None, bytes(4)), 1)
"""Two groups of four items."""


def elf(kind, sections, machine=62):
    """An ELF file of (name, kind, flags, content, link, info) each, which begin at number 1; their names come last."""
    names = b"\0" + b"".join(s[0] + b"\0" for s in sections) + b"names\0"
    contents = [s[3] for s in sections] + [names]
    at, headers, body = 64, [bytes(64)], b""
    for (name, sort, flags, _, link, info), content in zip([*sections, (b"names", 3, 0, b"", 0, 0)], contents,
                                                           strict=True):
        headers.append(struct.pack("<IIQQQQIIQQ", names.index(name + b"\0"), sort, flags, 0, at + len(body),
                                   len(content), link, info, 16, 0))
        body += content
    header = struct.pack("<HHIQQQIHHHHHH", kind, machine, 0, 0, 0, at + len(body), 0, 64, 0, 0, 64, len(headers),
                         len(headers) - 1)
    return b"\x7fELF\x02\x01" + bytes(10) + header + body + b"".join(headers)


def relocated(far=b"far", relocations=((AT_CONSTANT, 2, ABS64, 4), (AT_CALL, 3, PLT32, -4)), code=WORKED):
    """A program's binary: the kernel, its constants, symbols 1 the kernel, 2 the constants, 3 what is not here."""
    strings = b"\0chain\0" + far + b"\0"
    symbols = bytes(24) + b"".join(struct.pack("<IBBHQQ", *s) for s in (
        (1, 0x12, 0, 1, 0, len(WORKED)), (0, 3, 0, 2, 0, 0), (7, 0x10, 0, 0, 0, 0)))
    made = b"".join(struct.pack("<QQq", at, symbol << 32 | kind, more) for at, symbol, kind, more in relocations)
    return contained(elf(1, [(b"text", 1, 6, code, 0, 0), (b"constants", 1, 2, CONSTANTS, 0, 0),
                             (b"symbols", 2, 0, symbols, 4, 0), (b"strings", 3, 0, strings, 0, 0),
                             (b"relocations", 4, 0, made, 3, 1)]))


def contained(content, name=b".ocl.obj"):
    return elf(0xff04, [(b".ocl.ver", 0, 0, bytes(4), 0, 0), (name, 0, 0, content, 0, 0)])


def test_a_relocatable_object_is_followed():
    pytest.importorskip("capstone")
    assert intel.is_intel(relocated())
    assert intel.count(relocated(), *LAUNCHED).mix == {"add int32": 4, "mul float32": 3}
    again = ((AT_CONSTANT, 2, ABS64, 8), (AT_CALL, 3, PC32, -4))
    assert intel.count(relocated(relocations=again), *LAUNCHED).mix == {"add int32": 6, "mul float32": 5}


@pytest.mark.parametrize(("name", "lanes", "calls"), [
    (b"__ocl_svml_z0_rsqrtf8", 8, 0), (b"__ocl_svml_l9_sqrtf4", 4, 0), (b"__ocl_svml_z0_rsqrtf8_mask", 0, 1),
    (b"__ocl_svml_z0_rsqrt8", 0, 1), (b"__ocl_svml_z0_rsqrtf999", 0, 1), (b"far", 0, 1)])
def test_functions_that_are_not_in_the_object(name, lanes, calls):
    """Two calls a turn: what the name says is counted, other work is not seen."""
    pytest.importorskip("capstone")
    # mov ebx, [rdi + 8]; a turn: call; call; dec ebx; jnz a turn; ret
    code = bytes.fromhex("8b5f08e800000000e800000000ffcb75f2c3")
    binary = relocated(name, ((4, 3, PLT32, -4), (9, 3, PLT32, -4)), code)
    c = intel.count(binary, "chain", (1,), (1,), (None, bytes(4)), 1)
    what = "rsqrt" if b"rsqrt" in name else "sqrt"
    roots = {f"{what} float32": 2 * lanes, "special float32": 2 * lanes} if lanes else {"calls": 2}
    assert c.mix == {"add int32": 1, **roots}
    assert ("calls functions of another library" in source(c)) == bool(calls)


@pytest.mark.parametrize(("name", "known"), [(b"__ocl_svml_z0_udiv16", True), (b"__ocl_svml_l9_udiv8", False),
                                             (b"far", False)])
def test_what_a_call_leaves_known(name, known):
    """mov esi, [rdi + 8]; a turn: call; dec esi; jnz a turn: only mathematics for AVX-512 keeps rsi."""
    pytest.importorskip("capstone")
    code = bytes.fromhex("8b7708e800000000ffce75f7c3")
    c = intel.count(relocated(name, ((4, 3, PLT32, -4),), code), "chain", (1,), (1,), (None, bytes(4)), 1)
    assert c.mix == {"add int32": 1, "calls": 1} if known else "hangs on data" in c.why


@pytest.mark.parametrize(("name", "sums"), [(b"__ocl_svml_z0_udiv16", 0.5),
                                            (b"__ocl_svml_z0_sinf16", None), (b"far", None)])
def test_quotients_of_a_call_are_known(name, sums):
    """ecx: turns; zmm0 and zmm17 all of it, zmm1: 2; call; ebx: zmm0; vaddss and dec ebx as often; the same of zmm17,
    which mathematics for AVX-512 keeps."""
    pytest.importorskip("capstone")
    code = bytes.fromhex("8b4f08b80200000062f27d487cc162f27d487cc862e27d487cc9" "e800000000"
                         "c5f97ec3" "c5e258dbffcb75f8" "62b1fd486fc1" "c5f97ec3" "c5e258dbffcb75f8" "c3")
    c = intel.count(relocated(name, ((27, 3, PLT32, -4),), code), "chain", (1,), (1,), (None, bytes(4)), 1)
    if sums:
        assert c.mix["add float32"] == sums + 1
    else:
        assert c.mix is None


def test_constants_are_not_loaded_from_memory():
    """A turn: movabs rax, constant; mov edx, [rax]; mov eax, [rdi]; dec ecx; jnz."""
    pytest.importorskip("capstone")
    code = bytes.fromhex("8b4f0848b800000000000000008b108b07ffc975eec3")
    c = intel.count(relocated(relocations=((5, 2, ABS64, 4),), code=code), "chain", (1,), (1,), (None, bytes(4)), 1)
    assert c.mix == {"add int32": 1, "load bytes": 4, "loads": 1}


def test_arguments_are_packed_as_c_does():
    number = (1 << 33).to_bytes(8, "little")
    assert intel.packed((None, b"abcd", None, b"e", b"fg", number)) == (
        (intel.BUFFERS).to_bytes(8, "little") + b"abcd\0\0\0\0" + (3 * intel.BUFFERS).to_bytes(8, "little")
        + b"e\0fg\0\0\0\0" + number)
    assert intel.packed((None, b"abcd")) == intel.BUFFERS.to_bytes(8, "little") + b"abcd\0\0\0\0"
    with pytest.raises(NotRead, match="how an argument of 16 bytes is passed is not known"):
        intel.packed((bytes(16),))
    with pytest.raises(NotRead, match="texels are read by functions of the runtime"):
        intel.packed((None, Picture(1, 1, 16, 0, 0, 4, 4)))


def test_the_code_for_a_size_of_groups_is_found():
    made = SimpleNamespace(functions={"k": 1, "_ZGVeN16uu_k": 2, "_ZGVeN8uu_other": 3})
    assert [intel.entry(made, "k", (n,)) for n in (16, 256, 20, 8, 1)] == [2, 2, 1, 1, 1]
    with pytest.raises(NotRead, match="which groups the code _ZGVeN16uu_k is for is not known"):
        intel.entry(made, "k", (16, 2))
    with pytest.raises(NotRead, match="no function nothing"):
        intel.entry(made, "nothing", (1,))
    with pytest.raises(NotRead, match="the code _ZGVeM8uuv_k is for"):
        intel.entry(SimpleNamespace(functions={"k": 1, "_ZGVeM8uuv_k": 2}), "k", (16,))


@pytest.mark.parametrize(("binary", "why"), [
    (contained(b""), "no 64-bit ELF"), (contained(b"", b"other"), "no section .ocl.obj"),
    (contained(elf(1, [])), "the object has no function chain"),
    (contained(elf(1, [], 183)), "the object has no function chain"),
    (relocated(relocations=((AT_CONSTANT, 2, 99, 0),)), "a relocation of kind 99 is not known"),
    (relocated(relocations=((AT_CALL, 3, GOTPCREL, 0),)), "a relocation of kind 9 is not known"),
    (relocated(relocations=((len(WORKED) - 7, 2, ABS64, 0),)), "a relocation is not in its section"),
    (relocated(relocations=((1 << 63, 2, ABS64, 0),)), "a relocation is not in its section"),
    (relocated(relocations=((AT_CONSTANT, 9, ABS64, 0),)), "a relocation names no symbol"),
    (relocated(relocations=((AT_CALL, 3, PC32, 1 << 40),)), "a relocation does not fit"),
    (relocated(relocations=((AT_CONSTANT, 1, ABS64, 1 << 40),)), "hangs on data"),
    (relocated(code=b"\x06"), "a relocation is not in its section"),
    (relocated(code=b"\x06", relocations=()), "are no instructions")])
def test_what_is_no_object_of_a_kernel_is_not_read(binary, why):
    pytest.importorskip("capstone")
    c = intel.count(binary, *LAUNCHED)
    assert (c.mix, why in c.why) == (None, True), c.why


def test_sections_that_say_they_are_large_are_not_read():
    """As many bytes as there are, not as many as they say; and no more than the file has in all."""
    binary = relocated()
    at = struct.unpack_from("<Q", inner := elf(1, [(b"text", 1, 2, bytes(64), 0, 0)] * 3), 40)[0]

    def changed(offset, value):
        return contained(inner[:at + offset] + value.to_bytes(8, "little") + inner[at + offset + 8:])

    assert "ends early" in intel.count(changed(64 + 32, 1 << 60), *LAUNCHED).why
    assert "overlap" in intel.count(changed(64 + 32, len(inner) - 64), *LAUNCHED).why
    assert "have no room" in intel.count(changed(64 + 48, 1 << 63), *LAUNCHED).why
    for size in range(0, len(binary), 7):
        assert intel.count(binary[:size], *LAUNCHED).mix is None
    code = binary.index(WORKED)
    for at in (*range(0, code, 4), *range(code + len(WORKED), len(binary), 4)):
        for value in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0"):
            intel.count(binary[:at] + value + binary[at + 4:], *LAUNCHED)  # raises nothing


@pytest.fixture(scope="module")
def intel_bench(bench):
    if "Intel" not in bench.identity.vendor or not bench.one_by_one:
        pytest.skip("needs Intel's OpenCL runtime for processors as device 0 (PyPI: intel-opencl-rt)")
    return bench


def counted_here(bench, text, size=(512,), group=(256,), arguments=None):
    import numpy as np

    out = bench._buffer(np.zeros(1 << 16, np.uint32))
    return counting.count(bench.cl, bench.queue, text, "k", size, group, (out, *(arguments or (np.uint32(4),))))


LAUNCH_NUMBERS = {**{f"get_{what}({d})": numbers[d] for d in range(3) for what, numbers in (
    ("global_size", (96, 6, 4)), ("local_size", (48, 3, 2)), ("num_groups", (2, 2, 2)), ("global_offset", (0, 0, 0)),
    ("group_id", (0, 0, 0)))}, "get_work_dim()": 3}


@pytest.mark.parametrize("function", LAUNCH_NUMBERS)
def test_intels_code_reads_the_numbers_of_a_launch_where_they_are(intel_bench, function):
    """So many products a turn of each item."""
    c = counted_here(intel_bench, f"""__kernel void k(__global uint *out, uint turns) {{
        uint id = get_global_id(0) + 96 * (get_global_id(1) + 6 * get_global_id(2)), x = out[id];
        for (uint i = 0; i < turns; i++) for (uint j = 0; j < {function} + 5; j++) x = x * (x ^ j);
        out[id] = x; }}""", (96, 6, 4), (48, 3, 2))
    assert c.why == ""
    assert c.mix["mul int32"] == 5 + LAUNCH_NUMBERS[function]


STEPS_OF = """__kernel void k(__global uint *out, uint turns) {{
    float x = {start}, y = turns * 0.5f;
    for (uint i = 0; i < turns; i++) {{ x = fma(x, y, y); x = fma(x, y, y); x = fma(x, y, y); x = fma(x, y, y); }}
    out[get_global_id(0)] = x; }}"""


@pytest.mark.parametrize("group", [256, 64, 20, 1])
def test_intels_code_that_does_once_what_is_the_same_for_all_items_is_found(intel_bench, group):
    """A group's vectors have 16 items, what is left is done one by one."""
    asked = Asked("operations", {"fma float32": 4})
    c = counted_here(intel_bench, STEPS_OF.format(start="get_global_id(0)"), (5 * group,), (group,))
    assert (c.mix["fma float32"], objection(c, asked)) == (4, "")
    c = counted_here(intel_bench, STEPS_OF.format(start="1"), (5 * group,), (group,))
    once = group // 16 + group % 16
    assert c.mix["fma float32"] == pytest.approx(4 * once / group)
    assert bool(objection(c, asked)) == (once < group)


@pytest.mark.parametrize("group", [256, 20])
def test_intels_code_with_local_memory_and_barriers_is_read(intel_bench, group):
    """256 items have a code of their own, for 16 at once."""
    c = counted_here(intel_bench, """__kernel void k(__global uint *out, uint turns) {
        __local uint cells[256];
        uint l = get_local_id(0), x = l;
        cells[l] = out[l];
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = 0; i < turns; i++) x += cells[(l + 3 * i) & 255] * x;
        out[get_global_id(0)] = x; }""", (5 * group,), (group,))
    assert c.why == ""
    assert (c.mix["load bytes"], c.mix["mul int32"]) == (4, 1)


@pytest.mark.parametrize(("run", "work"), [
    (lambda b: b.local(3), "loads"), (lambda b: b.local_write(5), "stores"), (lambda b: b.diverge(4), "operations"),
    (lambda b: b.barrier(), "barriers")], ids=["local memory", "stores to it", "two ways", "barriers"])
def test_intels_code_whose_way_goes_by_vectors_is_followed(intel_bench, monkeypatch, run, work):
    """Masks of compared numbers of the work items, and loops that end when none is left."""
    monkeypatch.setattr(opencl, "SCALES", 0.0)
    monkeypatch.setattr(opencl, "ENOUGH", 1e-5)
    t = run(intel_bench)
    assert (t.wrong, t.counted) == ("", "work counted in x86-64 machine code")
    assert t.work[work] == int(t.work[work]) > 0


def test_lanes_that_intels_code_leaves_out_are_not_counted(intel_bench):
    c = counted_here(intel_bench, """__kernel void k(__global uint *out, uint turns) {
        uint l = get_global_id(0), x = out[l];
        for (uint i = 0; i < turns; i++) if (x & 1) x += out[x & 1023];
        out[l] = x; }""")
    assert (c.mix, c.why) == (None, "lanes of vectors are switched off by masks")


def test_what_intels_code_does_not_say_is_not_read(intel_bench):
    import numpy as np

    c = counted_here(intel_bench, "__kernel void k(__global uint *out, __local uint *x, uint turns) { *out = *x; }",
                     arguments=(intel_bench.cl.LocalMemory(64), np.uint32(4)))
    assert c.why == "an argument is neither a number nor a buffer nor an image: LocalMemory"
    t = intel_bench.image(10_000)
    assert t.wrong == ""
    assert "texels are read by functions of the runtime" in t.counted


# PTX


LOOP = """
//
.version 8.4
.target sm_90, texmode_independent
.address_size 64
.entry chain(
	.param .u64 .ptr .global .align 4 chain_param_0,
	.param .u32 chain_param_1,
	.param .f32 chain_param_2
)
{
	.reg .pred 	%p<3>;
	ld.param.u64 	%rd1, [chain_param_0];
	ld.param.u32 	%r1, [chain_param_1];
	setp.eq.s32 	%p1, %r1, 0;
	@%p1 bra 	$L__BB0_2;
$L__BB0_1:
	fma.rn.f32 	%f1, %f1, %f2, %f3;
	ld.global.v4.u32 	{%r4, %r5, %r6, %r7}, [%rd1];
	fma.rn.f16x2 	%h1, %h1, %h2, %h3;
	mad.lo.s32 	%r8, %r8, %r9, %r4;
	mul.lo.s32 	%r8, %r8, %r9;
	add.s32 	%r8, %r8, 7;
	dp4a.u32.u32 	%r8, %r4, %r5, %r6;
	rsqrt.approx.f32 	%f1, %f1;
	tex.2d.v4.u32.s32 	{%r10, %r11, %r12, %r13}, [%rd3, sampler, {%r14, %r15}];
	st.global.f32 	[%rd1], %f1;
	ld.local.u32 	%r9, [%rd2];
	add.s32 	%r1, %r1, -1;
	setp.ne.s32 	%p2, %r1, 0;
	@%p2 bra 	$L__BB0_1;
$L__BB0_2:
	ret;
}
"""


def test_ptx_is_followed():
    assert ptx.is_ptx(LOOP.encode())
    c = ptx.count(LOOP.encode() + b"\0", "chain", (64,), (32,), (None, bytes(4), bytes(4)), 1)
    assert c == Counted({"add int32": 2.0, "fma float16": 2.0, "fma float32": 1.0, "fma int32": 2.0, "fma int8": 4.0,
                         "texel bytes": 16.0, "texels": 1.0, "load bytes": 16.0, "loads": 1.0, "mul int32": 1.0,
                         "products of integers": 6.0, SUMS: 1.0,
                         "rsqrt float32": 1.0, "special float32": 1.0,
                         "spill bytes": 4.0, "store bytes": 4.0, "stores": 1.0}, "PTX")
    assert "no entry nothing" in ptx.count(LOOP.encode(), "nothing", (64,), (32,), (None, bytes(4), bytes(4)), 1).why
    data = LOOP.replace("%p2, %r1, 0", "%p2, %r4, 0")
    assert "hangs on data" in ptx.count(data.encode(), "chain", (64,), (32,), (None, bytes(4), bytes(4)), 1).why
    assert not ptx.is_ptx(b"poclbin\0.entry")


BUILTINS = """
#define get_local_id(x) ((size_t)__nvvm_read_ptx_sreg_tid_x())
#define get_group_id(x) ((size_t)__nvvm_read_ptx_sreg_ctaid_x())
#define get_local_size(x) ((size_t)__nvvm_read_ptx_sreg_ntid_x())
#define get_global_id(x) (get_group_id(0) * get_local_size(0) + get_local_id(0))
#define barrier(x) __nvvm_bar_sync(0)
#define rsqrt(x) __nvvm_rsqrt_approx_f(x)
static inline float __attribute__((overloadable)) fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float4 __attribute__((overloadable)) fused(float4 a, float4 b, float4 c) {
    return (float4)(fused(a.x, b.x, c.x), fused(a.y, b.y, c.y), fused(a.z, b.z, c.z), fused(a.w, b.w, c.w));
}
#define fma(a, b, c) fused(a, b, c)
"""
CLANG = next((c for c in ("clang", *(f"clang-{n}" for n in range(14, 22))) if shutil.which(c) and "nvptx64" in
              subprocess.run([c, "--print-targets"], capture_output=True, text=True).stdout), "")


def compiled(source_):
    return subprocess.run([CLANG, "-target", "nvptx64-nvidia-nvcl", "-x", "cl", "-cl-std=CL1.2", "-Xclang",
                           "-finclude-default-header", "-O3", "-march=sm_70", "-S", "-o", "-", "-"],
                          input=(BUILTINS + source_).encode(), capture_output=True, check=True).stdout


@pytest.mark.skipif(not CLANG, reason="needs clang with the NVPTX back end")
@pytest.mark.parametrize(("text", "name", "kinds"), [
    (kernels.CHASE, "chase", {"load bytes": 32}), (kernels.stream(4), "read", {"load bytes": 16}),
    (kernels.stream(16), "write", {"store bytes": 64}), (kernels.stream(8), "copy", {"load bytes": 16,
                                                                                     "store bytes": 16}),
    (kernels.chain("fma", "float32", 1, 1), "chain", {"fma float32": 16}),
    (kernels.chain("fma", "float32", 4, 2), "chain", {"fma float32": 128}),
    (kernels.chain("mul", "float32", 2, 2), "chain", {"mul float32": 64}),
    (kernels.chain("add", "float32", 1, 2), "chain", {"add float32": 32}),
    (kernels.chain("special", "float32", 1, 2), "chain", {"special float32": 32}),
    *((kernels.chain("mul", "int32", *shape), "chain", {"mul int32": 16 * math.prod(shape)})
      for shape in ((1, 1), (4, 2))),
    *((kernels.chain("add", "int32", *shape), "chain", {SUMS: 16 * math.prod(shape)})
      for shape in ((1, 1), (1, 3), (4, 2))),
    (kernels.chain("fma", "int32", 4, 2), "chain", {"fma int32": 128}), (kernels.DIVERGE, "diverge", {"fma int32": 4}),
    (kernels.hold(24), "hold", {"fma float32": 24}), (kernels.local(1024), "local_loads", {"load bytes": 16}),
    (kernels.barrier(256), "meet", {"barriers": 2, "load bytes": 8, "store bytes": 8})])
def test_kernels_as_ptx_do_what_their_source_states(text, name, kinds):
    """LLVM unrolls these loops by two and four, with a rest."""
    many = text.split(f"void {name}(")[1].split(")")[0].count(",") + 1
    number = {"size": 4096, "offset": 64, "stride": 1, "period": 1, "apart": 129}
    arguments = [number.get(re.findall(r"\w+", a)[-1], 1).to_bytes(4, "little") if "*" not in a else None
                 for a in text.split(f"void {name}(")[1].split(")")[0].split(",")]
    assert len(arguments) == many
    c = ptx.count(compiled(text), name, (512,), (256,), arguments, place(text, name))
    assert c.why == ""
    assert objection(c, Asked("operations", kinds)) == ""


@pytest.mark.skipif(not CLANG, reason="needs clang with the NVPTX back end")
def test_a_loop_that_llvm_folds_is_seen_in_ptx():
    text = kernels.chain("mul", "float32", 1, 1).replace("] = total;", "] = c;")
    c = ptx.count(compiled(text), "chain", (512,), (256,), (None, bytes(4), *[bytes(4)] * 3), 1)
    assert "0 mul float32 a turn, not 16: the loop was folded" in objection(c, Asked("operations", {"mul float32": 16}))


@pytest.mark.skipif(not CLANG, reason="needs clang with the NVPTX back end")
def test_a_loops_own_sums_do_not_stand_for_those_that_are_missing():
    """15 sums and the count of turns, which LLVM keeps for each four of them."""
    text = kernels.chain("add", "int32", 1, 1)
    last = "y0 = y0 + x0;\n    }"
    assert last in text
    text = text.replace(last, "y0 = y0 ^ x0;\n    }")
    c = ptx.count(compiled(text), "chain", (512,), (256,), (None, *[bytes(4)] * 4), 1)
    assert c.mix["add int32"] > c.mix[SUMS] == 15
    assert f"15 {SUMS} a turn, not 16: the compiler put steps" in objection(c, Asked("operations", {SUMS: 16}))


# SPIR-V


SHADER = """
#version 450
layout(local_size_x = 64) in;
layout(push_constant) uniform P { uint other; uint turns; float b; } p;
layout(set = 0, binding = 0) buffer B { vec4 data[]; };
shared float cells[64];
void main() {
    uint at = gl_GlobalInvocationID.x;
    vec4 x = vec4(1);
    float y = 0;
    for (uint i = 0; i < p.turns; i++) {
        x = fma(x, vec4(p.b), data[at]);
        y += cells[(at + i) & 63];
        at = (at + 64u) % 1024u;
        for (int k = 0; k < 3; k++) y = inversesqrt(y * p.b);
        if ((i & 1u) == 0u) data[at] = x;
    }
    data[gl_GlobalInvocationID.x] = x + y;
}
"""


@pytest.fixture(scope="module")
def shader(tmp_path_factory):
    if not shutil.which("glslangValidator"):
        pytest.skip("needs a compiler of shaders: apt install glslang-tools")
    folder = tmp_path_factory.mktemp("shader")
    (folder / "a.comp").write_text(SHADER)
    subprocess.run(["glslangValidator", "-V", "a.comp", "-o", "a.spv"], cwd=folder, check=True, capture_output=True)
    return (folder / "a.spv").read_bytes()


def test_a_shader_is_followed(shader):
    c = spirv.count(shader, (512,), (64,), bytes(12), 4)
    assert c.why == ""
    assert {k: n for k, n in c.mix.items() if "int" not in k} == {
        "add float32": 1, "fma float32": 4, "load bytes": 16 + 4, "loads": 2, "mul float32": 3, "rsqrt float32": 3,
        "special float32": 3, "store bytes": 8, "stores": 0.5}
    other = spirv.count(shader, (512,), (64,), bytes(12), 0)  # not what the loop turns by
    assert other.mix == {}


@pytest.mark.parametrize(("width", "chains"), [(1, 1), (1, 3), (4, 2)])
def test_sums_of_a_shaders_loop_are_none_of_its_chains(width, chains):
    module = shaders.chain("add", "int32", width, chains).make("chain", 64)
    c = spirv.count(module, (512,), (64,), bytes(16), 0, 1)
    steps = 16 * width * chains
    assert {k: n for k, n in c.mix.items() if "add" in k} == {"add int32": steps + 1, SUMS: steps}


def test_barriers_of_a_shader_are_counted_beside_the_words_that_are_exchanged(monkeypatch):
    """Where all words arrive, a barrier may be missing all the same."""
    exchanged = Asked("barriers", {"load bytes": 8, "store bytes": 8}, 8 * 64, besides={"barriers": 2})

    def counted_anew():
        return spirv.count(shaders.barrier(64).make("meet", 64), (64,), (64,), bytes(8), 0, 1)

    c = counted_anew()
    assert (c.why, objection(c, exchanged), work(c, exchanged) * 64) == ("", "", 2)
    left, real = iter((1, 1, 0)), Shader.barrier
    monkeypatch.setattr(Shader, "barrier", lambda s: real(s) if next(left) else None)
    c = counted_anew()
    assert "the compiled loop has 1 barriers a turn, not 2: the compiler put steps" in objection(c, exchanged)
    assert objection(Counted({"load bytes": 8.0, "store bytes": 8.0}, MACHINE), exchanged) == ""  # has none
    assert "0 barriers a turn" in objection(Counted({"load bytes": 8.0, "store bytes": 8.0}, "PTX"), exchanged)
    assert "0 load bytes a turn, not 8" in objection(Counted({"store bytes": 8.0}, MACHINE), exchanged)


def test_a_shader_that_is_damaged_is_not_read(shader):
    assert "no SPIR-V module" in spirv.count(b"", (64,), (64,), bytes(12), 4).why
    assert "no entry nothing" in spirv.count(shader, (64,), (64,), bytes(12), 4, entry="nothing").why
    assert "hangs on data" in spirv.count(shader, (64,), (64,), b"", 400, binding=3).why
    for at in range(20, len(shader), 52):
        assert spirv.count(shader[:at], (64,), (64,), bytes(12), 4).mix is None
        for value in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
            spirv.count(shader[:at] + value + shader[at + 4:], (64,), (64,), bytes(12), 4)  # raises nothing


# turns


def test_a_turn_is_what_more_turns_do_more():
    c = of_a_turn(lambda n: {"fma float32": 100 + 16 * n * 64, "add int32": n // 4, "spill bytes": n * n}, 64, "x")
    assert c.mix == {"add int32": 0.25 / 64, "fma float32": 16}
    assert list(c.uneven) == ["spill bytes"]

    assert "switched off by masks" in of_a_turn(lambda n: {"masked": n, "add float32": n}, 1, "x").why

    def lost(n):
        raise NotRead("no way")

    assert of_a_turn(lost, 1, "x") == Counted(None, "x", why="no way")


def test_loads_that_were_put_together_are_not_narrow_ones():
    """Four of four bytes side by side in one of 16 are as many bytes."""
    asked = Asked("bytes", {"load bytes": 64}, each=4)
    assert objection(Counted({"load bytes": 64.0, "loads": 16.0}, "x"), asked) == ""
    assert "moves 64 bytes in 4 loads a turn, not 4 in each: the compiler put several together" in objection(
        Counted({"load bytes": 64.0, "loads": 4.0}, "x"), asked)
    assert "64 bytes in 32 loads a turn, not 4 in each: the compiler made several of one" in objection(
        Counted({"load bytes": 64.0, "loads": 32.0}, "x"), asked)
    both = Asked("bytes", {"load bytes": 64, "store bytes": 64}, each=4)
    assert "64 bytes in 0 stores" in objection(Counted({"load bytes": 64.0, "loads": 16.0, "store bytes": 64.0}, "x"),
                                               both)
    assert objection(Counted({"load bytes": 64.0, "loads": 4.0}, "x"), Asked("bytes", {"load bytes": 64})) == ""


def test_a_texel_has_the_bytes_that_are_stored_of_it():
    """A read of one gives four numbers."""
    read, narrow = Counted({"texel bytes": 64.0, "texels": 4.0}, "x"), Asked("bytes", {"load bytes": 16}, texel=4)
    assert (objection(read, narrow), work(read, narrow)) == ("", 16)
    assert "8 load bytes a turn, not 16" in objection(Counted({"texel bytes": 32.0, "texels": 2.0}, "x"), narrow)
    assert work(read, Asked("bytes", {"load bytes": 64})) == 64  # whose texels are not said to be narrower
    machine_code = Counted({"load bytes": 16.0, "loads": 4.0}, MACHINE)
    assert (objection(machine_code, narrow), work(machine_code, narrow)) == ("", 16)


def test_work_is_what_was_counted():
    asked = Asked("operations", {"mul float32": 32}, pads=True)
    assert work(Counted({"mul float32": 32.0}, "x"), asked) == 32
    assert work(Counted({"mul float32": 64.0}, "x"), asked) == 32  # two lanes of a register of four
    assert objection(Counted({"mul float32": 64.0}, "x"), asked) == ""
    assert "more of it" in objection(Counted({"mul float32": 64.0}, "x"), Asked("operations", {"mul float32": 32}))
    assert "put steps together" in objection(Counted({"mul float32": 31.0}, "x"), asked)
    assert work(Counted(None, why="no"), asked) == 32
    assert work(Counted({"load bytes": 16.0}, "x"), Asked("loads", {"load bytes": 16}, 4)) == 4
    assert objection(Counted(None), asked) == ""
    assert "calls functions of another library" in source(Counted({"calls": 2.0}, "x"))
