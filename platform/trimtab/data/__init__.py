"""Prompts: reading, form, splitting, filtering."""
