"""Register of patches: functions that replace a symbol of another library."""

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any, TypeVar

from trimtab.errors import IncompatibleLibraryError

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
FLAG = "_trimtab_patches"


@dataclass(frozen=True)
class Symbol:
    """Replaced symbol: `path` is `module:attribute`; `parameters` are the names that its signature must begin with.

    A value that is no function has no parameters.
    """

    path: str
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Patch:
    """Registered patch.

    `symbols` are what it replaces or relies on, `upstream` the issue or pull request, `versions` those that were seen to
    need it, `remove_when` the condition to delete it.
    """

    name: str
    symbols: tuple[Symbol, ...]
    upstream: str
    versions: str
    remove_when: str


class PatchRegister:
    """Patches of one library. `package` is its distribution, or several of which one is installed."""

    def __init__(self, library: str, *packages: str) -> None:
        self.library = library
        self.patches: dict[str, Patch] = {}
        self._packages = packages

    def add(self, *symbols: Symbol, upstream: str, versions: str, remove_when: str) -> Callable[[FunctionT], FunctionT]:
        """Register the decorated function under its name."""

        def register(function: FunctionT) -> FunctionT:
            self.patches[function.__name__] = Patch(function.__name__, symbols, upstream, versions, remove_when)
            return function

        return register

    def check(self, *names: str) -> None:
        """Check that the symbols of patches are as they were when the patch was written.

        Args:
            names: patches to check; all registered ones if none are named.

        Raises:
            IncompatibleLibraryError: if a symbol is missing or its signature has changed.
        """
        for name in names or tuple(self.patches):
            patch = self.patches[name]
            for symbol in patch.symbols:
                if reason := _find_change(symbol):
                    raise self._build_error(name, symbol.path, reason, patch.versions)

    def check_attributes(self, user: str, owner: Any, paths: Iterable[str], versions: str) -> None:
        """Check that an object of the library has attributes that exist on instances only, not on their class.

        Args:
            user: component that reads the attributes.
            owner: object of the library.
            paths: attributes to check, each as a dotted path from the object.
            versions: versions of the library that have the attributes.

        Raises:
            IncompatibleLibraryError: if an attribute is missing.
        """
        for path in paths:
            try:
                attrgetter(path)(owner)
            except AttributeError:
                raise self._build_error(user, f"{type(owner).__name__}.{path}", "does not exist", versions) from None

    def _build_error(self, user: str, path: str, reason: str, versions: str) -> IncompatibleLibraryError:
        return IncompatibleLibraryError(
            f"{user}: {path} of {self.library} {self._get_version()} {reason}. Install {self.library} {versions}"
        )

    def _get_version(self) -> str:
        for package in self._packages:
            try:
                return version(package)
            except PackageNotFoundError:
                continue
        return "(not installed)"


def replace_attribute(owner: Any, name: str, patch: str, wrap: Callable[[Any], Any]) -> bool:
    """Replace `owner.name` by `wrap(original)`, once for each owner and patch.

    Args:
        owner: module, class or object that holds the symbol.
        name: attribute to replace.
        patch: name of the patch, which is kept on the owner as its applied flag.
        wrap: takes the original, returns the replacement.

    Returns:
        Whether the symbol was replaced now; False if the patch was applied before.
    """
    if is_applied(owner, name, patch):
        return False
    setattr(owner, name, wrap(getattr(owner, name)))
    setattr(owner, FLAG, vars(owner).get(FLAG, set()) | {f"{patch}:{name}"})
    return True


def is_applied(owner: Any, name: str, patch: str) -> bool:
    """Return whether a patch has replaced `owner.name`."""
    return f"{patch}:{name}" in vars(owner).get(FLAG, set())


def _find_change(symbol: Symbol) -> str | None:
    """Return what has changed about a symbol, or None."""
    module, _, path = symbol.path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return "does not exist"
    if symbol.parameters is None:
        return None
    names = tuple(inspect.signature(found).parameters)
    if names[: len(symbol.parameters)] != symbol.parameters:
        return f"takes ({', '.join(names)}), not ({', '.join(symbol.parameters)}, ...)"
    return None
