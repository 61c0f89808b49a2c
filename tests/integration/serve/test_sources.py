"""Prefixes and detectors read from a folder instead of the registry."""

import asyncio
import json

import pytest
import torch

from trimtab import heads
from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import build_prefix, save_prefix
from trimtab.detection.calibration import FALSE_POSITIVE_RATES
from trimtab.detection.detector import FILE, build_detector, save_detector
from trimtab.detection.detector_card import DetectorCard
from trimtab.engine.prefixes import version_loader
from trimtab.engine.prefixes.catalog import VersionCatalog
from trimtab.engine.prefixes.version_loader import RegisteredVersion
from trimtab.errors import ArtifactError, TrackingError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.serve.registry.sources import ReadSignals, find_read_signals, open_sources


@pytest.fixture
def registry_folder(tmp_path):
    """Folder with two versions of a prefix, one of a detector, and a folder that is no version."""
    base = BaseModel("tiny", tmp_path, "0123456789abcdef", 8, 100, 6)
    for version in (1, 2):
        prefix = build_prefix(torch.randn(1, 8), PrefixCard("prefix", "mine", "tiny", base.fingerprint, "system", 0, 0, ""))
        save_prefix(prefix, tmp_path / "mine" / str(version))
    card = DetectorCard(
        "truth", "tiny", base.fingerprint, [2, 4], 8, "linear", {}, -2.0, dict.fromkeys(FALSE_POSITIVE_RATES, 0.5)
    )
    head = heads.get_head("linear")(8, 2)
    detector = build_detector(head, torch.stack([torch.zeros(7), torch.ones(7)]), torch.tensor([1.0, 0.0]), card)
    save_detector(detector, tmp_path / "truth" / "1")
    (tmp_path / "mine" / "aliases.json").write_text(json.dumps({"champion": 1, "candidate": 2}))
    (tmp_path / "truth" / "aliases.json").write_text(json.dumps({"champion": 1}))
    (tmp_path / "mine" / "notes").mkdir()
    return tmp_path


def test_lists_versions_and_aliases_by_kind(registry_folder):
    base = BaseModel("tiny", registry_folder, "0123456789abcdef", 8, 100, 6)
    prefixes, detectors = open_sources(base, str(registry_folder))
    assert prefixes.list_versions() == [
        RegisteredVersion("mine", 1, None, ("champion",)),
        RegisteredVersion("mine", 2, None, ("candidate",)),
    ]
    assert [version.name for version in detectors.list_versions()] == ["truth"]
    assert prefixes.load(prefixes.list_versions()[1]).card.name == "mine"
    assert find_read_signals(detectors, {}).layers == (2, 4)


def test_alias_changes_with_its_file(registry_folder):
    prefixes, _ = open_sources(BaseModel("tiny", registry_folder, "0123456789abcdef", 8, 100, 6), str(registry_folder))
    new_file = registry_folder / "mine" / "aliases.new"
    new_file.write_text(json.dumps({"champion": 2}))
    new_file.replace(registry_folder / "mine" / "aliases.json")
    assert [version.aliases for version in prefixes.list_versions()] == [(), ("champion",)]


def test_new_replica_captures_layers_of_detectors_in_use(registry_folder):
    _, detectors = open_sources(BaseModel("tiny", registry_folder, "0123456789abcdef", 8, 100, 6), str(registry_folder))
    (registry_folder / "truth" / "aliases.json").write_text("{}")
    assert find_read_signals(detectors, {}).layers == ()
    assert find_read_signals(detectors, {("truth", "champion"): 1}) == ReadSignals((2, 4), token_statistics=False)


@pytest.mark.parametrize(("retry_seconds", "loaded"), [(0.0, {("truth", "champion"): 1}), (60.0, {})])
def test_repaired_version_is_loaded_after_the_retry_interval(registry_folder, monkeypatch, retry_seconds, loaded):
    monkeypatch.setattr(version_loader, "RETRY_SECONDS", retry_seconds)
    _, detectors = open_sources(BaseModel("tiny", registry_folder, "0123456789abcdef", 8, 100, 6), str(registry_folder))
    versions = VersionCatalog("tiny", "detector", detectors, lambda part: None)
    path = registry_folder / "truth" / "1" / FILE
    content = path.read_bytes()
    path.write_bytes(b"x")
    assert asyncio.run(versions.refresh()) == {}
    assert "truth@1" in versions.refused
    path.write_bytes(content)
    assert asyncio.run(versions.refresh()) == loaded
    assert ("truth@1" in versions.refused) == (not loaded)


def test_version_whose_files_are_gone_is_refused_alone(registry_folder, monkeypatch):
    """As after a lifecycle rule of a bucket: the registry lists the version, and its files cannot be read."""
    prefixes, detectors = open_sources(BaseModel("tiny", registry_folder, "0123456789abcdef", 8, 100, 6), str(registry_folder))
    load = type(prefixes).load

    def load_or_fail(source, version):
        if (version.name, version.version) in (("mine", 2), ("truth", 1)):
            raise TrackingError("MLflow: cannot download it (no such file)")
        return load(source, version)

    monkeypatch.setattr(type(prefixes), "load", load_or_fail)
    versions = VersionCatalog("tiny", "prefix", prefixes, lambda part: None)
    assert asyncio.run(versions.refresh()) == {("mine", "champion"): 1}
    assert "no such file" in versions.refused["mine@2"]
    assert find_read_signals(detectors, {}).layers == ()


def test_evicts_unused_versions_without_alias_and_reloads_them(registry_folder, monkeypatch):
    prefixes, _ = open_sources(BaseModel("tiny", registry_folder, "0123456789abcdef", 8, 100, 6), str(registry_folder))
    loaded: list[int] = []
    load = type(prefixes).load

    def load_and_record(source, version):
        loaded.append(version.version)
        return load(source, version)

    monkeypatch.setattr(type(prefixes), "load", load_and_record)
    versions = VersionCatalog("tiny", "prefix", prefixes, lambda part: None)

    async def run() -> None:
        (registry_folder / "mine" / "aliases.json").write_text(json.dumps({"champion": 1}))
        await versions.set_aliases(await versions.refresh())
        await versions.find("mine", "2")
        assert versions.evict_unused() == [], "version 2 has just been requested"
        monkeypatch.setattr(version_loader, "IDLE_SECONDS", -1.0)
        assert [version.version for version in versions.evict_unused()] == [2], "version 1 is champion"
        assert (await versions.find("mine", "2")).version.version == 2

    asyncio.run(run())
    assert loaded == [1, 2, 2]


def test_reports_unusable_files(registry_folder, caplog):
    base = BaseModel("tiny", registry_folder, "0123456789abcdef", 8, 100, 6)
    prefixes, detectors = open_sources(base, str(registry_folder))
    (registry_folder / "truth" / "1" / FILE).write_bytes(b"x")
    with pytest.raises(ArtifactError):
        detectors.load(detectors.list_versions()[0])
    assert find_read_signals(detectors, {}).layers == ()
    before = prefixes.list_versions()
    (registry_folder / "mine" / "aliases.json").write_text("{")
    assert prefixes.list_versions() == before
    assert "not readable JSON; keeping its previous content" in caplog.text
    for number in ('"2"', "true", "2.0"):
        (registry_folder / "mine" / "aliases.json").write_text(f'{{"champion": {number}}}')
        assert prefixes.list_versions() == before
    assert "aliases must refer to version numbers" in caplog.text
    (registry_folder / "mine" / "\u00b2").mkdir()
    (registry_folder / "mine" / "\u00b2" / "card.json").write_text((registry_folder / "mine" / "2" / "card.json").read_text())
    assert prefixes.list_versions() == before
    with pytest.raises(UsageError, match="is not a folder"):
        open_sources(base, str(registry_folder / "nowhere"))
    other = open_sources(BaseModel("other", registry_folder, "0123456789abcdef", 8, 100, 6), str(registry_folder / "truth"))
    assert other[0].list_versions() == []
