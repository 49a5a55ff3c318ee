"""The virtual NPU: executes command streams over a memory image. It knows the hardware, and nothing of the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from npulab.errors import DeviceError
from npulab.runtime.device import Fault
from npulab.targets.vivante import commands
from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.machine import convolve, tensor_processor
from npulab.targets.vivante.machine.convolve import Prepared, Work
from npulab.targets.vivante.machine.faults import Budget, JobFault, Limits
from npulab.targets.vivante.machine.frontend import FrontEnd
from npulab.targets.vivante.machine.memory import Memory
from npulab.targets.vivante.nn import NNDescriptor
from npulab.targets.vivante.tp import TPDescriptor

__all__ = ["JobTrace", "Limits", "VirtualNPU"]

KEPT_MAX = 1 << 29
"""Bytes of decoded kernels kept for the next submission."""
DESCRIPTORS_MAX = 1 << 12
"""Decoded descriptors kept."""
_MODES = (commands.GL_OCB_REMAP_START, commands.GL_OCB_REMAP_END, commands.GL_TP_CONFIG)
"""Registers whose values other than 0 change what a job means, in ways nobody has described."""


@dataclass(frozen=True, slots=True)
class JobTrace:
    """One executed descriptor: unit "nn" or "tp", where it lay, and what it did."""

    unit: str
    descriptor: int
    work: Work


class VirtualNPU:
    """A Device in software. Streams run to their end or to their first fault; nothing they hold can raise."""

    def __init__(self, chip: Chip, limits: Limits | None = None) -> None:
        self.chip = chip
        self.limits = limits or Limits()
        self.memory = Memory()
        self.trace: list[JobTrace] = []
        self._front = FrontEnd(self._nn, self._tp)
        self._budget = Budget(self.limits)
        self._blas = ThreadpoolController()
        self._prepared: dict[tuple[int, ...], tuple[int, Prepared]] = {}
        self._descriptors: dict[tuple[int, ...], NNDescriptor | TPDescriptor] = {}

    def map(self, name: str, address: int, size: int, data: bytes | memoryview | None) -> None:
        self.memory.map(name, address, size, data)

    def write(self, address: int, data: NDArray[np.uint8]) -> None:
        try:
            self.memory.write(address, data, "host write")
        except JobFault as fault:
            raise DeviceError(fault.message, where=f"address {address:#010x}") from None

    def read(self, address: int, size: int) -> NDArray[np.uint8]:
        try:
            return self.memory.read(address, size, "host read").copy()
        except JobFault as fault:
            raise DeviceError(fault.message, where=f"address {fault.address or address:#010x}") from None

    def submit(self, words: Sequence[int]) -> list[Fault]:
        """Execute one stream. `trace` then holds its jobs."""
        self.trace = []
        self._budget = Budget(self.limits)
        # One thread: these products are small. A second one gained 0 to 10 % on an idle machine, and cost a factor of
        # four beside another busy process, where each product waits for it.
        with self._blas.limit(limits=1, user_api="blas"):
            return self._front.run(words, self.limits.words)

    def _keep(self, words: tuple[int, ...], d: NNDescriptor | TPDescriptor) -> None:
        if len(self._descriptors) >= DESCRIPTORS_MAX:
            self._descriptors.clear()
        self._descriptors[words] = d

    def _check_modes(self) -> None:
        """Fault on registers that would change what a job means."""
        registers = self._front.registers
        cores = registers.get(commands.GL_NN_CONFIG, 0) >> 8 & 15
        if cores not in (0, self.chip.nn_cores):
            raise JobFault("unimplemented feature", f"GL_NN_CONFIG asks for {cores} NN cores of {self.chip.nn_cores}")
        for register in _MODES:
            if registers.get(register, 0):
                raise JobFault("unimplemented feature",
                               f"{commands.REGISTERS[register]} = {registers[register]:#x} while a job starts")

    def _nn(self, address: int) -> None:
        self._check_modes()
        words = (*self.memory.words(address, NNDescriptor.words - 2, "NN descriptor"), 0, 0)
        d = self._descriptors.get(words)
        if d is None:
            _refuse_unknown(NNDescriptor, words, address)
            d = NNDescriptor.decode(words)
            convolve.check_features(d)
            self._keep(words, d)
        assert isinstance(d, NNDescriptor)
        version = self.memory.find(d.kernel_address, 1, "coefficient buffer").version
        known = self._prepared.get(words)
        if known is None or known[0] != version:
            known = version, convolve.prepare(self.memory, d, self.chip, self._budget)
            if sum(p.size for _, p in self._prepared.values()) + known[1].size > KEPT_MAX:
                self._prepared.clear()
            self._prepared[words] = known
        self.trace.append(JobTrace("nn", address, convolve.run(self.memory, d, known[1], self._budget)))

    def _tp(self, address: int) -> None:
        self._check_modes()
        words = tuple(self.memory.words(address, TPDescriptor.words, "TP descriptor"))
        d = self._descriptors.get(words)
        if d is None:
            _refuse_unknown(TPDescriptor, words, address)
            d = TPDescriptor.decode(words)
            tensor_processor.check_features(d)
            self._keep(words, d)
        assert isinstance(d, TPDescriptor)
        self.trace.append(JobTrace("tp", address, tensor_processor.run(self.memory, d, self._budget)))


def _refuse_unknown(layout: type[NNDescriptor] | type[TPDescriptor], words: Sequence[int], address: int) -> None:
    for word, bits in layout.unknown_bits(words):
        raise JobFault("unimplemented feature", f"{layout.__name__} word {word} has unknown bits {bits:#x} set",
                       address + 4 * word)
