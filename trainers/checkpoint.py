"""What is saved and found again: one directory a checkpoint, whole or not there.

    checkpoints/step-00000100/weights.safetensors   the module's parameters and buffers
                              state.pt              optimizer, schedules, loops, data position
                              manifest.json         files with sizes and digests, versions, progress
    checkpoints/last                                the name of the newest whole checkpoint
    checkpoints/best                                the name, metric and value of the best one

A checkpoint is written beside its place, synced to disk, and renamed; `last` moves after that. No
file is ever unpickled into arbitrary objects: safetensors holds plain tensors, `state.pt` is read
with `weights_only=True`.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT_VERSION = 2  # 1: optimizer state by index instead of by parameter name
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"


class CheckpointDirectory(CheckpointIO):
    """Lightning's checkpoint dictionary as a directory of verified files."""

    def __init__(self, facts: dict[str, Any]):
        """Remember what every manifest of this run says: strategy, world size, data digest."""
        self.facts = facts
        self._is_checked = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to the directory `path`, whole or not at all.

        Raises:
            ValueError: The file system refused, for example because the disk is full. What was
                written is removed and older checkpoints stay.
        """
        path = Path(path)
        scratch = path.with_name(f".{path.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            _write(scratch, checkpoint, self.facts)
            if not self._is_checked:  # once a launch: what cannot be read should be known now
                _read_state(scratch)
                self._is_checked = True
        except (OSError, SafetensorError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            free = shutil.disk_usage(path.parent).free / 2**20
            raise ValueError(
                f"runs_dir -> the checkpoint {path} could not be written ({error}; "
                f"{free:.0f} MiB free there) -> make room or lower checkpoints.keep_last, then run "
                f"the same command again: it continues from {read_last(path.parent) or 'the start'}"
            ) from error
        _replace_directory(scratch, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the directory `path` to the CPU. `verify` comes first, once per launch."""
        return {"state_dict": load_weights(path)} | _read_state(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the directory `path`; a crash on the way leaves nothing that looks whole."""
        doomed = Path(path).with_name(f".{Path(path).name}.deleted")
        Path(path).replace(doomed)
        shutil.rmtree(doomed)


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the parameters and buffers of a checkpoint directory to the CPU."""
    return load_file(Path(path, WEIGHTS))


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Raises:
        ValueError: There is none, it is damaged, or a newer version of Trainyard wrote it.
    """
    try:
        manifest = json.loads(Path(path, MANIFEST).read_text())
        other = manifest["format"] != FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint={path} -> {MANIFEST} is missing or damaged ({error}) -> "
            f"choose another checkpoint{_offer(Path(path))}"
        ) from error
    if other:
        raise ValueError(
            f"checkpoint={path} -> written by trainyard {manifest['versions']['trainyard']} in "
            f"format {manifest['format']}, this one reads {FORMAT_VERSION} -> use that version"
        )
    return manifest


def verify(path: str | Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return the manifest.

    Raises:
        ValueError: A file is missing or differs; the newest older checkpoint that is whole is
            offered.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if damage := _find_damage(path, manifest):
        raise ValueError(f"checkpoint={path} -> {damage} -> do not use it{_offer(path)}")
    return manifest


def read_last(directory: str | Path) -> str | None:
    """Name of the newest whole checkpoint of a directory of checkpoints; None if there is none."""
    pointer = Path(directory, "last")
    return pointer.read_text().strip() if pointer.exists() else None


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of a directory by step, oldest first."""
    return sorted(path for path in Path(directory).glob("step-*") if path.is_dir())


def remove_leftovers(directory: str | Path) -> None:
    """Delete what a killed save or deletion left half done; nothing else begins with a dot."""
    for path in Path(directory).glob(".step-*"):
        shutil.rmtree(path)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader or a crash sees the old or the new, whole."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    _sync_directory(path.parent)


def _write(scratch: Path, checkpoint: dict[str, Any], facts: dict[str, Any]) -> None:
    scratch.mkdir(parents=True)
    state = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    save_file(unshared(checkpoint["state_dict"]), scratch / WEIGHTS, metadata={"format": "pt"})
    with (scratch / STATE).open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how its writer reports what the file system refused
            raise OSError(str(error)) from error
    files = {
        name: {"bytes": (scratch / name).stat().st_size, "blake2b": _digest(scratch / name)}
        for name in (WEIGHTS, STATE)
    }
    versions = {name: _version(name) for name in ("trainyard", "torch", "lightning")}
    manifest = {"format": FORMAT_VERSION, "step": checkpoint["global_step"], "files": files}
    manifest |= {"versions": versions} | facts
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for name in (*files, MANIFEST):
        with (scratch / name).open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(scratch)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = [line for line in str(error).splitlines() if "Unsupported" in line]
        reason = lines[0].strip() if lines else "damaged"
        raise ValueError(
            f"checkpoint={path} -> {STATE} holds objects that are not read for safety ({reason}) "
            f"-> keep tensors, numbers, strings, lists and dictionaries in the state of callbacks, "
            f"modules and datamodules"
        ) from error


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, a copy for each further name of one storage: safetensors wants that."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return unshared


def _replace_directory(scratch: Path, path: Path) -> None:
    if path.exists():  # saved before by a run that was rewound or crashed before `last` moved
        CheckpointDirectory({}).remove_checkpoint(path)
    scratch.replace(path)
    _sync_directory(path.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_damage(path: Path, manifest: dict[str, Any]) -> str | None:
    for name, expected in manifest["files"].items():
        found = _digest(path / name) if (path / name).exists() else "no such file"
        if found != expected["blake2b"]:
            wanted = expected["blake2b"][:16]
            return f"{name} is not what was saved (digest {found[:16]}, expected {wanted})"
    return None


def _offer(path: Path) -> str:
    """The newest whole checkpoint before `path`, as the end of a sentence."""
    for older in reversed(list_checkpoints(path.parent)):
        if older.name < path.name:
            with contextlib.suppress(ValueError):
                if _find_damage(older, read_manifest(older)) is None:
                    return f"; the one before it is whole: checkpoint={older.name}"
    return "; no older one is whole: start again under another run.name"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a clone on PYTHONPATH that nobody installed
        return "not installed"
