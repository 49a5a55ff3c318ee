"""What became of a network so far, as bytes: so that a long run goes on where it was stopped."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import msgspec
import numpy as np

from npulab.errors import ModelError
from npulab.exporters.onnx import to_view
from npulab.importers.onnx import read_onnx
from npulab.program.pages import arrays_away, let_go
from npulab.quantization.network import Network, network
from npulab.quantization.types import F32, Array, Params, Rules, Scheme

VERSION = 2
DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, msgspec.DecodeError)
"""What reading a file raises that is not whole."""


def save(out: BinaryIO, net: Network, about: dict[str, Any], aim: Sequence[F32 | None] | None = None) -> None:
    """The network's weights, codes and params, and `about`, which is plain data. `aim`: the layers' biases before they
    were corrected."""
    arrays: dict[str, Array] = {"graph": np.frombuffer(to_view(net.graph), np.uint8)}
    layers, points, operands = [], [], []
    for i, layer in enumerate(net.layers):
        arrays[f"layer{i}_weight"] = layer.weight
        for name, array in (("bias", layer.bias), ("codes", layer.codes)):
            if array is not None:
                arrays[f"layer{i}_{name}"] = array
        layers.append({"name": layer.name, "scheme": _scheme(layer.scheme), "params": _params(arrays, f"layer{i}",
                                                                                              layer.params)})
    for i, p in enumerate(net.points):
        points.append({"name": net.name(p.value), "scheme": _scheme(p.scheme), "why": p.why,
                       "params": _params(arrays, f"point{i}", p.params)})
    for i, (v, params) in enumerate(net.operands.items()):
        operands.append({"name": net.name(v), "params": _params(arrays, f"operand{i}", params)})
    for i, bias in enumerate(aim or ()):
        if bias is not None:
            arrays[f"aim{i}"] = bias
    head = {"version": VERSION, "about": about, "layers": layers, "points": points, "operands": operands,
            "notes": net.notes, "name": net.graph.name, "aimed": aim is not None}
    arrays["head"] = np.frombuffer(msgspec.json.encode(head), np.uint8)
    np.savez(out, **arrays)  # type: ignore[arg-type]
    for array in arrays.values():
        let_go(array)


def about(data: bytes) -> dict[str, Any] | None:
    """What was said beside the network; None if these bytes hold none, whole and of this version."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            head = msgspec.json.decode(arrays["head"].tobytes())
            return dict(head["about"]) if head["version"] == VERSION else None
    except DAMAGED:
        return None


def aimed_at(data: bytes, net: Network) -> list[F32 | None] | None:
    """`aim` of `save`, of bytes that `restored` takes."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        if not msgspec.json.decode(arrays["head"].tobytes())["aimed"]:
            return None
        return [arrays.get(f"aim{i}") for i in range(len(net.layers))]


def restored(data: bytes, rules: Rules) -> Network:
    """The network as it was saved. Raises: ModelError if the bytes are damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            head = msgspec.json.decode(arrays["head"].tobytes())
            net = network(read_onnx(arrays["graph"].tobytes(), head["name"]), rules)
            layers = {layer.name: layer for layer in net.layers}
            for i, one in enumerate(head["layers"]):
                layer = layers[one["name"]]
                layer.weight = arrays[f"layer{i}_weight"]
                layer.bias = arrays.get(f"layer{i}_bias")
                layer.codes = arrays.get(f"layer{i}_codes")
                layer.scheme = _scheme_of(one["scheme"])
                layer.params = _params_of(arrays, f"layer{i}", one["params"])
            for layer, weight in zip(net.layers, arrays_away([layer.weight for layer in net.layers]), strict=True):
                layer.weight = weight
            points = {net.name(p.value): p for p in net.points}
            for i, one in enumerate(head["points"]):
                p = points[one["name"]]
                p.scheme, p.why = _scheme_of(one["scheme"]), one["why"]
                p.params = _params_of(arrays, f"point{i}", one["params"])
            operands = {net.name(v): v for v in net.operands}
            for i, one in enumerate(head["operands"]):
                net.operands[operands[one["name"]]] = _params_of(arrays, f"operand{i}", one["params"])
            net.notes = list(head["notes"])
            return net
    except DAMAGED as e:
        raise ModelError("the file of a run to go on with is damaged", got=f"{type(e).__name__}: {e}"[:200],
                         try_="delete it, and start anew") from e


def _scheme(s: Scheme | None) -> dict[str, Any] | None:
    return asdict(s) if s else None


def _scheme_of(data: dict[str, Any] | None) -> Scheme | None:
    return Scheme(**data) if data else None


def _params(arrays: dict[str, Array], name: str, p: Params | None) -> dict[str, Any] | None:
    if p is None:
        return None
    arrays[f"{name}_scales"], arrays[f"{name}_zeros"] = p.scales, p.zeros
    return {"scheme": asdict(p.scheme), "axis": p.axis}


def _params_of(arrays: Any, name: str, data: dict[str, Any] | None) -> Params | None:
    if data is None:
        return None
    return Params(Scheme(**data["scheme"]), arrays[f"{name}_scales"], arrays[f"{name}_zeros"], data["axis"])
