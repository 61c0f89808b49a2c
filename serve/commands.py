"""The command of this folder."""

from trimtab.cli import Command

from .config import ServeConfig

SERVE = Command("Serve a base model and its prefixes over the OpenAI API.", ServeConfig, "trimtab.serve.server:run")
