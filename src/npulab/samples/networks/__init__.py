"""Three small trained classifiers, the images to calibrate them on and those to measure them on.

scripts/train_networks.py makes all of them; README.md of the folder above says how and under which licence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UsageError

NAMES = ("depthwise", "residual", "attention")
MEAN, DEVIATION = 127.5, 127.5
"""Of pixels 0..255: they become -1..1."""
FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """The ONNX file: `image` (1, 1, 24, 24) float32 in, `logits` (1, 10) out.

    Raises: UsageError for a name that is not in NAMES.
    """
    if name not in NAMES:
        raise UsageError("no sample network has this name", got=name, want=", ".join(NAMES))
    return FOLDER / f"{name}.onnx"


def facts() -> dict[str, Any]:
    """What networks.json says: accuracy, training and SHA-256 of each network, source and licence of the images."""
    return dict(json.loads((FOLDER / "networks.json").read_text("utf-8")))


def normalized(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels (N, 24, 24) as the networks take them: (N, 1, 24, 24)."""
    return ((pixels.astype(np.float32) - np.float32(MEAN)) / np.float32(DEVIATION))[:, None]


def data(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Calibration images (256, 1, 24, 24), held-out images (797, 1, 24, 24), and the labels 0..9 of these.

    All networks have the same. The calibration images are training images; no training step saw the others.

    Raises: UsageError for a name that is not in NAMES.
    """
    path(name)
    with np.load(FOLDER / "images.npz", allow_pickle=False) as images:
        return normalized(images["calibration"]), normalized(images["test"]), images["labels"].astype(np.int64)
