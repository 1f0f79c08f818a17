"""Builds ``memsave._native``, the C core, with cffi in API mode (see setup.py)."""

from pathlib import Path

from cffi import FFI

CORE = Path("memsave/csrc")  # setuptools wants paths relative to setup.py
SOURCES = ["scan", "copy", "pages"]

ffi = FFI()
ffi.cdef((Path(__file__).parent / "csrc" / "memsave_api.h").read_text())
ffi.set_source(
    "memsave._native",
    '#include "memsave.h"',
    sources=[str(CORE / f"{name}.c") for name in SOURCES],
    depends=[str(path) for path in sorted(CORE.glob("*.h"))],
    include_dirs=[str(CORE)],
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-Werror"],
)
