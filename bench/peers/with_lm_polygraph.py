"""Answers with uncertainties from lm-polygraph, as its documentation does it. Run by bench/libraries.py with the Python of an
environment that has lm-polygraph; reads a task and writes what it found, both JSON."""

import json
import sys
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

FREE = (Perplexity, MeanTokenEntropy, MaximumSequenceProbability)
SAMPLED = (MonteCarloSequenceEntropy, EigenScore)


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(task["model"], dtype="float32", attn_implementation="eager")
    model = WhiteboxModel(loaded, tokenizer, model_path=task["model"], instruct=True)
    estimators = [made() for made in (FREE + SAMPLED if task["samples"] else FREE)]
    began = time.monotonic()
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
    found = {"answers": list(manager.stats["greedy_texts"]), "scores": scores, "seconds": time.monotonic() - began}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
