"""A domain on Debian's own hypervisor, which cannot track what a PV guest writes to: it stands
still while it is read, and everything else is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from epochs import Machine, Store
from tests.system.guest import check_disks, ctl, wait_witness

XEN = ["--disk", "700M", "--disk", "700M", "--hypervisor", "xen-debian"]
pytestmark = pytest.mark.timeout(900)


def test_paravirtual(boot: Callable[[str], Machine], store: Store, tmp_path: Path) -> None:
    web = boot("pv")
    ctl(web, "nonce", "set", "one")
    epoch = web.create()
    assert (epoch.stats["tracking"], epoch.stats["pages_precopied"]) == ("none", 0)
    assert epoch.stats["pages_sealed_in_pause"] > 128 << 8 >> 1, "most of its memory"
    count = wait_witness(web, 0, 60)
    ctl(web, "nonce", "set", "two")
    web.rollback(epoch, keep=False)
    assert ctl(web, "nonce", "get") == "one"
    wait_witness(web, count, 60)
    check_disks(store, epoch, tmp_path)
