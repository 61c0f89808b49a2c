"""Methods by name: one file each in a package of ours, and more from other packages by an entry-point group."""

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar

from trimtab.errors import NotFoundError

T = TypeVar("T")
MethodT = TypeVar("MethodT")


class MethodRegistry(Generic[T]):
    """Classes of one kind. `kind` is what people call them; `package` and `path` are where ours are; others' are in the
    entry-point group that has the package's name."""

    def __init__(self, kind: str, package: str, path: Iterable[str]) -> None:
        self._kind = kind
        self._package = package
        self._path = path
        self._known: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[MethodT]], type[MethodT]]:
        """Class decorator: make a class known by this name."""

        def add(cls: type[MethodT]) -> type[MethodT]:
            self._known[name] = cls  # pyright: ignore[reportArgumentType]
            return cls

        return add

    def get_method(self, name: str) -> type[T]:
        """The class of a name; NotFoundError with the names there are."""
        names = self.list_names()
        if name not in self._known:
            raise NotFoundError(f"no {self._kind} {name!r}; there are: {', '.join(names)}")
        return self._known[name]

    def list_names(self) -> list[str]:
        """All known names."""
        for module in iter_modules(self._path):
            import_module(f"{self._package}.{module.name}")
        for entry in entry_points(group=self._package):
            entry.load()
        return sorted(self._known)
