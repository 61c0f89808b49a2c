"""Answers and uncertainties of lm-polygraph over transformers, for bench/libraries.py.

PYTHON bench/peers/with_lm_polygraph.py TASK RESULT

PYTHON is the interpreter of an environment with lm-polygraph. The script uses the library as in its documentation. TASK and
RESULT are JSON files.
"""

import argparse
import json
import time
from pathlib import Path

from lm_polygraph import WhiteboxModel
from lm_polygraph.defaults.register_default_stat_calculators import register_default_stat_calculators
from lm_polygraph.estimators import (
    EigenScore,
    MaximumSequenceProbability,
    MeanTokenEntropy,
    MonteCarloSequenceEntropy,
    Perplexity,
)
from lm_polygraph.utils.builder_enviroment_stat_calculator import BuilderEnvironmentStatCalculator
from lm_polygraph.utils.dataset import Dataset
from lm_polygraph.utils.manager import UEManager
from transformers import AutoModelForCausalLM, AutoTokenizer

GREEDY_ESTIMATORS = (Perplexity, MeanTokenEntropy, MaximumSequenceProbability)
SAMPLING_ESTIMATORS = (MonteCarloSequenceEntropy, EigenScore)


def main() -> None:
    options = parse_arguments()
    task = json.loads(options.task.read_text())
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base_model = AutoModelForCausalLM.from_pretrained(task["model"], dtype="float32", attn_implementation="eager")
    model = WhiteboxModel(base_model, tokenizer, model_path=task["model"], instruct=True)
    classes = GREEDY_ESTIMATORS + SAMPLING_ESTIMATORS if task["samples"] else GREEDY_ESTIMATORS
    estimators = [estimator_class() for estimator_class in classes]
    start = time.monotonic()
    manager = UEManager(
        Dataset(task["questions"], [""] * len(task["questions"]), batch_size=task["batch"]),
        model,
        estimators,
        available_stat_calculators=register_default_stat_calculators("Whitebox"),
        builder_env_stat_calc=BuilderEnvironmentStatCalculator(model),
        generation_metrics=[],
        ue_metrics=[],
        processors=[],
        ignore_exceptions=False,
        verbose=False,
        max_new_tokens=task["max_tokens"],
        save_stats=["greedy_texts"],
    )
    manager()
    scores = {str(e): [-float(value) for value in manager.estimations[e.level, str(e)]] for e in estimators}
    result = {"answers": list(manager.stats["greedy_texts"]), "scores": scores, "seconds": time.monotonic() - start}
    options.result.write_text(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="file of the task")
    parser.add_argument("result", type=Path, help="write the answers and scores to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
