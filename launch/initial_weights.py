"""Weights to start a new run from: `init_from=<run|checkpoint directory>`, or torch's DCP."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.run_directory import TOKENIZERS
from launch.run_home import find_run


def load_initial_weights(module: Any, config: DictConfig) -> None:
    """Load what `init_from=<run|checkpoint directory>` names into a module: a run's best or last.

    Or a distributed checkpoint of torch, which has neither digests nor a vocabulary to compare.

    Values whose names begin with one of `module.starts_anew` stay as they are.

    Raises:
        ValueError: There is no such run, it has saved nothing, its weights do not fit, or its
            vocabulary is another.
    """
    from trainers.distributed_checkpoint import METADATA, load_dcp_weights

    source, anew = config.init_from, tuple(getattr(module, "starts_anew", ()))
    own = module.state_dict()
    if (Path(source) / METADATA).exists():
        weights = load_dcp_weights(source, [name for name in own if not name.startswith(anew)])
    else:
        weights = _weights_of_run(config)
    weights = {name: value for name, value in weights.items() if not name.startswith(anew)}
    own = {name: value for name, value in own.items() if name.startswith(anew)}
    try:
        module.load_state_dict(_fitted(module, weights) | own, assign=True)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(
            f"init_from={source} -> its weights do not fit this module ({reasons}) -> use the "
            f"module settings of that run"
        ) from error


def _weights_of_run(config: DictConfig) -> dict[str, Any]:
    from trainers.checkpoint import MANIFEST, load_weights, verify

    source = config.init_from
    path: Path | None = Path(source)
    if not (Path(source) / MANIFEST).exists():
        run = find_run(source, config, "best", "last")
        best = (run.checkpoints / "best").exists()
        path = run.find_checkpoint("best" if best else "last")
    if path is None:
        raise ValueError(f"init_from={source} -> that run has saved nothing -> train it first")
    verify(path)
    _refuse_other_vocabulary(config, path.parent.parent)
    return load_weights(path)


def _fitted(module: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Weights in the dtypes of a module; those of parameters that are tied in it are one."""
    import torch

    known: dict[int, Any] = {}
    own = module.state_dict(keep_vars=True)
    fitted = {}
    for name, value in weights.items():
        mine = own.get(name, value)  # what it does not have it refuses itself
        if id(mine) not in known:
            known[id(mine)] = value.to(mine.dtype)
            if isinstance(mine, torch.nn.Parameter):
                known[id(mine)] = torch.nn.Parameter(known[id(mine)], mine.requires_grad)
        fitted[name] = known[id(mine)]
    return fitted


def _refuse_other_vocabulary(config: DictConfig, run: Path) -> None:
    """Compare the tokenizers of the data with those that a run was trained with, if there are any.

    Raises:
        ValueError: They differ: the same numbers would stand for other tokens.
    """
    for name in TOKENIZERS if config.data else ():
        own, other = Path(config.data.path, name), run / name
        if not (other.exists() and own.exists()):
            continue
        theirs, ours = _read_vocabulary(other), _read_vocabulary(own)
        if theirs != ours:
            sizes, key = [len(each[0]) for each in (theirs, ours)], name.removesuffix(".json")
            raise ValueError(
                f"init_from={config.init_from} -> its {name} is another vocabulary ({sizes[0]:,} "
                f"tokens) than that of the data ({sizes[1]:,} tokens, {own}), so its weights "
                f"belong to other tokens -> prepare the data with corpus.{key}={other}"
            )


def _read_vocabulary(path: Path) -> tuple[Any, ...]:
    """What gives tokens their numbers; how text is cleaned before that may differ."""
    tokenizer = json.loads(path.read_bytes())
    added = [(token["id"], token["content"]) for token in tokenizer["added_tokens"]]
    return tokenizer["model"]["vocab"], tokenizer["model"].get("merges"), added
