"""What reports share: templates that escape all that they are given, and values as JSON knows them."""

from collections.abc import Mapping
from importlib import resources
from math import isfinite
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render_template(name: str, **values: Any) -> str:
    """A template of this folder filled in. Raises jinja2's UndefinedError for a value that is not given."""
    loader = FunctionLoader(lambda name: resources.files("trimtab.evaluation").joinpath("templates", name).read_text("utf-8"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.get_template(name).render(**values)


def plain(value: Any) -> Any:
    """The same with what JSON knows: lists, dictionaries, and null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value
