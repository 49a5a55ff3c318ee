"""The one part of the build that pyproject.toml cannot say: C modules that may fail to build."""

from setuptools import Extension, setup


def module(name: str, *depends: str) -> Extension:
    return Extension(f"npulab.{name}", [f"src/npulab/{name}.c"], depends=list(depends), py_limited_api=True,
                     optional=True, extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"])


setup(ext_modules=[module("_kernels"), module("_floats", "src/npulab/_floats_lanes.h")],
      options={"bdist_wheel": {"py_limited_api": "cp311"}})
