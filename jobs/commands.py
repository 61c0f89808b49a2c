"""The commands of this folder."""

from trimtab.cli.main import Command
from trimtab.jobs.collect_config import CollectConfig
from trimtab.jobs.config import AlignConfig
from trimtab.jobs.detect_config import DetectConfig
from trimtab.jobs.evaluate_config import SafetyConfig
from trimtab.jobs.gc_config import GcConfig
from trimtab.jobs.judge_config import JudgesConfig
from trimtab.jobs.promote_config import PromoteConfig
from trimtab.jobs.study_config import StudyConfig
from trimtab.jobs.submit_config import JobConfig, JobsConfig, SubmitConfig
from trimtab.jobs.sweep_config import SweepConfig
from trimtab.jobs.truth_config import TruthConfig
from trimtab.jobs.utility_config import UtilityConfig

ALIGN = Command("Learn a prefix on a frozen model, judge it, register it.", AlignConfig, "trimtab.jobs.align:command")
COLLECT = Command("Answer questions and keep the model's signals.", CollectConfig, "trimtab.jobs.collect:command")
DETECT = Command("Train detectors on collected signals.", DetectConfig, "trimtab.jobs.detect:command")
EVALUATE_SAFETY = Command(
    "Refusal and compliance of the base model, a text prompt and prefixes, on any prompt files.",
    SafetyConfig,
    "trimtab.jobs.evaluate:command",
)
EVALUATE_TRUTH = Command(
    "The whole report on detectors of made-up answers: every head and score on every data set.",
    TruthConfig,
    "trimtab.jobs.truth:command",
)
EVALUATE_UTILITY = Command(
    "What prefixes cost in ability: accuracy on questions, perplexity and KL drift on neutral texts.",
    UtilityConfig,
    "trimtab.jobs.utility:command",
)
STUDY = Command("Compare ways to learn a prefix over several seeds, in one report.", StudyConfig, "trimtab.jobs.study:command")
SWEEP = Command(
    "Search settings of `trimtab align`, and register the prefix of the best.", SweepConfig, "trimtab.jobs.sweep:command"
)
FILTER = Command("What the hard filter would leave, without training on it.", AlignConfig, "trimtab.jobs.filter:command")
GC = Command("Show and remove what nothing refers to any more.", GcConfig, "trimtab.jobs.gc:command")
JUDGES = Command("Measure judges against human labels, and fit a classifier.", JudgesConfig, "trimtab.jobs.judges:command")
PROMOTE = Command("Make a version the champion, where it passes the gate.", PromoteConfig, "trimtab.jobs.promote:command")
SUBMIT = Command("Send a command of trimtab to a Ray cluster.", SubmitConfig, "trimtab.jobs.submit:submit")
JOBS_LIST = Command("List the jobs of a cluster.", JobsConfig, "trimtab.jobs.submit:show")
JOBS_LOGS = Command("Show what a job has said.", JobConfig, "trimtab.jobs.submit:logs")
JOBS_STOP = Command("End a job.", JobConfig, "trimtab.jobs.submit:stop")
