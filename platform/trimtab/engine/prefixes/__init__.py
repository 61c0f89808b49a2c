"""Prefixes in the engine: catalog of versions, embedding slots, token guard."""
