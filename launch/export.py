"""Export: a checkpoint's networks, each as a safetensors file, and what they were built with."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch import runtime
from launch.evaluate import load_checkpoint
from launch.run_home import find_run


def export_run(config: DictConfig) -> None:
    """Write `<network>.safetensors` for each network, and `config.json`; print where they are.

    The networks are `module.exports` by name; of a module without them `model` is its whole
    network, whose names of parameters are then without the prefix that the module gives them.
    """
    runtime.quiet_libraries()
    from trainers.checkpoint import read_manifest
    from trainers.durable_files import write_atomically
    from trainers.safetensors_file import Entry, write_tensors

    run = find_run(config.run, config, str(config.checkpoint))
    checkpoint, module = load_checkpoint(run, str(config.checkpoint))
    out = Path(config.out) if config.out else run.path / "exports" / checkpoint.name
    out.mkdir(parents=True, exist_ok=True)
    networks = networks_of(module)
    for name, network in networks.items():
        scratch, path = out / f".{name}.partial", out / f"{name}.safetensors"
        write_tensors(
            scratch,
            [
                Entry(key, value.dtype, tuple(value.shape), lambda value=value: value)
                for key, value in network.state_dict().items()
            ],
        )
        scratch.replace(path)
    manifest, settings = read_manifest(checkpoint), runtime.plain(run.config)
    facts = {
        "run": run.path.name,
        "checkpoint": checkpoint.name,
        "step": manifest["step"],
        "versions": manifest["versions"],
        "networks": [*networks],
        "module": settings["module"],
        "data": settings["data"],
    }
    write_atomically(out / "config.json", json.dumps(facts, indent=1) + "\n")
    print(f"{', '.join(networks)} of checkpoint {checkpoint.name}, and config.json, in {out}")


def networks_of(module: Any) -> dict[str, Any]:
    """What of a LightningModule is worth having outside of Trainyard, by name."""
    if hasattr(module, "exports"):
        return dict(module.exports)
    parts = list(getattr(module, "parts", {}).values())
    return {"model": parts[0] if len(parts) == 1 else module}


main = runtime.verb("export")(export_run)

if __name__ == "__main__":
    main()
