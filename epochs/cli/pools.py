"""Thin pools: pool create, list, status, extend, remove."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from epochs.cli import output
from epochs.cli.output import emit, opened

if TYPE_CHECKING:
    from epochs.protocol.pools import PoolState


@click.group("pool")
def pool_command() -> None:
    """Make and look after thin pools, which keep disks on device-mapper."""


pool_argument = click.argument("name")


@pool_command.command("create")
@pool_argument
@click.argument("path", metavar="DEVICE|FILE", type=click.Path(path_type=Path))
@click.option("--size", metavar="SIZE", help="Make a file of that size, like 20G.")
@click.option("--force", is_flag=True, help="Take a device that holds something, and destroy that.")
@click.pass_context
def create_command(ctx: click.Context, name: str, path: Path, size: str | None,
                   force: bool) -> None:
    """Make a pool on a block device, or on a file."""
    from epochs.spec import parse_size

    with opened(ctx) as store:
        made = store.create_pool(name, path, size=parse_size(size) if size else None, force=force)
        emit(ctx, made.to_json(), f"pool '{name}' made on {path}: {_room(made)}")


@pool_command.command("list")
@click.pass_context
def list_command(ctx: click.Context) -> None:
    """List pools."""
    with opened(ctx) as store:
        pools = store.pools()
        emit(ctx, {"pools": [pool.to_json() for pool in pools]},
             output.table(("NAME", "LAYERS", "LIVE", "FREE", "ON"), [
                 (pool.record.name, str(pool.layers), "yes" if pool.live else "no",
                  pool.trouble or _room(pool), pool.record.path) for pool in pools])
             if pools else "no pools; 'epochs pool create NAME DEVICE' makes one")


@pool_command.command("status")
@pool_argument
@click.pass_context
def status_command(ctx: click.Context, name: str) -> None:
    """Show one pool."""
    with opened(ctx) as store:
        pool = store.pool(name)
        emit(ctx, pool.to_json(), "\n".join((
            f"pool      {name} (id {pool.record.id})", f"on        {pool.record.path}",
            f"layers    {pool.layers}", f"in use    {'yes' if pool.live else 'no'}",
            f"free      {pool.trouble or _room(pool)}")))


@pool_command.command("extend")
@pool_argument
@click.option("--size", metavar="SIZE", help="Make its file that large first, like 40G.")
@click.pass_context
def extend_command(ctx: click.Context, name: str, size: str | None) -> None:
    """Let a pool have what its device became larger by. Guests that wait for space go on."""
    from epochs.spec import parse_size

    with opened(ctx) as store:
        pool = store.extend_pool(name, size=parse_size(size) if size else None)
        emit(ctx, pool.to_json(), f"pool '{name}': {pool.trouble or _room(pool)}")


@pool_command.command("remove")
@pool_argument
@click.pass_context
def remove_command(ctx: click.Context, name: str) -> None:
    """Give a pool's device back, empty. A pool that holds layers is refused."""
    with opened(ctx) as store:
        store.remove_pool(name)
        emit(ctx, {"pool": name}, f"pool '{name}' removed")


def _room(pool: PoolState) -> str:
    room = pool.room
    if room is None:
        return ""
    return (f"{output.size(room.data)} of {output.size(room.data_total)} free, metadata "
            f"{output.size(room.metadata)} of {output.size(room.metadata_total)}")
