"""What several replicas agree to answer with, and their metrics as one."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from trimtab.engine.prefixes.catalog import VersionNames
from trimtab.serve.registry import coordinator
from trimtab.serve.registry.coordinator import VersionCoordinator, compute_agreement
from trimtab.serve.registry.coordinator_client import merge_metrics

KEY = ("mine", "champion")


def names(version, refused=None):
    return VersionNames(
        {"prefix": {KEY: version} if version else {}, "detector": {}}, {"prefix": refused or {}, "detector": {}}
    )


def told(agreement, *tellings):
    """What the last of (replica, names) is told."""

    async def run():
        return [await agreement.report(replica, said) for replica, said in tellings][-1]

    return asyncio.run(run())


def test_an_alias_moves_when_all_have_the_version():
    both = VersionCoordinator()
    assert told(both, ("a", names(1)), ("b", names(1))).aliases["prefix"] == {KEY: 1}
    assert told(both, ("a", names(2))).aliases["prefix"] == {KEY: 1}
    assert told(both, ("b", names(2))).aliases["prefix"] == {KEY: 2}
    assert told(both, ("a", names(2))).aliases["prefix"] == {KEY: 2}
    assert told(both, ("a", names(None)), ("b", names(None))).aliases["prefix"] == {}


def test_a_refusal_of_one_is_known_to_all_and_keeps_the_old_version():
    both = VersionCoordinator()
    told(both, ("a", names(1)), ("b", names(1)), ("a", names(1, {"mine@2": "damaged"})))
    there = told(both, ("b", names(2)))
    assert there.aliases["prefix"] == {KEY: 1}
    assert there.refused["prefix"] == {"mine@2": "damaged"}


def test_those_that_are_gone_are_not_waited_for(monkeypatch):
    both = VersionCoordinator()
    told(both, ("a", names(1)), ("b", names(1)))
    asyncio.run(both.leave("b"))
    assert told(both, ("a", names(2))).aliases["prefix"] == {KEY: 2}
    told(both, ("b", names(1)))
    monkeypatch.setattr(coordinator, "GONE_SECONDS", -1.0)
    assert told(both, ("a", names(3))).aliases["prefix"] == {KEY: 3}


def test_a_new_replica_answers_with_what_the_others_do():
    both = VersionCoordinator()
    told(both, ("a", names(1)))
    assert told(both, ("new", names(2))).aliases["prefix"] == {KEY: 1}
    assert compute_agreement([], {KEY: 1}) == {}


def test_metrics_of_all_are_told_by_replica():
    both = VersionCoordinator()
    told(both, ("a", names(1)), ("b", names(1)))
    assert asyncio.run(both.exchange_metrics("a", "# of a\n")) == {}
    assert asyncio.run(both.exchange_metrics("b", "# of b\n")) == {"a": "# of a\n"}
    asyncio.run(both.leave("a"))
    assert asyncio.run(both.exchange_metrics("b", "# of b\n")) == {}
    text = '# HELP n_total Some.\n# TYPE n_total counter\nn_total{prefix="x"} 2.0\n# HELP g Rows.\n# TYPE g gauge\ng 1.0\n'
    families = {f.name: f for f in text_string_to_metric_families(merge_metrics({"a": text, "b": text}).decode())}
    assert {(s.labels["replica"], s.labels["prefix"], s.value) for s in families["n"].samples} == {("a", "x", 2), ("b", "x", 2)}
    assert families["g"].type == "gauge"
