"""Settings of `trimtab gc`."""

from dataclasses import dataclass, field

from trimtab.errors import UsageError


@dataclass(frozen=True)
class GcConfig:
    """Show what nothing refers to any more in trimtab's home, and remove it.

    Args:
        remove: remove it; without this it is only shown.
        days: what was written to within this time stays.
        signals: folders of signals to look at too: those that no detector in the registry has learned from can go.
    """

    remove: bool = False
    days: float = 7
    signals: list[str] | str = field(default_factory=list[str])

    def __post_init__(self) -> None:
        if self.days < 0:
            raise UsageError("days cannot be below 0")
