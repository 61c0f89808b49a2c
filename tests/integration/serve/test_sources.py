"""A folder in the registry's place, without a server."""

import asyncio
import json

import pytest
import torch

from trimtab import heads
from trimtab.artifacts.card import PrefixCard
from trimtab.artifacts.prefix import build_prefix, save_prefix
from trimtab.detection.calibration import FALSE_POSITIVE_RATES
from trimtab.detection.detector import FILE, DetectorCard, build_detector, save_detector
from trimtab.engine.prefixes import catalog
from trimtab.engine.prefixes.catalog import RegisteredVersion, VersionCatalog
from trimtab.errors import ArtifactError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.serve.registry.sources import find_detector_layers, open_sources


@pytest.fixture
def folder(tmp_path):
    """Two versions of a prefix, one of a detector, and things that are none."""
    base = BaseModel("tiny", tmp_path, "0123456789abcdef", 8, 100, 6)
    for version in (1, 2):
        made = build_prefix(torch.randn(1, 8), PrefixCard("prefix", "mine", "tiny", base.fingerprint, "system", 0, 0, ""))
        save_prefix(made, tmp_path / "mine" / str(version))
    card = DetectorCard(
        "truth", "tiny", base.fingerprint, [2, 4], 8, "linear", {}, -2.0, dict.fromkeys(FALSE_POSITIVE_RATES, 0.5)
    )
    head = heads.get_head("linear")(8, 2)
    made = build_detector(head, torch.stack([torch.zeros(7), torch.ones(7)]), torch.tensor([1.0, 0.0]), card)
    save_detector(made, tmp_path / "truth" / "1")
    (tmp_path / "mine" / "aliases.json").write_text(json.dumps({"champion": 1, "candidate": 2}))
    (tmp_path / "truth" / "aliases.json").write_text(json.dumps({"champion": 1}))
    (tmp_path / "mine" / "notes").mkdir()
    return tmp_path


def test_versions_and_aliases_are_read_by_kind(folder):
    base = BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6)
    held, watching = open_sources(base, str(folder))
    assert held.list_versions() == [
        RegisteredVersion("mine", 1, None, ("champion",)),
        RegisteredVersion("mine", 2, None, ("candidate",)),
    ]
    assert [known.name for known in watching.list_versions()] == ["truth"]
    assert held.load(held.list_versions()[1]).card.name == "mine"
    assert find_detector_layers(watching, {}) == (2, 4)


def test_an_alias_moves_with_its_file(folder):
    held, _ = open_sources(BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6), str(folder))
    written = folder / "mine" / "aliases.new"
    written.write_text(json.dumps({"champion": 2}))
    written.replace(folder / "mine" / "aliases.json")
    assert [known.aliases for known in held.list_versions()] == [(), ("champion",)]


def test_a_replica_that_comes_reads_what_the_others_answer_with(folder):
    _, watching = open_sources(BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6), str(folder))
    (folder / "truth" / "aliases.json").write_text("{}")
    assert find_detector_layers(watching, {}) == ()
    assert find_detector_layers(watching, {("truth", "champion"): 1}) == (2, 4)


@pytest.mark.parametrize(("seconds", "taken"), [(0.0, {("truth", "champion"): 1}), (60.0, {})])
def test_a_damaged_version_that_was_mended_is_read_again_after_a_while(folder, monkeypatch, seconds, taken):
    monkeypatch.setattr(catalog, "RETRY_SECONDS", seconds)
    _, watching = open_sources(BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6), str(folder))
    held = VersionCatalog("tiny", "detector", watching, lambda part: None)
    path = folder / "truth" / "1" / FILE
    whole = path.read_bytes()
    path.write_bytes(b"x")
    assert asyncio.run(held.refresh()) == {}
    assert "truth@1" in held.refused
    path.write_bytes(whole)
    assert asyncio.run(held.refresh()) == taken
    assert ("truth@1" in held.refused) == (not taken)


def test_unused_versions_without_an_alias_leave_memory_and_load_again(folder, monkeypatch):
    prefixes, _ = open_sources(BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6), str(folder))
    loaded: list[int] = []
    load = type(prefixes).load

    def load_and_note(source, version):
        loaded.append(version.version)
        return load(source, version)

    monkeypatch.setattr(type(prefixes), "load", load_and_note)
    versions = VersionCatalog("tiny", "prefix", prefixes, lambda part: None)

    async def run() -> None:
        (folder / "mine" / "aliases.json").write_text(json.dumps({"champion": 1}))
        await versions.set_aliases(await versions.refresh())
        await versions.find("mine", "2")
        assert versions.evict_unused() == [], "version 2 has just been requested"
        monkeypatch.setattr(catalog, "IDLE_SECONDS", -1.0)
        assert [version.version for version in versions.evict_unused()] == [2], "version 1 is champion"
        assert (await versions.find("mine", "2")).version.version == 2

    asyncio.run(run())
    assert loaded == [1, 2, 2]


def test_what_must_not_be_used_is_told(folder, caplog):
    base = BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6)
    held, watching = open_sources(base, str(folder))
    (folder / "truth" / "1" / FILE).write_bytes(b"x")
    with pytest.raises(ArtifactError):
        watching.load(watching.list_versions()[0])
    assert find_detector_layers(watching, {}) == ()
    before = held.list_versions()
    (folder / "mine" / "aliases.json").write_text("{")
    assert held.list_versions() == before
    assert "not readable JSON; keeping its previous content" in caplog.text
    (folder / "mine" / "\u00b2").mkdir()
    (folder / "mine" / "\u00b2" / "card.json").write_text((folder / "mine" / "2" / "card.json").read_text())
    assert held.list_versions() == before
    with pytest.raises(UsageError, match="is not a folder"):
        open_sources(base, str(folder / "nowhere"))
    other = open_sources(BaseModel("other", folder, "0123456789abcdef", 8, 100, 6), str(folder / "truth"))
    assert other[0].list_versions() == []
