"""Template rendering and JSON conversion shared by all reports."""

from collections.abc import Mapping
from importlib import resources
from math import isfinite
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render_template(name: str, **values: Any) -> str:
    """Render a template of `trimtab/evaluation/templates` with HTML autoescaping.

    Args:
        name: file name of the template.
        values: variables of the template.

    Returns:
        The rendered page.

    Raises:
        jinja2.UndefinedError: if the template uses a variable that is missing from `values`.
    """
    loader = FunctionLoader(lambda name: resources.files("trimtab.evaluation").joinpath("templates", name).read_text("utf-8"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.get_template(name).render(**values)


def plain(value: Any) -> Any:
    """Convert nested values to JSON types: sequences to lists, mappings to dictionaries, non-finite floats to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value
