"""SPIR-V of OpenCL's kind, as Mesa's rusticl keeps it: modules assembled here are followed, damaged ones are not, and
the kernels of all experiments on a device of rusticl's are counted."""

import random
import re
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from npulab.gpu import counting, kernels, opencl
from npulab.gpu.counting import SUMS, rusticl, source, spirv
from npulab.gpu.types import Timing
from scripts import loaded

with loaded("bench/gpu_sabotage.py") as sabotage:
    pass

HEAD = """
OpCapability Addresses
OpCapability Kernel
OpCapability Int64
OpCapability Int8
OpCapability Linkage
OpCapability Vector16
OpCapability GenericPointer
%std = OpExtInstImport "OpenCL.std"
OpMemoryModel Physical64 OpenCL
OpEntryPoint Kernel %main "k" %lid
OpDecorate %lid BuiltIn LocalInvocationId
OpDecorate %far LinkageAttributes "{far}" Import
%void = OpTypeVoid
%bool = OpTypeBool
%char = OpTypeInt 8 0
%uint = OpTypeInt 32 0
%ulong = OpTypeInt 64 0
%float = OpTypeFloat 32
%uint4 = OpTypeVector %uint 4
%float4 = OpTypeVector %float 4
%ulong3 = OpTypeVector %ulong 3
%c0 = OpConstant %uint 0
%c1 = OpConstant %uint 1
%c2 = OpConstant %uint 2
%c3 = OpConstant %uint 3
%c7 = OpConstant %uint 7
%m1 = OpConstant %uint 4294967295
%l0 = OpConstant %ulong 0
%l1 = OpConstant %ulong 1
%l32 = OpConstant %ulong 32
%far_away = OpConstant %ulong 4294967296
%f1 = OpConstant %float 1
%zeros = OpConstantNull %uint4
%some = OpConstantComposite %uint4 %c0 %c1 %c2 %c3
%one_of = OpConstantComposite %float4 %f1 %f1 %f1 %f1
%g_float = OpTypePointer CrossWorkgroup %float
%g_uint = OpTypePointer CrossWorkgroup %uint
%g_char = OpTypePointer CrossWorkgroup %char
%g_float4 = OpTypePointer CrossWorkgroup %float4
%p_float = OpTypePointer Function %float
%p_uint = OpTypePointer Function %uint
%p_char = OpTypePointer Function %char
%p_g_float = OpTypePointer Function %g_float
%any_uint = OpTypePointer Generic %uint
%i_ulong3 = OpTypePointer Input %ulong3
%lid = OpVariable %i_ulong3 Input
%of_k = OpTypeFunction %void %g_float %uint
%of_far = OpTypeFunction %ulong %uint
%of_own = OpTypeFunction %float %float %uint
%far = OpFunction %ulong None %of_far
%far_axis = OpFunctionParameter %uint
OpFunctionEnd
"""
LOOP = HEAD + """
%own = OpFunction %float None %of_own
%own_x = OpFunctionParameter %float
%own_i = OpFunctionParameter %uint
%own_label = OpLabel
%own_y = OpFMul %float %own_x %own_x
OpReturnValue %own_y
OpFunctionEnd
%main = OpFunction %void None %of_k
%out = OpFunctionParameter %g_float
%turns = OpFunctionParameter %uint
%begin = OpLabel
%var = OpVariable %p_uint Function
%held = OpVariable %p_g_float Function
OpStore %held %out Aligned 8
OpBranch %head
%head = OpLabel
%i = OpPhi %uint %c0 %begin %next %rest
%a = OpPhi %uint %c0 %begin %b %rest
%b = OpPhi %uint %c1 %begin %a %rest
%more = OpULessThan %bool %i %turns
OpBranchConditional %more %body %end
%body = OpLabel
{body}
OpBranch %rest
%rest = OpLabel
%next = OpIAdd %uint %i %c1
OpBranch %head
%end = OpLabel
OpReturn
OpFunctionEnd
"""
"""Turns with a body; a and b are 0 and 1, then 1 and 0, and so on."""
WHEN = """
OpBranchConditional {condition} %then %after
%then = OpLabel
%done = OpFAdd %float %f1 %f1
OpBranch %after
%after = OpLabel
"""
"""A sum where a condition is true."""
LAUNCHED = ("k", (8,), (4,), (None, bytes(4)), 1)


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """A module's bytes, of its body: `spirv-val` has no objection."""
    if not shutil.which("spirv-as"):
        pytest.skip("needs an assembler of SPIR-V: apt install spirv-tools")
    folder = tmp_path_factory.mktemp("spirv")

    def assemble(body, far="_Z12get_local_idj", whole=LOOP):
        (folder / "a.asm").write_text(whole.format(body=body, far=far))
        for program in (["spirv-as", "--target-env", "spv1.2", "a.asm", "-o", "a.spv"],
                        ["spirv-val", "--target-env", "opencl2.2", "a.spv"]):
            done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return (folder / "a.spv").read_bytes()

    return assemble


def kept(module):
    """As in a program's binary of Mesa 22.3.6."""
    return struct.pack("<3I", 1, len(module), 4) + module


def of_a_turn(module, arguments=LAUNCHED):
    """Without the count of turns."""
    c = rusticl.count(kept(module), *arguments)
    assert c.why == ""
    assert c.uneven == {}
    mix = dict(c.mix)
    assert mix.pop("add int32") >= 1
    return mix


# what is followed


@pytest.mark.parametrize(("body", "mix"), [
    ("%x = OpExtInst %float %std fma %f1 %f1 %f1", {"fma float32": 1}),
    ("%x = OpExtInst %float4 %std mad %one_of %one_of %one_of", {"fma float32": 4}),
    *((f"%x = OpExtInst %float %std {name} %f1", {f"{name.split('_')[-1]} float32": 1, "special float32": 1})
      for name in ("sqrt", "rsqrt", "native_sqrt", "native_rsqrt", "half_sqrt", "half_rsqrt")),
    *((f"%x = OpExtInst %float %std {name} %f1 %f1", {"div float32": 1}) for name in ("native_divide", "half_divide")),
    ("%x = OpExtInst %uint %std u_mad24 %i %i %i", {"fma int32": 1, "products of integers": 1}),
    ("%x = OpExtInst %float %std sin %f1", {}),
    ("%x = OpFunctionCall %float %own %f1 %i\n%y = OpFunctionCall %float %own %x %i", {"mul float32": 2}),
    # memory
    ("%to = OpLoad %g_float %held\n%p = OpInBoundsPtrAccessChain %g_float %to %l1\n%x = OpLoad %float %p\n"
     "OpStore %p %x\nOpStore %p %x", {"load bytes": 4, "store bytes": 8, "loads": 1, "stores": 2}),
    ("%to = OpBitcast %g_float4 %out\n%x = OpLoad %float4 %to", {"load bytes": 16, "loads": 1}),
    ("%x = OpExtInst %float4 %std vloadn %l1 %out 4\n%y = OpExtInst %void %std vstoren %x %l1 %out",
     {"load bytes": 16, "store bytes": 16, "loads": 1, "stores": 1}),
    ("%from = OpBitcast %g_char %out\n%to = OpBitcast %p_char %var\nOpCopyMemorySized %to %from %l32",
     {"load bytes": 32, "loads": 1}),
    ("%from = OpBitcast %g_char %out\n%to = OpBitcast %p_char %var\nOpCopyMemorySized %from %to %l32",
     {"store bytes": 32, "stores": 1}),
    ("%to = OpBitcast %g_uint %out\n%p = OpPtrCastToGeneric %any_uint %to\n%x = OpLoad %uint %p\n"
     "%y = OpIAdd %uint %x %x", {"load bytes": 4, "loads": 1, SUMS: 1}),
    ("%p = OpPtrCastToGeneric %any_uint %var\nOpStore %p %i\n%x = OpLoad %uint %p", {}),
    ("%at = OpLoad %ulong3 %lid\n%x = OpCompositeExtract %ulong %at 0\n%p = OpPtrAccessChain %g_float %out %x\n"
     "OpStore %p %f1", {"store bytes": 4, "stores": 1}),
])
def test_what_a_kernel_does_is_counted(assembled, body, mix):
    assert of_a_turn(assembled(body)) == mix


@pytest.mark.parametrize(("body", "turns"), [
    ("%yes = OpIEqual %bool %a %c0", 0.5),  # phis are taken at once: else a would stay what it became
    ("%x = OpUConvert %ulong %i\n%y = OpIAdd %ulong %x %far_away\n%yes = OpUGreaterThan %bool %y %far_away", 1),
    ("%x = OpUConvert %ulong %m1\n%yes = OpULessThan %bool %far_away %x", 0),
    ("%x = OpSConvert %ulong %m1\n%yes = OpULessThan %bool %far_away %x", 1),
    ("%x = OpShiftLeftLogical %ulong %l1 %l32\n%yes = OpIEqual %bool %x %far_away", 1),
    ("%x = OpUConvert %char %m1\n%y = OpSConvert %uint %x\n%yes = OpIEqual %bool %y %m1", 1),
    ("%x = OpISub %uint %c0 %c1\n%yes = OpSLessThan %bool %x %c0", 1),
    ("%x = OpVectorShuffle %uint4 %some %zeros 3 4 2 1\n%y = OpCompositeExtract %uint %x 0\n"
     "%yes = OpIEqual %bool %y %c3", 1),
    ("%x = OpCompositeInsert %uint4 %c7 %zeros 2\n%y = OpIAdd %uint4 %x %some\n%z = OpCompositeExtract %uint %y 2\n"
     "%yes = OpUGreaterThan %bool %z %c7", 1),
    ("%x = OpBitwiseAnd %uint %i %c1\n%y = OpINotEqual %bool %x %c0\n%z = OpSelect %uint %y %c2 %c3\n"
     "%yes = OpIEqual %bool %z %c2", 0.5),
    ("%x = OpExtInst %uint %std u_min %i %c3\n%yes = OpULessThan %bool %x %c3", 0),  # beyond the first turns
    ("OpStore %var %i\n%x = OpLoad %uint %var\n%yes = OpIEqual %bool %x %i", 1),
    ("%at = OpLoad %ulong3 %lid\n%x = OpCompositeExtract %ulong %at 0\n%yes = OpIEqual %bool %x %l0", 1 / 3),
    ("%x = OpFunctionCall %ulong %far %c0\n%yes = OpIEqual %bool %x %l0", 1 / 3),
    ("%x = OpFunctionCall %ulong %far %c1\n%yes = OpIEqual %bool %x %l0", 1)])
def test_what_can_be_known_decides(assembled, body, turns):
    """Of a sum that is done where it is true; of three items, the group's first, middle and last."""
    mix = of_a_turn(assembled(body + WHEN.format(condition="%yes")))
    assert mix.pop("add float32", 0) == pytest.approx(turns)
    assert set(mix) <= {"add int64"}


@pytest.mark.parametrize(("name", "value"), [
    ("_Z14get_local_sizej", 4), ("_Z15get_global_sizej", 8), ("_Z14get_num_groupsj", 2), ("_Z12get_group_idj", 0)])
def test_functions_of_opencl_c_may_be_called(assembled, name, value):
    module = assembled(f"%x = OpFunctionCall %ulong %far %c0\n%y = OpUConvert %uint %x\n%c = OpIAdd %uint %y %c1\n"
                       f"%d = OpIMul %uint %c1 %c{value}\n%yes = OpIEqual %bool %y %c{value}"
                       .replace("%c4", "%four").replace("%c8", "%eight") + WHEN.format(condition="%yes"),
                       name, LOOP.replace("%c3 =", "%four = OpConstant %uint 4\n%eight = OpConstant %uint 8\n%c3 ="))
    assert of_a_turn(module)["add float32"] == 1


def test_functions_that_are_not_there_are_not_seen(assembled):
    c = rusticl.count(kept(assembled("%x = OpFunctionCall %ulong %far %c0", "far_away")), *LAUNCHED)
    assert c.mix == {"add int32": 1, "calls": 1}
    assert "calls functions of another library" in source(c)


def test_a_switch_is_followed(assembled):
    """Of 8 turns two in each of four ways; of 64 bits its numbers are two words."""
    body = """%x = OpBitwiseAnd %uint %i %c3
{wide}
OpSwitch {what} %rest_of 0 %zero 2 %two
%zero = OpLabel
%y = OpFAdd %float %f1 %f1
OpBranch %rest_of
%two = OpLabel
%z = OpFMul %float %f1 %f1
OpBranch %rest_of
%rest_of = OpLabel
"""
    for wide, what in (("", "%x"), ("%w = OpUConvert %ulong %x", "%w")):
        assert of_a_turn(assembled(body.format(wide=wide, what=what))) == {"add float32": .25, "mul float32": .25}


def test_what_hangs_on_data_is_not_followed(assembled):
    loaded_ = "%to = OpBitcast %g_uint %out\n%x = OpLoad %uint %to\n"
    body = loaded_ + "%yes = OpIEqual %bool %x %c0" + WHEN.format(condition="%yes")
    assert rusticl.count(kept(assembled(body)), *LAUNCHED).why == "where the code goes hangs on data"


# where the module is


@pytest.fixture(scope="module")
def module(assembled):
    return assembled("%x = OpExtInst %float %std fma %f1 %f1 %f1\n" + "OpStore %out %x\n%y = OpLoad %float %out")


MIX = {"add int32": 1, "fma float32": 1, "load bytes": 4, "store bytes": 4, "loads": 1, "stores": 1}


@pytest.mark.parametrize(("before", "behind"), [
    (b"", b""), (struct.pack("<3I", 1, 0, 4), b""), (b"odd", b""), (b"MESA" + bytes(60), b"more of it"),
    (rusticl.MAGIC, b"\0" * 64), (rusticl.MAGIC * 3, rusticl.MAGIC + bytes(16)), (b"", b"\xff" * 64)])
def test_a_module_is_found_wherever_it_is(module, before, behind):
    binary = before + module + behind
    assert rusticl.is_rusticl(binary)
    assert list(rusticl.modules(binary)) == [module]
    assert rusticl.count(binary, *LAUNCHED).mix == MIX


def test_a_driver_is_told_by_what_it_keeps(module, monkeypatch):
    """Capstone is for machine code alone."""
    class Kept(SimpleNamespace):
        def get_info(self, _):
            return [kept(module)]

        def k(self, queue, size, group, *arguments):
            return SimpleNamespace(wait=lambda: None)

    class Buffer:
        pass

    cl = SimpleNamespace(Program=lambda *_: SimpleNamespace(build=lambda **_: Kept()), Buffer=Buffer,
                         Error=RuntimeError, program_info=SimpleNamespace(BINARIES=0))
    monkeypatch.setitem(sys.modules, "capstone", None)
    c = counting.count(cl, SimpleNamespace(context=None), "__kernel void k(__global float *out, uint turns) {}", "k",
                       (8,), (4,), [Buffer(), np.uint32(5)])
    assert (c.mix, source(c)) == (MIX, "work counted in SPIR-V, as the driver is given it")


def test_one_of_several_modules_is_not_chosen(module, assembled):
    assert rusticl.count(module + module, *LAUNCHED).mix == MIX
    assert "several modules" in rusticl.count(module + assembled(""), *LAUNCHED).why


def test_another_kernel_is_not_this_one(module):
    assert rusticl.count(module, "another", *LAUNCHED[1:]).why == "the SPIR-V has no entry another"


def test_what_is_no_module_of_opencl_is_not_taken():
    from npulab.gpu import shaders

    shader = shaders.chain("fma", "float32", 1, 2).make("chain", 64)
    for binary in (b"", rusticl.MAGIC, rusticl.MAGIC * 100, shader, b"\x7fELF" + bytes(100)):
        assert not rusticl.is_rusticl(binary)
    assert "has no SPIR-V of OpenCL's kind" in rusticl.count(shader, *LAUNCHED).why


# damage


def test_a_damaged_module_is_not_read_and_raises_nothing(module, monkeypatch):
    """Each word: 0, all ones, another; then many at once."""
    monkeypatch.setattr(spirv, "OWN", 1 << 12)
    r = random.Random(0)

    def word():
        instruction = r.randrange(1, 9) << 16 | r.randrange(260)
        return struct.pack("<I", r.choice((r.randrange(1 << 32), r.randrange(256), instruction)))

    for at in range(0, len(module), 4):
        for value in (bytes(4), b"\xff" * 4, word(), word(), word()):
            rusticl.count(kept(module[:at] + value + module[at + 4:]), *LAUNCHED)
        assert rusticl.count(kept(module[:at]), *LAUNCHED).mix is None
    for _ in range(2000):
        damaged = bytearray(module)
        for _ in range(r.randrange(1, 8)):
            at = r.randrange(5, len(module) // 4) * 4
            damaged[at:at + 4] = word()
        rusticl.count(kept(bytes(damaged)), *LAUNCHED)


@pytest.mark.parametrize(("body", "whole", "why"), [
    ("", LOOP.replace("OpBranch %head\n%end", "OpBranch %rest\n%end"), "more than 4096 instructions"),
    ("%x = OpFunctionCall %float %own %f1 %i", LOOP.replace("%own_y = OpFMul %float %own_x %own_x",
                                                            "%own_y = OpFunctionCall %float %own %own_x %own_i"),
     "more than 64 calls in each other"),
    ("%p = OpAccessChain %p_uint %q %c0", LOOP.replace(
        "%more =", "%q = OpPhi %p_uint %var %begin %p %rest\n%more ="), "a part of a variable is too deep in it")])
def test_what_does_not_end_is_ended(assembled, monkeypatch, body, whole, why):
    monkeypatch.setattr(spirv, "OWN", 1 << 12)
    monkeypatch.setattr(subprocess, "run", lambda program, real=subprocess.run, **more: real(
        ["true"] if program[0] == "spirv-val" else program, **more))  # which objects, too
    assert why in rusticl.count(kept(assembled(body, whole=whole)), *LAUNCHED).why


def test_ways_to_parts_do_not_grow(assembled):
    """A pointer that goes further each turn."""
    body = "%to = OpLoad %g_float %held\n%p = OpInBoundsPtrAccessChain %g_float %to %l1\nOpStore %held %p"
    assert of_a_turn(assembled(body)) == {}


@pytest.mark.parametrize(("line", "why"), [
    ("%uint4 = OpTypeVector %uint 4", "vectors of 99 are not followed"),
    ("%ulong = OpTypeInt 64 0", "numbers of 99 bits are not followed")])
def test_large_numbers_in_types_take_no_memory(assembled, line, why):
    module = assembled("")
    at = {"%uint4": 23, "%ulong": 21}[line.split()[0]]
    words = list(struct.unpack(f"<{len(module) // 4}I", module))
    place = 5
    while words[place] & 0xffff != at or words[place + (3 if at == 23 else 2)] not in (4, 64):
        place += words[place] >> 16
    words[place + (3 if at == 23 else 2)] = 99
    assert rusticl.count(kept(struct.pack(f"<{len(words)}I", *words)), *LAUNCHED).why == why


# the driver


@pytest.fixture(scope="module")
def bench():
    cl = pytest.importorskip("pyopencl", reason="needs pyopencl: pip install 'npulab[gpu]'")
    found = [d for p in opencl.devices() and cl.get_platforms() for d in p.get_devices()
             if "rusticl" in f"{p.name} {p.vendor} {d.platform.name}".lower()]
    if not found:
        pytest.skip("needs a device of rusticl's: apt install mesa-opencl-icd; RUSTICL_ENABLE=llvmpipe")
    made = opencl.OpenCL(found[0])
    made.turns_max = 64  # times are not looked at
    return made


def test_all_that_a_device_of_rusticl_does_is_counted(bench, monkeypatch):
    """Its clock may stand still (Mesa 22.3.6)."""
    monkeypatch.setattr(opencl, "SCALES", 0.0)
    monkeypatch.setattr(opencl, "REPEATS", 2)
    monkeypatch.setattr(opencl, "WAITED", 1e9)
    for one_by_one in (True, False):
        bench.one_by_one = one_by_one
        for name, run in sabotage.honest(bench):
            t = run()
            assert isinstance(t, Timing)
            assert not re.search("compiled", t.wrong), (name, t.wrong)
            if name not in ("launch", "map", "up", "down", "barrier"):
                assert t.counted == "work counted in SPIR-V, as the driver is given it", (name, t.counted)


def test_a_binary_of_rusticl_is_one_module(bench):
    cl = bench.cl
    program = cl.Program(bench.context, kernels.CHASE).build(cache_dir=False)
    binary = bytes(program.get_info(cl.program_info.BINARIES)[0])
    found, = rusticl.modules(binary)
    assert binary.endswith(found)
