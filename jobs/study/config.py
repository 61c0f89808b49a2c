"""Settings of `trimtab study`."""

from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import UsageError
from trimtab.jobs.evaluate.config import UtilitySuite
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.types import BASELINE_ARMS, Label


@dataclass(frozen=True)
class SuiteConfig:
    """Additional prompts for the evaluation of every arm of a study.

    Args:
        data: sources of prompts, as in `trimtab evaluate safety`.
        columns: column names of the fields, if they differ from the default names.
        default_class: class of prompts without a class.
        limit: maximum number of prompts per side, 0 for all.
    """

    data: list[str] | str
    columns: dict[str, str] = field(default_factory=dict[str, str])
    default_class: Label | None = None
    limit: int = 0


@dataclass(frozen=True)
class StudyConfig:
    """Compare training methods of a prefix over several seeds and write one report.

    Args:
        name: name of the study; a second call with the same name resumes its folder and MLflow run.
        seeds: random seeds; every arm is trained once per seed.
        shared: settings of `trimtab align` for all arms, as in its YAML file.
        arms: trained arms by name, each with the settings of `trimtab align` that differ, dotted or nested.
        max_concurrent_runs: number of training runs at the same time; they share the CPU cores.
        random_baseline: add a baseline arm with a random vector per seed.
        token_candidates: number of candidates in the search for the best single vocabulary token, which is added as a baseline
            arm; 0 for no such arm.
        suites: prompts to evaluate besides the test part, by name.
        utility: questions and neutral texts to measure the utility cost of every arm, by name.
        judge: judge of the answers.
        detector: detector of prompts: NAME, NAME@ALIAS or NAME@VERSION. It adds the arms that `trimtab evaluate safety
            --detector` adds, for each trained prefix.
        threshold: risk above which the detector flags a prompt; by default its balanced threshold.
        out: folder of the report; by default `report` in the folder of the study.
        address: address of the Ray cluster to run on.
    """

    name: str = "study"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    arms: dict[str, dict[str, Any]] = field(default_factory=lambda: {"likelihood": {"objective": "likelihood"}, "sta": {}})
    max_concurrent_runs: int = 1
    random_baseline: bool = True
    token_candidates: int = 0
    suites: dict[str, SuiteConfig] = field(default_factory=dict[str, SuiteConfig])
    utility: dict[str, UtilitySuite] = field(default_factory=dict[str, UtilitySuite])
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    detector: str | None = None
    threshold: float | None = None
    out: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if not self.seeds or not self.arms:
            raise UsageError("a study needs at least one seed and one arm")
        if self.max_concurrent_runs < 1:
            raise UsageError(f"max_concurrent_runs must be at least 1, not {self.max_concurrent_runs}")
        if bad := [name for name in self.arms if not name or any(c in name for c in "/#") or name in BASELINE_ARMS]:
            raise UsageError(f"{bad[0]!r} is not a valid arm name: leave out / and #; {', '.join(BASELINE_ARMS)} are reserved")
