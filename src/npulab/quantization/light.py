"""Networks of common operators run without ONNX Runtime: node after node, weights where they lie, in files.

ONNX Runtime takes 26 MiB before it has a network, and copies the weights several times. Here a constant is a view of
what it was read from, results lie in buffers that are used again as soon as nothing reads them any more, and a layer
needs no room of its own but a panel (_floats.c). Nothing depends on threads, nor on where a network is cut.

Whatever is not in the list (light_operators.OPERATORS) is left to ONNX Runtime: `opened` gives None.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from npulab.errors import UnsupportedError
from npulab.importers.onnx_parts import Thin
from npulab.program.pages import let_go
from npulab.quantization import light_operators as operators
from npulab.quantization.light_operators import OPEN, Built, Foreign, Known, Made, Node
from npulab.quantization.types import Array, Feeds

if TYPE_CHECKING:
    import onnx

DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"}
"""Element types of TensorProto that are taken."""
OPSETS = range(7, 24)
"""Of ONNX, whose operators mean what they mean here; before 7, sums broadcast otherwise."""
CLAMPED = "Conv", "Gemm", "MatMul"
"""Operators that clamp what they make."""
WHOLE = "ReduceMin", "ReduceMax", "ReduceSum"
"""What is found in one pass over a tensor."""
POOLED = 1 << 16
"""Bytes from which a result lies in a buffer that is used again."""


def _mapped(size: int) -> Array:
    """Bytes that the system has back as soon as nothing refers to them: the C library keeps what threads gave back."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return np.frombuffer(mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, **private), np.uint8)


class _Pool:
    """Buffers that nothing reads at the moment, of all networks that are open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.free: list[Array] = []
        self.users = 0

    def take(self, size: int) -> Array:
        with self.lock:
            fit = [b for b in self.free if b.size >= size]
            if fit:
                best = min(fit, key=lambda b: b.size)
                self.free = [b for b in self.free if b is not best]
                return best
            self.free = []  # smaller ones: their pages are worth more to the new one
        return _mapped(size)

    def give(self, buffer: Array) -> None:
        with self.lock:
            if self.users:
                self.free.append(buffer)

    def enter(self) -> None:
        """One more network. Its tensors may have other sizes than those before."""
        with self.lock:
            self.users += 1
            self.free = []

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.free = []


_pool = _Pool()


class Room:
    """Where results of one run go. `spare`: inputs of the present node that nothing reads behind it."""

    def __init__(self) -> None:
        self.spare: list[Array] = []
        self.kept = False  # whoever asked for the present node's result keeps it
        self.lives: dict[int, tuple[Array, int]] = {}  # of a buffer: itself, and names of what lies in it

    def new(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if size < POOLED:
            return np.empty(shape, dtype)
        buffer = _mapped(size) if self.kept else _pool.take(size)
        if not self.kept:
            self.lives[id(buffer)] = buffer, 0
        found: Array = buffer[:size].view(dtype).reshape(shape)
        return found

    def over(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """In the place of an input of this shape that nothing reads any more, if there is one."""
        found = next((x for x in self.spare if x.shape == tuple(shape) and x.dtype == dtype), None)
        return self.new(shape, dtype) if found is None or self.kept else found

    def count(self, array: Array, more: int) -> int:
        """How many names have what lies where the array does, now; 0 for what is not of the pool."""
        key = id(array.base)
        if array.base is None or key not in self.lives:
            return 0
        buffer, names = self.lives[key]
        self.lives[key] = buffer, names + more
        if names + more <= 0:
            del self.lives[key]
            _pool.give(buffer)
        return names + more

    def close(self) -> None:
        for buffer, _ in self.lives.values():
            _pool.give(buffer)
        self.lives = {}


@dataclass(eq=False)
class _Step:
    """A node, and what is not read any more once it is done."""

    make: Made
    inputs: list[str]
    outputs: list[str]
    last: list[str] = field(default_factory=list)


class Light:
    """A network that is open. Call it with inputs."""

    def __init__(self, steps: Sequence[_Step], constants: Mapping[str, Array], inputs: Mapping[str, np.dtype[Any]],
                 names: Sequence[str]) -> None:
        self.steps, self.constants, self.inputs, self.names = steps, constants, inputs, list(names)
        asked = set(names)
        seen: set[str] = set()
        for step in reversed(steps):
            own = set(step.inputs) | set(step.outputs)
            step.last = sorted(name for name in own - seen - asked if name and name not in constants)
            seen |= own
        _pool.enter()
        weakref.finalize(self, _close, _pool, list(constants.values()))

    def __call__(self, feeds: Feeds) -> list[Array]:
        room = Room()
        try:
            with np.errstate(all="ignore"):
                return self._run(feeds, room)
        except (ValueError, IndexError, TypeError) as e:
            raise UnsupportedError("the network does not run on this sample", got=e) from None
        finally:
            room.close()

    def _run(self, feeds: Feeds, room: Room) -> list[Array]:
        have = dict(self.constants)
        for name, dtype in self.inputs.items():
            if name not in feeds:
                raise ValueError(f"nothing for the input '{name}'")
            x = np.asarray(feeds[name])
            if x.dtype != dtype:
                raise ValueError(f"'{name}' is {x.dtype}, not {dtype}")
            have[name] = np.ascontiguousarray(x).reshape(x.shape)
        for step in self.steps:
            arrays = [have[name] if name else None for name in step.inputs]
            room.spare = [x for name, x in zip(step.inputs, arrays, strict=True) if x is not None
                          and name in step.last and step.inputs.count(name) == 1 and room.count(x, 0) == 1]
            room.kept = any(name in self.names for name in step.outputs)
            for name, y in zip(step.outputs, step.make(arrays, room), strict=True):
                if name:
                    have[name] = y
                    room.count(y, 1)
            for name in step.last:
                room.count(have.pop(name), -1)
        room.spare = []
        # what an asked view of a buffer shows is the caller's
        return [have[name].copy() if room.count(have[name], 0) else have[name] for name in self.names]


def _close(pool: _Pool, constants: Sequence[Array]) -> None:
    for array in constants:
        let_go(array)
    pool.leave()


def opened(model: Thin, names: Sequence[str]) -> Light | None:
    """The model, ready to give `names`; None if ONNX Runtime has to run it."""
    if operators.loops is None:
        return None
    try:
        return _Opening(model, names).light()
    except (Foreign, ValueError, IndexError, TypeError):  # ONNX Runtime says what is wrong
        return None


class _Opening:
    """What is found out while a model is opened."""

    def __init__(self, model: Thin, names: Sequence[str]) -> None:
        graph = model.proto.graph
        own = [o.version for o in model.proto.opset_import if o.domain in ("", "ai.onnx")]
        if len(own) != 1 or own[0] not in OPSETS or graph.sparse_initializer:
            raise Foreign
        self.model, self.names, self.opset = model, list(names), own[0]
        self.tensors = {t.name: t for t in graph.initializer}
        if any(i.name in self.tensors for i in graph.input):  # they may be given another one
            raise Foreign
        self.dtypes = {i.name: _dtype(i.type.tensor_type.elem_type) for i in graph.input}
        self.inputs = dict(self.dtypes)
        self.constants: dict[str, Array] = {}  # those that were read, or computed of such

    def light(self) -> Light:
        steps = [self._step(node) for node in self._joined([n for n in self._needed() if not self._is_fixed(n)])]
        made = {*self.inputs, *(o for s in steps for o in s.outputs)}
        if not all(name in made or self._constant(name) is not None for name in self.names):
            raise Foreign
        reads = {*self.names, *(name for s in steps for name in s.inputs)}
        for name, array in self.constants.items():
            if name not in reads:
                let_go(array)
        return Light(steps, {n: a for n, a in self.constants.items() if n in reads}, self.inputs, self.names)

    def _needed(self) -> list[Node]:
        """Nodes that the names are computed from."""
        wanted, found = set(self.names), []
        for n in reversed(self.model.proto.graph.node):
            if not wanted.isdisjoint(n.output):
                found.append(Node.of(n))
                wanted.update(n.input)
        return found[::-1]

    def _joined(self, nodes: Sequence[Node]) -> Iterator[Node]:
        """The same, but clamps with what makes their inputs, QuantizeLinear with the DequantizeLinear behind it, and
        extremes with the sum of the same tensor: where nothing else reads what lies between."""
        readers = Counter(name for n in nodes for name in n.inputs)
        makers: dict[str, Node] = {}
        wholes: dict[tuple[str, int], Node] = {}
        found: list[Node] = []
        for n in nodes:
            before = makers.get(n.inputs[0]) if n.inputs else None
            if before is not None and (readers[n.inputs[0]] > 1 or n.inputs[0] in self.names):
                before = None
            whole = n.inputs[0], n.attributes.get("keepdims", 1)
            if n.op in ("Relu", "Clip") and before is not None and before.op in CLAMPED and before.clamp == OPEN:
                before.clamp = operators.bounds(self._known(n))
                before.outputs = n.outputs
            elif n.op == "DequantizeLinear" and before is not None and before.op == "QuantizeLinear" and (
                    n.inputs[1:] == before.inputs[1:] and self._is_one(n.inputs[1])):
                before.op, before.outputs = "Shown", n.outputs
            elif n.op in WHOLE and len(n.inputs) == 1 and not n.attributes.keys() - {"keepdims"} and (
                    n.inputs[0] not in self.tensors):
                if whole not in wholes:
                    wholes[whole] = Node("Extremes", n.inputs, [""] * len(WHOLE), {"keepdims": whole[1]})
                    found.append(wholes[whole])
                at = WHOLE.index(n.op)
                if wholes[whole].outputs[at]:
                    raise Foreign
                wholes[whole].outputs[at] = n.outputs[0]
            else:
                found.append(n)
            makers.update((o, before if before is not None and before.outputs is n.outputs else n) for o in n.outputs)
        return iter(found)

    def _is_one(self, name: str) -> bool:
        found = self._constant(name)
        return found is not None and found.size == 1

    def _known(self, node: Node) -> Known:
        constants = [self._constant(name) if name else None for name in node.inputs]
        dtypes = [self.dtypes.get(name) if name else None for name in node.inputs]
        return Known(node, dtypes, constants, self.opset)

    def _constant(self, name: str) -> Array | None:
        """What is known before a sample is."""
        if name not in self.constants and name in self.tensors:
            self.constants[name] = _array(self.tensors[name], self.model)
            self.dtypes[name] = self.constants[name].dtype
        return self.constants.get(name)

    def _is_fixed(self, node: Node) -> bool:
        """Whether the node is known before a sample is. What it makes is computed then, once."""
        known = self._known(node)
        if any(a is None for name, a in zip(node.inputs, known.constants, strict=True) if name):
            return False
        make, _ = self._built(known)
        room = Room()
        room.kept = True
        for name, y in zip(node.outputs, make(known.constants, room), strict=False):
            self.constants[name], self.dtypes[name] = np.ascontiguousarray(y).reshape(y.shape), y.dtype
        for array in known.constants:
            if array is not None:
                let_go(array)
        return True

    def _step(self, node: Node) -> _Step:
        make, dtypes = self._built(self._known(node))
        self.dtypes.update(zip(node.outputs, dtypes, strict=False))
        return _Step(make, node.inputs, node.outputs)

    def _built(self, known: Known) -> Built:
        if known.node.op not in operators.OPERATORS:
            raise Foreign
        if any(t is None for name, t in zip(known.node.inputs, known.dtypes, strict=True) if name):
            raise Foreign  # nothing makes it, or it is made behind this
        return operators.OPERATORS[known.node.op](known)


def _dtype(kind: int) -> np.dtype[Any]:
    if kind not in DTYPES:
        raise Foreign
    return np.dtype(DTYPES[kind])


def _array(tensor: onnx.TensorProto, model: Thin) -> Array:
    from onnx import numpy_helper

    dtype, shape = _dtype(tensor.data_type), tuple(tensor.dims)
    if tensor.name in model.contents:
        return np.frombuffer(model.contents[tensor.name][1](), dtype).reshape(shape)
    return np.asarray(numpy_helper.to_array(tensor))
