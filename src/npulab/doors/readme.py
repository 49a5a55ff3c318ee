"""The README of an export: what lies in the folder, what to install, what to run where, what the numbers mean."""

from __future__ import annotations

import textwrap
from typing import Any

from npulab.doors.types import Door

WHAT = {
    "README.txt": "this text", "export.json": "source, tensors, scales, SHA-256 of each file",
    "example.npz": "a random input and what the source network computes for it",
    "export_data.py": "reads example and calibration set for the scripts",
    "convert.py": "the conversion", "convert.sh": "the conversion",
    "verify.py": "runs the result on this machine and compares it with example.npz",
    "quantize.py": "writes 8-bit integers into the ONNX file, by ONNX Runtime's quantizer",
    "preprocess.py": "what happens to calibration pictures",
    "calibration.npy": "calibration pictures, uint8 [N,H,W,C], red first",
    "calibration.txt": "the calibration set, one sample a line",
    "postprocess.py": "what the head that was cut off computed; it needs NumPy alone",
    "config.json": "Pulsar2's configuration", "model_data.c": "the model as a C array", "model_data.h": "its header",
    "model_ops.h": "the operators to register, and the size of the arena", "model_io.h": "shapes and scales",
}


def script_name(template: str) -> str:
    """convert_rknn.py.txt -> convert.py."""
    stem, ending = template.removesuffix(".txt").rsplit(".", 1)
    return f"{stem.split('_')[0]}.{ending}"


def text(door: Door, manifest: dict[str, Any], notes: tuple[str, ...], files: list[str]) -> bytes:
    """README.txt: plain text of 80 columns."""
    source = manifest["source"]
    lines = [f"{_plain(source['name'])} for {door.tool}", "",
             *_wrapped(f"Made by `npulab export`. The {source['format']} file's SHA-256: {source['sha256']}."),
             "", "TO DO", "", *_steps(door, manifest, files), "", "TENSORS", ""]
    for kind in ("inputs", "outputs"):
        for t in manifest[kind]:
            one = len(t.get("scale", ())) == 1
            scale = f", scale {t['scale'][0]:.6g}, zero point {t['zero_point'][0]}" if one else ""
            lines += _wrapped(f"{kind[:-1]} {_plain(t['name'])}: {t['dtype']} {t['shape']}{scale}")
    lines += ["", "PICTURES", "", *_pictures(door, manifest)]
    lines += ["", "FILES", ""]
    seen = False
    for path in files:
        if path.startswith("calibration/"):
            lines += [] if seen else ["  calibration/      the calibration set"]
            seen = True
        else:
            lines += _wrapped(f"  {path:<17} {WHAT.get(path, 'the network')}", " " * 20)
    if notes:
        lines += ["", "NOTES", "", *[line for n in notes for line in _wrapped(f"- {n}")]]
    return ("\n".join([*lines, "", "Documentation of the tool:", f"  {door.source}"]) + "\n").encode()


def _steps(door: Door, manifest: dict[str, Any], files: list[str]) -> list[str]:
    steps = [f"Get {door.tool}: {door.install}."]
    scripts = {script_name(s) for s in door.scripts}
    chip = f" for {manifest['target']}" if manifest["target"] else ""
    if "convert.py" in scripts:
        steps.append(f"There: python convert.py. It writes {door.product}{chip}.")
    if "convert.sh" in scripts:
        steps.append(f"There: bash convert.sh (TOOL=/path/to/{door.program} if it is not on the PATH). It writes "
                     f"{door.product}{chip}.")
    if door.name == "tflm":
        steps.append("Compile model_data.c with the firmware, include model_data.h and model_ops.h, call AddModelOps, "
                     "give MicroInterpreter an arena of kModelArenaSize aligned to 16 bytes.")
    if "verify.py" in scripts:
        steps.append("There, on this machine: python verify.py. It prints how far the outputs are from the source's.")
    if "postprocess.py" in files:
        steps.append("On the board: give the outputs, dequantized, to postprocess.py. Its head says how.")
    if not manifest["calibration"]["samples"] and door.calibration:
        steps.append("There is no calibration set in this folder" + (
            ", and the tool needs one" if door.needs else
            ": without one the result computes floats, or its ranges are guessed")
            + ". npulab export ... --calibration FOLDER adds it.")
    return [line for k, s in enumerate(steps, 1) for line in _wrapped(f"{k}. {s}", "   ")]


def _pictures(door: Door, manifest: dict[str, Any]) -> list[str]:
    how = manifest["preprocessing"]
    if not how:
        return _wrapped("Nothing was said about mean, scale and colour order, so the converted network takes the same "
                        "numbers as the source. npulab export ... --mean M --std S --order rgb|bgr says it.")
    said = f"number = (pixel - {how['mean']}) / {how['std']}, channels in the order {how['order'].upper()}"
    if how["inside"]:
        order = "in the order RGB" if door.name in ("openvino", "hailo") else (
            f"in the order {how['order'].upper()}" if door.name in ("rknn", "axera") else "in the order RGB")
        return _wrapped(f"{said}: this is inside the converted network, which takes pixels (uint8, N H W C, {order}). "
                        "Do not do it again.")
    return _wrapped(f"{said}: the application does this before it calls the network.")


def _wrapped(line: str, hang: str = "  ") -> list[str]:
    return textwrap.wrap(line, 80, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)


def _plain(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:100])
