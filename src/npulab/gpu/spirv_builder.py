"""Compute shaders written in Python as SPIR-V words, without a compiler: what is asked for is what the driver is given.

    s = Shader(64, ("uint",), ("uint", "uint"))         # a buffer of uints; two arguments
    turns, step = s.arguments
    x = s.variable(s.local_id)
    with s.loop(turns):
        x.set(x.get() + step)
    s.store(0, s.global_id, x.get())
    words = s.assemble()

Values are uint, int, float, half (16 bits) or bool, alone or in vectors of 2 to 4. Control flow is structured.
Buffers are set 0, bindings 0, 1, ...; the arguments are a uniform block in the binding after them, four bytes each.
Nothing is folded, reordered or left out, but for types and constants, which are declared once.

Source: SPIR-V Specification 1.6 (opcodes, layout of a module), Vulkan 1.1 appendix A (what a module may hold).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from npulab.gpu.spirv_values import Kind, Type, Value, Variable
from npulab.gpu.spirv_words import ARITHMETIC, BUILTINS, CLASSES, DECORATIONS, GLSL, MAGIC, VERSION, text, word

__all__ = ["Kind", "Shader", "Type", "Value", "Variable"]

CONSTANT = Type("uint", 4)
"""Of constant memory: arrays in uniform blocks have a stride of 16 bytes at least (Vulkan 1.1, 14.5.4)."""


class Shader:
    """A compute shader with the entry point `main` in groups of (x, y, 1) threads.

    group      threads, (x, y) or x alone.     buffers  what each one is an array of.
    arguments  kinds of the numbers that a call gives: uint or float; with none there is no block of them.
    constants  vectors of four uints of constant memory, a uniform block in the next binding.
    image      an image of four uints a texel, in the binding after all others.
    """

    def __init__(self, group: int | tuple[int, int], buffers: Sequence[Type | Kind], arguments: Sequence[Kind],
                 constants: int = 0, image: bool = False) -> None:
        self.group = group if isinstance(group, tuple) else (group, 1)
        self.buffers = [Type(b) if isinstance(b, str) else b for b in buffers]
        self._next = 1
        self._capabilities = {1: None}  # Shader
        self._decorations: list[int] = []
        self._globals: list[int] = []
        self._locals: list[int] = []
        self._body: list[int] = []
        self._known: dict[tuple[object, ...], int] = {}
        self._glsl, self._main = self.new(), self.new()
        self._interface: list[int] = []
        self._bound = [self._binding(i, "StorageBuffer", self._once("TypeRuntimeArray", self.type_id(t),
                                                                   stride=t.size))
                       for i, t in enumerate(self.buffers)]
        self._block(arguments)
        if constants:
            array = self._once("TypeArray", self.type_id(CONSTANT), self.constant(constants).id, stride=CONSTANT.size)
            self._constants = self._binding(len(self.buffers) + bool(arguments), "Uniform", array)
        if image:
            self._image_type = self._once("TypeImage", self.type_id(Type("uint")), 1, 0, 0, 0, 1, 0)  # 2-D, sampled
            pointer = self._once("TypePointer", CLASSES["UniformConstant"], self._image_type)
            self._image = self._bind(pointer, "UniformConstant", len(self.buffers) + bool(arguments) + bool(constants))
        self._shared: list[tuple[int, Type]] = []
        self.global_id, self.local_id, self.group_id = (self._builtin(b) for b in ("global", "local", "group"))
        self.global_y, self.local_y, self.group_y = (self._builtin(b, 1) for b in ("global", "local", "group"))

    # what is computed

    def constant(self, value: float, kind: Kind = "uint", lanes: int = 1) -> Value:
        """The same number in each lane."""
        one = Type(kind)
        if kind in ("uint", "int"):
            word = int(value) & 0xFFFFFFFF
        else:
            word = int.from_bytes(struct.pack("<e" if kind == "half" else "<f", value).ljust(4, b"\0"), "little")
        found = self._once("Constant", word, result=self.type_id(one))
        if lanes > 1:
            found = self._once("ConstantComposite", *[found] * lanes, result=self.type_id(Type(kind, lanes)))
        return Value(self, found, Type(kind, lanes))

    def like(self, value: Value | float, other: Value) -> Value:
        """`value` in the type of `other`: spread over its lanes, a plain number made a constant."""
        if not isinstance(value, Value):
            return self.constant(value, other.type.kind, other.type.lanes)
        assert value.type.kind == other.type.kind
        return value if value.type == other.type else self.spread(value, other.type.lanes)

    def spread(self, value: Value, lanes: int) -> Value:
        assert value.type.lanes == 1
        return value if lanes == 1 else self.typed("CompositeConstruct", Type(value.type.kind, lanes), *[value] * lanes)

    def binary(self, sign: str, a: Value, b: Value | float) -> Value:
        return self.typed(ARITHMETIC[sign][a.type.kind not in ("uint", "int")], a.type, a, self.like(b, a))

    def compare(self, opcode: str, a: Value, b: Value | int) -> Value:
        return self.typed(opcode, Type("bool", a.type.lanes), a, self.like(b, a))

    def both(self, a: Value, b: Value) -> Value:
        return self.typed("LogicalAnd", Type("bool"), a, b)

    def select(self, condition: Value, yes: Value | float, no: Value) -> Value:
        """Lane by lane; one condition may stand for all lanes."""
        if condition.type.lanes != no.type.lanes:
            condition = self.spread(condition, no.type.lanes)
        return self.typed("Select", no.type, condition, self.like(yes, no), no)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once where the device does."""
        return self.builtin("Fma", a, self.like(b, a), self.like(c, a))

    def builtin(self, name: str, *values: Value) -> Value:
        """Of `GLSL`: the result has the type of the first."""
        return self.typed("ExtInst", values[0].type, self._glsl, GLSL[name], *values)

    def lane(self, value: Value, index: int) -> Value:
        return value if value.type.lanes == 1 else self.typed("CompositeExtract", Type(value.type.kind), value, index)

    def vector(self, *lanes: Value) -> Value:
        return self.typed("CompositeConstruct", Type(lanes[0].type.kind, len(lanes)), *lanes)

    def sum(self, value: Value) -> Value:
        """Of the lanes, from the first on."""
        total = self.lane(value, 0)
        for i in range(1, value.type.lanes):
            total = total + self.lane(value, i)
        return total

    def convert(self, value: Value, kind: Kind) -> Value:
        """A number of another kind: uint or int to float, float to int without its fraction, float to half and back."""
        if value.type.kind == kind:
            return value
        opcode = {"uint": "ConvertUToF", "int": "ConvertSToF"}.get(value.type.kind,
                                                                   "ConvertFToS" if kind == "int" else "FConvert")
        return self.typed(opcode, Type(kind, value.type.lanes), value)

    def bits(self, value: Value, kind: Kind) -> Value:
        """The same bits as another kind of as many."""
        return value if value.type.kind == kind else self.typed("Bitcast", Type(kind, value.type.lanes), value)

    def unpacked(self, value: Value) -> Value:
        """Two floats of the halves in a uint, the lower one first. Needs no capability."""
        return self.typed("ExtInst", Type("float", 2), self._glsl, GLSL["UnpackHalf2x16"], value)

    def packed(self, value: Value) -> Value:
        """Two floats as halves in a uint."""
        return self.typed("ExtInst", Type("uint"), self._glsl, GLSL["PackHalf2x16"], value)

    # memory

    def load(self, buffer: int, index: Value) -> Value:
        return self.typed("Load", self.buffers[buffer], self._element(buffer, index))

    def store(self, buffer: int, index: Value, value: Value) -> None:
        assert value.type == self.buffers[buffer]
        self.do("Store", self._element(buffer, index), value.id)

    def load_constant(self, index: Value, lane: Value | None = None) -> Value:
        """A vector, or one word of it."""
        type_ = CONSTANT if lane is None else Type("uint")
        pointer = self._once("TypePointer", CLASSES["Uniform"], self.type_id(type_))
        at = self.new()
        self.do("AccessChain", pointer, at, self._constants, self.constant(0).id, index.id,
                *([lane.id] if lane is not None else []))
        return self.typed("Load", type_, at)

    def texel(self, x: Value, y: Value) -> Value:
        """Four uints of the image."""
        image = self.new()
        self.do("Load", self._image_type, image, self._image)
        place = self.typed("CompositeConstruct", Type("uint", 2), x, y)
        return self.typed("ImageFetch", CONSTANT, image, place, 2, self.constant(0))  # Lod

    def shared(self, kind: Type | Kind, count: int) -> int:
        """An array of the group's local memory, by its number."""
        element = Type(kind) if isinstance(kind, str) else kind
        array = self._once("TypeArray", self.type_id(element), self.constant(count).id)
        pointer = self._once("TypePointer", CLASSES["Workgroup"], array)
        found = self.new()
        self._globals += word("Variable", pointer, found, CLASSES["Workgroup"])
        self._shared.append((found, element))
        return len(self._shared) - 1

    def shared_load(self, array: int, index: Value) -> Value:
        return self.typed("Load", self._shared[array][1], self._shared_element(array, index))

    def shared_store(self, array: int, index: Value, value: Value) -> None:
        self.do("Store", self._shared_element(array, index), value.id)

    def barrier(self) -> None:
        """All threads of the group, with what they stored in local memory."""
        scope = self.constant(2).id  # Workgroup
        self.do("ControlBarrier", scope, scope, self.constant(0x8 | 0x100).id)  # AcquireRelease, WorkgroupMemory

    def variable(self, value: Value) -> Variable:
        pointer = self._once("TypePointer", CLASSES["Function"], self.type_id(value.type))
        found = Variable(self, self.new(), value.type)
        self._locals += word("Variable", pointer, found.id, CLASSES["Function"])
        found.set(value)
        return found

    # control flow

    @contextmanager
    def loop(self, turns: Value | int, step: Value | int = 1, start: Value | int = 0) -> Iterator[Value]:
        """for (i = start; i < turns; i += step), of uints; gives i."""
        i = self.variable(self.constant(start) if isinstance(start, int) else start)
        header, test, body, onward, after = (self.new() for _ in range(5))
        self.do("Branch", header)
        self.do("Label", header)
        self.do("LoopMerge", after, onward, 0)
        self.do("Branch", test)
        self.do("Label", test)
        now = i.get()
        self.do("BranchConditional", (now < turns).id, body, after)
        self.do("Label", body)
        yield now
        self.do("Branch", onward)
        self.do("Label", onward)
        i.set(now + step)
        self.do("Branch", header)
        self.do("Label", after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        yes, after = self.new(), self.new()
        self.do("SelectionMerge", after, 0)
        self.do("BranchConditional", condition.id, yes, after)
        self.do("Label", yes)
        yield
        self.do("Branch", after)
        self.do("Label", after)

    def either(self, condition: Value, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
        """Two ways, of which a thread takes one."""
        yes, no, after = self.new(), self.new(), self.new()
        self.do("SelectionMerge", after, 0)
        self.do("BranchConditional", condition.id, yes, no)
        for label, way in ((yes, then), (no, otherwise)):
            self.do("Label", label)
            way()
            self.do("Branch", after)
        self.do("Label", after)

    # the module

    @property
    def has_halves(self) -> bool:
        """Whether it asks for the capability Float16."""
        return 9 in self._capabilities

    def assemble(self) -> bytes:
        """The module, little-endian."""
        out: list[int] = []
        for capability in self._capabilities:
            out += word("Capability", capability)
        out += word("ExtInstImport", self._glsl, *text("GLSL.std.450"))
        out += word("MemoryModel", 0, 1)  # Logical, GLSL450
        out += word("EntryPoint", 5, self._main, *text("main"), *self._interface)  # GLCompute
        out += word("ExecutionMode", self._main, 17, *self.group, 1)  # LocalSize
        void = self._once("TypeVoid")
        function = self._once("TypeFunction", void)
        out += self._decorations + self._globals
        out += word("Function", void, self._main, 0, function)
        out += word("Label", self.new()) + self._locals + self._body
        out += word("Return") + word("FunctionEnd")
        return struct.pack(f"<{len(out) + 5}I", MAGIC, VERSION, 0, self._next, 0, *out)

    def new(self) -> int:
        """A result id."""
        self._next += 1
        return self._next - 1

    def do(self, opcode: str, *operands: int) -> None:
        self._body += word(opcode, *operands)

    def typed(self, opcode: str, type_: Type, *operands: Value | int) -> Value:
        found = Value(self, self.new(), type_)
        self.do(opcode, self.type_id(type_), found.id, *(o.id if isinstance(o, Value) else o for o in operands))
        return found

    def type_id(self, t: Type) -> int:
        if t.lanes > 1:
            return self._once("TypeVector", self.type_id(Type(t.kind)), t.lanes)
        if t.kind == "half":
            self._capabilities[9] = None  # Float16
        return {"bool": lambda: self._once("TypeBool"), "uint": lambda: self._once("TypeInt", 32, 0),
                "int": lambda: self._once("TypeInt", 32, 1), "float": lambda: self._once("TypeFloat", 32),
                "half": lambda: self._once("TypeFloat", 16)}[t.kind]()

    def _once(self, opcode: str, *operands: int, result: int = 0, stride: int = 0) -> int:
        """A type or constant, declared at its first use. stride: of an array, bytes."""
        key = (opcode, result, stride, *operands)
        if key not in self._known:
            self._known[key] = found = self.new()
            self._globals += word(opcode, *([result] if result else []), found, *operands)
            if stride:
                self._decorate(found, "ArrayStride", stride)
        return self._known[key]

    def _decorate(self, target: int, decoration: str, *operands: int) -> None:
        self._decorations += word("Decorate", target, DECORATIONS[decoration], *operands)

    def _binding(self, number: int, storage: str, *members: int) -> int:
        """A variable of a block with members of these types, of four bytes each but for the last."""
        block = self.new()
        self._globals += word("TypeStruct", block, *members)
        self._decorate(block, "Block")
        for i in range(len(members)):
            self._decorations += word("MemberDecorate", block, i, DECORATIONS["Offset"], 4 * i)
        return self._bind(self._once("TypePointer", CLASSES[storage], block), storage, number)

    def _bind(self, pointer: int, storage: str, number: int) -> int:
        found = self.new()
        self._globals += word("Variable", pointer, found, CLASSES[storage])
        self._decorate(found, "DescriptorSet", 0)
        self._decorate(found, "Binding", number)
        return found

    def _block(self, arguments: Sequence[Kind]) -> None:
        types = [Type(k) for k in arguments]
        self.arguments: list[Value] = []
        if not types:
            return
        block = self._binding(len(self.buffers), "Uniform", *(self.type_id(t) for t in types))
        for i, t in enumerate(types):
            pointer = self._once("TypePointer", CLASSES["Uniform"], self.type_id(t))
            at = self.new()
            self.do("AccessChain", pointer, at, block, self.constant(i).id)
            self.arguments.append(self.typed("Load", t, at))

    def _builtin(self, name: str, component: int = 0) -> Value:
        three = Type("uint", 3)
        pointer = self._once("TypePointer", CLASSES["Input"], self.type_id(three))
        key = ("builtin", name)
        if key not in self._known:
            self._known[key] = found = self.new()
            self._globals += word("Variable", pointer, found, CLASSES["Input"])
            self._decorate(found, "BuiltIn", BUILTINS[name])
            self._interface.append(found)
        return self.lane(self.typed("Load", three, self._known[key]), component)

    def _element(self, buffer: int, index: Value) -> int:
        pointer = self._once("TypePointer", CLASSES["StorageBuffer"], self.type_id(self.buffers[buffer]))
        at = self.new()
        self.do("AccessChain", pointer, at, self._bound[buffer], self.constant(0).id, index.id)
        return at

    def _shared_element(self, array: int, index: Value) -> int:
        variable, element = self._shared[array]
        pointer = self._once("TypePointer", CLASSES["Workgroup"], self.type_id(element))
        at = self.new()
        self.do("AccessChain", pointer, at, variable, index.id)
        return at
