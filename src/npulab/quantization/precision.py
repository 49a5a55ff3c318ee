"""Which layers and tensors get how many bits: what a user asks for, within what the chip takes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace

from npulab.errors import UsageError
from npulab.quantization.network import Layer, Network
from npulab.quantization.types import Rules, Scheme


def chosen(rules: Rules, weights: int | None = None, per_channel: bool | None = None, activations: int | None = None
           ) -> Rules:
    """The rules with those schemes first that have these bits and granularity; None: the chip's own default.

    Raises: UsageError if the chip takes none such.
    """
    return replace(rules, weights=_first(rules, "weights", rules.weights, weights, per_channel),
                   depthwise_weights=_first(rules, "weights", rules.depthwise_weights, weights, per_channel)
                   if rules.depthwise_weights else (),
                   activations=_first(rules, "activations", rules.activations, activations, None))


def _first(rules: Rules, what: str, schemes: Sequence[Scheme], bits: int | None, per_channel: bool | None
           ) -> tuple[Scheme, ...]:
    fits = [s for s in schemes if (bits is None or s.bits == bits)
            and (per_channel is None or s.per_channel == per_channel)]
    if not fits:
        asked = " and ".join([*([] if bits is None else [f"of {bits} bits"]), *([] if per_channel is None else [
            "with scales per channel" if per_channel else "with one scale per tensor"])])
        source = rules.sources.get(what, "assumed")
        raise UsageError(f"{rules.title} takes no {what} {asked}",
                         want=f"{'; '.join(dict.fromkeys(map(str, schemes)))} ({source})")
    return (fits[0], *(s for s in schemes if s is not fits[0]))


def matching(net: Network, patterns: Iterable[str]) -> list[Layer]:
    """Layers by name, number or pattern ("conv1", "3", "*/head/*"), in order. Raises: UsageError for one of none."""
    found: dict[int, Layer] = {}
    for pattern in patterns:
        hits = [(i, layer) for i, layer in enumerate(net.layers)
                if pattern in (layer.name, str(i)) or fnmatch.fnmatchcase(layer.name, pattern)]
        if not hits:
            some = ", ".join(layer.name for layer in net.layers[:6])
            raise UsageError(f"no layer is called '{pattern}'", want="a name, a number or a pattern such as */head/*",
                             got=some + (", ..." if net.layers[6:] else ""))
        found.update(hits)
    return [found[i] for i in sorted(found)]


def leave_float(net: Network, layers: Iterable[Layer]) -> list[str]:
    """Layers computed in floats between integer ones. Raises: UsageError for a chip without floats."""
    layers = list(layers)
    if layers and not net.rules.float_islands:
        raise UsageError(f"{net.rules.title} has no floats", got=", ".join(layer.name for layer in layers[:4]),
                         try_="16 bits, if it has those: --wide")
    for layer in layers:
        layer.scheme = layer.params = layer.codes = None
    return [f"{layer.name}: left in floats" for layer in layers]


def make_wide(net: Network, layers: Iterable[Layer]) -> list[str]:
    """Layers whose input and result have 16 bits. Raises: UsageError for a chip without them."""
    layers = list(layers)
    wide = next((s for s in net.rules.activations if s.bits == 16), None)
    if layers and wide is None:
        raise UsageError(f"{net.rules.title} has no tensors of 16 bits",
                         want="; ".join(map(str, net.rules.activations)))
    for layer in layers:
        for v in (layer.data, layer.result):
            if v in net.of and net.of[v].scheme is not None:
                net.of[v].scheme = wide
    return [f"{layer.name}: 16 bits" for layer in layers]
