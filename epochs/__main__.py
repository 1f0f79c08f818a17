"""``python -m epochs`` and the console script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; never returns."""
    from epochs.cli import cli
    from epochs.cli.failures import run

    sys.exit(run(cli, sys.argv[1:]))


if __name__ == "__main__":
    main()
