"""Every door, and which one is a described board's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from npulab.doors.types import Door
from npulab.errors import UnsupportedError, UsageError

SCRIPTS = Path(__file__).parent / "scripts"

DOORS: tuple[Door, ...] = (
    Door("tflite", "the TFLite file itself: LiteRT, delegates, and drivers that take it (Teflon, VX, Artpec)",
         ("tflite",), "LiteRT", "pip install ai-edge-litert", ("verify_tflite.py.txt",), "model.tflite",
         "https://ai.google.dev/edge/litert", package="ai-edge-litert", module="ai_edge_litert", verify=True),
    Door("onnx", "the ONNX file itself, shapes fixed, for ONNX Runtime and whatever reads ONNX",
         ("onnx",), "ONNX Runtime", "pip install onnxruntime", ("verify_onnx.py.txt",), "model.onnx",
         "https://onnxruntime.ai/docs/", package="onnxruntime", module="onnxruntime", verify=True),
    Door("rknn", "Rockchip NPUs: .rknn for RK35xx, RV11xx and RK2118",
         ("onnx",), "RKNN-Toolkit2",
         "pip install rknn-toolkit2, in an environment of its own: it pins old onnx, protobuf, numpy and torch",
         ("convert_rknn.py.txt",), "model.rknn", "https://github.com/airockchip/rknn-toolkit2", opset=19,
         package="rknn-toolkit2", module="rknn", calibration="pictures", bakes=True, verify=True,
         targets=("rk3588", "rk3576", "rk3566", "rk3568", "rk3562", "rv1126b", "rv1103", "rv1106", "rv1103b", "rv1106b",
                  "rk2118")),
    Door("hailo", "Hailo-8, -8L, -10H, -15H: .hef",
         ("onnx", "tflite"), "Hailo Dataflow Compiler",
         "the wheel hailo_dataflow_compiler from Hailo's developer zone (an account is needed)",
         ("convert_hailo.py.txt",), "model.hef", "https://hailo.ai/developer-zone/documentation/",
         floats=True, opset=17,
         module="hailo_sdk_client", calibration="arrays", needs=True, bakes=True, integers=True, seconds=7200,
         targets=("hailo8", "hailo8l", "hailo8r", "hailo10h", "hailo15h", "hailo15m")),
    Door("tensorrt", "NVIDIA GPUs and the DLA of Jetson: an engine, built on the board that runs it",
         ("onnx",), "TensorRT (trtexec)", "part of JetPack on the board (apt: tensorrt; /usr/src/tensorrt/bin/trtexec)",
         ("convert_tensorrt.sh.txt", "quantize.py.txt"), "model.engine",
         "https://docs.nvidia.com/deeplearning/tensorrt/", opset=20, program="trtexec", calibration="arrays",
         targets=("gpu", "dla"), seconds=3600),
    Door("openvino", "Intel CPU, GPU and NPU: OpenVINO IR (.xml and .bin)",
         ("onnx", "tflite"), "OpenVINO", "pip install openvino; for 8 bits also pip install nncf",
         ("convert_openvino.py.txt", "verify_openvino.py.txt"), "model.xml",
         "https://docs.openvino.ai/", package="openvino", module="openvino", calibration="arrays", bakes=True,
         verify=True, targets=("CPU", "NPU", "GPU")),
    Door("vela", "Arm Ethos-U55, -U65, -U85: TFLite with the NPU's part as one operator",
         ("tflite",), "Vela", "pip install ethos-u-vela", ("convert_vela.sh.txt",), "model_vela.tflite",
         "https://gitlab.arm.com/artificial-intelligence/ethos-u/ethos-u-vela", integer=True,
         package="ethos-u-vela", program="vela",
         targets=("ethos-u55-128", "ethos-u55-32", "ethos-u55-64", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512",
                  "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048")),
    Door("edgetpu", "Coral Edge TPU: TFLite with the TPU's part as one operator",
         ("tflite",), "Edge TPU Compiler", "apt install edgetpu-compiler, from Coral's own apt repository (x86-64)",
         ("convert_edgetpu.sh.txt",), "model_edgetpu.tflite", "https://coral.ai/docs/edgetpu/compiler/", integer=True,
         program="edgetpu_compiler"),
    Door("tflm", "microcontrollers with TensorFlow Lite Micro: the model as a C array, and its operators",
         ("tflite",), "TensorFlow Lite Micro", "pip install tflite-micro, to run it here; the library is C++",
         ("verify_tflm.py.txt",), "model_data.c", "https://github.com/tensorflow/tflite-micro",
         package="tflite-micro", module="tflite_micro", verify=True),
    Door("esp-dl", "ESP32, -S3, -P4 with ESP-DL: .espdl, powers of two as scales",
         ("onnx",), "ESP-PPQ", "pip install esp-ppq, in an environment of its own: it needs torch",
         ("convert_espdl.py.txt",), "model.espdl",
         "https://docs.espressif.com/projects/esp-dl/en/latest/tutorials/how_to_quantize_model.html",
         floats=True, opset=18,
         package="esp-ppq", module="esp_ppq", calibration="arrays", verify=True, integers=True,
         targets=("esp32s3", "esp32p4", "c")),
    Door("ncnn", "CPUs and Vulkan GPUs with ncnn: .param and .bin",
         ("onnx",), "pnnx",
         "pip install ncnn, then pip install --no-deps pnnx: it does not need torch here",
         ("convert_ncnn.py.txt", "verify_ncnn.py.txt"), "model.ncnn.param",
         "https://github.com/pnnx/pnnx", floats=True, package="pnnx", module="pnnx", verify=True),
    Door("mnn", "CPUs and GPUs with MNN: .mnn",
         ("onnx",), "MNN converter",
         "pip install MNN; leave its console programs alone, they install telemetry",
         ("convert_mnn.py.txt", "verify_mnn.py.txt"), "model.mnn", "https://github.com/alibaba/MNN",
         package="MNN", module="MNN", floats=True, verify=True),
    Door("qnn", "Qualcomm Hexagon (HTP): an ONNX file around a QNN context",
         ("onnx",), "ONNX Runtime QNN", "pip install onnxruntime-qnn; for 8 bits also pip install onnx",
         ("convert_qnn.py.txt", "quantize.py.txt", "verify_qnn.py.txt"), "model_ctx.onnx",
         "https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html",
         package="onnxruntime-qnn", module="onnxruntime_qnn", calibration="arrays", verify=True,
         targets=("75", "68", "69", "73", "79", "81")),
    Door("k210", "Kendryte K210 (KPU): .kmodel",
         ("tflite", "onnx"), "nncase",
         "the wheel nncase 1.x from github.com/kendryte/nncase/releases (Python 3.10 or older)",
         ("convert_k210.py.txt",), "model.kmodel", "https://github.com/kendryte/nncase/blob/master/docs/USAGE_EN.md",
         module="nncase", calibration="arrays", needs=True, bakes=True, integers=True, targets=("k210",)),
    Door("st", "STM32N6 (Neural-ART), STM32MP2 and other STM32: C code, or a network binary",
         ("tflite", "onnx"), "ST Edge AI Core", "the installer from st.com (STEdgeAI-Core, an account is needed)",
         ("convert_st.sh.txt", "quantize.py.txt"), "st_ai_output",
         "https://stedgeai-dc.st.com/assets/embedded-docs/command_line_interface.html",
         program="stedgeai", calibration="arrays", targets=("stm32n6", "stm32mp25", "stm32h7")),
    Door("axelera", "Axelera Metis: .axmodel",
         ("onnx",), "Voyager SDK (axcompile)", "Axelera's Voyager SDK (its own installer)",
         ("convert_axelera.sh.txt", "preprocess.py.txt"), "compiled",
         "https://docs.axelera.ai/sdk/reference/compiler/compiler-cli", floats=True, opset=14, program="axcompile",
         calibration="pictures", integers=True, seconds=7200),
    Door("axera", "Axera AX6xx and M57: .axmodel",
         ("onnx",), "Pulsar2", "the pulsar2 container image from Axera (docker load -i ax_pulsar2_VERSION.tar.gz)",
         ("convert_axera.sh.txt",), "compiled.axmodel", "https://pulsar2-docs.readthedocs.io/en/latest/", floats=True,
         program="pulsar2", calibration="pictures", needs=True, bakes=True, integers=True, seconds=3600,
         targets=("AX650", "AX620E", "AX615", "AX637", "M57")),
)


def find_door(name: str) -> Door:
    """Raises: UsageError naming what there is."""
    known = {d.name: d for d in DOORS}
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, 3, 0.4)
        raise UsageError(f"there is no door '{name[:60]}'", want=", ".join(close or known),
                         try_="npulab export --list")
    return known[name]


@cache
def board_doors() -> Mapping[str, tuple[str, str]]:
    """Board id -> (door, the tool's word for the chip or "")."""
    import tomllib

    data: dict[str, Any] = tomllib.loads((Path(__file__).parent / "boards.toml").read_text("utf-8"))
    return {board: (entry["door"], entry.get("target", "")) for board, entry in data.items()}


def boards_of(door: Door) -> tuple[str, ...]:
    """The described boards whose door this is."""
    return tuple(sorted(b for b, (name, _) in board_doors().items() if name == door.name))


def chosen(to: str | None, board: str | None, target: str | None = None) -> tuple[Door, str]:
    """The door and the tool's word for the chip, from what a user named.

    Raises: UsageError for names that do not exist or do not belong together; UnsupportedError for a board whose
    vendor's tool has no door here.
    """
    from npulab.targets.facts.board import find_board

    if board is not None:
        find_board(board)
        if board not in board_doors():
            raise UnsupportedError(f"no door here leads to {board}", want="one of " + ", ".join(sorted(board_doors())),
                                   try_="--to onnx or --to tflite, whichever its vendor's tool reads")
    if to is None and board is None:
        raise UsageError("npulab export needs to know where to", want="--to DOOR or --board BOARD",
                         try_="npulab export --list")
    name, word = board_doors()[board] if board else ("", "")
    door = find_door(to or name)
    if door.name != name:  # the plain formats and tools that take any chip go with every board
        if board and door.targets:
            raise UsageError(f"{door.name} does not make files for {board}", want=name,
                             try_=f"--to {name} --board {board}")
        word = ""
    if target:
        if not door.targets:
            raise UsageError(f"{door.name} does not ask for a chip", got=f"--chip {target}", try_="leave --chip out")
        if target not in door.targets:
            raise UsageError(f"{door.name} knows no chip '{target[:40]}'", want=", ".join(door.targets))
        word = target
    return door, word or (door.targets[0] if door.targets else "")
