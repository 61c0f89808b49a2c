"""Selection of the prompts that a training job reads."""

from trimtab.data.prompt_sets import read_prompt_set
from trimtab.jobs.align.config import AlignConfig, DataConfig, TrainConfig
from trimtab.jobs.align.dataset import read_raw_dataset

TWINS = ["trimtab:contrast"]


def read_prompts(base, limit=None, **train):
    data = DataConfig(harmful=TWINS, benign=TWINS, limit=limit, validation_fraction=0.1, test_fraction=0.15)
    raw = read_raw_dataset(AlignConfig(data=data, train=TrainConfig(**train)), base)
    return [prompt for prompts in raw.parts.values() for prompt in prompts]


def test_as_many_prompts_as_training_reads_are_used(tiny_base):
    prompts = read_prompts(tiny_base, max_steps=30, global_batch_size=10)
    assert sum(prompt.label == "harmful" for prompt in prompts) == 200
    assert len(prompts) == 400


def test_short_runs_use_enough_prompts_for_the_held_out_parts(tiny_base):
    prompts = read_prompts(tiny_base, max_steps=2, global_batch_size=2)
    assert sum(prompt.label == "harmful" for prompt in prompts) == 120


def test_limit_selects_pairs_of_twins(tiny_base):
    prompts = read_prompts(tiny_base, limit=100)
    sides = [{prompt.group for prompt in prompts if (prompt.label == "harmful") == side} for side in (True, False)]
    assert len(sides[0]) == 100
    assert sides[0] == sides[1]


def test_all_prompts_are_used_if_the_limit_is_0(tiny_base):
    assert len(read_prompts(tiny_base, limit=0)) == len(read_prompt_set("contrast"))
