"""Fixtures of several modules."""

import pytest

from npulab.cli import run_arguments
from npulab.gpu import opencl, vulkan


@pytest.fixture
def npulab(capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = run_arguments([str(a) for a in arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture(scope="module")
def opencl_bench():
    """The first OpenCL device, to be measured."""
    pytest.importorskip("pyopencl", reason="needs OpenCL: pip install 'npulab[gpu]'")
    if not opencl.devices():
        pytest.skip("needs an OpenCL device: apt install pocl-opencl-icd")
    return opencl.open_device(0)


@pytest.fixture(scope="module")
def device(opencl_bench):
    """The same, to compute on."""
    from npulab.gpu.compute.device import Device

    return Device(0)


@pytest.fixture(scope="module")
def vulkan_bench():
    """The first Vulkan device."""
    pytest.importorskip("wgpu", reason="needs wgpu: pip install 'npulab[vulkan]'")
    if not vulkan.devices():
        pytest.skip("needs a Vulkan device: apt install mesa-vulkan-drivers")
    return vulkan.open_device(0)
