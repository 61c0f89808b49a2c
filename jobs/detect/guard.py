"""Guard of a job: a detector of harmful prompts that is trained on the labeled prompts of the job."""

from collections.abc import Sequence
from pathlib import Path

from trimtab import settings
from trimtab.data.prompt import Prompt, compute_prompts_digest, write_prompts
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.collect.job import collect
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.job import train_detectors
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.model.base_model import BaseModel
from trimtab.tracking import registry
from trimtab.tracking.registry import Version
from trimtab.types import DType

# Seeds that select the layer and the penalty.
SEEDS = 3


def find_guard(base: BaseModel, name: str, prompts: Sequence[Prompt]) -> Version | None:
    """Return the newest version of a guard, unless a job trained it on other prompts.

    Args:
        base: base model.
        name: name of the detector.
        prompts: labeled prompts of the job. A version that the user has trained with `trimtab detect` may have any others.
    """
    version = registry.find_alias(base.name, name, registry.CANDIDATE)
    if version is None:
        return None
    signals = Path(str(registry.load_detector(version, base).card.data[0]["name"]))
    is_own = signals.is_relative_to(_get_folder(name))
    return version if not is_own or signals.name.startswith(_build_key(base, prompts)) else None


def train_guard(
    base: BaseModel,
    name: str,
    prompts: Sequence[Prompt],
    base_name: str,
    revision: str | None,
    dtype: DType,
    scale: ScaleConfig,
) -> Version:
    """Collect the signals of prompts, train a linear detector on them, and register it.

    Args:
        base: base model.
        name: name of the detector.
        prompts: labeled prompts.
        base_name: base model, as in the settings of jobs.
        revision: revision of a Hugging Face id.
        dtype: data type of the model.
        scale: cluster resources of the engine.

    Raises:
        TrimtabError: if the signals cannot be collected, or the detector cannot be trained or registered.
    """
    # The same job resumes an interrupted collection.
    signals = str(_get_folder(name) / f"{_build_key(base, prompts)}-{dtype}")
    source = f"{signals}.jsonl"
    _get_folder(name).mkdir(parents=True, exist_ok=True)
    write_prompts(prompts, Path(source))
    collect(
        CollectConfig(subject="prompt", data=source, out=signals, base=base_name, revision=revision, dtype=dtype, scale=scale)
    )
    detected = train_detectors(
        DetectConfig(signals, "linear", num_seeds=SEEDS, name=name, base=base_name, revision=revision, address=scale.address)
    )
    return detected.version or registry.find_version(base.name, name, registry.CANDIDATE)


def _get_folder(name: str) -> Path:
    return settings.get_runs_folder() / name


def _build_key(base: BaseModel, prompts: Sequence[Prompt]) -> str:
    return f"{base.fingerprint}-{compute_prompts_digest(prompts)[:12]}"
