"""Nothing of ours takes the place of an installed package, whichever of our folders stands first on `sys.path`.

SGLang and transformers import the PyPI package `kernels`: a module of that name in a folder that comes first would be
imported in its place, in every worker. A plain folder without `__init__.py` is harmless, because Python takes it for a
package only where nothing else has the name.
"""

import sys
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it before 3.11

ROOT = Path(__file__).parents[2]
OURS = "sgl-lim"


def first_folders() -> list[Path]:
    """The folders that our commands and tests put first: `-m` the root, an installation its sources, pytest the rest.

    A script that is run by its path puts its own folder there, so the folders of all that can be run count as well.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    listed = [*settings["setuptools"]["packages"]["find"]["where"], *settings["pytest"]["ini_options"]["pythonpath"]]
    sources = [
        path
        for top in ("benchmarks", "kernels", "patches", "sgl_lim", "tests", "training")
        for path in (ROOT / top).rglob("*.py")
    ]
    collected = [path.parent for path in sources if path.name.startswith(("test_", "conftest"))]
    runnable = [path.parent for path in sources if '__name__ == "__main__"' in path.read_text()]
    return sorted({ROOT, *(ROOT / folder for folder in listed), *collected, *runnable})


def shadowed(folder: Path, names: set[str]) -> list[str]:
    """Of `names`, those that are imported from `folder` when it comes before everything that is installed."""
    found = []
    for name in names & {path.stem if path.is_file() else path.name for path in folder.iterdir()}:
        spec = PathFinder.find_spec(name, [str(folder), *sys.path])
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin and (origin == folder / f"{name}.py" or origin.is_relative_to(folder / name)):
            found.append(name)
    return sorted(found)


@cache
def installed_names() -> set[str]:
    """Top-level names of the standard library and of every installed distribution but ours."""
    others = {name for name, distributions in packages_distributions().items() if set(distributions) != {OURS}}
    return others | set(sys.stdlib_module_names)


@pytest.mark.parametrize("folder", first_folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_no_module_of_ours_takes_an_installed_name(folder: Path) -> None:
    names = installed_names()
    assert {"kernels", "sglang", "transformers", "json"} <= names
    assert shadowed(folder, names) == []


def test_the_package_kernels_is_the_installed_one_in_these_tests() -> None:
    spec = find_spec("kernels")
    assert spec is not None and spec.origin is not None and "site-packages" in spec.origin


def test_a_module_and_a_package_of_that_name_are_found(tmp_path: Path) -> None:
    package, module, plain = (tmp_path / name for name in ("package", "module", "plain"))
    for folder in (package / "kernels", module, plain / "kernels"):
        folder.mkdir(parents=True)
    (package / "kernels" / "__init__.py").touch()
    (module / "kernels.py").touch()
    (plain / "kernels" / "other.py").touch()
    assert [shadowed(folder, {"kernels", "json"}) for folder in (package, module, plain)] == [
        ["kernels"],
        ["kernels"],
        [],
    ]


def test_the_folders_in_question_are_found() -> None:
    names = {str(folder.relative_to(ROOT)) for folder in first_folders()}
    assert {".", "kernels", "patches", "tests", "training", "benchmarks", "tests/benchmarks", "tests/kernels"} <= names
