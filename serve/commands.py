"""The command of this folder."""

from trimtab.serve.config import ServeConfig

from trimtab.cli import Command

SERVE = Command("Serve a base model and its prefixes over the OpenAI API.", ServeConfig, "trimtab.serve.server:run")
