"""Feedback cycle of the demo: users who ask about currencies and label the answers."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import httpx

from trimtab.cli.console import print_line
from trimtab.data.question_sets import read_question_set
from trimtab.settings import build_key_header
from trimtab.types import DEFAULT_BASE

# Kinds of questions that the detector is trained on, and the kind that users ask later.
TRAINED, LATER = ("capitals", "continents"), "currencies"
CLIENTS = 4


def send_labeled_questions(url: str, key: str, excluded: Collection[str]) -> None:
    """Send questions about currencies to a server, and label each answer as right if it has a reference answer.

    Args:
        url: URL of the server.
        key: API key of a trusted rater.
        excluded: questions that are not sent.
    """
    rows = [row for row in read_question_set("countries") if row["source"] == LATER and row["question"] not in excluded]
    with httpx.Client(base_url=url, headers=build_key_header(key), timeout=300) as client:

        def send_and_label(question: str, references: list[str]) -> bool:
            messages = [{"role": "user", "content": question}]
            body = {"model": DEFAULT_BASE, "messages": messages, "max_tokens": 24, "temperature": 0}
            response = client.post("/v1/chat/completions", json=body).raise_for_status()
            answer = response.json()["choices"][0]["message"]["content"].lower()
            correct = any(reference.lower() in answer for reference in references)
            label = {"id": response.headers["x-trimtab-request-id"], "correct": correct}
            client.post("/v1/feedback", json=label).raise_for_status()
            return correct

        with ThreadPoolExecutor(CLIENTS) as pool:
            labels = list(pool.map(send_and_label, *zip(*((row["question"], row["answers"]) for row in rows), strict=True)))
    print_line(f"{len(labels)} answers about {LATER} labeled by reference answers, {sum(labels)} of them right")
