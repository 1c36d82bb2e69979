"""Checkpoints: list, verify, compare, convert and delete those of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.filesize import decimal

from launch import runtime
from launch.checkpoint_tables import (
    leftovers,
    name_in,
    print_checkpoints,
    print_comparison,
    read_pointers,
)
from launch.progress import byte_bar
from launch.run_directory import RunDirectory
from launch.run_home import describe_store, find_run, is_stored


def checkpoints(config: DictConfig) -> int:
    """Do what `action` asks for; give the exit code.

    Raises:
        ValueError: There is no such action, checkpoint or setting, or it may not be done.
    """
    action = str(config.action)
    if action not in ACTIONS:
        raise ValueError(f"action={action} -> unknown -> use one of {', '.join(ACTIONS)}")
    function, own = ACTIONS[action]
    settings = ("checkpoint", "with", "to", "form", "dtype", "ranks", "yes", "force")
    given = [key for key in settings if config[key] not in (None, False) and key not in own]
    if given:
        raise ValueError(
            f"{given[0]}={config[given[0]]} -> action={action} does not read it -> leave it out"
        )
    if action == "delete" and is_stored(config.run, config):
        raise ValueError(
            f"action=delete -> {config.run} is in an object store, which a launch brings to where "
            "its own disk is -> leave that to checkpoints.keep_last, or use the store's own tools"
        )
    which = () if action == "list" else (str(config.checkpoint or "last"),)
    return function(find_run(config.run, config, *which), config)


def list_all(run: RunDirectory, config: DictConfig) -> int:
    """Print a table of what there is on this disk, and in an object store what is there."""
    print_checkpoints(run)
    if is_stored(config.run, config):
        print(describe_store(config.run, config))
    return runtime.DONE


def verify(run: RunDirectory, config: DictConfig) -> int:
    """Compare all bytes with their digests, and name what is damaged; 1 if something is."""
    from trainers.checkpoint import list_checkpoints, size_of
    from trainers.checkpoint_inspection import find_damages

    paths = list_checkpoints(run.checkpoints)
    if config.checkpoint:
        paths = [find(run, config.checkpoint)]
    with byte_bar("Verifying", sum(map(size_of, paths))) as advance:
        found = {path: find_damages(path, advance) for path in paths}
    for path, damages in found.items():
        print(f"{name_in(run, path)}: {'; '.join(damages) or 'whole'}")
    damaged = [path for path, damages in found.items() if damages]
    print(f"{len(paths) - len(damaged)} of {len(paths)} checkpoint(s) are what was saved")
    for line in leftovers(run):
        print(line)
    return runtime.FAILED if damaged else runtime.DONE


def compare(run: RunDirectory, config: DictConfig) -> int:
    """Print how two checkpoints differ."""
    if not config["with"]:
        raise ValueError("with=null -> there is nothing to compare with -> add with=<checkpoint>")
    print_comparison(
        find(run, config.checkpoint or "last"), find_other(run, str(config["with"]), config)
    )
    return runtime.DONE


def convert(run: RunDirectory, config: DictConfig) -> int:
    """Write a checkpoint anew: in the present format, or its weights in torch's."""
    from trainers.checkpoint import open_checkpoint, size_of
    from trainers.checkpoint import verify as verify_bytes
    from trainers.checkpoint_conversion import convert as write
    from trainers.distributed_checkpoint import write_dcp
    from trainers.stored_tensors import choose_dtype

    path = find(run, config.checkpoint or "last")
    num_files = 1 if config.ranks is None else config.ranks
    dtype, to = choose_dtype(config.dtype), Path(config.to or "")
    if not isinstance(num_files, int) or num_files < 1:
        raise ValueError(f"ranks={num_files} -> no number of files -> use 1 or more")
    if not config.to or to.exists():
        why = "it is there already" if config.to else "it has no value"
        raise ValueError(f"to={config.to} -> {why} -> give a directory that is yet to be made")
    if config.form not in (None, "dcp") or (config.form and config.ranks):
        raise ValueError(
            f"form={config.form} -> unknown, or not to be had with ranks={config.ranks} -> use "
            "null, or dcp without ranks"
        )
    verify_bytes(path)
    source = open_checkpoint(path)
    if config.form == "dcp":
        write_dcp(source, to, dtype)
        use = "torch.distributed.checkpoint"
    else:
        with byte_bar("Converting", size_of(path)) as advance:
            write(source, to, num_files=num_files, dtype=dtype, advance=advance)
        use = f"checkpoints/step-{source.manifest['step']:08d} of a run, to go back to"
    print(f"{name_in(run, path)} is in {to} ({decimal(size_of(to))}): for init_from={to}, or {use}")
    return runtime.DONE


def delete(run: RunDirectory, config: DictConfig) -> int:
    """Delete a checkpoint, or say what that would free."""
    from trainers.checkpoint import size_of

    if not config.checkpoint:
        raise ValueError("checkpoint=null -> none is named -> add checkpoint=<name>")
    path = find(run, config.checkpoint)
    folder = run.checkpoints.resolve()
    is_its_own = path.resolve().parent in (folder, folder / "abandoned")
    if not is_its_own or not path.resolve().name.startswith("step-"):
        raise ValueError(
            f"checkpoint={config.checkpoint} -> it is no checkpoint of run {run.path.name} -> name "
            "one of that run, or give its own run"
        )
    name, size = name_in(run, path), decimal(size_of(path))
    if not config["yes"]:
        _refuse_needed(run, name, config.force)
        print(f"would delete {path} and free {size}; to do it add yes=true")
        return runtime.DONE
    with run.lock():
        _refuse_needed(run, name, config.force)
        notes = _delete(run, path, name)
    print("; ".join([f"deleted {path}, {size}", *notes]))
    return runtime.DONE


def _refuse_needed(run: RunDirectory, name: str, is_forced: bool) -> None:
    """Refuse to delete what a pointer names.

    Raises:
        ValueError: One does.
    """
    uses = {"last": "where the run continues", "best": "what evaluate and init_from take first"}
    pointers = read_pointers(run)
    needed = [
        f"it is {key}, {uses[key]}" for key in pointers if pointers[key]["checkpoint"] == name
    ]
    if needed and not is_forced:
        raise ValueError(
            f"checkpoint={name} -> {' and '.join(needed)} -> keep it, or add force=true"
        )


def _delete(run: RunDirectory, path: Path, name: str) -> list[str]:
    """Move pointers away from a checkpoint, then delete it; a crash in between loses neither."""
    from trainers.checkpoint import list_checkpoints, remove_checkpoint
    from trainers.checkpoint_inspection import look_at
    from trainers.durable_files import write_atomically

    notes, pointing = [], {key: each["checkpoint"] for key, each in read_pointers(run).items()}
    if pointing.get("last") == name:
        others = [p for p in list_checkpoints(run.checkpoints) if p.name != name]
        whole = [other.name for other in others if look_at(other)[1] is None]
        if whole:
            write_atomically(run.checkpoints / "last", whole[-1] + "\n")
            notes.append(f"the run continues from {whole[-1]}")
        else:
            (run.checkpoints / "last").unlink()
            notes.append("the run has nothing to continue from: it would begin again")
    if pointing.get("best") == name:
        (run.checkpoints / "best").unlink()
        notes.append("the next validation decides which is best")
    remove_checkpoint(path)
    return notes


def find(run: RunDirectory, which: Any) -> Path:
    """Find a checkpoint of a run.

    Raises:
        ValueError: There is none of that name.
    """
    path = run.find_checkpoint(str(which))
    if path is None:
        raise ValueError(f"run={run.path.name} -> it has saved nothing yet -> train it first")
    return path


def find_other(run: RunDirectory, which: str, config: DictConfig) -> Path:
    """Find a checkpoint of this run, or `<run>/<name>` of another, or by its path."""
    other, _, name = which.rpartition("/")
    if other and not Path(which).is_dir() and not (run.checkpoints / which).is_dir():
        return find(find_run(other, config, name), name)
    if is_stored(config.run, config) and not Path(which).is_dir():
        run = find_run(config.run, config, which)
    return find(run, which)


ACTIONS: dict[str, tuple[Callable[[RunDirectory, DictConfig], int], tuple[str, ...]]] = {
    "list": (list_all, ()),
    "verify": (verify, ("checkpoint",)),
    "compare": (compare, ("checkpoint", "with")),
    "convert": (convert, ("checkpoint", "to", "form", "dtype", "ranks")),
    "delete": (delete, ("checkpoint", "yes", "force")),
}
"""Name -> what does it, and the settings that it reads."""

main = runtime.verb("checkpoints")(checkpoints)

if __name__ == "__main__":
    main()
