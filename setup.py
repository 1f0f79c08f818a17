"""Builds the C core; everything else about the package stands in setup.cfg."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup


def has_xen() -> bool:
    """Asked of the module that builds it: the package itself cannot be imported yet."""
    path = Path(__file__).parent / "memsave" / "build_xen.py"
    spec = importlib.util.spec_from_file_location("build_xen", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.available()


setup(
    cffi_modules=["memsave/build_native.py:ffi", "blockcow/build_devmapper.py:ffi",
                  *(["memsave/build_xen.py:ffi"] if has_xen() else [])],
    ext_modules=[
        # Not a Python module: a library that the hypervisor loads through LD_PRELOAD.
        Extension(
            "memsave._tracker_preload",
            sources=["memsave/csrc/tracker_preload.c"],
            extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
        )
    ],
)
