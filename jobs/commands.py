"""The commands of this folder."""

from trimtab.cli.main import Command
from trimtab.jobs.align.config import AlignConfig
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.report_config import TruthConfig
from trimtab.jobs.evaluate.config import SafetyConfig, UtilityConfig
from trimtab.jobs.gc.config import GcConfig
from trimtab.jobs.judges.config import JudgesConfig
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.jobs.study.config import StudyConfig
from trimtab.jobs.submit.config import JobConfig, JobsConfig, SubmitConfig
from trimtab.jobs.sweep.config import SweepConfig

ALIGN = Command("Learn a prefix on a frozen model, judge it, register it.", AlignConfig, "trimtab.jobs.align.job:run_align")
COLLECT = Command("Answer questions and keep the model's signals.", CollectConfig, "trimtab.jobs.collect.job:run_collect")
DETECT = Command("Train detectors on collected signals.", DetectConfig, "trimtab.jobs.detect.job:run_detect")
EVALUATE_SAFETY = Command(
    "Refusal and compliance of the base model, a text prompt and prefixes, on any prompt files.",
    SafetyConfig,
    "trimtab.jobs.evaluate.safety:run_evaluate_safety",
)
EVALUATE_TRUTH = Command(
    "The whole report on detectors of made-up answers: every head and score on every data set.",
    TruthConfig,
    "trimtab.jobs.detect.report:run_evaluate_truth",
)
EVALUATE_UTILITY = Command(
    "What prefixes cost in ability: accuracy on questions, perplexity and KL drift on neutral texts.",
    UtilityConfig,
    "trimtab.jobs.evaluate.utility:run_evaluate_utility",
)
STUDY = Command(
    "Compare ways to learn a prefix over several seeds, in one report.", StudyConfig, "trimtab.jobs.study.job:run_study"
)
SWEEP = Command(
    "Search settings of `trimtab align`, and register the prefix of the best.", SweepConfig, "trimtab.jobs.sweep.job:run_sweep"
)
FILTER = Command(
    "What the hard filter would leave, without training on it.", AlignConfig, "trimtab.jobs.align.filter_command:run_filter"
)
GC = Command("Show and remove what nothing refers to any more.", GcConfig, "trimtab.jobs.gc.job:run_gc")
JUDGES = Command(
    "Measure judges against human labels, and fit a classifier.", JudgesConfig, "trimtab.jobs.judges.job:run_judges"
)
PROMOTE = Command(
    "Make a version the champion, where it passes the gate.", PromoteConfig, "trimtab.jobs.promote.job:run_promote"
)
SUBMIT = Command("Send a command of trimtab to a Ray cluster.", SubmitConfig, "trimtab.jobs.submit.job:run_submit")
JOBS_LIST = Command("List the jobs of a cluster.", JobsConfig, "trimtab.jobs.submit.job:run_jobs_list")
JOBS_LOGS = Command("Show what a job has said.", JobConfig, "trimtab.jobs.submit.job:run_jobs_logs")
JOBS_STOP = Command("End a job.", JobConfig, "trimtab.jobs.submit.job:run_jobs_stop")
