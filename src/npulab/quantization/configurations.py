"""Which layers and tensors have how many bits: as a value, put upon a network, and tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from npulab.errors import UsageError
from npulab.program.pages import Buffer
from npulab.quantization.calibrate import choose_activations, roomy
from npulab.quantization.compare import FirstSamples, noises
from npulab.quantization.emit import float_model, integer_model
from npulab.quantization.network import MOVES, Layer, Network, Point
from npulab.quantization.observe import Statistics
from npulab.quantization.ranges import weight_params
from npulab.quantization.sensitivity import (
    SAMPLES,
    Sensitivity,
    ends,
    relative,
    sensitivities,
    tensor_schemes,
    weight_schemes,
)
from npulab.quantization.session import Progress
from npulab.quantization.types import Params, Samples, Scheme

FLOAT = 32
"""Bits of what stays in floats."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """Bits of each layer's weights and of each point; FLOAT: in floats."""

    weights: tuple[int, ...]
    tensors: tuple[int, ...]


def configuration(net: Network) -> Configuration:
    """As the network has it."""
    def bits(x: Layer | Point) -> int:
        return FLOAT if x.scheme is None else x.scheme.bits

    return Configuration(tuple(map(bits, net.layers)), tuple(map(bits, net.points)))


def assign(net: Network, c: Configuration) -> list[str]:
    """Give layers and points the schemes of a configuration; params are to be chosen behind that. Lines say what is
    not in the network's own widths.

    A tensor that only layers in floats make and read stays in floats too. What has no scheme gets none.
    Raises: UsageError for a width that the chip does not take.
    """
    lines: dict[str, list[str]] = {}
    for layer, bits in zip(net.layers, c.weights, strict=True):
        if layer.scheme is None or layer.scheme.bits == bits:
            continue
        layer.params = layer.codes = None
        layer.scheme = None if bits == FLOAT else _scheme(net, weight_schemes(net, layer), bits, "weights")
        lines.setdefault("floats" if bits == FLOAT else f"{bits}-bit weights", []).append(layer.name)
    if FLOAT in c.weights and not net.rules.float_islands and any(layer.scheme is None for layer in net.layers):
        raise UsageError(f"{net.rules.title} has no floats", try_="16 bits, if it has those")
    for p, bits in zip(net.points, c.tensors, strict=True):
        if p.scheme is None or p.scheme.bits == bits:
            continue
        p.params = None
        p.scheme = None if bits == FLOAT else _scheme(net, tensor_schemes(net), bits, "tensors")
        p.why = "stays in floats, for the outputs' sake" if bits == FLOAT else p.why
        lines.setdefault("tensors in floats" if bits == FLOAT else f"{bits}-bit tensors", []).append(net.name(p.value))
    for p in freed(net):
        p.scheme, p.params, p.why = None, None, "only layers in floats make and read it"
    return [f"{what}: {len(names)} of {len(net.points if 'tensor' in what else net.layers)}: "
            + ", ".join(names[:8]) + (", ..." if names[8:] else "") for what, names in sorted(lines.items())]


def _scheme(net: Network, allowed: Mapping[int, Scheme], bits: int, what: str) -> Scheme:
    if bits not in allowed:
        raise UsageError(f"{net.rules.title} takes no {what} of {bits} bits",
                         want=", ".join(map(str, allowed)))
    return allowed[bits]


def freed(net: Network) -> list[Point]:
    """Points in integers that only layers in floats make and read."""
    floats = {layer.node for layer in net.layers if layer.scheme is None}
    return [p for p in net.quantized_points() if (around := neighbours(net, p)) is not None and around
            and around <= floats]


def neighbours(net: Network, p: Point) -> set[int] | None:
    """Nodes of the layers that make and read a point; None where something else does."""
    made = {layer.result: layer.node for layer in net.layers}
    layers = {layer.node for layer in net.layers}
    found: set[int] = set()
    inner = set(p.values)
    for v in p.values:
        producer = net.graph.producer.get(v)
        if producer is not None and not (producer.op.name in MOVES and producer.inputs[0] in inner):
            if v not in made:
                return None
            found.add(made[v])
        for n in net.readers(v):
            if n.op.name in MOVES and n.outputs[0] in inner:
                continue
            if n.index not in layers:
                return None
            found.add(n.index)
    return found


def size(net: Network, weights: Sequence[int]) -> int:
    """Bytes of all layers' weights in these widths, with their biases and scales."""
    return sum(layer_bytes(net, layer, bits) for layer, bits in zip(net.layers, weights, strict=True))


def layer_bytes(net: Network, layer: Layer, bits: int) -> int:
    """Of the weights in so many bits, the bias as 32 bits, a float32 for each scale."""
    scales = 0 if bits == FLOAT else layer.channels if weight_schemes(net, layer)[bits].per_channel else 1
    return -(-layer.weight.size * bits // 8) + 4 * scales + (4 * layer.bias.size if layer.bias is not None else 0)


def total(rows: Iterable[Sensitivity], c: Configuration) -> float:
    """The sum of the noises of a configuration's parts."""
    return float(sum(r.noise for r in rows if (c.weights if r.kind == "weights" else c.tensors)[r.index] == r.bits))


@dataclass(eq=False)
class Trial:
    """A network whose configurations are tried: how its ranges are chosen, and what its outputs were in floats.

    samples   the first few are measured on.    reference  the float network's file; b"": as the weights are now.
    """

    net: Network
    samples: Samples
    seen: Mapping[int, Statistics]
    how: str = "min-max"
    clip: str = "min-max"
    reference: Buffer = b""
    progress: Progress | None = None
    params: dict[tuple[int, Scheme], Params] = field(default_factory=dict)
    tried: dict[Configuration, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = self.net.snapshot()
        self.reference = self.reference or float_model(self.net)
        self.check = FirstSamples(self.samples, SAMPLES)
        self.base = configuration(self.net)

    def rows(self) -> list[Sensitivity]:
        """Sensitivities of all widths that the chip takes; those of weights that are held already are used."""
        self.net.restore(self.before)
        return sensitivities(self.net, self.check, self.seen, self.how, self.clip, progress=self.progress,
                             chosen=self.params)

    def take(self, c: Configuration) -> list[str]:
        """The network in this configuration, ranges chosen anew."""
        net = self.net
        net.restore(self.before)
        lines = assign(net, c)
        choose_activations(net, self.seen, self.how)
        for i, layer in enumerate(net.layers):
            layer.codes = None
            layer.params = None
            if layer.scheme is not None:
                key = i, layer.scheme
                if key not in self.params:
                    self.params[key] = weight_params(layer.rows(), layer.scheme, layer.axis, self.clip)
                layer.params = roomy(net, layer, self.params[key])
        return lines

    def noise(self, c: Configuration) -> float:
        """Of the outputs in this configuration, measured."""
        if c not in self.tried:
            self.take(c)
            names = [self.net.name(v) for v in ends(self.net)]
            found = noises(self.reference, integer_model(self.net), dict(zip(names, names, strict=True)), self.check)
            self.tried[c] = relative(found.values())
        return self.tried[c]
