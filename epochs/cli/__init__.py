"""The command line: it parses and prints, and decides nothing.

Commands live in one module per group and are imported when they are called, so that
``epochs --help`` loads click and nothing else. The table below is what ``--help`` shows.
"""

from __future__ import annotations

from importlib import import_module

import click

from epochs._version import __version__

# command: (module, one line of help)
COMMANDS = {
    "add": ("machines", "Register a machine."),
    "start": ("machines", "Boot a machine, or let a paused one go on."),
    "stop": ("machines", "Power a machine off."),
    "pause": ("machines", "Hold a machine's CPUs until it is started again."),
    "list": ("machines", "List machines."),
    "status": ("machines", "Show one machine."),
    "remove": ("machines", "Forget a machine and its present disks."),
    "console": ("guests", "Attach to the serial console (leave with Ctrl-])."),
    "exec": ("guests", "Run a command in the guest through its agent."),
    "screenshot": ("guests", "Write the display to a PNG file."),
    "create": ("states", "Make an epoch of a running machine."),
    "rollback": ("states", "Put a machine back to an epoch."),
    "fork": ("states", "Start new machines from an epoch."),
    "standby": ("standby", "Have instances of an epoch ready ahead of need."),
    "guard": ("guarding", "Run a command, and go back to before it if it fails."),
    "log": ("history", "Show the graph of epochs."),
    "show": ("history", "Show one epoch."),
    "diff": ("history", "Show what differs between two epochs."),
    "mount": ("mounts", "Look at the files of an epoch's disk, read-only."),
    "umount": ("mounts", "Take a mounted epoch down."),
    "import-xen": ("xen", "Make an epoch of a file that 'xl save' wrote."),
    "export-xen": ("xen", "Write an epoch of a domain for 'xl restore'."),
    "tag": ("history", "Tag an epoch."),
    "pool": ("pools", "Make and look after thin pools for disks."),
    "prune": ("guarding", "Delete epochs that a rule does not keep."),
    "every": ("guarding", "Write a systemd timer that makes and prunes epochs."),
    "delete": ("upkeep", "Delete epochs; all others stay intact."),
    "gc": ("upkeep", "Give back space that nothing needs."),
    "verify": ("upkeep", "Read every stored byte and report damage."),
    "recover": ("upkeep", "Settle what an interrupted command left."),
    "doctor": ("upkeep", "Say what this host can do, and what is missing."),
    "completion": ("upkeep", "Print a shell's completion script."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"epochs.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="epochs")
@click.option("--store", metavar="DIR", help="Where machines and epochs are kept "
              "(default: $EPOCHS_STORE, else your state directory).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.pass_context
def cli(ctx: click.Context, store: str | None, as_json: bool) -> None:
    """Live checkpoints, rollback and forks of virtual machines, memory and disks as one.

    EPOCH is an id, a unique prefix of one (4 characters or more), a tag, MACHINE (its newest
    epoch), MACHINE@TAG, or any of these with ~N for the Nth ancestor.
    """
    if store == "":
        raise click.UsageError("--store needs a directory, it was given an empty name")
    ctx.obj = {"store": store, "json": as_json}
