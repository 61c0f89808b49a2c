"""Coordination of replicas: common versions of aliases and merged metrics."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from trimtab.engine.prefixes.catalog import VersionNames
from trimtab.serve.metrics import merge_metrics
from trimtab.serve.registry import coordinator
from trimtab.serve.registry.coordinator import VersionCoordinator, compute_agreement

KEY = ("mine", "champion")


def make_names(version, refused=None):
    """Make the report of a replica that has loaded a version."""
    return VersionNames(
        {"prefix": {KEY: version} if version else {}, "detector": {}}, {"prefix": refused or {}, "detector": {}}
    )


def send_reports(versions, *reports):
    """Send reports of (replica, names) and return the last response."""

    async def run():
        return [await versions.report(replica, names) for replica, names in reports][-1]

    return asyncio.run(run())


def test_alias_moves_when_all_replicas_have_the_version():
    versions = VersionCoordinator()
    assert send_reports(versions, ("a", make_names(1)), ("b", make_names(1))).aliases["prefix"] == {KEY: 1}
    assert send_reports(versions, ("a", make_names(2))).aliases["prefix"] == {KEY: 1}
    assert send_reports(versions, ("b", make_names(2))).aliases["prefix"] == {KEY: 2}
    assert send_reports(versions, ("a", make_names(2))).aliases["prefix"] == {KEY: 2}
    assert send_reports(versions, ("a", make_names(None)), ("b", make_names(None))).aliases["prefix"] == {}


def test_refused_version_is_shared_and_alias_stays():
    versions = VersionCoordinator()
    send_reports(versions, ("a", make_names(1)), ("b", make_names(1)), ("a", make_names(1, {"mine@2": "damaged"})))
    response = send_reports(versions, ("b", make_names(2)))
    assert response.aliases["prefix"] == {KEY: 1}
    assert response.refused["prefix"] == {"mine@2": "damaged"}


def test_alias_moves_without_replicas_that_left_or_expired(monkeypatch):
    versions = VersionCoordinator()
    send_reports(versions, ("a", make_names(1)), ("b", make_names(1)))
    asyncio.run(versions.leave("b"))
    assert send_reports(versions, ("a", make_names(2))).aliases["prefix"] == {KEY: 2}
    send_reports(versions, ("b", make_names(1)))
    monkeypatch.setattr(coordinator, "GONE_SECONDS", -1.0)
    assert send_reports(versions, ("a", make_names(3))).aliases["prefix"] == {KEY: 3}


def test_new_replica_uses_version_of_the_others():
    versions = VersionCoordinator()
    send_reports(versions, ("a", make_names(1)))
    assert send_reports(versions, ("new", make_names(2))).aliases["prefix"] == {KEY: 1}
    assert compute_agreement([], {KEY: 1}) == {}


def test_merged_metrics_are_labeled_by_replica():
    versions = VersionCoordinator()
    send_reports(versions, ("a", make_names(1)), ("b", make_names(1)))
    assert asyncio.run(versions.exchange_metrics("a", "# of a\n")) == {}
    assert asyncio.run(versions.exchange_metrics("b", "# of b\n")) == {"a": "# of a\n"}
    asyncio.run(versions.leave("a"))
    assert asyncio.run(versions.exchange_metrics("b", "# of b\n")) == {}
    text = '# HELP n_total Some.\n# TYPE n_total counter\nn_total{prefix="x"} 2.0\n# HELP g Rows.\n# TYPE g gauge\ng 1.0\n'
    families = {
        family.name: family for family in text_string_to_metric_families(merge_metrics({"a": text, "b": text}).decode())
    }
    samples = families["n"].samples
    assert {(sample.labels["replica"], sample.labels["prefix"], sample.value) for sample in samples} == {
        ("a", "x", 2),
        ("b", "x", 2),
    }
    assert families["g"].type == "gauge"
