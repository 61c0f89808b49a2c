"""Settings of the study command."""

from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import UsageError
from trimtab.jobs.evaluate.config import UtilitySuite
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.types import BASELINE_ARMS, Label


@dataclass(frozen=True)
class SuiteConfig:
    """Prompts that every arm of a study is judged on besides the test part.

    Args:
        data: sources of prompts, as in `trimtab evaluate safety`.
        columns: other names of the fields.
        default_class: class of prompts that bring none.
        limit: prompts of each side at most, 0 for all.
    """

    data: list[str] | str
    columns: dict[str, str] = field(default_factory=dict[str, str])
    default_class: Label | None = None
    limit: int = 0


@dataclass(frozen=True)
class StudyConfig:
    """Compare ways to learn a prefix, arm by arm, over several seeds; one report at the end.

    Args:
        name: name of the study; its folder and MLflow run go on where they stopped.
        seeds: seeds of every arm.
        shared: settings of `trimtab align` for all arms, as in its YAML.
        arms: learned arms by name, each with the settings of `trimtab align` that differ, dotted or nested.
        parallel: training runs at once, which share the cores.
        random: add an arm with a random vector, which nothing was learned for.
        token: add an arm with the best single vocabulary token that a search finds; so many candidates are tried, 0 for none.
        suites: prompts to judge on besides the test part, by name.
        utility: questions and neutral texts that tell what every arm costs in ability, by name.
        judge: what gives the verdicts.
        out: folder for the report; without it, in the study's own folder.
        address: Ray cluster to run on.
    """

    name: str = "study"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    arms: dict[str, dict[str, Any]] = field(default_factory=lambda: {"likelihood": {"objective": "likelihood"}, "sta": {}})
    parallel: int = 1
    random: bool = True
    token: int = 0
    suites: dict[str, SuiteConfig] = field(default_factory=dict[str, SuiteConfig])
    utility: dict[str, UtilitySuite] = field(default_factory=dict[str, UtilitySuite])
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    out: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if not self.seeds or not self.arms:
            raise UsageError("a study needs at least one seed and one arm")
        if self.parallel < 1:
            raise UsageError(f"parallel must be at least 1, not {self.parallel}")
        if bad := [name for name in self.arms if not name or any(c in name for c in "/#") or name in BASELINE_ARMS]:
            raise UsageError(f"{bad[0]!r} cannot name an arm: leave out / and #, and {', '.join(BASELINE_ARMS)} are taken")
