"""Whole float networks on an OpenCL device: graph -> Plan -> Session -> arrays.

    plan = compile_network(graph, traits_of(device))
    outputs = plan.open(device).run({"input": array})

The stages: normal form and groups (fusing), layers and views (layers, operators, heavy), kernels (this file asks for
them), memory (memory). The whole network is one list of launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.dialects import to_onnx
from npulab.errors import CapacityError, InvariantError, UsageError
from npulab.gpu.compute import convolution, matrices, moves, operators, tiles, windows
from npulab.gpu.compute.choices import Work
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.fusing import groups, normal
from npulab.gpu.compute.layers import Layer, Network
from npulab.gpu.compute.memory import Arenas, Need, arranged
from npulab.gpu.compute.numbers import numbers_of, widened
from npulab.gpu.compute.problems import Attention, Convolution, LayerNorm, Product, Softmax
from npulab.gpu.compute.profiling import Profile, timed
from npulab.gpu.compute.types import Buffer, Launch, Lowered, Number, Traits
from npulab.gpu.compute.views import Shape
from npulab.ir import Graph

ALIGNMENT = 128
"""Bytes, where no device says otherwise."""
Choose = Callable[[Work], Any]
"""The tuned choice of a problem, or None."""


@dataclass(frozen=True, slots=True)
class Step:
    """A launch of the network. Roles of its buffers are names of the plan."""

    launch: Launch
    layer: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A network as launches on buffers, for devices of these traits.

    needs      what lies in memory that is used again, with its life in steps.
    constants  name -> array, uploaded once.
    inputs, outputs  name -> (buffer, shape, what it is stored as).
    """

    network: Network
    traits: Traits
    steps: tuple[Step, ...]
    needs: tuple[Need, ...]
    constants: Mapping[str, NDArray[Any]]
    inputs: Mapping[str, tuple[str, Shape, Number]]
    outputs: Mapping[str, tuple[str, Shape, Number]]

    @property
    def weights(self) -> int:
        """Bytes of constants."""
        return sum(a.nbytes for a in self.constants.values())

    def arenas(self, alignment: int = ALIGNMENT, largest: int = 1 << 62) -> Arenas:
        return arranged(self.needs, alignment, largest)

    def open(self, device: Device) -> Session:
        """The network on the device, weights uploaded and kernels compiled.

        Raises: CapacityError before anything is allocated, if it does not fit; DeviceError if the device fails or does
        not compile.
        """
        return Session(self, device)


def compile_network(graph: Graph, traits: Traits, choose: Choose | None = None, fuse_attention: bool = True,
                    number: Number | None = None) -> Plan:
    """Launches for a float network of either dialect. `choose` gives tuned choices; without one, the model's. Without
    `fuse_attention` all scores of attention lie in memory: what fusing is worth is measured so. `number`: what weights
    and tensors between inputs and outputs are stored as, float32 or float16; None: as in the model.

    Raises: UnsupportedError naming every node that there are no kernels for; CapacityError for tensors beyond counting;
    UsageError for inputs without a fixed size, or without the package onnx.
    """
    return planned(layers_of(graph, fuse_attention, number), traits, choose)


def layers_of(graph: Graph, fuse_attention: bool = True, number: Number | None = None) -> Network:
    """The layers of a network, whatever the device. Raises as `compile_network`."""
    graph = to_onnx(graph, keep_layout=True)
    for v in (graph.values[i] for i in graph.inputs):
        if v.dynamic_axes or not v.has_shape:
            raise UsageError(f"the input '{v.name}' of '{graph.name}' has no fixed size", got=str(v),
                             try_="npulab patch --dim NAME=SIZE writes a network of fixed size")
    graph, names = widened(graph)
    graph = normal(graph)
    return operators.network(graph, groups(graph, fuse_attention), numbers_of(graph, names, number))


def tunable(network: Network) -> list[Work]:
    """Problems whose kernels have choices, each once."""
    found = {x.what: None for x in network.layers if isinstance(x.what, Work)}
    return [w for w in found if not isinstance(w, Convolution) or w.groups == 1 or w.groups != w.channels]


def on_halves(number: Number, traits: Traits) -> bool:
    """Whether kernels may compute on halves. Not a CPU's: few have any, its attention computes on floats."""
    return number == "float16" and traits.halves and not traits.cpu


def _choice(what: Convolution | Product, traits: Traits, choose: Choose | None) -> Any:
    """The tuned one; else the model's first, on halves or not; None: what the kernels take."""
    found = choose(what) if choose else None
    return found or (tiles.candidates(what, traits, True)[0] if on_halves(what.number, traits) else None)


def lowered(layer: Layer, traits: Traits, choose: Choose | None = None) -> Lowered:
    """The launches of one layer."""
    what = layer.what
    match what:
        case Convolution():
            weights, bias = layer.packed
            assert weights is not None
            if 1 < what.groups == what.channels:  # depthwise: nothing to choose
                return convolution.lower(what, traits, weights, bias, halves=on_halves(what.number, traits))
            return convolution.lower(what, traits, weights, bias, _choice(what, traits, choose))
        case Product():
            b, row = layer.packed
            return matrices.lower(what, traits, b, row, _choice(what, traits, choose))
        case Softmax():
            from npulab.gpu.compute import softmax

            return softmax.lower(what, traits)
        case LayerNorm():
            from npulab.gpu.compute import normalize

            return normalize.lower(what, traits, *layer.packed)
        case Attention():
            from npulab.gpu.compute import attention

            try:
                return attention.lower(what, traits, choose(what) if choose else None, on_halves(what.number, traits))
            except CapacityError:  # no room in local memory, or on a thread's stack
                return attention.unfused(what, traits)
        case moves.Map():
            return moves.lower_map(what, traits)
        case moves.Take():
            return moves.lower_take(what, traits)
        case windows.Reduce():
            return windows.lower_reduce(what, traits)
        case windows.Pool():
            return windows.lower_pool(what, traits)
        case windows.Resample():
            return windows.lower_resample(what, traits)
        case windows.TransposedConvolution():
            return windows.lower_transposed(what, traits)
    raise InvariantError(f"there is no kernel for {type(what).__name__}")


def planned(network: Network, traits: Traits, choose: Choose | None = None) -> Plan:
    """Kernels for every layer, with names of the whole network for their buffers."""
    steps: list[Step] = []
    constants: dict[str, NDArray[Any]] = {
        f"t{i}": t.constant for i, t in enumerate(network.tensors) if t.constant is not None}
    scratch: list[Need] = []
    for i, layer in enumerate(network.layers):
        found = lowered(layer, traits, choose)
        names = {moves.role(k): f"t{t}" for k, t in enumerate(layer.reads)} | {"output": f"t{layer.writes}"}
        names |= {role: f"{i}.{role}" for role in (*found.constants, *found.scratch)}
        constants |= {names[role]: a for role, a in found.constants.items()}
        first = len(steps)
        steps += [Step(_named(launch, names), i) for launch in found.launches]
        scratch += [Need(names[role], size, first, len(steps) - 1) for role, size in found.scratch.items()]
    inputs, outputs = ({n: (f"t{t}", shape, network.tensors[t].number) for n, (t, shape) in border.items()}
                       for border in (network.inputs, network.outputs))
    used = {a.role for s in steps for a in s.launch.arguments if isinstance(a, Buffer)}
    used |= {name for name, *_ in outputs.values()}
    constants = {name: a for name, a in constants.items() if name in used}
    needs = (*lives(steps, network, {n for n, *_ in inputs.values()}, {n for n, *_ in outputs.values()}, constants),
             *scratch)
    return Plan(network, traits, tuple(steps), needs, constants, inputs, outputs)


def _named(launch: Launch, names: Mapping[str, str]) -> Launch:
    arguments = tuple(Buffer(names[a.role]) if isinstance(a, Buffer) else a for a in launch.arguments)
    return replace(launch, arguments=arguments)


def lives(steps: Sequence[Step], network: Network, inputs: set[str], outputs: set[str],
          constants: Mapping[str, Any]) -> list[Need]:
    """Tensors by the first and last step that names them; inputs are there before the first, outputs after the last."""
    first: dict[str, int] = dict.fromkeys(sorted(inputs), -1)
    last: dict[str, int] = dict.fromkeys(sorted(inputs), -1)
    for i, s in enumerate(steps):
        for a in s.launch.arguments:
            if isinstance(a, Buffer) and a.role.startswith("t") and a.role not in constants:
                first.setdefault(a.role, i)
                last[a.role] = i
    for name in outputs - set(constants):
        first.setdefault(name, -1)
        last[name] = len(steps)
    return [Need(n, network.tensors[int(n[1:])].bytes, f, last[n]) for n, f in first.items()]


@dataclass(eq=False)
class Session:
    """A plan on a device. Inputs may be given again and again."""

    plan: Plan
    device: Device
    arenas: Arenas = field(init=False)
    opened: float = field(init=False)
    """Seconds of compiling kernels and uploading weights."""

    def __post_init__(self) -> None:
        info, plan = self.device.device, self.plan
        alignment = max(ALIGNMENT, int(info.mem_base_addr_align) // 8)
        largest = self.device.limits.buffer_max
        self.arenas = plan.arenas(alignment, largest)
        biggest = max((a.nbytes for a in plan.constants.values()), default=0)
        have = int(info.global_mem_size)
        need = self.arenas.bytes + plan.weights
        if need > have or biggest > largest:
            raise CapacityError(
                f"'{plan.network.name}' does not fit {self.device.identity.name}",
                got=f"{need} bytes: {self.arenas.bytes} for tensors, {plan.weights} for weights",
                want=f"at most {have} bytes, {largest} in one buffer", try_="--device onnxruntime")
        start = time.perf_counter()
        for kernel in dict.fromkeys(s.launch.kernel for s in plan.steps):
            self.device.kernel(kernel)
        buffers = [self.device.allocate(size) for size in self.arenas.sizes]
        sizes = {n.name: n.size for n in plan.needs}
        self._buffers: dict[str, Any] = {
            name: self.device.part(buffers[arena], at, sizes[name]) for name, (arena, at) in self.arenas.places.items()}
        self._buffers |= {name: self.device.upload(a) for name, a in plan.constants.items()}
        self._launch = self.device.prepared([s.launch for s in plan.steps], self._buffers)
        self.opened = time.perf_counter() - start

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.floating]]:
        """The outputs by their names. Arrays are of the model's own types and shapes.

        Raises: UsageError for other names, types and shapes; DeviceError if the device fails.
        """
        self.feed(arrays)
        self.launch()
        return {name: self.device.download(self._buffers[b], shape, np.dtype(number))
                for name, (b, shape, number) in self.plan.outputs.items()}

    def launch(self) -> list[float]:
        """Seconds of each step by the device's clock, on what was last fed. Raises: DeviceError if the device fails."""
        return self._launch()

    def profile(self, arrays: Mapping[str, NDArray[Any]], runs: int = 5
                ) -> tuple[dict[str, NDArray[np.floating]], Profile]:
        """The outputs, and how long each layer takes: medians of `runs` runs behind one that is not counted."""
        outputs = self.run(arrays)
        times, walls = [], []
        for _ in range(max(1, runs)):
            self.feed(arrays)
            start = time.perf_counter()
            times.append(self.launch())
            walls.append(time.perf_counter() - start)
        each = [median(column) for column in zip(*times, strict=True)]
        layers = self.plan.network.layers
        steps = [(layers[s.layer].title, layers[s.layer].operators, s.launch.label, s.launch.operations,
                  s.launch.traffic) for s in self.plan.steps]
        return outputs, Profile(timed(steps, each), median(sum(t) for t in times), median(walls), len(times))

    def feed(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        wanted = self.plan.inputs
        if missing := [n for n in wanted if n not in arrays]:
            raise UsageError(f"'{self.plan.network.name}' has inputs that are not given",
                             got=", ".join(arrays) or "none", want=", ".join(missing))
        if strange := [n for n in arrays if n not in wanted]:
            raise UsageError(f"'{self.plan.network.name}' has no input '{strange[0]}'", want=", ".join(wanted))
        for name, (_, shape, number) in wanted.items():
            x = np.asarray(arrays[name])
            if x.dtype != number or x.shape != shape:
                raise UsageError(f"the input '{name}' of '{self.plan.network.name}' is another",
                                 want=f"{number}{list(shape)}", got=f"{x.dtype}{list(x.shape)}")
        for name, (buffer, *_) in wanted.items():
            if buffer in self._buffers:
                self.device.upload(np.asarray(arrays[name]), self._buffers[buffer])
