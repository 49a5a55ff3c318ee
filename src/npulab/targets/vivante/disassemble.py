"""A program as text: command words, the descriptors they start, and the source operator each comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from npulab.bits import Layout
from npulab.program.types import Job, NpuStep, Program
from npulab.targets.vivante import commands
from npulab.targets.vivante.nn import NNDescriptor
from npulab.targets.vivante.tp import TPDescriptor


def disassemble(program: Program) -> str:
    """The whole program. Fields at their default are left out; addresses name the section they lie in."""
    out = [f"; {program.model} for {program.target}, plan {program.plan}, model sha256 {program.digest[:16]}"]
    if program.init:
        out += ["", "submit 0: initialise", *_stream(program.init, {})]
    submit = 1
    for i, step in enumerate(program.steps):
        if not isinstance(step, NpuStep):
            named = ", ".join(f"{program.ops[n]} (node {n})" for n in step.nodes)
            out += ["", f"step {i}: host runs {named}"]
            continue
        starts = {job.words[0]: job for job in step.jobs}
        out += ["", f"step {i}, submit {submit}: {len(step.jobs)} jobs"]
        out += [f"  upload   tensor {t.value} -> {t.address:#010x} ({t.size} B)" for t in step.uploads]
        out += _stream(step.words, {at: _job(program, job) for at, job in starts.items()})
        out += [f"  download tensor {t.value} <- {t.address:#010x} ({t.size} B)" for t in step.downloads]
        submit += 1
    return "\n".join(out) + "\n"


def _stream(words: Sequence[int], notes: dict[int, list[str]]) -> Iterator[str]:
    at = 0
    while at < len(words):
        yield from notes.get(at, [])
        word = words[at]
        opcode = word >> 27
        if word == 0:
            padding = 1
            while at + padding < len(words) and words[at + padding] == 0:
                padding += 1
            yield f"  {at:5}  {'':26}; {padding} words of padding"
            at += padding
        elif opcode == commands.LOAD_STATE:
            count = word >> 16 & 0x3FF or 1024
            for k in range(min(count, len(words) - at - 1)):
                register = (word & 0xFFFF) * 4 + 4 * k
                name = commands.REGISTERS.get(register, "?")
                yield f"  {at:5}  {word:08x} {words[at + 1 + k]:08x}  {name} = {words[at + 1 + k]:#x}"
            at += 1 + count + (count + 1) % 2
        else:
            yield f"  {at:5}  {word:08x}           {commands.OPCODES.get(opcode, '?')}"
            at += 2


def _job(program: Program, job: Job) -> list[str]:
    sources = ", ".join(f"{program.ops[n]} (node {n})" for n in job.nodes)
    out = ["", f"  job {job.index}: {job.kind.upper()} {job.role}, from {sources}"]
    if job.coefficients:
        out.append(f"    coefficients at {job.coefficients[0]:#010x}, {job.coefficients[1]} B")
    layout: type[Layout] = NNDescriptor if job.kind == "nn" else TPDescriptor
    for address in job.descriptors:
        words = _words(program, address, layout.words)
        out.append(f"    descriptor at {address:#010x}")
        for field, value in layout.decode(words).items():
            if value != field.default:
                shown = f"{value:#x}" if "address" in field.name else str(value)
                out.append(f"      {field.name:<28} {shown:>10} {field.unit:<8} {field.where}")
    return out


def _words(program: Program, address: int, count: int) -> list[int]:
    for s in program.sections:
        if s.data is not None and s.address <= address and address + 4 * count <= s.address + len(s.data):
            raw = s.data[address - s.address : address - s.address + 4 * count]
            return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    return [0] * count
