"""Which version answers where a request names none: shares of the requests by alias, and a shadow that is asked beside."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from trimtab.data.rows import fraction
from trimtab.errors import UsageError


@dataclass(frozen=True)
class Traffic:
    """`weights` are by prefix and alias, as {"mine": {"champion": 95, "candidate": 5}}; of a prefix that is not in them the
    champion answers. `shadow` names an alias of a prefix that is asked as well, and whose answers nobody gets.

    Raises UsageError for weights that say nothing.
    """

    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    shadow: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name, shares in self.weights.items():
            if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
                raise UsageError(f"traffic of {name!r} needs shares that are not below 0, and one above")

    def alias(self, name: str, user: str | None) -> str | None:
        """The alias that answers; the same one for a user as long as the weights are the same. None for the champion."""
        shares = self.weights.get(name)
        if not shares:
            return None
        place = (fraction(f"{name} {user}", 0) if user else random.random()) * sum(shares.values())
        for alias, share in shares.items():
            if place < share:
                return alias
            place -= share
        return max(shares, key=lambda alias: shares[alias])
