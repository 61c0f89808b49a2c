"""Adapters of vLLM's model runners."""
