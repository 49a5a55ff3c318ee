"""Small programs made by hand, and a device that does one thing: no compiler, no virtual NPU."""

from __future__ import annotations

import numpy as np

from npulab.exporters.tflite_builder import ModelBuilder
from npulab.program.types import (
    HostNode,
    HostStep,
    Job,
    NpuStep,
    Program,
    Section,
    SectionKind,
    Tensor,
    Transfer,
)
from npulab.runtime.device import Fault

INPUT, OUTPUT = 0x800000, 0x801000
SHAPE = (1, 2, 4, 8)
SIZE = 64


def softmax_model(shape=SHAPE):
    m = ModelBuilder("part")
    a = m.tensor("a", shape, "int8", scale=0.1, zero_point=0)
    b = m.tensor("b", shape, "int8", scale=1 / 256, zero_point=-128)
    m.op("SOFTMAX", [a], [b], beta=1.0)
    return m.build([a], [b])


def program(**changed):
    """int8 `x` -> an NPU step with an NN and a TP job -> `y` -> a softmax on the host -> `p`."""
    words = (0, 0, 0x08010E00, 1, 0x08010E01, 2, 0, 0)
    fields = {
        "target": "a311d", "plan": "best", "model": "hand", "digest": "ab" * 32, "init": (0x08010E03, 5),
        "sections": (
            Section("in", SectionKind.TENSOR, INPUT, SIZE, None),
            Section("out", SectionKind.TENSOR, OUTPUT, SIZE, None),
            Section("coefficients", SectionKind.COEFFICIENTS, 0x802000, 100, bytes(range(100))),
            Section("descriptors", SectionKind.DESCRIPTOR, 0x803000, 512, bytes(range(256)) * 2),
        ),
        "steps": (
            NpuStep(nodes=(0, 1), uploads=(Transfer(0, INPUT, SIZE, True),), words=words, jobs=(
                Job(0, "nn", "convolution", (0,), (0x803000,), (2, 2), (0x802000, 100), 4096),
                Job(1, "tp", "transpose", (1,), (0x803100, 0x803180), (4, 2)),
            ), downloads=(Transfer(1, OUTPUT, SIZE, True),)),
            HostStep((2,), (1,), (2,), softmax_model()),
        ),
        "tensors": (Tensor(0, "x", "int8", SHAPE, 0.1, 0), Tensor(1, "y", "int8", SHAPE, 0.1, 0),
                    Tensor(2, "p", "int8", SHAPE, 1 / 256, -128)),
        "inputs": (0,), "outputs": (2,),
        "host_nodes": (HostNode(2, "SOFTMAX", ("Softmax runs on the host.",)),),
        "ops": ("CONV_2D", "RESHAPE", "SOFTMAX"),
    }
    return Program(**(fields | changed))


class AddOne:
    """A device whose every stream adds one to each byte of `in` and writes it to `out`."""

    def __init__(self, faults=()):
        self.memory = {}
        self.streams = []
        self.faults = list(faults)

    def map(self, name, address, size, data):
        self.memory[address] = np.zeros(size, np.uint8)

    def write(self, address, data):
        self.memory[address][: len(data)] = data

    def read(self, address, size):
        return self.memory[address][:size]

    def submit(self, words):
        self.streams.append(tuple(words))
        self.memory[OUTPUT][:] = self.memory[INPUT] + np.uint8(1)
        return self.faults


FAULT = Fault("unmapped", "reads 64 bytes that no section holds", 12, 3, 0x900000)
