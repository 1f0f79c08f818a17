"""Builds ``blockcow._devmapper``, the binding to libdevmapper, with cffi in API mode.

The package works without it; only the backends of device-mapper need it. Where the library's header
is missing (Debian: libdevmapper-dev) it is therefore left out, and `epochs doctor` says so.
"""

from pathlib import Path

from cffi import FFI

SOURCE = Path("blockcow/csrc")  # setuptools wants paths relative to setup.py

# Of the library itself, as libdevmapper.h declares them.
LIBRARY = """
struct dm_task;
void dm_task_destroy(struct dm_task *dmt);
int dm_task_set_uuid(struct dm_task *dmt, const char *uuid);
int dm_task_set_newname(struct dm_task *dmt, const char *newname);
int dm_task_set_ro(struct dm_task *dmt);
int dm_task_set_message(struct dm_task *dmt, const char *message);
int dm_task_set_sector(struct dm_task *dmt, uint64_t sector);
int dm_task_set_event_nr(struct dm_task *dmt, uint32_t event_nr);
int dm_task_no_flush(struct dm_task *dmt);
int dm_task_skip_lockfs(struct dm_task *dmt);
int dm_task_retry_remove(struct dm_task *dmt);
int dm_task_set_cookie(struct dm_task *dmt, uint32_t *cookie, uint16_t flags);
int dm_task_add_target(struct dm_task *dmt, uint64_t start, uint64_t size, const char *ttype,
                       const char *params);
void *dm_get_next_target(struct dm_task *dmt, void *next, uint64_t *start, uint64_t *length,
                         char **target_type, char **params);
const char *dm_task_get_message_response(struct dm_task *dmt);
void dm_hold_control_dev(int hold_open);
void dm_udev_set_sync_support(int sync_with_udev);
int dm_udev_get_sync_support(void);
int dm_udev_create_cookie(uint32_t *cookie);
int dm_udev_wait(uint32_t cookie);
"""


def _declarations() -> str:
    """devmapper.h without preprocessor lines, which cffi does not take."""
    header = Path(__file__).parent / "csrc" / "devmapper.h"
    return "\n".join(line for line in header.read_text().splitlines() if not line.startswith("#"))


ffi = FFI()
ffi.cdef(LIBRARY + _declarations())
ffi.set_source(
    "blockcow._devmapper",
    '#include <libdevmapper.h>\n#include "devmapper.h"',
    sources=[str(SOURCE / "devmapper.c")],
    depends=[str(SOURCE / "devmapper.h")],
    include_dirs=[str(SOURCE)],
    libraries=["devmapper"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
    optional=not Path("/usr/include/libdevmapper.h").exists(),
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
