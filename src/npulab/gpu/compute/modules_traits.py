"""What shapes of threads are chosen by, of a Vulkan device: measured by a probe, stated, or assumed.

A processor behind Vulkan (lavapipe) is a device of warps too: its compiler puts a thread in each lane of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npulab.gpu import vulkan
from npulab.gpu.compute import traits
from npulab.gpu.compute.types import Traits
from npulab.gpu.vulkan import Vulkan

WARP, REGISTERS = 8, 16
"""Of a processor: lanes of 256 bits, which lavapipe computes with (Mesa, gallivm, lp_native_vector_width), and a lane
of each vector register of AVX2 (Intel SDM 1, 14.1)."""


def traits_of(bench: Vulkan, result: Mapping[str, Any] | None = None) -> Traits:
    """result: as of `traits.traits_of`, of a Vulkan device."""
    found, limits = traits.quantities(bench.identity, result), bench.limits
    cpu = limits.processor
    sources = dict.fromkeys(("cpu", "group_max", "local_bytes", "halves"), "stated")
    sources |= {"compute_units": "stated" if cpu else "measured", "vector": "assumed"}

    def choose(name: str, measured: Any, otherwise: Any, standing: str = "assumed") -> Any:
        sources[name] = "measured" if measured else standing
        return measured or otherwise

    low, high = vulkan.subgroup(bench.adapter.info)
    stated = low if low == high else 0
    warp = choose("warp", int(found.get("warp width", 0)), stated or (WARP if cpu else traits.WARP),
                  "stated" if stated else "assumed")
    registers = choose("registers", traits.registers_of(found), REGISTERS if cpu else traits.GPU_REGISTERS)
    sizes = tuple(int(found[f"L{i}"]) for i in range(1, 5) if f"L{i}" in found) if "L1" in found else ()
    caches = choose("caches", sizes, traits.CPU_CACHES if cpu else traits.GPU_CACHES)
    return Traits(
        name=bench.identity.name, cpu=cpu, compute_units=max(1, limits.compute_units), vector=1, registers=registers,
        warp=warp, local_bytes=limits.local_bytes, group_max=max(1, limits.group_max), caches=caches,
        operations=float(choose("operations", 2 * found.get("rate", 0.0), 0.0)),
        bandwidth=float(choose("bandwidth", found.get("bandwidth", 0.0), 0.0)),
        halves="float16" in limits.elements, sources=sources)
