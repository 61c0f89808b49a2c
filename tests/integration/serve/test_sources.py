"""A folder in the registry's place, without a server."""

import asyncio
import json

import pytest
import torch

from trimtab import heads
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import Card
from trimtab.detection import detector
from trimtab.detection.calibration import ALARMS
from trimtab.detection.detector import DetectorCard
from trimtab.engine.prefixes import catalog
from trimtab.engine.prefixes.catalog import Known, Library
from trimtab.errors import ArtefactError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.serve.registry import sources


@pytest.fixture
def folder(tmp_path):
    """Two versions of a prefix, one of a detector, and things that are none."""
    base = BaseModel("tiny", tmp_path, "0123456789abcdef", 8, 100, 6)
    for version in (1, 2):
        made = prefixes.make(torch.randn(1, 8), Card("prefix", "mine", "tiny", base.fingerprint, "system", 0, 0, ""))
        prefixes.save(made, tmp_path / "mine" / str(version))
    card = DetectorCard("truth", "tiny", base.fingerprint, [2, 4], 8, "linear", {}, -2.0, dict.fromkeys(ALARMS, 0.5))
    head = heads.get("linear")(8, 2)
    made = detector.make(head, torch.stack([torch.zeros(7), torch.ones(7)]), torch.tensor([1.0, 0.0]), card)
    detector.save(made, tmp_path / "truth" / "1")
    (tmp_path / "mine" / "aliases.json").write_text(json.dumps({"champion": 1, "candidate": 2}))
    (tmp_path / "truth" / "aliases.json").write_text(json.dumps({"champion": 1}))
    (tmp_path / "mine" / "notes").mkdir()
    return tmp_path


def test_versions_and_aliases_are_read_by_kind(folder):
    base = BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6)
    held, watching = sources.opened(base, str(folder))
    assert held.known() == [Known("mine", 1, None, ("champion",)), Known("mine", 2, None, ("candidate",))]
    assert [known.name for known in watching.known()] == ["truth"]
    assert held.load(held.known()[1]).card.name == "mine"
    assert sources.layers(watching, {}) == (2, 4)


def test_an_alias_moves_with_its_file(folder):
    held, _ = sources.opened(BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6), str(folder))
    written = folder / "mine" / "aliases.new"
    written.write_text(json.dumps({"champion": 2}))
    written.replace(folder / "mine" / "aliases.json")
    assert [known.aliases for known in held.known()] == [(), ("champion",)]


def test_a_replica_that_comes_reads_what_the_others_answer_with(folder):
    _, watching = sources.opened(BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6), str(folder))
    (folder / "truth" / "aliases.json").write_text("{}")
    assert sources.layers(watching, {}) == ()
    assert sources.layers(watching, {("truth", "champion"): 1}) == (2, 4)


@pytest.mark.parametrize(("seconds", "taken"), [(0.0, {("truth", "champion"): 1}), (60.0, {})])
def test_a_damaged_version_that_was_mended_is_read_again_after_a_while(folder, monkeypatch, seconds, taken):
    monkeypatch.setattr(catalog, "AGAIN_SECONDS", seconds)
    _, watching = sources.opened(BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6), str(folder))
    held = Library("tiny", "detector", watching, lambda part: None)
    path = folder / "truth" / "1" / detector.FILE
    whole = path.read_bytes()
    path.write_bytes(b"x")
    assert asyncio.run(held.read()) == {}
    assert "truth@1" in held.refused
    path.write_bytes(whole)
    assert asyncio.run(held.read()) == taken
    assert ("truth@1" in held.refused) == (not taken)


def test_what_must_not_be_used_is_told(folder, caplog):
    base = BaseModel("tiny", folder, "0123456789abcdef", 8, 100, 6)
    held, watching = sources.opened(base, str(folder))
    (folder / "truth" / "1" / detector.FILE).write_bytes(b"x")
    with pytest.raises(ArtefactError):
        watching.load(watching.known()[0])
    assert sources.layers(watching, {}) == ()
    before = held.known()
    (folder / "mine" / "aliases.json").write_text("{")
    assert held.known() == before
    assert "not readable JSON; what it held before stays" in caplog.text
    (folder / "mine" / "\u00b2").mkdir()
    (folder / "mine" / "\u00b2" / "card.json").write_text((folder / "mine" / "2" / "card.json").read_text())
    assert held.known() == before
    with pytest.raises(UsageError, match="is no folder"):
        sources.opened(base, str(folder / "nowhere"))
    other = sources.opened(BaseModel("other", folder, "0123456789abcdef", 8, 100, 6), str(folder / "truth"))
    assert other[0].known() == []
