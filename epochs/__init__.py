"""Epochs: live checkpoints, rollback and forks of virtual machines, memory and disks as one.

``from epochs import Store`` is the way in; see :mod:`epochs.api`. Names are loaded when first used,
so that ``epochs --help`` does not pay for the hypervisor driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epochs._version import __version__

if TYPE_CHECKING:
    from epochs.api import Epoch, Machine, Store
    from epochs.spec import DiskSpec, MachineSpec

__all__ = ["DiskSpec", "Epoch", "Machine", "MachineSpec", "Store", "__version__"]

_HOME = {"Store": "epochs.api", "Machine": "epochs.api", "Epoch": "epochs.api",
         "MachineSpec": "epochs.spec", "DiskSpec": "epochs.spec"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'epochs' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
