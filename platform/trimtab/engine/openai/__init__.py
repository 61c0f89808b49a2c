"""OpenAI-compatible ASGI app around vLLM's server."""
