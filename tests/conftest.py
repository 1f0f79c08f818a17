"""Order: what takes longest begins first, so that the workers of pytest-xdist end together. And an
end of tests that do not even end when their time is up."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest

GRACE = 120  # seconds from the end of a test's time, when pytest-timeout raises in it, to its end
_stderr = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.get_closest_marker("dm") is None
                                 and item.get_closest_marker("xen") is None,
                                 item.get_closest_marker("slow") is None))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # while pytest captures nothing yet


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_stderr])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A clean-up may hang in its turn, with nothing to end it: then every thread's stack is
    printed, and the worker's process ends, which pytest-xdist reports as this test's failure.
    Elsewhere somebody may be looking at it with a debugger."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker else
                  item.config.getoption("timeout") or item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
