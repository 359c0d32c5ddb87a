"""A pip that downloads from a folder, and fails or waits as it is told."""

import os
import zipfile
from pathlib import Path

import pytest

PROGRAM = """
import os, shutil, sys, time
from pathlib import Path

home = Path(os.environ["FAKE_PIP"])
requirement, to = sys.argv[-1], Path(sys.argv[sys.argv.index("--dest") + 1])
with (home / "asked").open("a") as asked:
    asked.write(requirement + "\\n")
fails = home / f"{requirement}.fails"
if fails.exists():
    sys.exit(fails.read_text())
name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
if (home / "wait").exists():
    (to / name).write_bytes(b"half of it")
    while (home / "wait").exists():
        time.sleep(0.02)
shutil.copy(home / requirement, to / name)
"""


class FakePip:
    """Stands before the real pip in every Python that is started while `patch` is in force."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self._home = home
        (home / "pip").mkdir(parents=True)
        (home / "pip" / "__init__.py").touch()
        self._program = home / "pip" / "__main__.py"
        self._program.write_text(PROGRAM)
        patch.setenv("PYTHONPATH", str(home), prepend=os.pathsep)
        patch.setenv("FAKE_PIP", str(home))

    def offer(self, requirement: str, member: str, content: bytes) -> None:
        """Have a package whose wheel holds one file."""
        with zipfile.ZipFile(self._home / requirement, "w") as wheel:
            wheel.writestr(member, content)

    def offer_broken(self, requirement: str) -> None:
        """Have a package whose wheel is none."""
        (self._home / requirement).write_bytes(b"no wheel")

    def fail(self, requirement: str, message: str) -> None:
        """Fail at a package with this message."""
        (self._home / f"{requirement}.fails").write_text(message)

    def recover(self, requirement: str) -> None:
        """Fail at it no longer."""
        (self._home / f"{requirement}.fails").unlink()

    def wait(self) -> None:
        """Stop at half of each file."""
        (self._home / "wait").touch()

    def go_on(self) -> None:
        """Wait no longer."""
        (self._home / "wait").unlink()

    def vanish(self) -> None:
        """Be a package that cannot be run, which Python reports as it reports one that is missing."""
        self._program.unlink()

    def asked(self) -> list[str]:
        """Every requirement that was asked for, in order."""
        path = self._home / "asked"
        return path.read_text().splitlines() if path.exists() else []
