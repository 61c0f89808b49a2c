"""Command-line entry points of the jobs."""

from trimtab.cli.main import Command
from trimtab.jobs.align.config import AlignConfig, FilterConfig
from trimtab.jobs.collect.config import CollectConfig
from trimtab.jobs.detect.config import DetectConfig
from trimtab.jobs.detect.report_config import TruthConfig
from trimtab.jobs.distil.config import DistilConfig
from trimtab.jobs.drift.config import DriftConfig
from trimtab.jobs.evaluate.config import GuardConfig, SafetyConfig, UtilityConfig
from trimtab.jobs.gc.config import GcConfig
from trimtab.jobs.judges.config import JudgesConfig
from trimtab.jobs.promote.config import PromoteConfig
from trimtab.jobs.refresh.config import RefreshConfig
from trimtab.jobs.study.config import StudyConfig
from trimtab.jobs.submit.config import JobsConfig, LogsConfig, StopConfig, SubmitConfig
from trimtab.jobs.sweep.config import SweepConfig

ALIGN = Command(AlignConfig, "trimtab.jobs.align.job:run_align")
COLLECT = Command(CollectConfig, "trimtab.jobs.collect.job:run_collect")
DETECT = Command(DetectConfig, "trimtab.jobs.detect.job:run_detect")
DISTIL = Command(DistilConfig, "trimtab.jobs.distil.job:run_distil")
DRIFT = Command(DriftConfig, "trimtab.jobs.drift.job:run_drift")
EVALUATE_GUARD = Command(GuardConfig, "trimtab.jobs.evaluate.guard:run_evaluate_guard")
EVALUATE_SAFETY = Command(SafetyConfig, "trimtab.jobs.evaluate.safety:run_evaluate_safety")
EVALUATE_TRUTH = Command(TruthConfig, "trimtab.jobs.detect.report:run_evaluate_truth")
EVALUATE_UTILITY = Command(UtilityConfig, "trimtab.jobs.evaluate.utility:run_evaluate_utility")
STUDY = Command(StudyConfig, "trimtab.jobs.study.job:run_study")
SWEEP = Command(SweepConfig, "trimtab.jobs.sweep.job:run_sweep")
FILTER = Command(FilterConfig, "trimtab.jobs.align.filter_command:run_filter")
GC = Command(GcConfig, "trimtab.jobs.gc.job:run_gc")
JUDGES = Command(JudgesConfig, "trimtab.jobs.judges.job:run_judges")
PROMOTE = Command(PromoteConfig, "trimtab.jobs.promote.job:run_promote")
REFRESH = Command(RefreshConfig, "trimtab.jobs.refresh.job:run_refresh")
SUBMIT = Command(SubmitConfig, "trimtab.jobs.submit.job:run_submit")
JOBS_LIST = Command(JobsConfig, "trimtab.jobs.submit.job:run_jobs_list")
JOBS_LOGS = Command(LogsConfig, "trimtab.jobs.submit.job:run_jobs_logs")
JOBS_STOP = Command(StopConfig, "trimtab.jobs.submit.job:run_jobs_stop")
