"""The registry: every kept prefix and detector is a version of `trimtab.<base>.<name>`; aliases say which one to use.

`candidate` is the newest, `champion` the one that passed the gate (tracking/moves.py moves it).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import mlflow.artifacts
from mlflow import MlflowException
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.entities.paged_list import PagedList

from trimtab import settings
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import FILE, PrefixCard, read_json_object
from trimtab.artifacts.prefix import Prefix
from trimtab.detection import detector as detectors
from trimtab.detection.detector import Detector, DetectorCard
from trimtab.errors import NotFoundError, TrackingError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.tracking.client import get_client, get_experiment_id, wrap_tracking_errors
from trimtab.util.atomic_files import write_atomic

CANDIDATE, CHAMPION = "candidate", "champion"
# What `register` writes on each version, and `versions` looks for.
TAGS = {"trimtab.name", "trimtab.fingerprint"}
# In a downloaded version's folder once all of it is there.
WHOLE = ".whole.json"
MODELS_PAGE, VERSIONS_PAGE = 1000, 10_000
Found = TypeVar("Found")
# What the command makes that names a kind.
MAKERS = {"prefix": "trimtab align", "detector": "trimtab detect"}


@dataclass(frozen=True)
class Version:
    """One version in the registry, of a `kind`: prefix or detector. `aliases` point at it now; `metrics` are its card's."""

    base: str
    name: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    fingerprint: str
    metrics: Mapping[str, float]
    kind: str = "prefix"


def format_model_name(base: str, name: str) -> str:
    """Registered model of a prefix or a detector."""
    for part in (base, name):
        if not part or any(c in part for c in "/:@") or "." in name:
            raise UsageError(f"{part!r} cannot be a name: leave out / : @ and dots")
    return f"trimtab.{base}.{name}"


def register_version(folder: Path, run_id: str) -> Version:
    """Keep the folder of a prefix or detector as a LoggedModel of its run and as a new version with alias `candidate`.

    Raises ArtifactError for a folder that must not be used, UsageError where its name is taken by another kind.
    """
    card = _card(folder)
    registered = format_model_name(card.base, card.name)
    with wrap_tracking_errors(f"register {registered}"):
        api = get_client()
        there = api.search_registered_models(f"name = '{registered}'")
        if there and (kind := there[0].tags.get("trimtab.kind")) != card.kind:
            raise UsageError(f"{card.base} has a {kind} of the name {card.name!r} already: give the {card.kind} another --name")
        model = api.create_logged_model(
            get_experiment_id(), card.name, run_id, params=_params(card), model_type=f"trimtab-{card.kind}"
        )
        api.log_model_artifacts(model.model_id, str(folder))
        api.finalize_logged_model(model.model_id, "READY")
        for key, value in card.metrics.items():
            api.log_metric(run_id, key, value, model_id=model.model_id)
        tags = {"trimtab.kind": card.kind, "trimtab.base": card.base}
        if not there:
            api.create_registered_model(registered, tags=tags)
        tags |= {"trimtab.fingerprint": card.fingerprint, "trimtab.name": card.name, "trimtab.digest": card.digest}
        tags |= {f"trimtab.metric.{k}": f"{v:.6g}" for k, v in card.metrics.items()}
        made = api.create_model_version(
            registered, f"models:/{model.model_id}", run_id=run_id, tags=tags, model_id=model.model_id
        )
        api.set_registered_model_alias(registered, CANDIDATE, made.version)
        mark_used(registered)
    return find_version(card.base, card.name, str(made.version))


def find_version(base: str, name: str, ref: str = CHAMPION) -> Version:
    """The version that an alias or a number names; NotFoundError where there is none, with what there is."""
    registered = format_model_name(base, name)
    with wrap_tracking_errors(f"look up {registered}"):
        try:
            if ref.isdigit():
                return _version(get_client().get_model_version(registered, ref))
            return _version(get_client().get_model_version_by_alias(registered, ref))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    there = [f"{v.version} ({', '.join(v.aliases) or 'no alias'})" for v in list_versions(base, name)]
    if there:
        raise NotFoundError(f"{name!r} of {base} has no {ref!r}; it has versions {', '.join(there)}")
    others = sorted({v.name for v in list_versions(base)})
    none = f"none yet ({' and '.join(MAKERS.values())} make some)"
    raise NotFoundError(f"nothing named {name!r} for {base}; there are: {', '.join(others) or none}")


def find_champion(base: str, name: str) -> Version | None:
    """The version that `champion` names; None where there is none yet."""
    try:
        return find_version(base, name, CHAMPION)
    except NotFoundError:
        return None


def list_versions(base: str | None = None, name: str | None = None, kind: str | None = None) -> list[Version]:
    """All versions, of one base model, name or kind where given; the newest of each name first."""
    # In LIKE, an underscore is any character, so that what comes is looked at again.
    pattern = f"name LIKE 'trimtab.{f'{base}.' if base else ''}%'"
    with wrap_tracking_errors("list versions"):
        models = _pages(lambda token: get_client().search_registered_models(pattern, max_results=MODELS_PAGE, page_token=token))
        held = _pages(lambda token: get_client().search_model_versions(pattern, max_results=VERSIONS_PAGE, page_token=token))
    wanted = {
        model.name: model
        for model in models
        if (mine := model.tags.get("trimtab.kind")) in MAKERS
        and kind in (None, mine)
        and base in (None, model.tags.get("trimtab.base"))
    }
    found: list[Version] = []
    for version in held:
        # Versions that others made by hand say nothing of what they are.
        if (model := wanted.get(version.name)) is None or not version.tags.keys() >= TAGS:
            continue
        # The versions of a search come without their aliases; the model has them all.
        names = [alias for alias, number in model.aliases.items() if int(number) == int(version.version)]
        whole = _version(version, names)
        if name in (None, whole.name):
            found.append(whole)
    return sorted(found, key=lambda v: (v.base, v.name, -v.version))


def get_last_modified(base: str) -> int:
    """When something of a base model was last registered, promoted or rolled back by trimtab, in milliseconds since 1970.

    A look of some milliseconds, where `versions` takes as long as there are versions. An alias that others moved does not show.
    """
    with wrap_tracking_errors("look for changes"):
        newest = get_client().search_registered_models(
            f"name LIKE 'trimtab.{base}.%'", max_results=1, order_by=["last_updated_timestamp DESC"]
        )
    return int(newest[0].last_updated_timestamp or 0) if newest else 0


def load_prefix(version: Version, base: BaseModel | None = None) -> Prefix:
    """The prefix of a version, checked against its card (and a base model)."""
    return prefixes.load_prefix(_fetch_artifacts(version, "prefix"), base)


def load_detector(version: Version, base: BaseModel | None = None) -> Detector:
    """The detector of a version, checked against its card (and a base model)."""
    return detectors.load_detector(_fetch_artifacts(version, "detector"), base)


def load_card(version: Version) -> PrefixCard | DetectorCard:
    """The card of a version."""
    return _card(_fetch_artifacts(version, version.kind))


def _fetch_artifacts(version: Version, kind: str) -> Path:
    """The folder of a version, downloaded; where the store is away, as it was downloaded before. Others on this machine may
    read it, or download it too, at the same time. Raises NotFoundError where it is of another kind."""
    if version.kind != kind:
        raise NotFoundError(f"{version.name!r} of {version.base} is a {version.kind}, not a {kind}")
    registered = format_model_name(version.base, version.name)
    target = settings.get_home() / "registry" / registered / str(version.version)
    whole, folder = target / WHOLE, target / "artifacts"
    try:
        with wrap_tracking_errors(f"download {version.name} version {version.version}"):
            target.mkdir(parents=True, exist_ok=True)
            uri, store = (
                get_client().get_model_version_download_uri(registered, str(version.version)),
                settings.get_tracking_uri(),
            )
            with TemporaryDirectory(prefix=".", dir=target) as partial:
                made = mlflow.artifacts.download_artifacts(
                    artifact_uri=uri, dst_path=partial, tracking_uri=store, registry_uri=store
                )
                shutil.copytree(made, folder, copy_function=os.replace, dirs_exist_ok=True)
    except TrackingError:
        held = json.loads(whole.read_text()) if whole.exists() else {}
        if held.get("run_id") != version.run_id:
            raise
        return folder
    write_atomic(whole, json.dumps({"run_id": version.run_id}))
    return folder


def mark_used(registered: str) -> None:
    """Let `changed` see that an alias was moved, which MLflow itself does not date."""
    get_client().update_registered_model(registered, get_client().get_registered_model(registered).description or "")


def _pages(page: Callable[[str | None], PagedList[Found]]) -> list[Found]:
    found: list[Found] = []
    token = None
    while True:
        held = page(token)
        found += held
        token = held.token
        if not token:
            return found


def _card(folder: Path) -> PrefixCard | DetectorCard:
    kind = read_json_object(folder / FILE, "a card").get("kind") if (folder / FILE).exists() else None
    return detectors.load_detector(folder).card if kind == "detector" else prefixes.load_prefix(folder).card


def _params(card: PrefixCard | DetectorCard) -> dict[str, str]:
    """What tells one version from another at a glance."""
    if isinstance(card, DetectorCard):
        return {"head": card.head, "layers": ", ".join(map(str, card.layers))}
    return {"objective": str(card.method.get("objective")), "place": card.place, "rows": str(card.rows)}


def _version(found: ModelVersion, aliases: Sequence[str] | None = None) -> Version:
    tags = dict(found.tags)
    metrics = {k.removeprefix("trimtab.metric."): float(v) for k, v in tags.items() if k.startswith("trimtab.metric.")}
    base = found.name.removeprefix("trimtab.").rpartition(".")[0]
    names = tuple(sorted(found.aliases if aliases is None else aliases))
    return Version(
        base,
        tags["trimtab.name"],
        int(found.version),
        str(found.run_id),
        names,
        tags["trimtab.fingerprint"],
        metrics,
        tags.get("trimtab.kind", "prefix"),
    )
