"""Answers with confidences from uqlm, over an OpenAI endpoint, as its documentation does it. Run by bench/libraries.py with the
Python of an environment that has uqlm and langchain-openai; reads a task and writes what it found, both JSON."""

import asyncio
import json
import sys
import time
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from uqlm import WhiteBoxUQ

FREE = ["sequence_probability", "min_probability", "mean_token_negentropy", "min_token_negentropy", "probability_margin"]
SAMPLED = ["monte_carlo_probability"]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    llm = ChatOpenAI(
        base_url=task["url"], model=task["model"], api_key="none", temperature=0, max_tokens=task["max_tokens"], logprobs=True
    )
    prompts = [[HumanMessage(question)] for question in task["questions"]]
    scorers = FREE + SAMPLED if task["samples"] else FREE
    began = time.monotonic()
    asked = WhiteBoxUQ(llm=llm, scorers=scorers, top_k_logprobs=15)
    result = asyncio.run(asked.generate_and_score(prompts, num_responses=task["samples"] or 5, show_progress_bars=False))
    seconds = time.monotonic() - began
    scores = {name: [float(value) for value in result.data[name]] for name in scorers}
    Path(sys.argv[2]).write_text(json.dumps({"answers": result.data["responses"], "scores": scores, "seconds": seconds}))


if __name__ == "__main__":
    main()
