"""Registry of prefixes and detectors on the MLflow model registry.

Each prefix or detector is a version of the registered model `trimtab.<base>.<name>`. The alias `candidate` points to the newest
version, `champion` to the one that passed the gate (see tracking/promotions.py).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import mlflow.artifacts
from mlflow import MlflowException
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.entities.paged_list import PagedList

from trimtab import settings
from trimtab.artifacts import prefix as prefixes
from trimtab.artifacts.card import FILE, PrefixCard
from trimtab.artifacts.prefix import Prefix
from trimtab.detection import detector as detectors
from trimtab.detection.detector import Detector
from trimtab.detection.detector_card import DetectorCard
from trimtab.errors import NotFoundError, TrackingError, UsageError
from trimtab.model.base_model import BaseModel
from trimtab.tracking.client import get_client, get_experiment_id, wrap_tracking_errors
from trimtab.util.atomic_files import write_atomic
from trimtab.util.json_files import read_json_object

CANDIDATE, CHAMPION = "candidate", "champion"
# Characters that MLflow or references do not allow in names.
RESERVED = "/:@%'\""
# Tags that `register_version` sets and `list_versions` requires.
TAGS = {"trimtab.name", "trimtab.fingerprint"}
# Start of the names of tags with the metrics of a version.
METRIC = "trimtab.metric."
# Marks a complete download in the folder of a version.
COMPLETE = ".whole.json"
MODELS_PAGE, VERSIONS_PAGE = 1000, 10_000
ItemT = TypeVar("ItemT")
# Command that produces each kind.
MAKERS = {"prefix": "trimtab align", "detector": "trimtab detect"}


@dataclass(frozen=True)
class Version:
    """Version of a prefix or detector in the registry.

    Attributes:
        base: name of the base model.
        name: name of the prefix or detector.
        version: version number.
        run_id: id of the MLflow run that produced it.
        aliases: aliases that point to the version.
        fingerprint: base model fingerprint.
        metrics: metrics of its card.
        kind: "prefix" or "detector".
    """

    base: str
    name: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    fingerprint: str
    metrics: Mapping[str, float]
    kind: str = "prefix"


def format_model_name(base: str, name: str) -> str:
    """Return the name of the registered model of a prefix or detector.

    Raises:
        UsageError: if MLflow or a reference NAME@VERSION does not allow a name.
    """
    check_name(base, "base model")
    check_name(name, "name", RESERVED + ".")
    return f"trimtab.{base}.{name}"


def check_name(name: str, kind: str, reserved: str = RESERVED) -> None:
    """Check a name before any work is done under it.

    Args:
        name: name of a prefix, a detector or a base model.
        kind: noun for the message.
        reserved: characters that the name must not contain.

    Raises:
        UsageError: if the name is blank, or contains a reserved or unprintable character.
    """
    if not name.strip() or not name.isprintable() or any(character in name for character in reserved):
        raise UsageError(
            f"{name!r} cannot be a {kind}: it must not be blank or contain {' '.join(reserved)}. Choose another one"
        )


def register_version(folder: Path, run_id: str) -> Version:
    """Upload a prefix or detector as a LoggedModel of its run, and register it as a new version with the alias `candidate`.

    Args:
        folder: folder of the prefix or detector.
        run_id: id of the MLflow run that produced it.

    Raises:
        ArtifactError: if the folder is not a valid artifact.
        UsageError: if the name belongs to an artifact of the other kind.
        TrackingError: if MLflow cannot be reached.
    """
    card = _read_card(folder)
    registered = format_model_name(card.base, card.name)
    with wrap_tracking_errors(f"register {registered}"):
        client = get_client()
        existing = client.search_registered_models(f"name = '{registered}'")
        if existing and (kind := existing[0].tags.get("trimtab.kind")) != card.kind:
            raise UsageError(f"{card.base} already has a {kind} named {card.name!r}: give the {card.kind} another --name")
        model = client.create_logged_model(
            get_experiment_id(), card.name, run_id, params=_build_params(card), model_type=f"trimtab-{card.kind}"
        )
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        for key, value in card.metrics.items():
            client.log_metric(run_id, key, value, model_id=model.model_id)
        tags = {"trimtab.kind": card.kind, "trimtab.base": card.base}
        if not existing:
            client.create_registered_model(registered, tags=tags)
        tags |= {"trimtab.fingerprint": card.fingerprint, "trimtab.name": card.name, "trimtab.digest": card.digest}
        tags |= {f"{METRIC}{k}": f"{v:.6g}" for k, v in card.metrics.items()}
        created = client.create_model_version(
            registered, f"models:/{model.model_id}", run_id=run_id, tags=tags, model_id=model.model_id
        )
        client.set_registered_model_alias(registered, CANDIDATE, created.version)
        mark_used(registered)
    return find_version(card.base, card.name, str(created.version))


def find_version(base: str, name: str, ref: str = CHAMPION) -> Version:
    """Find a version by its alias or number.

    Args:
        base: name of the base model.
        name: name of the prefix or detector.
        ref: alias or version number.

    Raises:
        NotFoundError: if there is no such version. The message lists the existing versions or names.
    """
    registered = format_model_name(base, name)
    with wrap_tracking_errors(f"look up {registered}"):
        try:
            if ref.isdigit():
                return _convert_version(get_client().get_model_version(registered, ref))
            return _convert_version(get_client().get_model_version_by_alias(registered, ref))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    existing = [f"{v.version} ({', '.join(v.aliases) or 'no alias'})" for v in list_versions(base, name)]
    if existing:
        raise NotFoundError(f"{name!r} of {base} has no {ref!r}; it has versions {', '.join(existing)}")
    others = sorted({v.name for v in list_versions(base)})
    none = f"none yet (train one with {' or '.join(MAKERS.values())})"
    raise NotFoundError(f"nothing named {name!r} for {base}; there are: {', '.join(others) or none}")


def find_champion(base: str, name: str) -> Version | None:
    """Return the champion, or None if there is none."""
    return find_alias(base, name, CHAMPION)


def find_alias(base: str, name: str, alias: str) -> Version | None:
    """Return the version that an alias points to, or None if there is none."""
    try:
        return find_version(base, name, alias)
    except NotFoundError:
        return None


def list_versions(base: str | None = None, name: str | None = None, kind: str | None = None) -> list[Version]:
    """List the versions in the registry.

    Args:
        base: list only the versions for this base model.
        name: list only the versions of this name.
        kind: list only the versions of this kind, "prefix" or "detector".

    Returns:
        Versions, sorted by base model and name, newest first.
    """
    for part in (base, name):
        if part is not None:
            check_name(part, "name")
    # An underscore in LIKE matches any character, so the results are filtered again below.
    pattern = f"name LIKE 'trimtab.{f'{base}.' if base else ''}%'"
    with wrap_tracking_errors("list versions"):
        models = _read_pages(
            lambda token: get_client().search_registered_models(pattern, max_results=MODELS_PAGE, page_token=token)
        )
        model_versions = _read_pages(
            lambda token: get_client().search_model_versions(pattern, max_results=VERSIONS_PAGE, page_token=token)
        )
    wanted = {
        model.name: model
        for model in models
        if (model_kind := model.tags.get("trimtab.kind")) in MAKERS
        and kind in (None, model_kind)
        and base in (None, model.tags.get("trimtab.base"))
    }
    versions: list[Version] = []
    for version in model_versions:
        # Versions that were created by other tools lack the tags.
        if (model := wanted.get(version.name)) is None or not version.tags.keys() >= TAGS:
            continue
        # A search returns versions without their aliases, but the model has them.
        names = [alias for alias, number in model.aliases.items() if int(number) == int(version.version)]
        converted = _convert_version(version, names)
        if name in (None, converted.name):
            versions.append(converted)
    return sorted(versions, key=lambda v: (v.base, v.name, -v.version))


def get_last_modified(base: str) -> int:
    """Return when trimtab last registered, promoted or rolled back a version for a base model.

    The query takes some milliseconds, while the time of `list_versions` grows with the number of versions. Aliases that other
    tools move are not noticed.

    Returns:
        Time in milliseconds since 1970; 0 if the base model has no versions.
    """
    with wrap_tracking_errors("check for changes"):
        newest = get_client().search_registered_models(
            f"name LIKE 'trimtab.{base}.%'", max_results=1, order_by=["last_updated_timestamp DESC"]
        )
    return int(newest[0].last_updated_timestamp or 0) if newest else 0


def load_prefix(version: Version, base: BaseModel | None = None) -> Prefix:
    """Download and read the prefix of a version.

    Args:
        version: version to load.
        base: base model that the prefix must match, if given.

    Raises:
        NotFoundError: if the version is not a prefix.
        ArtifactError: if the prefix is invalid or was made for another base model.
        TrackingError: if MLflow cannot be reached and the version was not downloaded before.
    """
    return prefixes.load_prefix(_fetch_artifacts(version, "prefix"), base)


def load_detector(version: Version, base: BaseModel | None = None) -> Detector:
    """Download and read the detector of a version. Arguments and errors are those of `load_prefix`."""
    return detectors.load_detector(_fetch_artifacts(version, "detector"), base)


def load_card(version: Version) -> PrefixCard | DetectorCard:
    """Download a version and return its card.

    Raises:
        ArtifactError: if the artifact is invalid.
        TrackingError: if MLflow cannot be reached and the version was not downloaded before.
    """
    return _read_card(_fetch_artifacts(version, version.kind))


def _fetch_artifacts(version: Version, kind: str) -> Path:
    """Download the artifacts of a version and return their folder, or an earlier download if the store cannot be reached.

    Other processes may read or download the same version at the same time. Raise NotFoundError if it is of another kind.
    """
    if version.kind != kind:
        raise NotFoundError(f"{version.name!r} of {version.base} is a {version.kind}, not a {kind}")
    registered = format_model_name(version.base, version.name)
    target = settings.get_home() / "registry" / registered / str(version.version)
    complete, folder = target / COMPLETE, target / "artifacts"
    try:
        with wrap_tracking_errors(f"download {version.name} version {version.version}"):
            target.mkdir(parents=True, exist_ok=True)
            uri, store = (
                get_client().get_model_version_download_uri(registered, str(version.version)),
                settings.get_tracking_uri(),
            )
            with TemporaryDirectory(prefix=".", dir=target) as partial:
                downloaded = mlflow.artifacts.download_artifacts(
                    artifact_uri=uri, dst_path=partial, tracking_uri=store, registry_uri=store
                )
                shutil.copytree(downloaded, folder, copy_function=os.replace, dirs_exist_ok=True)
    except TrackingError:
        marker = json.loads(complete.read_text()) if complete.exists() else {}
        if marker.get("run_id") != version.run_id:
            raise
        return folder
    write_atomic(complete, json.dumps({"run_id": version.run_id}))
    return folder


def mark_used(registered: str) -> None:
    """Update the timestamp of a registered model, because MLflow does not do so when an alias moves.

    `get_last_modified` reads this timestamp.
    """
    get_client().update_registered_model(registered, get_client().get_registered_model(registered).description or "")


def _read_pages(read_page: Callable[[str | None], PagedList[ItemT]]) -> list[ItemT]:
    items: list[ItemT] = []
    token = None
    while True:
        page = read_page(token)
        items += page
        token = page.token
        if not token:
            return items


def _read_card(folder: Path) -> PrefixCard | DetectorCard:
    kind = read_json_object(folder / FILE, "a card").get("kind") if (folder / FILE).exists() else None
    return detectors.load_detector(folder).card if kind == "detector" else prefixes.load_prefix(folder).card


def _build_params(card: PrefixCard | DetectorCard) -> dict[str, str]:
    """Return the parameters that distinguish versions in MLflow's web pages."""
    if isinstance(card, DetectorCard):
        return {"head": card.head, "layers": ", ".join(map(str, card.layers))}
    return {
        "objective": str(card.method.get("objective")),
        "position": card.position,
        "num_virtual_tokens": str(card.num_virtual_tokens),
    }


def _convert_version(version: ModelVersion, aliases: Sequence[str] | None = None) -> Version:
    tags = dict(version.tags)
    metrics: dict[str, float] = {}
    for tag, value in tags.items():
        # People can enter any text in MLflow's pages.
        with suppress(ValueError):
            if tag.startswith(METRIC) and isfinite(number := float(value)):
                metrics[tag.removeprefix(METRIC)] = number
    base = version.name.removeprefix("trimtab.").rpartition(".")[0]
    names = tuple(sorted(version.aliases if aliases is None else aliases))
    name, fingerprint, kind = tags["trimtab.name"], tags["trimtab.fingerprint"], tags.get("trimtab.kind", "prefix")
    return Version(base, name, int(version.version), str(version.run_id), names, fingerprint, metrics, kind)
