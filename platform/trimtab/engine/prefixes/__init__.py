"""Prefixes of the engine: version catalog, slots, token guard."""
