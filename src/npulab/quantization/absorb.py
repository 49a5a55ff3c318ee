"""High-bias absorption (Nagel et al. 2019, arXiv:1906.04721, section 4.1.3).

Equalization leaves channels whose numbers all lie far above zero; their tensor's one scale is then spent on numbers
that do not occur. Where a channel stays above c > 0 in front of a ReLU, the ReLU does nothing but for what lies below
c: it is taken out of the bias, ReLU(z) = ReLU(z - c) + c, and the readers' biases take W c.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from npulab.ir.ops import OnnxOp
from npulab.quantization.chains import Floats, Link, by_input, links
from npulab.quantization.moments import Seen, sums
from npulab.quantization.network import Layer, Network

REACH = 3.0
"""Deviations below its mean at which a channel's smallest number is taken to lie, as published."""


def absorb(net: Network, seen: Mapping[int, Seen] | None = None, exact: bool = False) -> list[str]:
    """Absorb what can be. Lines say where, and how much.

    seen   `moments.results_seen` of the network as it is; None: what batch normalization says, where it does.
    exact  c is the smallest number seen rather than mean - 3 deviations, so that on the samples nothing changes.

    Links whose readers pad are left alone: padding is zero in front of and behind the change, but c in between. So are
    channels that reach the upper limit of a ReLU6, which would be moved; without samples, all below one.
    """
    notes = []
    for link in links(net):
        layer = link.first
        movable = layer.clamp[0] in (0.0, -np.inf) and (layer.kind != "matmul" or layer.added >= 0)
        if not movable or not link.adds or layer.scheme is None or not all(_takes(net, r) for r, _ in link.readers):
            continue
        c = _amounts(net, layer, seen, exact)
        if c is None or not c.any():
            continue
        _move(net, link, c)
        notes.append(f"{layer.name}: {np.count_nonzero(c)} of {c.size} channels lowered, by at most "
                     f"{np.abs(c).max():.3g}")
    return notes


def _amounts(net: Network, layer: Layer, seen: Mapping[int, Seen] | None, exact: bool) -> Floats | None:
    """What each channel is lowered by, 0 where it stays; None where nothing is known."""
    ceiling = layer.clamp[1]
    if seen is not None and layer.linear in seen:
        s = seen[layer.linear]
        c = np.where(s.high < ceiling, s.low if exact else s.mean - REACH * s.deviation, 0.0)
    elif layer.linear in net.moments and not exact and not np.isfinite(ceiling):
        mean, deviation = (m.astype(np.float64) for m in net.moments[layer.linear])
        c = mean - REACH * deviation
    else:
        return None
    return np.maximum(c, 0.0)


def _takes(net: Network, reader: Layer) -> bool:
    """Whether a constant added to a layer's inputs adds constants to its outputs: no padding, and a bias to put it."""
    op = net.graph.nodes[reader.node].op
    assert isinstance(op, OnnxOp)
    if reader.kind == "matmul":
        return reader.added >= 0
    if reader.kind == "gemm":
        return True
    pads = op.attributes.get("pads") or [0]
    assert isinstance(pads, list | tuple)
    automatic = op.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    kernel = reader.weight.shape[2:]
    return reader.kind == "conv" and not any(pads) and (automatic or all(k == 1 for k in kernel))


def _move(net: Network, link: Link, c: Floats) -> None:
    layer = link.first
    bias = np.zeros(layer.channels) if layer.bias is None else layer.bias.astype(np.float64)
    layer.bias = (bias - c).astype(np.float32)
    if layer.linear in net.moments:
        mean, deviation = net.moments[layer.linear]
        net.moments[layer.linear] = (mean - c).astype(np.float32), deviation
    for reader, channels in link.readers:
        more = sums(reader, by_input(reader, reader.weight).astype(np.float64), c[channels])
        old = np.zeros(reader.channels) if reader.bias is None else reader.bias.astype(np.float64)
        reader.bias = (old + more).astype(np.float32)
