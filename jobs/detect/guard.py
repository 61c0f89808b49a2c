"""Guard of a job: a detector of harmful prompts that is trained on the labeled prompts of the job."""

from collections.abc import Sequence

from trimtab import settings
from trimtab.data.prompt import Prompt, write_prompts
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.job import collect
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import train_detectors
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.tracking import registry
from trimtab.tracking.registry import Version
from trimtab.types import DType

# Seeds that select the layer and the penalty.
SEEDS = 3


def train_guard(
    name: str, prompts: Sequence[Prompt], base: str, revision: str | None, dtype: DType, scale: ScaleConfig
) -> Version:
    """Collect the signals of prompts, train a linear detector on them, and register it.

    Args:
        name: name of the detector.
        prompts: labeled prompts.
        base: base model, as in the settings of jobs.
        revision: revision of a Hugging Face id.
        dtype: data type of the model.
        scale: cluster resources of the engine.

    Raises:
        TrimtabError: if the signals cannot be collected, or the detector cannot be trained or registered.
    """
    folder = settings.get_runs_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(prompts, folder / "prompts.jsonl")
    signals, source = str(folder / "signals"), str(folder / "prompts.jsonl")
    collect(CollectConfig(subject="prompt", data=source, out=signals, base=base, revision=revision, dtype=dtype, scale=scale))
    detected = train_detectors(
        DetectConfig(signals, "linear", num_seeds=SEEDS, name=name, base=base, revision=revision, address=scale.address)
    )
    return detected.version or registry.find_version(base, name, registry.CANDIDATE)
