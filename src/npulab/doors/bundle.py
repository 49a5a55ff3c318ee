"""All files of an export: the model, the vendor's script with its settings, calibration, an example, and a README."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.doors import readme, tflm
from npulab.doors.calibration import Set, gather
from npulab.doors.catalog import SCRIPTS
from npulab.doors.model import Prepared, computed, example, is_quantized, picture, prepare
from npulab.doors.types import Door, Preprocessing
from npulab.errors import NpulabError, UnsupportedError, UsageError
from npulab.ir import DType, Graph, Value
from npulab.postprocess.program import standalone
from npulab.postprocess.types import Post

Array = NDArray[Any]
MARK = "npulab export"
"""In export.json's `made_by`: how a folder is known as ours."""
EXAMPLE_MAX = 2**28
"""Bytes of an example; larger ones are left out."""
SOCS = {"68": "30", "69": "36", "73": "43", "75": "57", "79": "69", "81": "87"}
"""HTP version -> QNN's number of a Snapdragon 8 that has it. Source: Qualcomm AI Engine Direct, supported devices."""
QUANTIZERS = {"tensorrt": ("QInt8", "QInt8", True), "qnn": ("QUInt8", "QInt8", False), "st": ("QInt8", "QInt8", False)}
"""Door -> types of activations and weights, and whether zero points are 0, as each tool's documentation asks."""


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """Files by path in the folder; what was done; and the example with the source network's outputs, in order."""

    files: dict[str, bytes]
    notes: tuple[str, ...]
    model: Prepared
    manifest: dict[str, Any]
    expected: tuple[Array, ...]


def bundle(graph: Graph, door: Door, target: str = "", board: str | None = None, how: Preprocessing | None = None,
           calibration: Path | None = None, opset: int = 0, post: Post | None = None) -> Bundle:
    """Everything that `door` needs to convert `graph`.

    target       the tool's word for the chip, one of door.targets.
    how          what a picture goes through before the network, None if that is not said.
    calibration  folder of pictures or .npz files that ranges are measured on.
    post         what a head that was cut off computed; it goes along as a program.

    Raises: UsageError, UnsupportedError and ModelError of the parts.
    """
    model = prepare(graph, door, opset)
    how = _checked(how, model.graph)
    samples = Set({}, 0, False)
    notes = list(model.notes)
    if calibration is not None and not door.calibration:
        raise UsageError(f"{door.tool} measures no ranges", try_="leave --calibration out")
    if calibration is not None:
        samples = gather(calibration, model.graph, door)
    elif door.needs:
        notes.append(f"{door.tool} does not convert without calibration samples: --calibration FOLDER")
    name = f"model.{model.format}"
    inputs, expected = _example(graph, model.graph, how, notes)
    settings = _settings(door, name, target, model.graph, how, samples)
    files = {name: model.content, **samples.files, "example.npz": _npz(inputs, expected)}
    for template in door.scripts:
        text = (SCRIPTS / template).read_text("utf-8")
        files[readme.script_name(template)] = filled(text, settings, template).encode()
    if any(t.endswith(".py.txt") for t in door.scripts):
        files["export_data.py"] = (SCRIPTS / "export_data.py.txt").read_bytes()
    manifest = _manifest(graph, model, door, target, board, how, samples)
    if door.name == "tflm":
        files |= tflm.sources(model.graph, model.content, hashlib.sha256(model.content).hexdigest(), how)
        manifest["tflm"] = {"arena_bytes": tflm.arena_bytes(model.graph),
                            "operators": tflm.resolver_calls(model.graph)}
    if post is not None:
        files["postprocess.py"] = standalone(post).encode()
    if door.name == "axera":
        files["config.json"] = _pulsar2(model.graph, how, samples)
    files["README.txt"] = readme.text(door, manifest, tuple(notes), sorted({*files, "README.txt", "export.json"}))
    manifest["files"] = {p: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()}
                         for p, c in sorted(files.items())}
    files["export.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    return Bundle(files, tuple(notes), model, manifest, expected)


def filled(template: str, settings: dict[str, str], name: str) -> str:
    """A script with its `@SETTINGS@`. Values are written as literals of the script's language: names of a model cannot
    become code."""
    kind = "sh" if name.endswith(".sh.txt") else "py"

    def value(m: re.Match[str]) -> str:
        key = m[1]
        return shlex.quote(str(settings[key])) if kind == "sh" else (
            str(settings[key]) if key in ("ACTIVATIONS", "WEIGHTS") else repr(settings[key]))

    return re.sub(r"@([A-Z_]+)@", value, template)


def _checked(how: Preprocessing | None, graph: Graph) -> Preprocessing | None:
    """With one mean and std a channel. Raises UsageError where the network takes no picture."""
    if how is None:
        return None
    where = picture(graph)
    if where is None:
        raise UsageError(f"'{graph.name}' does not take one picture, so it has no mean and scale",
                         got=", ".join(str(graph.values[i]) for i in graph.inputs))
    if {len(how.mean), len(how.std)} - {1, where.channels} or not all(how.std):
        raise UsageError("--mean and --std do not fit the network's input",
                         got=f"{len(how.mean)} and {len(how.std)} numbers" + ("" if all(how.std) else ", a std of 0"),
                         want=f"{where.channels} numbers or one, no std of 0")
    if how.order == "bgr" and where.channels != 3:
        raise UsageError("--order bgr needs three channels", got=where.channels)

    def wide(numbers: tuple[float, ...]) -> tuple[float, ...]:
        return numbers * where.channels if len(numbers) == 1 else numbers

    return Preprocessing(wide(how.mean), wide(how.std), how.order)


def _settings(door: Door, name: str, target: str, graph: Graph, how: Preprocessing | None,
              samples: Set) -> dict[str, Any]:
    activations, weights, symmetric = QUANTIZERS.get(door.name, ("QInt8", "QInt8", False))
    baked = bakes(door, graph, how) or (how is not None and door.name == "axelera")
    quantized = is_quantized(graph)
    shape = graph.values[graph.inputs[0]].shape if graph.inputs else ()
    return {
        "MODEL": name, "TARGET": target, "MEAN": list(how.mean) if how and baked else None,
        "STD": list(how.std) if how and baked else None, "SWAP": bool(baked and how and how.order == "bgr"),
        "QUANTIZED": quantized, "QUANTIZED_SH": int(quantized), "CALIBRATED": int(samples.samples > 0), "BAKED": baked,
        "ACTIVATIONS": activations, "WEIGHTS": weights, "SYMMETRIC": symmetric, "SOC": SOCS.get(target, "57"),
        "SHAPE": ",".join(map(str, shape)),
    }


def bakes(door: Door, graph: Graph, how: Preprocessing | None) -> bool:
    """Whether mean and scale go into the converted network, which then takes pixels."""
    return bool(how and door.bakes and graph.inputs and graph.values[graph.inputs[0]].dtype is DType.FLOAT32)


def _example(source: Graph, graph: Graph, how: Preprocessing | None,
             notes: list[str]) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """Inputs of `graph`, and what `source` computes for them, in the layout of `graph`."""
    size = sum(graph.values[v].elements * 8 for v in (*graph.inputs, *graph.outputs))
    if size > EXAMPLE_MAX:
        notes.append("no example: inputs and outputs are too large")
        return {}, ()
    try:
        inputs = example(graph, how)
        if graph is not source and (given := _moved(inputs, graph, source)) is not None:
            found = [_layout(a, graph.values[v].shape) for a, v in
                     zip(computed(source, given), graph.outputs, strict=True)]
        else:
            found = computed(graph, inputs)
    except NpulabError as e:
        notes.append(f"no example outputs: {e.message}")
        return (inputs if "inputs" in locals() else {}), ()
    return inputs, tuple(found)


def _moved(inputs: dict[str, Array], graph: Graph, source: Graph) -> dict[str, Array] | None:
    """The same inputs as the source takes them; None where types differ."""
    if len(graph.inputs) != len(source.inputs):
        return None
    moved = {}
    for k, v in enumerate(source.values[i] for i in source.inputs):
        array = _layout(inputs[f"in{k}"], v.shape)
        if array.shape != v.shape or array.dtype != v.dtype.numpy:
            return None
        moved[f"in{k}"] = array
    return moved


def _layout(array: Array, shape: tuple[int, ...]) -> Array:
    """`array` with its channels moved if that gives `shape`."""
    if array.ndim == len(shape) and array.ndim in (3, 4):
        for moved in (np.moveaxis(array, -1, 1), np.moveaxis(array, 1, -1)):
            if moved.shape == shape and array.shape != shape:
                return np.ascontiguousarray(moved)
    return array


def _npz(inputs: dict[str, Array], expected: Sequence[Array]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **inputs, **{f"out{k}": a for k, a in enumerate(expected)})  # type: ignore[arg-type]
    return out.getvalue()


def _manifest(source: Graph, model: Prepared, door: Door, target: str, board: str | None, how: Preprocessing | None,
              samples: Set) -> dict[str, Any]:
    graph = model.graph
    where = picture(graph)
    return {
        "made_by": MARK, "version": 1, "door": door.name, "tool": door.tool, "target": target, "board": board,
        "source": {"name": source.name, "format": source.format, "sha256": source.digest},
        "model": f"model.{model.format}", "model_format": model.format, "product": door.product,
        "inputs": [_tensor(graph.values[v]) for v in graph.inputs],
        "outputs": [_tensor(graph.values[v]) for v in graph.outputs],
        "planes_first": bool(where and where.planes_first),
        "preprocessing": {"mean": list(how.mean), "std": list(how.std), "order": how.order,
                          "inside": bakes(door, graph, how)} if how else None,
        "calibration": {"samples": samples.samples, "pictures": samples.pictures},
    }


def _tensor(v: Value) -> dict[str, Any]:
    found: dict[str, Any] = {"name": v.name, "shape": list(v.shape), "dtype": v.dtype.value}
    if v.quantization:
        found |= {"scale": list(v.quantization.scales), "zero_point": list(v.quantization.zero_points)}
    return found


def _pulsar2(graph: Graph, how: Preprocessing | None, samples: Set) -> bytes:
    """Pulsar2's configuration. It calibrates with pictures and, given mean and std, takes pixels on the chip."""
    where = picture(graph)
    if where is None or not where.planes_first:
        raise UnsupportedError(f"the script for Pulsar2 is for networks of one picture, and '{graph.name}' is none",
                               got=", ".join(str(graph.values[i]) for i in graph.inputs),
                               try_="write config.json by hand: pulsar2-docs.readthedocs.io")
    mean, std = (list(how.mean), list(how.std)) if how else ([0.0] * where.channels, [1.0] * where.channels)
    order = "GRAY" if where.channels == 1 else "BGR" if how and how.order == "bgr" else "RGB"
    return (json.dumps({
        "model_type": "ONNX", "npu_mode": "NPU1", "output_name": "compiled.axmodel",
        "quant": {"input_configs": [{
            "tensor_name": where.name, "calibration_dataset": "calibration.tar", "calibration_format": "Image",
            "calibration_size": max(1, samples.samples), "calibration_mean": mean, "calibration_std": std}],
            "calibration_method": "MinMax"},
        "input_processors": [{
            "tensor_name": where.name, "tensor_format": order, "tensor_layout": "NCHW", "src_format": order,
            "src_dtype": "U8", "src_layout": "NHWC", "mean": mean, "std": std}],
        "compiler": {"check": 0},
    }, indent=1) + "\n").encode()
