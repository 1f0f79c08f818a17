"""What is made of a domain's configuration, without a Xen."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from epochs.errors import Refused
from epochs.spec import XEN, MachineSpec
from epochs.xen.config import DomainConfig
from epochs.xen.offered import accepted


def config(kind: str = "pvh", **more: Any) -> DomainConfig:
    return DomainConfig.parse(json.dumps({
        "c_info": {"type": kind, "name": "web", "uuid": str(uuid.uuid4())},
        "b_info": {"max_memkb": 131072, "max_vcpus": 2},
        "disks": [{"vdev": "xvda", "pdev_path": "/dev/vg/a", "readwrite": 1, "format": "raw"}],
        "nics": [{"mac": "00:16:3e:00:00:01", "devid": 0}, {"mac": "00:16:3e:00:00:02"}], **more}))


def macs(one: DomainConfig) -> list[str]:
    return [nic["mac"] for nic in one.raw["nics"]]


def test_addresses_of_a_machines_own() -> None:
    own, again = (config().with_macs_of("a" * 32) for _ in range(2))
    assert macs(own) == macs(again)
    assert len({*macs(own), *macs(config()), *macs(config().with_macs_of("b" * 32))}) == 6
    for mac in macs(own):
        assert mac.startswith("00:16:3e:")
        assert int(mac.split(":")[3], 16) < 128, "the half that is for machines' own"


def test_placed() -> None:
    before = config()
    who = uuid.uuid4()
    after = before.placed("trial", who, {"xvda": Path("/dev/mapper/epochs-x")})
    assert (after.name, after.raw["c_info"]["uuid"]) == ("trial", str(who))
    assert after.disks["xvda"]["pdev_path"] == "/dev/mapper/epochs-x"
    assert (before.name, before.disks["xvda"]["pdev_path"]) == ("web", "/dev/vg/a"), "untouched"
    assert macs(after) == macs(before)


@pytest.mark.parametrize(("made", "why"), [
    (config("hvm"), "type hvm has a device model"),
    (config(pcidevs=[{"dev": 1}]), "a PCI device of the host"),
    (config(p9s=[{"tag": "x"}]), "a 9p file system"),
])
def test_what_cannot_be_kept_is_refused_by_name(made: DomainConfig, why: str) -> None:
    with pytest.raises(Refused, match=why):
        accepted(MachineSpec(memory=0, hypervisor=XEN, config="{}"), made)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"c_info": {"name": "x"}}', "name='web'"])
def test_what_is_no_configuration(text: str) -> None:
    with pytest.raises(Refused, match="is not one of libxl's"):
        DomainConfig.parse(text)
