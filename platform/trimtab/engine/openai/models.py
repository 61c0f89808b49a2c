"""Model list of the server (`GET /v1/models`): the base model with its detectors, and each prefix with its aliases."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import NotFoundError

NamedAliases = Mapping[str, Mapping[str, int]]
"""Version numbers by name and alias."""


@dataclass(frozen=True)
class ModelList:
    """Entries of the model list.

    Attributes:
        base: name of the base model.
        created: time when the engine started, in seconds since 1970; versions have no time of their own in OpenAI's format.
        max_model_len: maximum length of prompt and answer together, in tokens, under the name that vLLM uses.
        prefixes: aliases of each prefix.
        detectors: aliases of each detector of answers.
        prompt_detectors: aliases of each detector of prompts.
        refused: reasons why versions with an alias cannot be used, by kind and NAME@VERSION.
        drift: status of the monitor of each detector by NAME@VERSION.
    """

    base: str
    created: int
    max_model_len: int
    prefixes: NamedAliases
    detectors: NamedAliases
    prompt_detectors: NamedAliases
    refused: Mapping[str, Mapping[str, str]]
    drift: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def list_entries(self) -> list[dict[str, Any]]:
        """Return the entries in OpenAI's format, with aliases in the field `trimtab`."""
        common = {"object": "model", "created": self.created, "owned_by": "trimtab", "max_model_len": self.max_model_len}
        detectors = {"detectors": self.detectors, "prompt_detectors": self.prompt_detectors}
        detectors |= {"refused": self.refused.get("detector", {}), "drift": self.drift}
        common |= {"root": self.base}
        base = {"id": self.base, **common, "parent": None, "trimtab": detectors}
        refused = self.refused.get("prefix", {})
        prefixes = [
            {"id": f"{self.base}:{name}", **common, "parent": self.base}
            | {"trimtab": {"aliases": aliases, "refused": {k: v for k, v in refused.items() if k.startswith(f"{name}@")}}}
            for name, aliases in sorted(self.prefixes.items())
        ]
        return [base, *prefixes]

    def find_entry(self, model: str) -> dict[str, Any]:
        """Return the entry of a model.

        Raises:
            NotFoundError: if there is no such model. The message lists the models.
        """
        entries = {entry["id"]: entry for entry in self.list_entries()}
        if model not in entries:
            raise NotFoundError(f"no model {model[:80]!r}; this server has {', '.join(entries)}")
        return entries[model]
