"""What a door is, how its network wants pictures, and what a folder made for it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelFormat = Literal["onnx", "tflite"]
Order = Literal["rgb", "bgr"]
Calibration = Literal["", "pictures", "arrays"]
"""What the tool measures ranges on: nothing, picture files, or arrays."""


@dataclass(frozen=True, slots=True)
class Door:
    """One vendor's converter, as its public documentation describes it.

    about     what comes out, and for which chips.
    takes     model formats, the one it prefers first.
    integer   only networks of integers.   floats  only networks of floats: it makes the integers itself, or has none.
    opset     the newest ONNX opset that it documents, 0 where none is stated.
    tool      its name.   package  what `pip install` installs, "" where no public registry has it.
    module    the Python module that the script imports, "" where `program` is called instead.
    install   how to get it, one line.
    scripts   templates in doors/scripts, which become files of the same name without ".txt".
    product   the file that the conversion leaves in the folder.
    targets   words of the tool for chips, the default first; empty where it does not ask.
    calibration  what it wants to measure ranges on; `needs` whether it does not work without.
    bakes     whether it puts mean, scale and colour order into the network, which then takes pixels.
    verify    whether what it makes runs on the machine it is made on.
    integers  whether it always makes integers of a float network, so that outputs agree roughly at best.
    seconds   time that the conversion may take.
    source    public documentation.
    """

    name: str
    about: str
    takes: tuple[ModelFormat, ...]
    tool: str
    install: str
    scripts: tuple[str, ...]
    product: str
    source: str
    integer: bool = False
    floats: bool = False
    opset: int = 0
    package: str = ""
    module: str = ""
    program: str = ""
    targets: tuple[str, ...] = ()
    calibration: Calibration = ""
    needs: bool = False
    bakes: bool = False
    verify: bool = False
    integers: bool = False
    seconds: int = 900


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The network's number is (pixel - mean) / std, pixels 0..255, channels in `order`. One mean and std a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: Order = "rgb"


@dataclass(frozen=True, slots=True)
class Picture:
    """The network's one input as a picture: where the planes are, and its size."""

    name: str
    height: int
    width: int
    channels: int
    planes_first: bool
