"""What all ranks of a start must have in common: code, packages, configuration, data."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.resume_rules import flatten

PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "safetensors", "tokenizers", "hydra-core")
OF_A_NODE = {"cluster.interface", "cluster.rendezvous", "data_dir"}
"""What each node may call by another name."""
OURS = ("conf", "datamodules", "launch", "modules", "trainers")


def facts_of_start(config: DictConfig) -> dict[str, str]:
    """Versions, a digest of this project's files, and every key of the configuration."""
    facts = {"python": platform.python_version(), **{each: _version(each) for each in PACKAGES}}
    facts["code"] = digest_of_code(Path(__file__).parent.parent)
    written: Any = OmegaConf.to_container(config, resolve=False)
    settings = {key: value for key, value in flatten(written).items() if key not in OF_A_NODE}
    return facts | {key: str(value) for key, value in settings.items()}


def facts_of_data(config: DictConfig) -> dict[str, str]:
    """What `complete` has filled in: by the digest of the data and the plan they are known."""
    data: dict[str, Any] = {"digest": config.data.get("digest"), **dict(config.plan)}
    return {f"data.{key}": str(value) for key, value in data.items()}


def digest_of_code(home: Path) -> str:
    """Digest of the five packages below `home`, as they are installed or checked out."""
    digest = hashlib.blake2b(digest_size=6)
    for package in OURS:
        for path in sorted((home / package).rglob("*.*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(path.relative_to(home).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
