"""What is known of a checkpoint that may be damaged, foreign, or half there."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainers.checkpoint import MANIFEST, read_manifest, verify
from trainers.durable_files import new_digest

CHUNK = 2**20
"""Bytes that are digested at a time."""


def look_at(path: Path) -> tuple[dict[str, Any], str | None]:
    """Read a checkpoint's manifest as far as it goes, and compare sizes.

    Returns:
        The manifest, empty if it cannot be read; and what is wrong, None if nothing was found.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not isinstance(manifest, dict):
            raise ValueError("no manifest")
    except (OSError, ValueError) as error:
        return {}, f"{MANIFEST} is missing or damaged ({error})"
    try:
        verify(path, digests=False)
    except (OSError, ValueError) as error:
        return manifest, reason_of(error)
    return manifest, None


def find_damages(path: Path, advance: Callable[[int], Any]) -> list[str]:
    """Say of every file of a checkpoint that is not what was saved what is wrong with it.

    Args:
        path: Its directory.
        advance: Is told how many bytes more are done, from several threads.
    """
    try:
        files = read_manifest(path)["files"]
    except ValueError as error:
        return [reason_of(error)]
    with ThreadPoolExecutor() as pool:  # digesting lets other threads go on
        found = pool.map(lambda name: _damage(path / name, files[name], advance), files)
    return [damage for damage in found if damage]


def _damage(path: Path, expected: Mapping[str, Any], advance: Callable[[int], Any]) -> str | None:
    digest, size, buffer = new_digest(), 0, memoryview(bytearray(CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
                advance(count)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    found = {"bytes": size, "blake2b": digest.hexdigest()}
    if found == expected:
        return None
    facts = [f"{size:,} bytes, expected {expected['bytes']:,}"] if size != expected["bytes"] else []
    facts.append(f"digest {found['blake2b'][:16]}, expected {expected['blake2b'][:16]}")
    return f"{path.name} is not what was saved ({'; '.join(facts)})"


def reason_of(error: Exception) -> str:
    """The middle of a message `key -> why -> remedy`."""
    parts = str(error).split(" -> ")
    return parts[1] if len(parts) > 2 else str(error)
