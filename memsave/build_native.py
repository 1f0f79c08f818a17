"""Builds ``memsave._native``, the C core, with cffi in API mode (see setup.py)."""

from pathlib import Path

from cffi import FFI

CORE = Path("memsave/csrc")  # setuptools wants paths relative to setup.py
SOURCES = ["kernels", "kernels_scalar", "kernels_avx2", "runs", "packs", "classify", "guest",
           "xen_read", "xen_canonical", "xen_write"]


def _declarations() -> str:
    """api.h without preprocessor lines, which cffi does not take."""
    header = Path(__file__).parent / "csrc" / "api.h"
    return "\n".join(line for line in header.read_text().splitlines() if not line.startswith("#"))


ffi = FFI()
ffi.cdef(_declarations())
ffi.set_source(
    "memsave._native",
    '#include "api.h"',
    sources=[str(CORE / f"{name}.c") for name in SOURCES],
    depends=[str(path) for path in sorted(CORE.glob("*.h"))],
    include_dirs=[str(CORE)],
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-Werror", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
