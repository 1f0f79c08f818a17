"""Order: what takes longest begins first, so that the workers of pytest-xdist end together."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (item.get_closest_marker("dm") is None
                                 and item.get_closest_marker("xen") is None,
                                 item.get_closest_marker("slow") is None))
