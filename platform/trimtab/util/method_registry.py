"""Registry of methods by name, which other packages extend through an entry-point group."""

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar

from trimtab.errors import NotFoundError

T = TypeVar("T")
MethodT = TypeVar("MethodT")


class MethodRegistry(Generic[T]):
    """Registry of the classes of one kind of method.

    A lookup imports all modules of the package, so that their decorators register their classes. Other packages
    register classes through the entry-point group that has the package's name.

    Args:
        kind: noun for error messages, such as "objective".
        package: dotted name of the package that contains the built-in methods.
        path: search path of that package (its `__path__`).
    """

    def __init__(self, kind: str, package: str, path: Iterable[str]) -> None:
        self._kind = kind
        self._package = package
        self._path = path
        self._methods: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[MethodT]], type[MethodT]]:
        """Return a class decorator that registers a class under a name."""

        def add(cls: type[MethodT]) -> type[MethodT]:
            self._methods[name] = cls  # pyright: ignore[reportArgumentType]
            return cls

        return add

    def get_method(self, name: str) -> type[T]:
        """Return the class that is registered under a name.

        Raises:
            NotFoundError: if no class has this name. The message lists the registered names.
        """
        names = self.list_names()
        if name not in self._methods:
            raise NotFoundError(f"no {self._kind} {name!r}; there are: {', '.join(names)}")
        return self._methods[name]

    def list_names(self) -> list[str]:
        """Return the registered names in alphabetical order."""
        for module in iter_modules(self._path):
            import_module(f"{self._package}.{module.name}")
        for entry in entry_points(group=self._package):
            entry.load()
        return sorted(self._methods)
