"""Answers and confidences of uqlm over an OpenAI endpoint, for bench/libraries.py.

PYTHON bench/peers/with_uqlm.py TASK RESULT

PYTHON is the interpreter of an environment with uqlm and langchain-openai. The script uses the library as in its documentation.
TASK and RESULT are JSON files.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from uqlm import WhiteBoxUQ

GREEDY_SCORERS = [
    "sequence_probability",
    "min_probability",
    "mean_token_negentropy",
    "min_token_negentropy",
    "probability_margin",
]
SAMPLING_SCORERS = ["monte_carlo_probability"]
DEFAULT_RESPONSES = 5


def main() -> None:
    options = parse_arguments()
    task = json.loads(options.task.read_text())
    llm = ChatOpenAI(
        base_url=task["url"], model=task["model"], api_key="none", temperature=0, max_tokens=task["max_tokens"], logprobs=True
    )
    prompts = [[HumanMessage(question)] for question in task["questions"]]
    scorers = GREEDY_SCORERS + SAMPLING_SCORERS if task["samples"] else GREEDY_SCORERS
    responses = task["samples"] or DEFAULT_RESPONSES
    start = time.monotonic()
    quantifier = WhiteBoxUQ(llm=llm, scorers=scorers, top_k_logprobs=15)
    result = asyncio.run(quantifier.generate_and_score(prompts, num_responses=responses, show_progress_bars=False))
    seconds = time.monotonic() - start
    scores = {name: [float(value) for value in result.data[name]] for name in scorers}
    options.result.write_text(json.dumps({"answers": result.data["responses"], "scores": scores, "seconds": seconds}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="file of the task")
    parser.add_argument("result", type=Path, help="write the answers and scores to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
