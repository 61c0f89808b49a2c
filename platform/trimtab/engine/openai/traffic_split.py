"""Traffic split between the versions of each prefix. Free of heavy imports: the settings of the server check it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from trimtab.data.prompt import hash_to_fraction
from trimtab.errors import UsageError


@dataclass(frozen=True)
class TrafficSplit:
    """Traffic between the versions of each prefix.

    Attributes:
        weights: shares of requests by prefix and alias, as {"mine": {"champion": 95, "candidate": 5}}. The champion answers all
            requests for other prefixes.
        shadow: alias of the shadow version by prefix. It receives a copy of each request, and its answers are discarded.

    Raises:
        UsageError: if the shares of a prefix are empty, negative, or all 0.
    """

    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    shadow: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name, shares in self.weights.items():
            if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
                raise UsageError(f"traffic of {name!r} needs shares of at least 0, one of them above 0")

    def select_alias(self, name: str, user: str | None) -> str | None:
        """Select the alias that answers a request.

        Args:
            name: name of the prefix.
            user: the request's `user`. With unchanged weights, a user always gets the same alias. If None, the alias is random.

        Returns:
            The alias; None for the champion of a prefix without weights.
        """
        shares = self.weights.get(name)
        if not shares:
            return None
        point = (hash_to_fraction(f"{name} {user}", 0) if user else random.random()) * sum(shares.values())
        for alias, share in shares.items():
            if point < share:
                return alias
            point -= share
        return max(shares, key=lambda alias: shares[alias])
