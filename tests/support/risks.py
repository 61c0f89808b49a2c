"""Prefix and risks of a request, as a response describes them."""

from types import SimpleNamespace

from trimtab.engine.context import Steering
from trimtab.engine.detectors.request_risk import RequestRisk
from trimtab.engine.prefixes.version_loader import LoadedVersion, RegisteredVersion

STEERING = Steering("calm", 3, "run", "system", (100,), "salt")


def make_risk(running: bool = False, **risks: float) -> RequestRisk:
    """Make the risk of a request whose detector flags risks above 0.5; `risks` are those of choices `c0`, `c1`, ..."""
    artifact = SimpleNamespace(card=SimpleNamespace(thresholds={"0.05": 0.5}))
    detector = LoadedVersion(RegisteredVersion("truth", 2, "detector-run"), artifact)
    return RequestRisk(detector, running=running, risks={int(name[1:]): risk for name, risk in risks.items()})
