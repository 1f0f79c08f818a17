"""The pytest plugin: tests whose guest is put back to an epoch before each of them.

::

    @pytest.mark.epoch("web@ready")
    def test_shop(epochs_machine):
        assert epochs_machine.exec(["curl", "-fs", "localhost"]).status == 0

The machine that a test gets is a fork of this process, so that those of pytest-xdist's workers
do not meet, and the user's own machine is left alone. It is made once per epoch and rolled back
from then on. Registered as the entry point ``epochs`` of ``pytest11``; loaded with every pytest, so
what is heavy is imported on use.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from epochs.api import Epoch, Machine, Store

NAME = "pytest-{process}-{number}"
OURS = re.compile(r"pytest-(\d+)-(\d+)-\d+")  # pid, and when it began, as /proc has it

Times = dict[str, list[float]]  # "resets" and "forks": seconds of each
TIMES = pytest.StashKey[Times]()
HARNESS = pytest.StashKey["Harness"]()
USED = pytest.StashKey[list["Machine"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("epochs", "machines that are put back to an epoch")
    group.addoption("--epochs-store", metavar="DIR",
                    help="where machines and epochs are kept (default: $EPOCHS_STORE, else your "
                         "state directory)")
    group.addoption("--epochs-keep-failed", action="store_true",
                    help="keep the state of a guest whose test failed as an epoch")
    group.addoption("--epochs-report", metavar="FILE", type=Path,
                    help="write the seconds of each reset and fork there, as JSON")
    group.addoption("--epochs-standby", metavar="N", type=int, default=0,
                    help="have N instances ready for resets, made in the background (default: 0; "
                         "pays where tests leave a CPU idle for a tenth of a second)")
    parser.addini("epochs_epoch", "epoch for tests without a marker of their own")
    parser.addini("epochs_fixup", "set the guest's clock and renew its random numbers after each "
                  "reset (default: no, so that each begins exactly as the epoch was)", type="bool")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "epoch(EPOCH): the epoch that epochs_machine and "
                                       "epochs_fork begin with, like \"web@ready\"")
    times: Times = {"resets": [], "forks": []}
    config.stash[TIMES] = times


class Harness:
    """The forks of this process, one for each epoch that tests asked for."""

    def __init__(self, store: Store, times: Times, fixup: bool, standby: int = 0) -> None:
        self.store, self.times, self._fixup, self._standby = store, times, fixup, standby
        self.kept: set[str] = set()
        self._machines: dict[str, Machine] = {}
        self._count = 0

    def reset(self, epoch: Epoch) -> Machine:
        """The machine of an epoch, as it was then."""
        from epochs.errors import NotFound

        machine = self._machines.get(epoch.id)
        if machine is not None:
            began = time.perf_counter()
            with contextlib.suppress(NotFound):  # a test may have removed it
                self._forget_epochs(machine)
                machine.rollback(epoch, keep=False, fixup=self._fixup, running=True)
                self.times["resets"].append(time.perf_counter() - began)
                return machine
        machine = self._machines[epoch.id] = self.fork(epoch)
        if self._standby:
            self.store.standby(epoch, self._standby, machine=machine.name, fixup=self._fixup)
        return machine

    def fork(self, epoch: Epoch) -> Machine:
        """A new machine, which the caller removes."""
        if self._count == 0:
            self._sweep()
        self._count += 1
        began = time.perf_counter()
        machine = self.store.fork(epoch, NAME.format(process=_process(os.getpid()),
                                                     number=self._count), fixup=self._fixup)
        self.times["forks"].append(time.perf_counter() - began)
        return machine

    def remove(self, machine: Machine) -> None:
        """Remove a machine with its epochs, but for those that are to be kept."""
        from epochs.errors import NotFound

        with contextlib.suppress(NotFound):
            self._forget_epochs(machine)
            machine.remove(force=True)

    def close(self) -> None:
        for machine in self._machines.values():
            self.remove(machine)
        self._machines.clear()

    def _forget_epochs(self, machine: Machine) -> None:
        made = self.store.files.catalog.epochs_of(machine.record.id)
        if left := [epoch for epoch in made if epoch not in self.kept]:
            self.store.delete(left)

    def _sweep(self) -> None:
        """Remove what a pytest that was killed has left."""
        from epochs.errors import Busy, NotFound

        for machine in self.store.machines():
            match = OURS.fullmatch(machine.name)
            if match is None or _process(int(match[1])) == f"{match[1]}-{match[2]}":
                continue
            with contextlib.suppress(NotFound, Busy):  # another worker sweeps, too
                machine.remove(force=True)

    def keep(self, machine: Machine, test: str) -> str:
        """Seal the state of a failed test; returns a sentence for its report."""
        try:
            epoch = machine.create(f"failed: {test}"[:200])
        except Exception as error:  # the test's report is worth more than the reason
            return f"the state of '{machine.name}' was not kept: {error}"
        self.kept.add(epoch.id)
        return (f"the failing state is epoch {epoch.id[:12]}; open it with\n"
                f"epochs --store {self.store.files.path} fork {epoch.id[:12]} failed")


def _process(pid: int) -> str:
    """A process, told from others of its number: "PID-START"."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return f"{pid}-{stat.rpartition(')')[2].split()[19]}"


@pytest.fixture(scope="session")
def epochs_store(pytestconfig: pytest.Config) -> Iterator[Store]:
    """The store of ``--epochs-store``."""
    from epochs.api import Store

    with Store(pytestconfig.getoption("epochs_store")) as store:
        yield store


@pytest.fixture(scope="session")
def _epochs_harness(pytestconfig: pytest.Config, epochs_store: Store) -> Iterator[Harness]:
    harness = Harness(epochs_store, pytestconfig.stash[TIMES],
                      bool(pytestconfig.getini("epochs_fixup")),
                      pytestconfig.getoption("epochs_standby"))
    pytestconfig.stash[HARNESS] = harness
    try:
        yield harness
    finally:
        harness.close()


def _epoch(request: pytest.FixtureRequest, store: Store) -> Epoch:
    from epochs.errors import EpochsError

    marker = request.node.get_closest_marker("epoch")
    wanted = marker.args[0] if marker and marker.args else request.config.getini("epochs_epoch")
    if not wanted:
        pytest.fail("which epoch? Mark the test with @pytest.mark.epoch(\"web@ready\"), or set "
                    "epochs_epoch in the configuration of pytest", pytrace=False)
    try:
        return store.epoch(wanted)
    except EpochsError as error:
        pytest.fail(str(error), pytrace=False)


def _used(request: pytest.FixtureRequest, machine: Machine) -> Machine:
    request.node.stash.setdefault(USED, []).append(machine)
    return machine


@pytest.fixture
def epochs_machine(request: pytest.FixtureRequest, epochs_store: Store,
                   _epochs_harness: Harness) -> Machine:
    """A running machine as it was at the epoch of the test's marker."""
    return _used(request, _epochs_harness.reset(_epoch(request, epochs_store)))


@pytest.fixture
def epochs_fork(request: pytest.FixtureRequest, epochs_store: Store,
                _epochs_harness: Harness) -> Iterator[Machine]:
    """A fork of the same epoch for this test alone, thrown away after it."""
    machine = _epochs_harness.fork(_epoch(request, epochs_store))
    try:
        yield _used(request, machine)
    finally:
        _epochs_harness.remove(machine)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> (
        Generator[None, pytest.TestReport, pytest.TestReport]):
    report = yield
    if report.failed and report.when != "teardown" \
            and item.config.getoption("epochs_keep_failed"):
        for machine in item.stash.get(USED, []):
            report.sections.append(
                ("epochs", item.config.stash[HARNESS].keep(machine, item.nodeid)))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker of pytest-xdist tells its master
        output["epochs_times"] = session.config.stash[TIMES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    told: Times = getattr(node, "workeroutput", {}).get("epochs_times", {})
    for kind, seconds in told.items():
        node.config.stash[TIMES][kind].extend(seconds)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter,
                            config: pytest.Config) -> None:
    times = config.stash[TIMES]
    if report := config.getoption("epochs_report"):
        report.write_text(json.dumps(times))
    if not any(times.values()):
        return
    terminalreporter.section("epochs")
    for kind, seconds in times.items():
        if seconds:
            terminalreporter.write_line(f"{len(seconds)} {kind}: {summary(seconds)}")


def summary(seconds: list[float]) -> str:
    """"median 70 ms, 99 % within 93 ms, 12.3 s in all"."""
    ordered = sorted(seconds)
    late = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return (f"median {statistics.median(ordered) * 1e3:.0f} ms, 99 % within {late * 1e3:.0f} ms, "
            f"{sum(ordered):.1f} s in all")
