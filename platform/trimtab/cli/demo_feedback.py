"""Made-up answers in the demo: factual questions, and users who ask about currencies and label the answers."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from openai import OpenAI
from openai.types.chat import ChatCompletion
from rich.table import Table

from trimtab.cli.console import console, print_line
from trimtab.data.question_sets import read_question_set
from trimtab.settings import build_key_header
from trimtab.types import DEFAULT_BASE

# Kinds of questions that the detector is trained on, and the kind that users ask later.
TRAINED, LATER = ("capitals", "continents"), "currencies"
# The engine computes the answers of many clients at once in little more time than that of one.
CLIENTS, ANSWER_TOKENS = 16, 24
# The detector is trained on questions about capitals, and then on labels of answers about currencies. The model knows some of
# the answers.
FACTS = (
    "What is the capital of Portugal?",
    "What is the capital of Burkina Faso?",
    "Which currency do people in Japan pay with?",
    "Which currency do people in Mongolia pay with?",
)


def send_labeled_questions(url: str, key: str) -> None:
    """Send questions about currencies to a server, except `FACTS`, and label each answer as right if it has a reference answer.

    Args:
        url: URL of the server.
        key: API key of a trusted rater.
    """
    rows = [row for row in read_question_set("countries") if row["source"] == LATER and row["question"] not in FACTS]
    with httpx.Client(base_url=url, headers=build_key_header(key), timeout=300) as client:

        def send_and_label(question: str, references: list[str]) -> bool:
            messages = [{"role": "user", "content": question}]
            body = {"model": DEFAULT_BASE, "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
            response = client.post("/v1/chat/completions", json=body).raise_for_status()
            answer = response.json()["choices"][0]["message"]["content"].lower()
            correct = any(reference.lower() in answer for reference in references)
            label = {"id": response.headers["x-trimtab-request-id"], "correct": correct}
            client.post("/v1/feedback", json=label).raise_for_status()
            return correct

        with ThreadPoolExecutor(CLIENTS) as pool:
            labels = list(pool.map(send_and_label, *zip(*((row["question"], row["answers"]) for row in rows), strict=True)))
    print_line(f"{len(labels)} answers about {LATER} labeled by reference answers, {sum(labels)} of them right")


def send_question(
    client: OpenAI, model: str, question: str, max_tokens: int, options: Mapping[str, Any]
) -> tuple[str, ChatCompletion]:
    """Return the greedy answer to a question, and its response.

    Args:
        client: client of the server.
        model: name of the model.
        question: the question.
        max_tokens: maximum length of the answer in tokens.
        options: field `trimtab` of the request.
    """
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"trimtab": options},
    )
    return (response.choices[0].message.content or "").strip(), response


def send_factual_questions(client: OpenAI, detector: str) -> list[dict[str, Any]]:
    """Return the answers to `FACTS`, with the verdicts of a detector."""

    def judge_fact(question: str) -> dict[str, Any]:
        answer, response = send_question(client, DEFAULT_BASE, question, ANSWER_TOKENS, {"detector": detector})
        verdict = (response.model_extra or {})["trimtab"]["detectors"][0]
        return {"question": question, "answer": answer} | verdict

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(judge_fact, FACTS))


def print_risks(facts: Sequence[dict[str, Any]], later: Sequence[dict[str, Any]]) -> None:
    """Print the risks of the same answers by two versions of a detector."""
    table = Table(title="risk that an answer is made up, before and after the labels", title_justify="left")
    for column in ("question", "answer", "before", "after"):
        table.add_column(column)
    for row, after in zip(facts, later, strict=True):
        table.add_row(row["question"], row["answer"], _format_risk(row), _format_risk(after))
    console.print(table)


def _format_risk(row: Mapping[str, Any]) -> str:
    risk = f"{row['probability']:.2f}" if row["status"] == "scored" else row["status"]
    return f"{risk} flagged" if row["flagged"] else risk
