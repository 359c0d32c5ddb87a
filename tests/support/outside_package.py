"""Installs a distribution of a file and its entry points, as pip would, into a folder for `sys.path`."""

import os
import shutil
from pathlib import Path

EVERY_NTH = Path(__file__).parent / "outside" / "every_nth.py"


def install(site: Path, module: Path, group: str, target: str) -> tuple[tuple[str, str], ...]:
    """Put `module` and the metadata of a distribution with one entry point into `site`.

    Returns:
        The environment in which a process finds both.
    """
    name = module.stem.replace("_", "-")
    info = site / f"{module.stem}-0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(module, site)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{module.stem} = {target}\n")
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return (("PYTHONPATH", path),)
