"""What no tracking sees: a direct read that began before its page was protected and ends after.

The kernel pins the page when the read begins, which counts as a write then; the data that arrives
later goes past the page tables. docs/memory-image.md part 8: precopy must not be used where disks
are opened with O_DIRECT; seal is exact because I/O is drained in a pause.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from slow_file import SlowFile
from victim import Victim, contents

from memsave import Image, PackStore

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(),
                       reason="needs root and /dev/fuse"),
]


@pytest.mark.parametrize(("precopied", "right"), [(False, True), (True, False)])
def test_a_direct_read_in_flight(start: Callable[..., Victim], packs: PackStore, tmp_path: Path,
                                 precopied: bool, right: bool) -> None:
    with SlowFile(tmp_path) as file, start() as victim, victim.guest("userfaultfd") as guest:
        victim.write(0, 1, 20)
        victim.begin("d", 7, str(file.path))
        assert file.asked.wait(30)
        with guest.capture(trusted=False) as capture:
            if precopied:
                capture.precopy(enough=0)
            file.answer.set()
            victim.done()  # as a hypervisor's pause: it returns when I/O is drained
            capture.reserve()
            capture.seal()
            image = capture.write(Image.zero(victim.layout), None, packs, "p").image
        assert (contents(image, packs) == victim.memory()) is right
