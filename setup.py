"""The one part of the build that pyproject.toml cannot say: C modules that may fail to build."""

from setuptools import Extension, setup


def extension(name: str, *arguments: str, depends: tuple[str, ...] = ()) -> Extension:
    return Extension(f"npulab.{name}", [f"src/npulab/{name}.c"], depends=[f"src/npulab/{d}" for d in depends],
                     py_limited_api=True, optional=True, extra_compile_args=["-O3", *arguments])


setup(ext_modules=[extension("_kernels", "-fno-math-errno", "-fno-trapping-math"), extension("_sums", "-fwrapv"),
                   extension("_rounding", "-fno-math-errno", "-fno-trapping-math"),
                   extension("_floats", "-fno-math-errno", "-fno-trapping-math", depends=("_floats_lanes.h",))],
      options={"bdist_wheel": {"py_limited_api": "cp311"}})
