"""Export: a checkpoint's networks, each as a safetensors file, and what they were built with.

The module is built without values and the checkpoint read one tensor at a time, so that memory
holds the largest tensor and not the checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from launch import runtime
from launch.evaluate import find_verified
from launch.progress import byte_bar
from launch.run_home import find_run


def export_run(config: DictConfig) -> None:
    """Write `<network>.safetensors` for each network, and `config.json`; print where they are.

    The networks are `module.exports` by name; of a module without them `model` is its whole
    network, whose names of parameters are then without the prefix that the module gives them.
    """
    runtime.quiet_libraries()
    from trainers.checkpoint import open_checkpoint
    from trainers.checkpoint_parts import without_credentials
    from trainers.durable_files import write_atomically
    from trainers.stored_tensors import choose_dtype

    run = find_run(config.run, config, str(config.checkpoint))
    dtype = choose_dtype(config.dtype)
    checkpoint = find_verified(run, str(config.checkpoint))
    stored, module = open_checkpoint(checkpoint), build_without_values(run.config)
    networks = stored_networks(module, stored.weights, str(checkpoint))
    out = Path(config.out) if config.out else run.path / "exports" / checkpoint.name
    out.mkdir(parents=True, exist_ok=True)
    total = sum(each.nbytes for values in networks.values() for each in values.values())
    with byte_bar("Exporting", total) as advance:
        for name, values in networks.items():
            rounded = {key: value.to(dtype) for key, value in values.items()}
            _write_network(out / f"{name}.safetensors", rounded, advance)
    settings = without_credentials(runtime.plain(run.config))
    facts = {
        "run": run.path.name,
        "checkpoint": checkpoint.name,
        "step": stored.manifest["step"],
        "versions": stored.manifest["versions"],
        "networks": [*networks],
        "tied": {name: _tied(values) for name, values in networks.items()},
        "module": settings["module"],
        "data": settings["data"],
        "configuration": settings,
    }
    write_atomically(out / "config.json", json.dumps(facts, indent=1) + "\n")
    print(f"{', '.join(networks)} of checkpoint {checkpoint.name}, and config.json, in {out}")


def build_without_values(config: DictConfig) -> Any:
    """Build a run's module on the meta device; where it cannot be, with values in memory."""
    import torch

    try:
        with torch.device("meta"):
            return instantiate(config.module, _convert_="all")
    except InstantiationException as error:
        module = instantiate(config.module, _convert_="all")  # or say what is wrong
        reason = str(error.__cause__ or error).splitlines()[0]
        runtime.say_once(
            f"module={type(module).__name__} is held in memory: built on the meta device it says "
            f"`{reason}`"
        )
        return module


def networks_of(module: Any) -> dict[str, Any]:
    """What of a LightningModule is worth having outside of Trainyard, by name."""
    if hasattr(module, "exports"):
        return dict(module.exports)
    parts = list(getattr(module, "parts", {}).values())
    return {"model": parts[0] if len(parts) == 1 else module}


def stored_networks(
    module: Any, weights: Mapping[str, Any], checkpoint: str
) -> dict[str, dict[str, Any]]:
    """Find the values of a module's networks among those of a checkpoint.

    Args:
        module: Its values are not read.
        weights: Name in the module -> `Stored`.
        checkpoint: For messages.

    Returns:
        Network -> name in it -> `Stored`; names that are tied have the same one.

    Raises:
        ValueError: Some are not there, or have another shape.
    """
    names: dict[int, str] = {}
    own = module.state_dict(keep_vars=True)  # kept: a freed value's id would be another's
    for name, value in own.items():
        names.setdefault(id(value), name)
    return {
        network: {
            key: _find(names.get(id(value)), value, weights, f"{network}: {key}", checkpoint)
            for key, value in part.state_dict(keep_vars=True).items()
        }
        for network, part in networks_of(module).items()
    }


def _find(
    name: str | None, value: Any, weights: Mapping[str, Any], what: str, checkpoint: str
) -> Any:
    if name is None:
        raise ValueError(
            f"module.exports -> `{what}` is no value of the module, so that no checkpoint has it "
            "-> make the network a submodule"
        )
    if name not in weights or weights[name].shape != value.shape:
        found = f"is {list(weights[name].shape)}" if name in weights else "is not"
        raise ValueError(
            f"checkpoint={checkpoint} -> `{name}` {found} in it, and {list(value.shape)} in the "
            "run's module -> export it with the module and the settings that it was saved with"
        )
    return weights[name]


def _write_network(path: Path, values: Mapping[str, Any], advance: Any) -> None:
    from trainers.safetensors_file import Entry, write_tensors

    def read(key: str) -> Any:
        try:
            value = values[key].whole()
        except OverflowError as error:
            raise ValueError(f"dtype -> {key}: {error} -> use bf16 or fp32") from error
        advance(value.nbytes)
        return value

    scratch = path.with_name(f".{path.name}.partial")
    entries = [
        Entry(key, value.dtype, tuple(value.shape), lambda key=key: read(key))
        for key, value in values.items()
    ]
    try:
        write_tensors(scratch, entries)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _tied(values: Mapping[str, Any]) -> dict[str, str]:
    """Name -> the first name of the same value."""
    first: dict[int, str] = {}
    found = {key: first.setdefault(id(value), key) for key, value in values.items()}
    return {key: name for key, name in found.items() if key != name}


main = runtime.verb("export")(export_run)

if __name__ == "__main__":
    main()
