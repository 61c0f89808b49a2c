"""Settings of a small study, with prompts that have targets."""

from pathlib import Path
from typing import Any

from tests.support.prompt_rows import write_class_file
from trimtab.model.base_model import BaseModel

STEPS = 20


def build_study_config(base: BaseModel, folder: Path) -> dict[str, Any]:
    """Write the prompts and return the settings of a study `tiny` of two concurrent arms with STEPS steps."""
    train = {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 4, "validate_every": STEPS, "checkpoint_every": 4}
    shared = {
        "base": str(base.path),
        "data": {
            **write_class_file(folder / "all.jsonl"),
            "validation_fraction": 0.25,
            "test_fraction": 0.25,
            "filter_rules": [],
        },
        "train": train,
        "evaluate": {"limit": 2, "max_tokens": 4},
    }
    arms = {"poft": {"objective": "poft"}, "sta": {}}
    return {
        "name": "tiny",
        "seeds": [0],
        "shared": shared,
        "arms": arms,
        "max_concurrent_runs": 2,
        "out": str(folder / "report"),
    }
