"""API protocols of the server: OpenAI's completions, chat completions and responses, and Anthropic's messages."""
