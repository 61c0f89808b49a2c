"""Artifacts on disk: prefixes, their cards and the reader of safetensors files."""
