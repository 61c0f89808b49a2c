"""Chat requests through OpenAI's client."""

import asyncio

import openai

from tests.support.factories import TOKENS

BASE = "smollm2-135m"


def chat(client: openai.OpenAI, model: str, text: str, **options):
    """Send one question, with greedy decoding by default."""
    settings = {"max_tokens": TOKENS, "temperature": 0} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **settings)


def send_concurrently(url: str, requests: list[tuple[str, str]], **options):
    """Send requests of (model, text) at once, so that they share batches; return the responses in order."""

    async def run():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
        calls = [
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)
            for model, text in requests
        ]
        return await asyncio.gather(*calls)

    return asyncio.run(run())
