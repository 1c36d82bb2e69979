"""By which a checkpoint is known to be what was saved: digests of its files and of its manifest."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainers.durable_files import digest_of, new_digest


def seal(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest's file, which has a digest of the rest of it."""
    return json.dumps({**manifest, "blake2b": digest_of_manifest(manifest)}) + "\n"


def digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    """Digest of all that a manifest says."""
    return new_digest(json.dumps(manifest).encode()).hexdigest()


def find_damage(path: Path, manifest: Mapping[str, Any], digests: bool = True) -> str | None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        path: Its directory.
        manifest: It.
        digests: Read all bytes; else compare sizes.

    Returns:
        Which file is not what was saved, and how; None if all are.
    """
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (size := (path / name).stat().st_size) != expected["bytes"]:
            return f"{name} is not what was saved ({size:,} bytes, expected {expected['bytes']:,})"
    if not digests:
        return None
    with ThreadPoolExecutor() as pool:  # digesting lets other threads go on
        found = pool.map(_digest_or_refusal, (path / name for name in manifest["files"]))
    for (name, expected), digest in zip(manifest["files"].items(), found, strict=True):
        if digest != (wanted := expected["blake2b"]):
            return f"{name} is not what was saved (digest {digest[:16]}, expected {wanted[:16]})"
    return None


def _digest_or_refusal(path: Path) -> str:
    try:
        return digest_of(path)
    except OSError as error:  # of a disk that fails
        return error.strerror or str(error)
