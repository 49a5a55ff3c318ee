"""All devices that can be probed, in one list: those of OpenCL with their numbers there, then those of Vulkan.

A device is named by its number in the list, or by "opencl:N" or "vulkan:N" with its number there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from npulab.errors import DeviceError, UsageError
from npulab.gpu import opencl, vulkan
from npulab.gpu.types import Bench, Identity

MODULES = {"opencl": opencl, "vulkan": vulkan}
"""api -> what has `devices()` and `open_device(number)`."""
INSTALL = "pip install 'npulab[gpu]' (OpenCL), 'npulab[vulkan]' (Vulkan)"
DRIVERS = "OpenCL: pocl-opencl-icd (the CPU), mesa-opencl-icd; Vulkan: mesa-vulkan-drivers; or the vendor's"


@dataclass(frozen=True, slots=True)
class Found:
    """A device: `number` in its own API."""

    api: str
    number: int
    identity: Identity

    @property
    def name(self) -> str:
        return f"{self.api}:{self.number}"


def devices(missing: list[str] | None = None) -> list[Found]:
    """All of them. missing: gets what to install for each API whose package is not there.

    Raises: UsageError if no API's package is installed.
    """
    found: list[Found] = []
    faults: list[str] = []
    for api in MODULES:
        try:
            found += _of(api)
        except UsageError as e:
            faults.append(f"{e.message}: {e.facts.get('try', '')}")
    if len(faults) == len(MODULES):
        raise UsageError("no package that reaches a GPU is installed", want="pyopencl or wgpu", try_=INSTALL)
    if missing is not None:
        missing += faults
    return found


def _of(api: str) -> list[Found]:
    return [Found(api, n, who) for n, who in enumerate(MODULES[api].devices())]


def find(device: int | str) -> Found:
    """The device of a number or name. A number that OpenCL has does not ask for Vulkan.

    Raises: UsageError for a name of another form or without the API's package; DeviceError if there is no such device.
    """
    named = re.fullmatch(rf"(?:({'|'.join(MODULES)}):)?(\d+)", str(device))
    if not named:
        raise UsageError(f"'{device}' is no device", want="a number of npulab probe --list, opencl:N or vulkan:N")
    api, number = named[1], int(named[2])
    if api:
        have = _of(api)
        if number >= len(have):
            MODULES[api].open_device(number)  # says which there are
        return have[number]
    try:
        have = _of("opencl")
    except UsageError:
        have = []
    if number >= len(have):
        have = devices()
    if number >= len(have):
        raise DeviceError(f"there is no device {number}", got=_listed(have),
                          try_="one of these" if have else f"install a driver: {DRIVERS}")
    return have[number]


def _listed(have: Sequence[Found]) -> str:
    return "; ".join(f"{i}: {f.identity.name} ({f.name})" for i, f in enumerate(have)) or "none"


def open_device(found: Found) -> Bench:
    """Raises: DeviceError if it is not there any more, or fails."""
    bench: Bench = MODULES[found.api].open_device(found.number)
    return bench
