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
    """Run the command line and return its exit code."""
    try:
        result = command.main(arguments, prog_name="epochs", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        print("epochs: interrupted", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("epochs: interrupted; what was under way has been undone", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        if context is not None:
            print(context.get_usage(), file=sys.stderr)
        return _report("UsageError", error.format_message(), 2, arguments)
    except Exception as error:
        if os.environ.get("EPOCHS_DEBUG"):
            raise
        name, message, code, more = describe(error)
        return _report(name, message, code, arguments, more)


def _report(name: str, message: str, code: int, arguments: list[str],
            more: dict[str, Any] | None = None) -> int:
    print(f"epochs: {' '.join(message.split())}", file=sys.stderr)
    if "--json" in arguments[:4]:
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
    from blockcow import BlockError, LayerDamaged, SourceRefused
    from memsave.errors import MemoryDamaged, MemsaveError

    if isinstance(error, SourceRefused):
        return kind, str(error), 3 if "does not exist" in str(error) else 4, None
    if isinstance(error, LayerDamaged | MemoryDamaged):
        return kind, str(error), 6, {"findings": [{"file": str(error.path)}]}
    if isinstance(error, BlockError | MemsaveError):
        return kind, str(error), 5, None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return kind, (f"no space left while writing {error.filename or 'to the store'}; the "
                      "operation was undone: delete epochs or enlarge the file system"), 5, None
    if isinstance(error, OSError):
        return kind, f"{error.filename or 'an operation'}: {error.strerror or error}", 5, None
    return kind, (f"unexpected {kind}: {error}; set EPOCHS_DEBUG=1 to see where, and please "
                  "report it"), 5, None
