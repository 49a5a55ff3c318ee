"""Experiments with shaders of their own: images, constant memory, stores in local memory, mapped buffers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from npulab.errors import UnsupportedError
from npulab.gpu import opencl, shaders
from npulab.gpu.counting import Asked
from npulab.gpu.extras import in_order
from npulab.gpu.filled import Sums
from npulab.gpu.types import Order, Timing

MAPPABLE = "mappable-primary-buffers"
FORMATS = {4: "r32uint", 8: "rg32uint", 16: "rgba32uint"}
"""Of images, by bytes a texel: all devices read these (WebGPU, plain color formats)."""
CONSTANTS = 1 << 10
"""Vectors of 16 bytes in `constant`: the least that uniform blocks may have (Vulkan 1.3, maxUniformBufferRange)."""


class More(opencl.OpenCL):
    """Each is checked as those of OpenCL are."""

    wgpu: Any
    adapter: Any
    group: int
    """Threads of a group, and words of its local memory, in experiments."""
    words: int

    def local_write(self, stride: int, width: int = 4) -> Timing:
        words, lanes = self.words // (width // 4), width // 4  # of vectors
        kernel = self._kernel(self.kernels.local_write(self.words, width), "local_stores")
        group, threads, out = self._crowd()
        lids, factor = np.arange(group, dtype=np.uint64), 2654435761

        def run(turns: int) -> tuple[float, str]:
            seconds = self._time(kernel, (threads,), (group,), out, np.uint32(turns), np.uint32(stride),
                                 np.uint32(factor))
            many = turns * shaders.LOADED
            starts = np.unique(lids * stride % words)
            gaps = np.diff(starts, append=starts[0] + words).astype(np.int64)
            cells = np.zeros(words, np.uint64)  # those that no thread comes to stay 0
            for start, gap in zip(starts.tolist(), gaps.tolist(), strict=True):
                places = (start + np.arange(min(many, gap))) % words
                cells[places] = places * factor
            sums = np.array([lanes * cells[i::group].sum() for i in range(group)], np.uint64)
            want = ((lids * stride + many + sums) % (1 << 32)).astype(np.uint32)
            right = (self._read(out, threads).reshape(-1, group) == want).all()
            return seconds, "" if right else "local memory does not hold what was stored"

        return self._measured(run, Asked("stores", {"store bytes": width * shaders.LOADED}, 4), 1 << 18)

    def constant(self, spread: bool, width: int = 4) -> Timing:
        """Of a uniform block, whose arrays are of 16 bytes each."""
        if width == 8:
            raise UnsupportedError("uniform blocks have arrays of 16 bytes: one word of them is loaded, or all four")
        kernel = self._kernel(self.kernels.constant(CONSTANTS, spread, width), "constant")
        content = (np.arange(4 * CONSTANTS, dtype=np.uint64) * 2654435761 % (1 << 32)).astype(np.uint32)
        held = self._do(lambda: self.device.create_buffer_with_data(data=content, usage=self.wgpu.BufferUsage.UNIFORM))
        sums = content.reshape(-1, width // 4).sum(axis=1, dtype=np.uint64)
        group, threads, out = self._crowd()

        def run(turns: int) -> tuple[float, str]:
            seconds = self._time(kernel, (threads,), (group,), out, np.uint32(turns), held)
            found = self._read(out, threads)
            for i in (0, group - 1, threads - 1):
                at = (i % group * spread + np.arange(turns * shaders.LOADED)) % len(sums)
                want = int(sums[at].sum(dtype=np.uint64)) % (1 << 32)
                if int(found[i]) != want:
                    return seconds, f"thread {i} read {found[i]}, not {want}"
            return seconds, ""

        return self._measured(run, Asked("bytes", {"load bytes": width * shaders.LOADED}), 1 << 18)

    def map(self, size: int) -> Timing:
        """A buffer of `size` bytes made visible to the host, one word changed, and given back. work: "bytes"."""
        if MAPPABLE not in self.adapter.features:
            raise UnsupportedError("wgpu maps no buffers that shaders use on this device")
        usage = self.wgpu.BufferUsage
        buffer = self._do(lambda: self.device.create_buffer(
            size=size, usage=usage.STORAGE | usage.MAP_WRITE | usage.COPY_SRC))
        at, found = size // 16 * 8, []
        for n in range(opencl.REPEATS + 1):
            start = time.perf_counter()
            self._do(lambda: buffer.map_sync("WRITE"))
            buffer.write_mapped(np.array([n], np.uint32), at)
            self._do(buffer.unmap)
            found.append(time.perf_counter() - start)
        last = np.frombuffer(self._do(lambda: self.device.queue.read_buffer(buffer, at, 4)), np.uint32)[0]
        return Timing(tuple(found[1:]), {"bytes": float(size)}, "" if last == n else "a word did not arrive")

    def image(self, footprint: int, texel: int = 16, order: Order = "rows") -> Timing:
        """`footprint` may be up to a row less, in other orders than rows a power of two."""
        columns = 1 << ((footprint // texel).bit_length() - 1) // 2
        rows = footprint // texel // columns
        if order != "rows":
            rows = 1 << rows.bit_length() - 1
        most = int(self.adapter.limits["max-texture-dimension-2d"])
        if max(columns, rows) > most or min(columns, rows) < (shaders.TILE if order == "tiles" else 1):
            raise UnsupportedError("an image has no such size", got=f"{rows} rows", want=f"1 to {most}")
        size, lanes = rows * columns, texel // 4
        data = ((np.arange(lanes * size, dtype=np.uint32) * np.uint32(2654435761)) >> np.uint32(7)).reshape(size, lanes)
        row = {"rows": columns, "columns": rows, "tiles": columns // shaders.TILE}[order]
        kernel = self._kernel(self.kernels.image(row, texel, order), "image")
        group, threads, out = self._crowd()
        offset = max(1, size // (threads // group))
        spots = np.random.default_rng(0).integers(0, threads, opencl.SPOT_CHECKS)
        sums = Sums(in_order(data.reshape(rows, columns, lanes).sum(axis=2, dtype=np.uint32), order))

        def made() -> Any:
            usage = self.wgpu.TextureUsage
            texture = self.device.create_texture(size=(columns, rows, 1), format=FORMATS[texel],
                                                 usage=usage.TEXTURE_BINDING | usage.COPY_DST)
            self.device.queue.write_texture({"texture": texture}, data, {"bytes_per_row": texel * columns,
                                                                         "rows_per_image": rows}, (columns, rows, 1))
            return texture.create_view()

        view = self._do(made)

        def run(turns: int) -> tuple[float, str]:
            seconds = self._time(kernel, (threads,), (group,), out, np.uint32(size), np.uint32(offset),
                                 np.uint32(turns), view)
            return seconds, self._checked("read", out, sums, spots, group, offset, 1, group % size, turns)

        each = shaders.STREAMED["read"]
        return self._measured(run, Asked("bytes", {"load bytes": texel * each}, texel=texel),
                              whole=-(-size // (threads * each)))

    def _crowd(self) -> tuple[int, int, Any]:
        """(threads of a group, threads that fill the device, a word for each)."""
        threads = self.group * self.limits.compute_units * opencl.GROUPS_A_UNIT
        return self.group, threads, self._buffer(np.zeros(threads, np.uint32))
