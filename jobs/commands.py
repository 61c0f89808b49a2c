"""The commands of this folder."""

from trimtab.cli import Command

from .config import AlignConfig, SafetyConfig, StudyConfig

ALIGN = Command("Learn a prefix on a frozen model, judge it, register it.", AlignConfig, "trimtab.jobs.align:command")
EVALUATE_SAFETY = Command(
    "Refusal and compliance of the base model, a text prompt and prefixes, on any prompt files.",
    SafetyConfig,
    "trimtab.jobs.evaluate:command",
)
STUDY = Command("Compare ways to learn a prefix over several seeds, in one report.", StudyConfig, "trimtab.jobs.study:command")
FILTER = Command("What the hard filter would leave, without training on it.", AlignConfig, "trimtab.jobs.filter:command")
