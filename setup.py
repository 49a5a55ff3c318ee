"""The one part of the build that pyproject.toml cannot say: C modules that may fail to build."""

from setuptools import Extension, setup


def extension(name: str, *arguments: str) -> Extension:
    return Extension(f"npulab.{name}", [f"src/npulab/{name}.c"], py_limited_api=True, optional=True,
                     extra_compile_args=["-O3", *arguments])


setup(ext_modules=[extension("_kernels", "-fno-math-errno", "-fno-trapping-math"), extension("_sums", "-fwrapv")],
      options={"bdist_wheel": {"py_limited_api": "cp311"}})
