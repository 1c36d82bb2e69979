"""What is saved and found again: one directory a checkpoint, whole or not there.

    checkpoints/step-00000100/weights.safetensors     parameters (fp32 masters) and buffers
                              optimizer.safetensors   optimizer state with a value per element
                              state.pt                settings, schedules, loops, data position
                              manifest.json           files with sizes and digests, where tensors
                                                      are, versions, configuration, progress
    checkpoints/last                                  the name of the newest whole checkpoint
    checkpoints/best                                  name, metric and value of the best one

Of several ranks each writes what it holds: `weights-00001-of-00004.safetensors` and so on. Tensors
have the names of parameters, and under every strategy a rank has a run of the flattened elements of
each: `name[start:stop]` in a file, or `name` where it is all. So every strategy on any number of
ranks reads what any other wrote, and nothing has to be converted.

`trainers/checkpoint_writer.py` writes them. No file is ever unpickled into arbitrary objects:
safetensors holds plain tensors, `state.pt` is read with `weights_only=True` and no further classes.
"""

import contextlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainers.checkpoint_digests import digest_of_manifest, find_damage
from trainers.durable_files import sync_directory
from trainers.safetensors_file import DTYPES
from trainers.stored_tensors import Stored, is_elementwise
from trainers.tensor_pieces import OPTIMIZER, WEIGHTS, PieceReader, file_name

FORMAT_VERSION = 3
"""1: optimizer state by index instead of by parameter name; 2: everything written by rank 0."""
STATE, MANIFEST = "state.pt", "manifest.json"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint to read from, tensor by tensor.

    Attributes:
        path: Its directory.
        manifest: As `read_manifest` gives it.
        tensors: Everything by its full name; tied names have the same tensor.
    """

    path: Path
    manifest: dict[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def weights(self) -> dict[str, Stored]:
        """Parameters and buffers by name."""
        start = f"{WEIGHTS}/"
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}

    @cached_property
    def state(self) -> dict[str, Any]:
        """What is in `state.pt`."""
        return read_state(self.path)

    @property
    def optimizer_states(self) -> list[dict[str, Any]]:
        """Of each optimizer `param_groups`, and `state`: parameter -> key -> value or `Stored`."""
        found = []
        for index, saved in enumerate(self.state["optimizer_states"]):
            state = {name: self._wrapped(name, each) for name, each in saved["state"].items()}
            prefix = f"{OPTIMIZER}.{index}/"
            for name in (name for name in self.tensors if name.startswith(prefix)):
                key, parameter = name.removeprefix(prefix).split("/", 1)
                state.setdefault(parameter, {})[key] = self.tensors[name]
            found.append({**saved, "state": state})
        return found

    def _wrapped(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Small state as it is; in format 2 also what has a value for each element is there."""
        if self.manifest["format"] != 2:
            return dict(values)
        shape = self.tensors[f"{WEIGHTS}/{name}"].shape
        return {
            key: Stored.of(value) if is_elementwise(key, value, shape) else value
            for key, value in values.items()
        }


def open_checkpoint(path: str | Path) -> StoredCheckpoint:
    """Open a checkpoint to read from; `verify` it first.

    Raises:
        ValueError: As `read_manifest`, or a file of tensors is missing or damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest["format"] == 2:
        return StoredCheckpoint(path, manifest, _read_format_2(path))
    reader = PieceReader(path, manifest["world_size"])
    tensors = {
        name: reader.stored(name, DTYPES[facts["dtype"]], facts["shape"], facts["pieces"])
        for name, facts in manifest["tensors"].items()
    }
    tensors |= {alias: tensors[name] for alias, name in manifest["aliases"].items()}
    return StoredCheckpoint(path, manifest, tensors)


def _read_format_2(path: Path) -> dict[str, Stored]:
    """Weights whole in one file; optimizer state is in `state.pt`."""
    reader = PieceReader(path, 1)
    places = reader.file(file_name(WEIGHTS, 0, 1)).places
    return {
        f"{WEIGHTS}/{name}": reader.stored(
            f"{WEIGHTS}/{name}", place.dtype, place.shape, [[0, 0, place.numel]]
        )
        for name, place in places.items()
    }


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the parameters and buffers of a checkpoint directory to the CPU.

    Tied ones share their memory.
    """
    found: dict[Stored, Tensor] = {}
    weights = open_checkpoint(path).weights
    for stored in weights.values():
        if stored not in found:
            found[stored] = stored.whole()
    return {name: found[stored] for name, stored in weights.items()}


def read_state(path: Path) -> dict[str, Any]:
    """Read the small state of a checkpoint to the CPU; no code of it is run.

    Raises:
        ValueError: It holds other than tensors, numbers, strings, lists and dictionaries.
    """
    with (path / STATE).open("rb") as file:
        return unpickle(file, path)


def unpickle(file: BinaryIO, path: Path) -> dict[str, Any]:
    """As `read_state`, from an open file; `path` is for the message."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        raise _unread(path, STATE, error) from error
    except Exception as error:  # what damaged bytes raise can be anything
        reason = reason_of(error)
        if "Unsupported" not in reason:
            raise ValueError(
                f"checkpoint={path} -> {STATE} is damaged ({reason}) -> choose another checkpoint"
            ) from error
        raise ValueError(
            f"checkpoint={path} -> {STATE} holds objects that are not read for safety ({reason}) "
            "-> keep tensors, numbers, strings, lists and dictionaries in the state of callbacks, "
            "modules and datamodules"
        ) from error


def _unread(path: Path, name: str, error: Exception) -> ValueError:
    """For what says nothing of the checkpoint: no right to read it, a server that is away."""
    return ValueError(
        f"checkpoint={path} -> {name} cannot be read now ({error or type(error).__name__}) -> mend "
        "that, then the same command"
    )


def reason_of(error: Exception) -> str:
    """Why torch has not read a pickle, in a line, without its advice to read it all the same."""
    lines = str(error).splitlines() or [type(error).__name__]
    reasons = [line.strip() for line in lines if "Unsupported" in line]
    is_advice = isinstance(error, pickle.UnpicklingError) and not reasons
    return "no such pickle" if is_advice else [*reasons, lines[0]][0]


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Raises:
        ValueError: There is none, it is damaged, or a version of Trainyard wrote it whose format
            this one does not read.
    """
    try:
        return _read_manifest(Path(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if str(error).startswith("checkpoint="):
            raise
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise _unread(Path(path), MANIFEST, error) from error
        raise ValueError(
            f"checkpoint={path} -> {MANIFEST} is missing or damaged ({error}) -> "
            f"choose another checkpoint{_offer(Path(path))}"
        ) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / MANIFEST).read_text())
    if (version := manifest["format"]) not in (2, FORMAT_VERSION):
        raise ValueError(
            f"checkpoint={path} -> written by trainyard {manifest['versions']['trainyard']} in "
            f"format {version}, this one reads 2 and {FORMAT_VERSION} -> use that version"
        )
    digest = manifest.pop("blake2b", None)
    if version == FORMAT_VERSION and digest != digest_of_manifest(manifest):
        raise ValueError("it is not what was saved")
    for name, facts in manifest["files"].items():
        if Path(name).name != name or name in ("", "..") or facts.keys() != {"bytes", "blake2b"}:
            raise ValueError(f"it names {name}, which is no file of a checkpoint")
    return manifest


def verify(path: str | Path, *, digests: bool = True) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return the manifest.

    Args:
        path: Its directory.
        digests: Read all bytes; else compare sizes, which is quick for very large ones.

    Raises:
        ValueError: A file is missing or differs; the newest older checkpoint that is whole is
            offered.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if damage := find_damage(path, manifest, digests):
        raise ValueError(f"checkpoint={path} -> {damage} -> do not use it{_offer(path, digests)}")
    return manifest


def read_last(directory: str | Path) -> str | None:
    """Name of the newest whole checkpoint of a directory of checkpoints; None if there is none."""
    pointer = Path(directory, "last")
    return pointer.read_text().strip() if pointer.exists() else None


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of a directory by step, oldest first."""
    found = (path for path in Path(directory).glob("step-*") if path.name[5:].isdecimal())
    return sorted(path for path in found if path.is_dir())


def remove_leftovers(directory: str | Path) -> None:
    """Delete what a killed save or deletion left half done; nothing else begins with a dot."""
    for path in Path(directory).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a crash on the way leaves nothing that looks whole.

    What cannot be deleted yet, for on NFS another process reads it, the next start deletes.
    """
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def put_in_place(scratch: Path, path: Path) -> None:
    """Give a written directory the name of its checkpoint, and delete what had it before.

    That is of a run which crashed between putting a checkpoint in its place and moving `last`.
    """
    former = _set_aside(path) if path.exists() else None
    scratch.replace(path)
    sync_directory(path.parent)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def _set_aside(path: Path) -> Path:
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    return path.replace(doomed)


def size_of(path: Path) -> int:
    """Bytes of a checkpoint on disk."""
    return sum(file.stat().st_size for file in path.iterdir())


def _offer(path: Path, digests: bool = True) -> str:
    """The newest whole checkpoint before `path`, else after it, as the end of a sentence."""
    there = list_checkpoints(path.parent)
    older = [other for other in there if other.name < path.name]
    newer = [other for other in there if other.name > path.name]
    for other in [*reversed(older), *reversed(newer)]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            if find_damage(other, _read_manifest(other), digests) is None:
                place = "the one before it" if other in older else "a later one"
                return f"; {place} is whole: checkpoint={other.name}"
    return "; no other one is whole: start again under another run.name"
