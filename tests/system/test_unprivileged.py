"""The whole story as a user without privileges."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .guest import CTL, Artefacts

pytestmark = pytest.mark.guest
SCRIPT = Path(__file__).with_name("unprivileged_story.py")


@pytest.fixture
def home(tiny: Artefacts) -> Iterator[Path]:
    """A folder of the user nobody, with what it needs readable: packages and the guest."""
    if os.geteuid() != 0:
        pytest.skip("run as root, which can become another user; as a user all tests are this test")
    directory = Path(tempfile.mkdtemp(prefix="epochs-user-", dir="/tmp"))
    nobody = pwd.getpwnam("nobody")
    try:
        guest = directory / "guest"
        shutil.copytree(tiny.directory, guest)
        code = directory / "code"
        code.mkdir()
        import click

        import blockcow
        import epochs
        import memsave
        for package in (blockcow, epochs, memsave):
            root = Path(package.__file__ or "").parent
            shutil.copytree(root, code / root.name)
        del click
        site = {Path(p) for p in sys.path if p.endswith("site-packages")}
        for path in site:
            shutil.copytree(path, code / "site", dirs_exist_ok=True, symlinks=True,
                            ignore=shutil.ignore_patterns("mypy*", "ruff*", "hypothesis*",
                                                          "__editable__*", "*.pth"))
        subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", str(directory)],
                       check=True)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=False)


def test_create_rollback_fork_delete_as_an_ordinary_user(home: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    story = home / "story.py"
    shutil.copyfile(SCRIPT, story)
    interpreter = "/usr/bin/python3"  # the one under /root is not nobody's to run
    done = subprocess.run(
        [interpreter, str(story), str(home), CTL], cwd=home, capture_output=True, text=True,
        check=False, timeout=300, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8",
             "PYTHONPATH": f"{home / 'code'}:{home / 'code' / 'site'}",
             "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "UID 65534" in done.stdout
    assert "STORY COMPLETE" in done.stdout
