"""What of a run is in an object store, and which side is ahead: the store, or the local disk.

<runs_dir>/<run.name>/    config.yaml, status.json, ... as in the run directory; samples/
    checkpoints/          step-*/, `last`, `best`, `went_back`, abandoned/
"""

import json
import re
from pathlib import Path

from launch.object_store import ObjectStore
from launch.run_directory import TOKENIZERS

SMALL_FILES = (
    *("config.yaml", "status.json", "summary.json", "metrics.jsonl", "losses.png", "wandb.json"),
    *TOKENIZERS,
)
"""Of a run directory, beside its checkpoints, and its samples, which are not fetched again."""

PROGRESS = ("status.json", "summary.json")
"""Those of them that say how far the run is."""

OTHERS = tuple(name for name in SMALL_FILES if name not in PROGRESS)

CHECKPOINTS, MANIFEST, POINTERS = "checkpoints", "manifest.json", ("best", "went_back")
STEP = re.compile(r"step-\d+")

SYNCED = "store.json"
"""In the run directory only: the url, and its `last` when this disk had all of it."""


def is_store_ahead(theirs: str | None, ours: str | None, synced: str | None) -> bool:
    """Whether a run is to be continued from what the store has.

    The side that has moved since both were the same is ahead, also when it has gone back to an
    earlier step; where both have moved, the later step.

    Args:
        theirs: `last` of the store.
        ours: `last` of the local disk; None also where that checkpoint is not there.
        synced: What `last` of the store was when the disk had all of it; None for never.
    """
    if theirs is None or theirs == ours:
        return False
    if ours is None:
        return True
    if theirs == synced:
        return False
    return ours == synced or theirs > ours


def read_last_of(store: ObjectStore) -> str | None:
    """What `last` of a run in a store names; None before a checkpoint is there.

    Raises:
        ValueError: It names no checkpoint.
    """
    content = store.read(f"{CHECKPOINTS}/last")
    if content is None:
        return None
    name = content.decode(errors="replace").strip()
    if not STEP.fullmatch(name):
        raise ValueError(
            f"runs_dir -> {store.url}/{CHECKPOINTS}/last is {name[:40]!r}, which names no "
            f"checkpoint -> write the name of one into it, such as {_newest(store) or 'step-...'}"
        )
    return name


def read_synced(run: Path, url: str) -> str | None:
    """What `last` at `url` was when the disk had all of it; None for never."""
    path = run / SYNCED
    facts = json.loads(path.read_text()) if path.exists() else {}
    return facts["last"] if facts.get("url") == url else None


def write_synced(run: Path, url: str, last: str | None) -> None:
    """Write down that the disk has all that the store had when its `last` was this."""
    from trainers.durable_files import write_atomically

    if last != read_synced(run, url):
        write_atomically(run / SYNCED, json.dumps({"url": url, "last": last}) + "\n")


def checkpoints_in(store: ObjectStore) -> list[str]:
    """Names of the checkpoints in a store, whole or not, oldest first."""
    return [name for name in store.list(CHECKPOINTS) if STEP.fullmatch(name)]


def look_at(store: ObjectStore, name: str) -> tuple[bytes, str | None]:
    """Manifest of a checkpoint in a store, and what is wrong with it as far as sizes tell."""
    content = store.read(f"{CHECKPOINTS}/{name}/{MANIFEST}")
    if content is None:
        return b"", f"{MANIFEST} is missing"
    try:
        files = {file: facts["bytes"] for file, facts in json.loads(content)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return content, f"{MANIFEST} is damaged ({error})"
    found = store.sizes(f"{CHECKPOINTS}/{name}")
    for file, size in files.items():
        if file not in found:
            return content, f"{file} is missing"
        if found[file] != size:
            return content, f"{file} is not what was saved ({found[file]:,} bytes, not {size:,})"
    return content, None


def _newest(store: ObjectStore) -> str | None:
    whole = (name for name in reversed(checkpoints_in(store)) if look_at(store, name)[1] is None)
    return next(whole, None)
