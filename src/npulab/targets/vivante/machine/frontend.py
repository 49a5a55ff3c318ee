"""Walk a command stream: load registers, and start the job that a write to an instruction register names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from npulab.runtime.device import Fault
from npulab.targets.vivante import commands
from npulab.targets.vivante.machine.faults import JobFault

Start = Callable[[int], None]
"""Run the job whose descriptor lies at an address; raises JobFault."""


class FrontEnd:
    """The command processor. Registers keep their values from one submission to the next, as on the chip."""

    def __init__(self, start_nn: Start, start_tp: Start) -> None:
        self.registers: dict[int, int] = {}
        self._start = {
            commands.PS_NN_INST_ADDR: (start_nn, commands.NN_ADDRESS_MASK),
            commands.PS_TP_INST_ADDR: (start_tp, commands.TP_ADDRESS_MASK),
        }

    def run(self, words: Sequence[int], limit: int) -> list[Fault]:
        """Execute to the end of the stream, an END, or the first fault."""
        if len(words) > limit:
            return [Fault("work limit", f"a stream of {len(words)} words; the kernel takes {limit}", 0)]
        at = jobs = 0
        while at < len(words):
            word = words[at]
            if word == 0:
                at += 1
                continue
            opcode = word >> 27
            if at % 2:
                return [Fault("bad command", f"a command ({word:#010x}) at an odd word", at)]
            if opcode == commands.END:
                return []
            if opcode in (commands.NOP, commands.WAIT, commands.STALL):
                at += 2
                continue
            if opcode != commands.LOAD_STATE:
                name = commands.OPCODES.get(opcode)
                what = f"{name} is not for submitted streams" if name else f"opcode {opcode} does not exist"
                return [Fault("bad command", f"{what} ({word:#010x})", at)]
            if word >> 26 & 1:
                return [Fault("bad command", "LOAD_STATE with fixed-point conversion is not implemented", at)]
            count = word >> 16 & 0x3FF or 1024
            if at + 1 + count > len(words):
                return [Fault("bad command", f"LOAD_STATE of {count} words runs over the end of the stream", at)]
            for k in range(count):
                register, value = (word & 0xFFFF) * 4 + 4 * k, words[at + 1 + k]
                if register not in commands.REGISTERS:
                    return [Fault("bad command", f"register {register:#06x} is unknown", at + 1 + k)]
                self.registers[register] = value
                if register in self._start:
                    start, mask = self._start[register]
                    try:
                        start(value & mask)
                    except JobFault as fault:
                        return [Fault(fault.kind, fault.message, at + 1 + k, jobs, fault.address)]
                    jobs += 1
            at += 1 + count + (count + 1) % 2
        return []
