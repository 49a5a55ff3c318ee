"""The folder of real models beside the project. It is no part of it, so tests that need it skip where it is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODELS = SHARED / "models"

needs_shared = pytest.mark.skipif(not MODELS.is_dir(), reason=f"needs the real models in {MODELS}")
"""Mark of a test that reads files of SHARED."""


def model_files() -> list[Path]:
    """Every TFLite file there; none where the folder is absent."""
    return sorted(MODELS.glob("*/*.tflite"))
