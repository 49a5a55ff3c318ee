"""Instructions of SPIR-V as words: the numbers of what npulab's shaders use.

Source: SPIR-V Specification 1.6, sections 2.3 and 3; Extended Instructions for GLSL, GLSL.std.450.
"""

from __future__ import annotations

import struct

MAGIC, VERSION = 0x07230203, 0x00010300  # SPIR-V 1.3: Vulkan 1.1, storage buffers as a class of their own

OPCODES = {
    "ExtInstImport": 11, "ExtInst": 12, "MemoryModel": 14, "EntryPoint": 15, "ExecutionMode": 16, "Capability": 17,
    "TypeVoid": 19, "TypeBool": 20, "TypeInt": 21, "TypeFloat": 22, "TypeVector": 23, "TypeImage": 25,
    "TypeArray": 28, "TypeRuntimeArray": 29, "TypeStruct": 30, "TypePointer": 32, "TypeFunction": 33, "Constant": 43,
    "ConstantComposite": 44, "Function": 54, "FunctionEnd": 56, "Variable": 59, "Load": 61, "Store": 62,
    "AccessChain": 65, "ImageFetch": 95, "Decorate": 71, "MemberDecorate": 72, "CompositeConstruct": 80,
    "CompositeExtract": 81, "ConvertFToS": 110, "ConvertSToF": 111,
    "ConvertUToF": 112, "FConvert": 115, "Bitcast": 124, "IAdd": 128, "FAdd": 129, "ISub": 130,
    "FSub": 131, "IMul": 132, "FMul": 133, "UDiv": 134, "FDiv": 136, "UMod": 137, "LogicalAnd": 167, "Select": 169,
    "IEqual": 170, "INotEqual": 171, "UGreaterThanEqual": 174, "SGreaterThanEqual": 175, "ULessThan": 176,
    "SLessThan": 177, "ShiftRightLogical": 194, "ShiftRightArithmetic": 195, "ShiftLeftLogical": 196,
    "BitwiseOr": 197, "BitwiseXor": 198, "BitwiseAnd": 199, "ControlBarrier": 224, "LoopMerge": 246,
    "SelectionMerge": 247, "Label": 248, "Branch": 249, "BranchConditional": 250, "Return": 253,
}
GLSL = {"RoundEven": 2, "FAbs": 4, "Exp": 27, "InverseSqrt": 32, "FMin": 37, "UMin": 38, "SMin": 39, "FMax": 40,
        "SMax": 42, "Fma": 50, "PackHalf2x16": 58, "UnpackHalf2x16": 62}
"""Instructions of GLSL.std.450."""
CLASSES = {"UniformConstant": 0, "Input": 1, "Uniform": 2, "Workgroup": 4, "Function": 7, "StorageBuffer": 12}
DECORATIONS = {"Block": 2, "ArrayStride": 6, "BuiltIn": 11, "Binding": 33, "DescriptorSet": 34,
               "Offset": 35}
BUILTINS = {"group": 26, "local": 27, "global": 28}  # WorkgroupId, LocalInvocationId, GlobalInvocationId
ARITHMETIC = {"+": ("IAdd", "FAdd"), "-": ("ISub", "FSub"), "*": ("IMul", "FMul"),
              "/": ("UDiv", "FDiv")}


def word(opcode: str, *operands: int) -> list[int]:
    """An instruction: words in all and opcode, then its operands."""
    return [(len(operands) + 1) << 16 | OPCODES[opcode], *operands]


def text(s: str) -> list[int]:
    """UTF-8, ended by a zero, in whole words."""
    data = s.encode() + b"\0"
    data += b"\0" * (-len(data) % 4)
    return list(struct.unpack(f"<{len(data) // 4}I", data))
