"""What tilings are chosen by, of the device at hand: measured by a probe, stated by the device, or assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from npulab.gpu.compute.device import Device
from npulab.gpu.compute.types import Traits
from npulab.gpu.types import Identity

_CPU_REGISTERS = {16: 32, 8: 16, 4: 16}
"""Vector registers by float32 lanes: AVX-512, AVX2, SSE (Intel SDM 1, 15.1 and 10.2). NEON has 32 of 4 (Arm ARM A1.4):
taken for 16."""
GPU_REGISTERS = 32
"""Of a work item, where a probe did not look: 65536 of a core for 2048 threads on many desktop GPUs, 64 on some."""
WARP = 32
CPU_CACHES = (32 << 10, 512 << 10)
GPU_CACHES = (16 << 10,)


def traits_of(device: Device, result: Mapping[str, Any] | None = None) -> Traits:
    """`result`: what `npulab probe --json` wrote, as parsed; used where it is of this device and driver, else not at
    all. Refused quantities and such that cannot be are not used."""
    cl, d = device.cl, device.device
    found = quantities(device.identity, result)
    sources: dict[str, str] = {"compute_units": "stated", "group_max": "stated", "cpu": "stated", "halves": "stated"}
    cpu = bool(d.type & cl.device_type.CPU)
    vector = max(1, int(d.native_vector_width_float)) if cpu else 1
    sources["vector"] = "stated" if cpu else "assumed"
    vector = max(w for w in (1, 2, 4, 8, 16) if w <= vector)

    def choose(name: str, measured: Any, otherwise: Any, standing: str = "assumed") -> Any:
        sources[name] = "measured" if measured is not None else standing
        return measured if measured is not None else otherwise

    if cpu:
        registers, warp = vector * _CPU_REGISTERS.get(vector, 16), 1
        sources |= {"registers": "assumed", "warp": "assumed"}
    else:
        registers = choose("registers", registers_of(found), GPU_REGISTERS)
        warp = int(choose("warp", found.get("warp width"), WARP))
    real = int(d.local_mem_type) == int(cl.device_local_mem_type.LOCAL)
    sources["local_bytes"] = "stated"
    sizes = [found[f"L{i}"] for i in range(1, 5) if f"L{i}" in found]
    stated = [int(d.global_mem_cache_size)] if int(d.global_mem_cache_size) else []
    otherwise = (*CPU_CACHES, *stated) if cpu else (*GPU_CACHES, *stated)
    caches = choose("caches", None if not sizes or "L1" not in found else tuple(int(s) for s in sizes),
                    tuple(sorted(otherwise)))
    operations = choose("operations", 2 * found["rate"] if "rate" in found else None, 0.0)
    bandwidth = choose("bandwidth", found.get("bandwidth"), 0.0)
    return Traits(
        name=device.identity.name, cpu=cpu, compute_units=max(1, device.limits.compute_units), vector=vector,
        registers=int(registers), warp=warp, local_bytes=device.limits.local_bytes if real else 0,
        group_max=max(1, device.limits.group_max), caches=caches, operations=float(operations),
        bandwidth=float(bandwidth), halves="float16" in device.limits.elements, sources=sources)


def registers_of(found: Mapping[str, float]) -> int | None:
    """Of a GPU's work item, when all that fit are there; None: not measured."""
    if "register file" in found and found.get("resident threads"):
        return max(8, int(found["register file"] / 4 / found["resident threads"]))
    return None


_NAMES = {"warp width": "warp width", "register file": "register file", "resident threads": "resident threads",
          "fma float32 rate": "rate", "memory bandwidth": "bandwidth", "L1 size": "L1", "L2 size": "L2",
          "L3 size": "L3", "L4 size": "L4"}
_LARGEST = {"warp width": 1024, "register file": 1 << 30, "resident threads": 1 << 20, "rate": 1e18,
            "bandwidth": 1e18}


def quantities(own: Identity, result: Mapping[str, Any] | None) -> dict[str, float]:
    """Name -> value in SI units, of what was measured on this very device."""
    if not isinstance(result, Mapping):
        return {}
    identity = result.get("identity")
    if not isinstance(identity, Mapping) or (identity.get("name"), identity.get("driver")) != (own.name, own.driver):
        return {}
    found = {}
    listed = result.get("quantities")
    for q in listed if isinstance(listed, list | tuple) else ():
        if not isinstance(q, Mapping) or q.get("status") != "measured" or q.get("name") not in _NAMES:
            continue
        name, value = _NAMES[q["name"]], q.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        value = value * 1e9 if q.get("unit") == "GB/s" else float(value)
        if 1 <= value <= _LARGEST.get(name, 1 << 40):
            found[name] = value
    return found
