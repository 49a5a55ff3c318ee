"""Kernels of an OpenCL program counted in what the driver compiled them to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from npulab.gpu.counting import intel, pocl, ptx, rusticl
from npulab.gpu.counting.mix import Argument, Counted, NotRead, Picture

TURNS = "turns"
"""The argument of a kernel that says how often its loop turns."""
NO_CAPSTONE = "it is machine code, and the package capstone is not installed"


def count(cl: Any, queue: Any, source: str, name: str, size: Sequence[int], group: Sequence[int],
          arguments: Sequence[Any], options: Sequence[str] = ()) -> Counted:
    """A turn of the loop of the kernel `name`, in each work item, as it was launched.

    Built anew: pyopencl asks for a program's binary when it is built, and PoCL, which compiles for a size of work
    groups when one is launched, does not look again.
    """
    try:
        turns = place(source, name)
        anew = cl.Program(queue.context, source).build(options=list(options), cache_dir=False)
        none = [np.uint32(0) if k == turns else a for k, a in enumerate(arguments)]  # changes nothing
        getattr(anew, name)(queue, tuple(size), tuple(group), *none).wait()
        binary = bytes(anew.get_info(cl.program_info.BINARIES)[0])
        told = [_told(cl, a) for a in arguments]
    except NotRead as e:
        return Counted(None, why=str(e))
    except cl.Error as e:
        return Counted(None, why=f"the driver does not give its binary: {str(e).strip()[:120]}")
    if binary.startswith(pocl.MAGIC):
        read = pocl.count
    elif intel.is_intel(binary):
        read = intel.count
    elif ptx.is_ptx(binary):
        read = ptx.count
    elif rusticl.is_rusticl(binary):
        read = rusticl.count
    else:
        return Counted(None, why="the driver's binary is of no known kind")
    if read in (pocl.count, intel.count):
        try:
            import capstone  # noqa: F401
        except ImportError:
            return Counted(None, why=NO_CAPSTONE)
    return read(binary, name, size, group, told, turns)


def _told(cl: Any, argument: Any) -> Argument:
    if isinstance(argument, np.generic):
        return argument.tobytes()
    if isinstance(argument, cl.Buffer):
        return None
    if not isinstance(argument, cl.Image):
        raise NotRead(f"an argument is neither a number nor a buffer nor an image: {type(argument).__name__}")
    info, kind = cl.image_info, argument.format
    width, height, row = (int(argument.get_image_info(i)) for i in (info.WIDTH, info.HEIGHT, info.ROW_PITCH))
    return Picture(width, height, row, int(kind.channel_order), int(kind.channel_data_type), int(kind.channel_count),
                   int(kind.itemsize) // int(kind.channel_count))


def place(source: str, kernel: str) -> int:
    """Which argument of a kernel is TURNS. Raises: NotRead."""
    m = re.search(rf"\bvoid\s+{re.escape(kernel)}\s*\(([^)]*)\)", source)
    names = [re.findall(r"\w+", a)[-1] for a in m[1].split(",")] if m and m[1].strip() else []
    if TURNS not in names:
        raise NotRead(f"the kernel {kernel} has no argument {TURNS}")
    return names.index(TURNS)
