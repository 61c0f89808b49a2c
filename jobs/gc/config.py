"""Settings of `trimtab gc`."""

from dataclasses import dataclass, field

from trimtab.errors import UsageError


@dataclass(frozen=True)
class GcConfig:
    """List and remove unreferenced files.

    Args:
        remove: remove the files; without it they are only listed.
        min_age_days: minimum age in days; files modified more recently are kept.
        signals: folders of signals to check as well; those that no detector in the registry was trained on are unused.
    """

    remove: bool = False
    min_age_days: float = 7
    signals: list[str] | str = field(default_factory=list[str])

    def __post_init__(self) -> None:
        if self.min_age_days < 0:
            raise UsageError(f"min_age_days must not be below 0, not {self.min_age_days}")
