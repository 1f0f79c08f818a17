"""Builds ``memsave._xen``, which talks to a running Xen, where its libraries are (see setup.py)."""

from pathlib import Path

from cffi import FFI

HEADER = Path(__file__).parent / "csrc" / "xen_live.h"
LIBRARIES = ["xenguest", "xenctrl", "xenstore", "xencall", "xentoollog", "xenlight"]


def available() -> bool:
    """Whether Xen's headers are installed (Debian: libxen-dev)."""
    return any((Path(place) / "xenguest.h").exists()
               for place in ("/usr/include", "/usr/local/include"))


ffi = FFI()
ffi.cdef("\n".join(line for line in HEADER.read_text().splitlines() if not line.startswith("#"))
         + '\nextern "Python" int ms_on_suspended(void *, int);')
ffi.set_source(
    "memsave._xen",
    '#include "xen_live.h"',
    sources=["memsave/csrc/xen_live.c", "memsave/csrc/xen_boot.c"],
    depends=["memsave/csrc/xen_live.h"],
    include_dirs=["memsave/csrc"],
    libraries=LIBRARIES,
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
