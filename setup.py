"""The one part of the build that pyproject.toml cannot say: a C module that may fail to build."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("npulab._kernels", ["src/npulab/_kernels.c"], py_limited_api=True, optional=True,
                             extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"])],
      options={"bdist_wheel": {"py_limited_api": "cp311"}})
