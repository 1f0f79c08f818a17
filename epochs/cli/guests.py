"""Guests: console, exec, screenshot."""

from __future__ import annotations

import base64
import os
import select
import sys
from pathlib import Path

import click

from epochs.cli.machines import machine_argument
from epochs.cli.output import emit, notice, opened

ESCAPE = b"\x1d"  # Ctrl-]


@click.command("console")
@machine_argument
@click.option("--log", is_flag=True, help="Print what it said since the machine was added.")
@click.pass_context
def console_command(ctx: click.Context, name: str, log: bool) -> None:
    """Attach to the serial console; leave with Ctrl-]."""
    with opened(ctx) as store:
        machine = store.machine(name)
        if log:
            data = machine.console_log.read_bytes() if machine.console_log.exists() else b""
            sys.stdout.buffer.write(data)
            return
        console = machine.open_console()
    try:
        if sys.stdin.isatty():
            notice(f"connected to '{name}'; leave with Ctrl-]")
            _raw_terminal(console)
        else:
            _bridge(console)
    finally:
        os.close(console)


def _raw_terminal(console: int) -> None:
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        _bridge(console)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        print(file=sys.stderr)


def _bridge(console: int) -> None:
    """Copy both ways until the guest hangs up, input ends, or the escape key."""
    source = sys.stdin.fileno()
    while True:
        ready = select.select([source, console], [], [])[0]
        if console in ready:
            data = os.read(console, 65536)
            if not data:
                return
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        if source in ready:
            typed = os.read(source, 4096)
            if not typed or ESCAPE in typed:
                _send(console, typed.partition(ESCAPE)[0])
                return
            _send(console, typed)


def _send(console: int, data: bytes) -> None:
    while data:
        data = data[os.write(console, data):]


class GuestCommand(click.Command):
    """Options after NAME belong to the guest's command, unless a "--" says where that begins."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = "--" in args
        return super().parse_args(ctx, args)


@click.command("exec", cls=GuestCommand, context_settings={"ignore_unknown_options": True})
@click.option("--timeout", type=float, help="Seconds to wait for it (default: for ever).")
@click.option("--stdin", "with_input", is_flag=True, help="Give it our standard input.")
@machine_argument
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def exec_command(ctx: click.Context, name: str, timeout: float | None, with_input: bool,
                 argv: tuple[str, ...]) -> int:
    """Run a command in the guest; its exit status is ours."""
    data = sys.stdin.buffer.read() if with_input else None
    with opened(ctx) as store:
        done = store.machine(name).exec(list(argv), stdin=data, timeout=timeout)
    if ctx.obj["json"]:
        emit(ctx, {"machine": name, "status": done.status, "truncated": done.truncated,
                   **_text("stdout", done.stdout), **_text("stderr", done.stderr)}, "")
    else:
        sys.stdout.buffer.write(done.stdout)
        sys.stdout.buffer.flush()
        sys.stderr.buffer.write(done.stderr)
        sys.stderr.buffer.flush()
        if done.truncated:
            notice("the output was longer than the guest agent passes on")
    return done.status


def _text(key: str, data: bytes) -> dict[str, str]:
    try:
        return {key: data.decode()}
    except UnicodeDecodeError:
        return {f"{key}_base64": base64.b64encode(data).decode()}


@click.command("screenshot")
@machine_argument
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.pass_context
def screenshot_command(ctx: click.Context, name: str, file: Path) -> None:
    """Write the display to a PNG file."""
    with opened(ctx) as store:
        file.write_bytes(store.machine(name).screenshot())
    emit(ctx, {"machine": name, "file": str(file)}, f"written to {file}")
