"""Saved parts of trimtab: prefixes, their cards, and the reader of safetensors files."""
