"""Logical volumes to put disks on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GROUP = "vg"


def lvm(*arguments: str) -> str:
    """One command of LVM's own; raises if it fails."""
    return subprocess.run(["lvm", *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def group(device: str, pool: str | None = None) -> Iterator[None]:
    """A volume group on a device, with a thin pool of that size if one is asked for."""
    lvm("vgcreate", "--quiet", "--yes", GROUP, device)
    try:
        if pool:
            lvm("lvcreate", "--quiet", "--size", pool, "--thinpool", f"{GROUP}/pool")
        yield
    finally:
        lvm("vgremove", "--quiet", "--yes", GROUP)
        lvm("pvremove", "--quiet", "--yes", device)


def volume(name: str, image: Path, *, thin: bool) -> str:
    """A volume with the content of an image; returns its node."""
    size = f"{image.stat().st_size}b"
    if thin:
        lvm("lvcreate", "--quiet", "--virtualsize", size, "--thinpool", f"{GROUP}/pool",
            "--name", name)
    else:
        lvm("lvcreate", "--quiet", "--yes", "--size", size, "--name", name, GROUP)
    # An ordinary volume holds whatever was there before.
    subprocess.run(["dd", f"if={image}", f"of=/dev/{GROUP}/{name}", "bs=1M",
                    "conv=sparse,fsync" if thin else "conv=fsync", "oflag=direct", "status=none"],
                   check=True)
    return f"/dev/{GROUP}/{name}"


def volumes() -> list[dict[str, Any]]:
    """What LVM reports of its volumes."""
    text = lvm("lvs", "--reportformat", "json", "--options",
               "lv_name,lv_tags,origin,lv_active,lv_device_open,pool_lv,transaction_id")
    found: list[dict[str, Any]] = json.loads(text)["report"][0]["lv"]
    return found
