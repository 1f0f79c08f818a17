"""From exceptions to one sentence on standard error and an exit code (docs/errors.md)."""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import Any

import click

INTERRUPTED = 130


def run(command: click.Command, arguments: list[str]) -> int:
    """Run the command line and return its exit code.

    click's own ``main`` is not used: it turns KeyboardInterrupt into Abort and every EPIPE, also
    that of a hypervisor's socket, into a silent exit 1.
    """
    code = 0  # a reader that wants no more is no error
    try:
        code = _run(command, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # else Python complains when it flushes at its end
        os.close(null)
    return code


def _run(command: click.Command, arguments: list[str]) -> int:
    try:
        if "_EPOCHS_COMPLETE" in os.environ:
            return int(command.main(arguments, prog_name="epochs", standalone_mode=False) or 0)
        with command.make_context("epochs", list(arguments)) as context:
            result = command.invoke(context)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _report("Interrupted", "interrupted; what was under way has been undone",
                       INTERRUPTED, arguments)
    except click.ClickException as error:
        context_of = getattr(error, "ctx", None)
        if context_of is not None:
            print(context_of.get_usage(), file=sys.stderr)
        return _report("UsageError", error.format_message(), 2, arguments)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise
        if os.environ.get("EPOCHS_DEBUG"):
            import traceback

            traceback.print_exception(error)
        name, message, code, more = describe(error)
        return _report(name, message, code, arguments, more)


def _reader_left() -> bool:
    """Whether nobody reads our standard output any more."""
    import select

    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False  # not a file of the system


def _wants_json(arguments: list[str]) -> bool:
    """Whether --json stands before the command, where it is ours."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--json":
            return True
        if argument == "--store":
            next(rest, None)
        elif not argument.startswith("-"):
            return False
    return False


def _report(name: str, message: str, code: int, arguments: list[str],
            more: dict[str, Any] | None = None) -> int:
    print(f"epochs: {' '.join(message.split())}", file=sys.stderr)
    if _wants_json(arguments):
        print(json.dumps({"error": {"kind": name, "message": message, "exit_code": code,
                                    **(more or {})}}, indent=2))
    return code


def describe(error: Exception) -> tuple[str, str, int, dict[str, Any] | None]:
    """Kind, sentence, exit code and further JSON fields of an exception."""
    from epochs.errors import Damaged, EpochsError
    from epochs.points import FaultInjected

    kind = type(error).__name__
    if isinstance(error, Damaged):
        return kind, str(error), error.exit_code, {"findings": error.findings}
    if isinstance(error, EpochsError):
        return kind, str(error), error.exit_code, None
    if isinstance(error, FaultInjected):
        return kind, str(error), 5, None
    from blockcow import BlockDamaged, BlockError, BlockRefused, LayerDamaged, SourceRefused
    from memsave.errors import MemoryDamaged, MemsaveError, XenMissing

    if isinstance(error, SourceRefused):
        return kind, str(error), 3 if "does not exist" in str(error) else 4, None
    if isinstance(error, BlockRefused | XenMissing):
        return kind, str(error), 4, None
    if isinstance(error, LayerDamaged | MemoryDamaged):
        return kind, str(error), 6, {"findings": [{"file": str(error.path)}]}
    if isinstance(error, BlockDamaged):
        return kind, str(error), 6, None
    if isinstance(error, BlockError | MemsaveError):
        return kind, str(error), 5, None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return kind, (f"no space left while writing {error.filename or 'to the store'}; the "
                      "operation was undone: delete epochs or enlarge the file system"), 5, None
    if isinstance(error, OSError):
        return kind, f"{error.filename or 'an operation'}: {error.strerror or error}", 5, None
    if type(error).__module__ == "sqlite3":  # not imported for its name alone
        return kind, (f"the store's catalog cannot be used: {error}; 'epochs doctor' looks at the "
                      "store"), 5, None
    return kind, (f"unexpected {kind}: {error}; set EPOCHS_DEBUG=1 to see where, and please "
                  "report it"), 5, None
