"""The machine line that every committed result carries."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sgl_lim import command


def machine_line() -> str:
    """Device, driver, versions and commit, separated by `; `."""
    import torch

    parts = [_device(torch), f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("triton", "sglang"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return "; ".join([*parts, f"commit {_commit()}"])


def machine_line_apart() -> str:
    """The machine line from a process of its own: this one must hold no memory of the device beside the servers."""
    command = [sys.executable, "-m", "benchmarks.machine"]
    return subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    ).stdout.strip()


def _device(torch) -> str:  # type: ignore[no-untyped-def]
    if torch.cuda.is_available():
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.split("\n")[0]
        return f"{torch.cuda.get_device_name()}, driver {driver}"
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{model}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def _commit() -> str:
    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if git("status", "--porcelain") else "")


if __name__ == "__main__":
    command.run(lambda: print(machine_line()))
