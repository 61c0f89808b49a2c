"""Asking the server as users do."""

import asyncio

import openai

from tests.support.factories import TOKENS

BASE = "smollm2-135m"


def chat(client: openai.OpenAI, model: str, text: str, **options):
    """One question, greedy unless said otherwise."""
    settings = {"max_tokens": TOKENS, "temperature": 0} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **settings)


def together(url: str, requests: list[tuple[str, str]], **options):
    """All requests, of model and text, at once, so that they share batches."""

    async def run():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
        calls = [
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)
            for model, text in requests
        ]
        return await asyncio.gather(*calls)

    return asyncio.run(run())
