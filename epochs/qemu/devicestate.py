"""Device state without RAM: from ``xen-save-devices-state`` to a stream that loads anywhere.

The command (which has nothing to do with Xen but its name) writes a migration stream without the
configuration section that ``migrate-incoming`` expects on versioned machine types. The layout is
that of QEMU's migration/savevm.c: u32 magic "QEVM", u32 version 3, then sections; the
configuration section is u8 0x07, u32 length, the machine type's name (big endian).
"""

from __future__ import annotations

import struct

from epochs.errors import Failed

_HEADER = b"QEVM" + struct.pack(">I", 3)
_CONFIGURATION = 0x07


def with_configuration(stream: bytes, machine_type: str) -> bytes:
    """Insert the configuration section; Failed if this is not such a stream."""
    if not stream.startswith(_HEADER):
        raise Failed("QEMU's device state does not begin with a version 3 migration header")
    if stream[len(_HEADER)] == _CONFIGURATION:
        raise Failed("QEMU's device state already has a configuration section; this QEMU is "
                     "newer than what Epochs knows")
    name = machine_type.encode("ascii")
    section = struct.pack(">BI", _CONFIGURATION, len(name)) + name
    return _HEADER + section + stream[len(_HEADER):]
