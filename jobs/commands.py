"""Command-line entry points of the jobs."""

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

ALIGN = Command(
    "Train a prefix on a frozen model, evaluate it and register it.", AlignConfig, "trimtab.jobs.align.job:run_align"
)
COLLECT = Command("Answer questions and store the model's signals.", CollectConfig, "trimtab.jobs.collect.job:run_collect")
DETECT = Command("Train detectors on collected signals.", DetectConfig, "trimtab.jobs.detect.job:run_detect")
EVALUATE_SAFETY = Command(
    "Measure refusal and compliance of the base model, a text prompt and prefixes on any prompt files.",
    SafetyConfig,
    "trimtab.jobs.evaluate.safety:run_evaluate_safety",
)
EVALUATE_TRUTH = Command(
    "Evaluate detectors of made-up answers: every head and score on every data set.",
    TruthConfig,
    "trimtab.jobs.detect.report:run_evaluate_truth",
)
EVALUATE_UTILITY = Command(
    "Measure the utility cost of prefixes: accuracy on questions, perplexity and KL drift on neutral texts.",
    UtilityConfig,
    "trimtab.jobs.evaluate.utility:run_evaluate_utility",
)
STUDY = Command(
    "Compare training methods of a prefix over several seeds in one report.", StudyConfig, "trimtab.jobs.study.job:run_study"
)
SWEEP = Command(
    "Search settings of `trimtab align` and register the best prefix.", SweepConfig, "trimtab.jobs.sweep.job:run_sweep"
)
FILTER = Command(
    "Show the rows that the hard filter keeps, without training.", AlignConfig, "trimtab.jobs.align.filter_command:run_filter"
)
GC = Command("List and remove unreferenced files.", GcConfig, "trimtab.jobs.gc.job:run_gc")
JUDGES = Command(
    "Measure judges against human labels, and fit a classifier.", JudgesConfig, "trimtab.jobs.judges.job:run_judges"
)
PROMOTE = Command("Make a version the champion if it passes the gate.", PromoteConfig, "trimtab.jobs.promote.job:run_promote")
SUBMIT = Command("Submit a trimtab command to a Ray cluster.", SubmitConfig, "trimtab.jobs.submit.job:run_submit")
JOBS_LIST = Command("List the jobs of a cluster.", JobsConfig, "trimtab.jobs.submit.job:run_jobs_list")
JOBS_LOGS = Command("Print the log of a job.", JobConfig, "trimtab.jobs.submit.job:run_jobs_logs")
JOBS_STOP = Command("Stop a job.", JobConfig, "trimtab.jobs.submit.job:run_jobs_stop")
