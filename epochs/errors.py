"""The exception tree; every exit code of the command line has its class here.

::

    EpochsError            5  failed; guest and data intact
     ├─ UsageError         2  the request makes no sense as written
     ├─ NotFound           3  no such machine, epoch, tag, disk
     ├─ Refused            4  a check said no before anything was changed
     │   ├─ Busy           4  another command holds the machine or the store
     │   └─ Incompatible   4  this host's hypervisor cannot load the epoch
     ├─ Failed             5  something broke on the way and was undone
     │   └─ HypervisorDied 5  the hypervisor's process ended; carries its own words
     └─ Damaged            6  stored bytes are not those that were written

A message is one sentence that names the thing, the reason and the mend.
"""

from __future__ import annotations


class EpochsError(Exception):
    """Base class; ``exit_code`` is what the command line ends with."""

    exit_code = 5


class UsageError(EpochsError):
    """The request makes no sense as written."""

    exit_code = 2


class NotFound(EpochsError):
    """A machine, epoch, tag or disk that does not exist."""

    exit_code = 3


class Refused(EpochsError):
    """A check said no; nothing was changed."""

    exit_code = 4


class Busy(Refused):
    """Another command holds the machine or the store and did not finish in time."""


class Incompatible(Refused):
    """The epoch was made by a hypervisor or for devices that this host does not offer."""


class Failed(EpochsError):
    """An operation broke on the way; it was undone, guest and data are intact."""

    exit_code = 5


class HypervisorDied(Failed):
    """The hypervisor's process ended unexpectedly; the message quotes its last words."""


class Damaged(EpochsError):
    """Stored bytes are not those that were written; ``findings`` lists epoch and file."""

    exit_code = 6

    def __init__(self, message: str, findings: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.findings = findings or []
