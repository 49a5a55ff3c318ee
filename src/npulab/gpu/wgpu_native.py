"""What wgpu's library can do and its Python does not name. Each falls back to what is public."""

from __future__ import annotations

from typing import Any


def tick(device: Any) -> float:
    """Seconds of a tick of timestamps; 1 ns where wgpu has made them such already."""
    try:
        from wgpu.backends.wgpu_native._ffi import lib

        return float(lib.wgpuQueueGetTimestampPeriod(device.queue._internal)) * 1e-9 or 1e-9
    except (ImportError, AttributeError):
        return 1e-9


def wait(device: Any) -> None:
    """Until all that was submitted has ended. (The public call fails in wgpu 0.32: a callback of another type.)"""
    try:
        from wgpu.backends.wgpu_native import _api
        from wgpu.backends.wgpu_native._ffi import ffi

        _api.libf.wgpuDevicePoll(device._internal, True, ffi.NULL)
    except (ImportError, AttributeError):
        device.queue.on_submitted_work_done_sync()


def trusted(device: Any, code: bytes) -> Any:
    """A shader module without guards of memory and loops; with them if that cannot be had."""
    try:
        from wgpu.backends.wgpu_native import _api
        from wgpu.backends.wgpu_native._ffi import ffi, lib

        words = ffi.new("uint8_t[]", code)
        source = ffi.new("WGPUShaderSourceSPIRV *")
        source.chain.next, source.chain.sType = ffi.NULL, lib.WGPUSType_ShaderSourceSPIRV
        source.codeSize, source.code = len(code) // 4, ffi.cast("uint32_t *", words)
        asked = ffi.new("WGPUShaderModuleDescriptor *")
        asked.nextInChain = ffi.cast("WGPUChainedStruct *", source)
        found = _api.libf.wgpuDeviceCreateShaderModuleTrusted(device._internal, asked, lib.WGPUShaderRuntimeChecks_None)
        return _api.GPUShaderModule("", found, device)
    except (ImportError, AttributeError):
        return device.create_shader_module(code=code)
