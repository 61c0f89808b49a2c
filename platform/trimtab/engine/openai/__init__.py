"""OpenAI-compatible server around vLLM's own app."""
