"""Programs beside the package, as modules: tests run what people run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


@contextmanager
def loaded(path: str) -> Iterator[ModuleType]:
    """The program at `path` from the project's root, which finds its neighbours as when it is run. Threads that it sets
    in the environment and modules that it brings are put back."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(file.parent))
        patch.setitem(sys.modules, file.stem, module)
        with pytest.MonkeyPatch.context() as threads:
            for name in THREADS:
                threads.setenv(name, "1")
            spec.loader.exec_module(module)
        yield module
