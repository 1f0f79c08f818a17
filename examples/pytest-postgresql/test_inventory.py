"""Each test finds the database as it was at web@ready, and none of them cleans up."""

from __future__ import annotations

import pytest

from epochs import Machine


def sql(guest: Machine, statement: str) -> str:
    done = guest.exec(["runuser", "-u", "postgres", "--", "psql", "-qAtX", "-v", "ON_ERROR_STOP=1",
                       "-d", "demo", "-c", statement], timeout=60)
    assert done.status == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.fixture
def inventory(epochs_machine: Machine) -> Machine:
    """What every test here relies on."""
    assert sql(epochs_machine, "select count(*) from inventory") == "5000"
    return epochs_machine


def test_a_row_more(inventory: Machine) -> None:
    sql(inventory, "insert into inventory values (5001, 'new')")
    assert sql(inventory, "select note from inventory where id = 5001") == "new"


def test_the_row_is_not_there(inventory: Machine) -> None:
    assert sql(inventory, "select count(*) from inventory where id = 5001") == "0"


def test_the_table_dropped(inventory: Machine) -> None:
    sql(inventory, "drop table inventory")
    assert sql(inventory, "select to_regclass('inventory') is null") == "t"


def test_the_server_killed(inventory: Machine) -> None:
    assert inventory.exec(["pkill", "-9", "-x", "postgres"]).status == 0


def test_the_same_server_runs(inventory: Machine) -> None:
    """It was never started again: it is the process of the epoch."""
    assert sql(inventory, "select pg_postmaster_start_time() < now()") == "t"


def test_a_fork_to_compare_with(inventory: Machine, epochs_fork: Machine) -> None:
    sql(inventory, "update inventory set note = 'changed'")
    assert sql(epochs_fork, "select count(*) from inventory where note = 'changed'") == "0"
