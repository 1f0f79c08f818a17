"""Builds the C core; everything else about the package stands in setup.cfg."""

from setuptools import Extension, setup

setup(
    cffi_modules=["memsave/build_native.py:ffi", "blockcow/build_devmapper.py:ffi"],
    ext_modules=[
        # Not a Python module: a library that the hypervisor loads through LD_PRELOAD.
        Extension(
            "memsave._tracker_preload",
            sources=["memsave/csrc/tracker_preload.c"],
            extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
        )
    ],
)
