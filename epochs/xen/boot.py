"""The process that builds a domain with libxl: its configuration comes on standard input, and what
went wrong goes to standard error. It is a process of its own because libxl forks and waits for
children, and because that of a killed command must be found (:mod:`epochs.xen.toolstack`)."""

from __future__ import annotations

import sys

from memsave.errors import MemsaveError
from memsave.xen.live import boot


def main() -> int:
    try:
        boot(sys.stdin.buffer.read())
    except MemsaveError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
