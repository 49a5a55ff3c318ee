"""Jobs to bits: place buffers, encode descriptors and coefficient streams, write the command words."""

from __future__ import annotations

from collections.abc import Sequence

from npulab.errors import CapacityError, UnsupportedError
from npulab.ir import Graph
from npulab.program.types import (
    HostNode,
    HostStep,
    NpuStep,
    Program,
    Section,
    SectionKind,
    Tensor,
    Transfer,
)
from npulab.program.types import Job as ProgramJob
from npulab.targets.vivante import commands
from npulab.targets.vivante.caching import cache
from npulab.targets.vivante.chips import AXI_SRAM_ADDRESS, Chip
from npulab.targets.vivante.coefficients_v7 import (
    Coefficients,
    Streams,
    best_zero_run_bits,
    reference_zero_run_bits,
)
from npulab.targets.vivante.coefficients_v7 import encode as encode_streams
from npulab.targets.vivante.jobs import Border, NNJob, Region
from npulab.targets.vivante.options import EncodeOptions
from npulab.targets.vivante.tiling import Tiling, align, tile

FIRST_ADDRESS = 0x0080_0000
"""Where npulab starts to place buffers: behind the 4 MiB at which user space may begin (TP notes 6.2) and the
on-chip SRAM window that the vendor maps there (TP notes 5.2, inferred)."""

PAGE = 4096
"""Granularity of the NPU's memory management; every buffer starts on one."""

DESCRIPTOR_SLOT = 256
"""Distance of descriptors in their section: 64 would do, 256 is what the register's annotation asks for."""


ELEMENTS_MAX = 1 << 27
"""Elements of a tensor that crosses a border: 1 GiB of the widest type, as much as a program may map."""


class _Memory:
    """Hands out addresses, lowest first, whole pages."""

    def __init__(self) -> None:
        self.next = FIRST_ADDRESS
        self.sections: list[Section] = []
        self.on_chip: list[Section] = []
        self.tables: dict[bytes, int] = {}

    def share_on_chip(self, size: int) -> int:
        """The on-chip window, at least `size` bytes of it: one section for all who ask."""
        size = max(size, *(s.size for s in self.on_chip), 1)
        self.on_chip = [Section("on-chip tensors", SectionKind.TENSOR, AXI_SRAM_ADDRESS, size, None)]
        return AXI_SRAM_ADDRESS

    def table(self, data: bytes) -> int:
        """A table of the TP engine: equal ones lie in one section."""
        if data not in self.tables:
            self.tables[data] = self.add(f"table {len(self.tables)}", SectionKind.COEFFICIENTS, len(data), data)
        return self.tables[data]

    def add(self, name: str, kind: SectionKind, size: int, data: bytes | None) -> int:
        address = self.next
        size = max(size, 1)
        self.sections.append(Section(name, kind, address, size, data))
        self.next = align(address + size, PAGE)
        return address


def tiling_of(job: NNJob, chip: Chip) -> Tiling:
    if job.tiling is not None:
        return job.tiling
    kx, ky = job.tile_kernel
    return tile(*job.tile_extent, job.weights.out_c, kx, ky, job.stride, chip)


def coefficients_of(job: NNJob, tiling: Tiling, chip: Chip, options: EncodeOptions) -> Coefficients:
    streams = Streams(job.kernels(chip.nn_cores, tiling.superblocks))
    bits = 0
    if job.zero_runs and options.zero_runs:
        choose = best_zero_run_bits if options.optimal_zero_runs else reference_zero_run_bits
        bits = choose(streams, chip.zero_run_bits)
    return encode_streams(streams, bits)


def encode(graph: Graph, target: str, plan: str, chip: Chip, steps: Sequence[Region | HostStep],
           host_nodes: Sequence[HostNode], options: EncodeOptions) -> Program:
    """The Program of a plan. Deterministic: the same steps give the same bytes."""
    for v in graph.outputs:
        if graph.values[v].is_constant or graph.values[v].is_variable:
            raise UnsupportedError(f"output '{graph.values[v].name}' is stored in the file of '{graph.name}'",
                                   rule="Outputs of a program are computed tensors.", try_="take it out of the outputs")
    memory = _Memory()
    out: list[NpuStep | HostStep] = []
    crossing: dict[int, None] = dict.fromkeys((*graph.inputs, *graph.outputs))
    number = 0
    for step in steps:
        if isinstance(step, HostStep):
            crossing.update(dict.fromkeys((*step.inputs, *step.outputs)))
            out.append(step)
            continue
        npu = _region(memory, step, chip, options, number, len(out))
        number += len(step.jobs)
        crossing.update(dict.fromkeys(t.value for t in (*npu.uploads, *npu.downloads)))
        out.append(npu)
    return Program(
        target=target, plan=plan, model=graph.name, digest=graph.digest,
        init=tuple(commands.init_stream(AXI_SRAM_ADDRESS if memory.on_chip else 0)) if number else (),
        sections=(*memory.sections, *memory.on_chip), steps=tuple(out),
        tensors=tuple(_tensor(graph, v) for v in sorted(crossing)),
        inputs=graph.inputs, outputs=graph.outputs, host_nodes=tuple(host_nodes),
        ops=tuple(n.op.name for n in graph.nodes),
    )


def _tensor(graph: Graph, v: int) -> Tensor:
    value = graph.values[v]
    if value.elements > ELEMENTS_MAX or len(value.shape) > 8:
        raise CapacityError(f"tensor '{value.name}' is too large", got=f"{list(value.shape)}",
                            want=f"at most 8 dimensions and {ELEMENTS_MAX} elements")
    q = value.quantization
    one = q is not None and q.per_tensor
    return Tensor(v, value.name, value.dtype.value, value.shape, q.scale if q and one else None,
                  q.zero_point if q and one else None)


def _region(memory: _Memory, region: Region, chip: Chip, options: EncodeOptions, number: int, index: int) -> NpuStep:
    bases = [memory.share_on_chip(b.size) if b.on_chip
             else memory.add(f"step {index} {b.name}", SectionKind.TENSOR, b.size, None) for b in region.buffers]

    def address(tensor: int, offset: int = 0) -> int:
        buffer, base = region.homes[tensor]
        return bases[buffer] + base + offset

    count = sum(1 if isinstance(j, NNJob) else len(j.shares) for j in region.jobs)
    slots = align(memory.next, PAGE)
    descriptors = bytearray(count * DESCRIPTOR_SLOT)
    used = 0
    memory.next = align(slots + len(descriptors), PAGE)
    streams: list[tuple[int, ...]] = []
    jobs: list[ProgramJob] = []
    at = 8  # a batch begins with eight zero words
    for i, job in enumerate(region.jobs):
        source = address(job.source.tensor, job.source.offset)
        result = address(job.result.tensor, job.result.offset)
        coefficients: tuple[int, int] | None = None
        where: tuple[int, ...]
        if isinstance(job, NNJob):
            tiling = tiling_of(job, chip)
            coded = coefficients_of(job, tiling, chip, options)
            caching = cache(coded.cache_bytes, tiling, job.kernel_x, job.input.z, job.output.z, chip,
                            kernels=options.kernel_cache, image=job.image if options.image_cache else "never")
            base = memory.add(f"job {number + i} coefficients", SectionKind.COEFFICIENTS, len(coded.data), coded.data)
            coefficients = base, len(coded.data)
            encoded = [job.descriptor(source, result, base, tiling, caching, chip.nn_cores).to_bytes()]
        else:
            if job.table:
                coefficients = memory.table(job.table), len(job.table)
            encoded = [d.to_bytes() for d in job.descriptors(source, result, *(coefficients or ())[:1])]
        for one in encoded:
            descriptors[used * DESCRIPTOR_SLOT : used * DESCRIPTOR_SLOT + len(one)] = one
            used += 1
        where = tuple(slots + (used - len(encoded) + k) * DESCRIPTOR_SLOT for k in range(len(encoded)))
        words = commands.nn_job(where[0]) if isinstance(job, NNJob) else commands.tp_job(where, job.pad)
        streams.append(tuple(words))
        jobs.append(ProgramJob(
            index=number + i, kind="nn" if isinstance(job, NNJob) else "tp", role=job.role, nodes=job.nodes,
            descriptors=where, words=(at, len(words)), coefficients=coefficients,
            macs=job.engine_macs if isinstance(job, NNJob) else 0,
        ))
        at += len(words)
    memory.sections.append(Section(f"step {index} descriptors", SectionKind.DESCRIPTOR, slots,
                                   max(len(descriptors), 1), bytes(descriptors) or b"\0"))

    def transfer(b: Border) -> Transfer:
        return Transfer(b.value, address(b.place.tensor, b.place.offset), b.size, b.flip)

    return NpuStep(region.nodes, tuple(transfer(b) for b in region.uploads), tuple(commands.batch(streams)),
                   tuple(jobs), tuple(transfer(b) for b in region.downloads))

