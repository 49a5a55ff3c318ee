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


def first(interface, package, extra, driver):
    """The first device of an interface, to be measured; where there is none, who asks is skipped."""
    name = interface.__name__.rpartition(".")[2]
    pytest.importorskip(package, reason=f"needs {package}: pip install 'npulab[{extra}]'")
    if not interface.devices():
        pytest.skip(f"needs a device of {name}: apt install {driver}")
    return interface.open_device(0)


@pytest.fixture(scope="module")
def opencl_bench():
    return first(opencl, "pyopencl", "gpu", "pocl-opencl-icd")


@pytest.fixture(scope="module")
def vulkan_bench():
    return first(vulkan, "wgpu", "vulkan", "mesa-vulkan-drivers")


@pytest.fixture(scope="module")
def device(opencl_bench):
    """The first OpenCL device, to compute on."""
    from npulab.gpu.compute.device import Device

    return Device(0)
