"""The methods by name: those of this package, and those that other packages offer by an entry point.

A package offers a method by one line of its metadata, group `sgl_lim.methods`:

    [project.entry-points."sgl_lim.methods"]
    anything = "its_package.its_module:ItsMethod"

Entry points rather than calls, because every process that SGLang starts has to know the method.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

from sgl_lim.methods.base import Method
from sgl_lim.methods.full import Full
from sgl_lim.methods.lessismore import LessIsMore
from sgl_lim.methods.parameters import Choice, Parameter, parameters_of
from sgl_lim.methods.quest import Quest
from sgl_lim.methods.seerattention import SeerAttention
from sgl_lim.methods.tidaldecode import TidalDecode
from sgl_lim.methods.window import Window

GROUP = "sgl_lim.methods"
DEFAULT = LessIsMore
_OWN: tuple[type[Method], ...] = (LessIsMore, TidalDecode, Quest, SeerAttention, Window, Full)


class Methods(Mapping[str, type[Method]]):
    """Methods by name, the default first. Entry points are read when somebody looks for the first time."""

    def __init__(self) -> None:
        self._found: dict[str, type[Method]] = {}

    def _known(self) -> dict[str, type[Method]]:
        if not self._found:
            found = {method.name: method for method in _OWN}
            for point in entry_points(group=GROUP):
                method = _load(point)
                if found.setdefault(method.name, method) is not method:
                    raise ValueError(
                        f"entry point {GROUP}: {point.value} has the name {method.name!r}, which is taken; "
                        "give it another or uninstall its package"
                    )
            self._found = found
        return self._found

    def __getitem__(self, name: str) -> type[Method]:
        return self._known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def parameters(self) -> dict[str, dict[str, Parameter]]:
        """Every parameter that any method has, by name and then by the method's name."""
        found: dict[str, dict[str, Parameter]] = {}
        for name, method in self.items():
            for one in parameters_of(method).values():
                found.setdefault(one.name, {})[name] = one
        return found


METHODS = Methods()


def _load(point: EntryPoint) -> type[Method]:
    """The method behind an entry point. Raises ImportError or TypeError, which name the entry point and a way out."""
    try:
        method = point.load()
    except Exception as error:
        raise ImportError(
            f"entry point {GROUP}: {point.value} cannot be loaded ({type(error).__name__}: {error}); repair or "
            "uninstall its package"
        ) from error
    if not (isinstance(method, type) and issubclass(method, Method) and isinstance(getattr(method, "name", 0), str)):
        raise TypeError(
            f"entry point {GROUP}: expected a subclass of Method with a name, got {point.value}; repair or uninstall "
            "its package"
        )
    return method


def choices_of(declared: Mapping[str, Parameter]) -> tuple[str, ...] | None:
    """The words that a parameter takes with any method, None where it takes other than words."""
    forms = [one.form for one in declared.values()]
    if not all(isinstance(form, Choice) for form in forms):
        return None
    return tuple(dict.fromkeys(word for form in forms for word in form.choices or ()))
