"""What may differ between two launches of one run, and what may not."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf

# On resume these may change; any other difference stops the run and is listed.
FREE_KEYS = (
    "trainer.devices", "trainer.accelerator", "cluster", "strategy", "micro_batch",
    "activation_checkpointing", "trainer.timeout_s", "trainer.guard",
    "trainer.pictures_every_images", "datamodule.num_workers",
    "datamodule.on_bad_sample", "datamodule.max_bad_samples", "datamodule.cache",
    "logger", "runs_dir", "local_runs_dir", "data_dir",
    "corpus.path", "corpus.sources.*.path", "corpus.num_processes", "corpus.storage_options",
    "corpus.train", "corpus.val", "corpus.test",  # paths, of pairs
    "corpus.val_path", "corpus.test_path",  # of images
    "data.path", "data.settings", "data.sources.*.path",
    "module.preview", "module.generation", "module.pictures",  # of evaluations
    "module.scores.names", "module.scores.bleu_tokenize", "module.scores.max_samples",
    "module.scores.num_rows",
    "checkpoint", "checkpoints", "resume", "plan", "sweep",
)  # fmt: skip
# Keys that runs begun before there were such did not have. Whatever they say now, those runs were
# not made of it: what reads them, an optimizer say, has come with them.
ADDED_KEYS = (
    "module.optimizer.adamw_rms", "module.optimizer.adafactor",
    "corpus.num_sentinels", "data.sentinels",
    "batch_images", "max_images", "trainer.val_every_images", "trainer.pictures_every_images",
)  # fmt: skip
LENGTH_KEYS = ("max_tokens", "max_samples", "max_images", "max_steps")
RESUME_VALUES = {"drop": (None, "optimizer"), "verify": ("digests", "sizes")}


def refuse_changes(old: DictConfig, new: DictConfig, run: str) -> None:
    """Compare the configuration of a run with the one that is to continue it.

    Raises:
        ValueError: They differ in keys that may not change; each is listed.
    """
    changed = changed_keys(old, new)
    free = FREE_KEYS + (LENGTH_KEYS if new.resume.extend else ())
    free += ("module.optimizer",) if new.resume.drop else ()
    refused = [line for key, line in changed.items() if not is_within(key, free)]
    if refused:
        remedy = ""
        if any(key in LENGTH_KEYS for key in changed) and not new.resume.extend:
            remedy += "; to train longer add resume.extend=true"
        if "module.optimizer.name" in changed and not new.resume.drop:
            remedy += "; to go on without what the optimizer remembers add resume.drop=optimizer"
        raise ValueError(
            f"run.name={new.run.name} -> {run} was trained with another configuration:\n  "
            + "\n  ".join(refused)
            + f"\n-> take these changes back to continue it, or choose another run.name{remedy}"
        )


def check_resume(config: DictConfig) -> None:
    """Refuse values of `resume` that do not exist.

    Raises:
        ValueError: There are such.
    """
    for key, values in RESUME_VALUES.items():
        if (value := config.resume[key]) not in values:
            names = " or ".join(str(each or "null") for each in values)
            raise ValueError(f"resume.{key}={value} -> unknown -> use {names}")


def drops_optimizer(manifest: Mapping[str, Any], config: DictConfig) -> bool:
    """Whether a run goes on without the optimizer state of a checkpoint.

    With `resume.drop=optimizer` it does once, and again where the optimizer has changed since.

    Raises:
        ValueError: The checkpoint has the state of another optimizer, and it may not be dropped.
    """
    saved = manifest.get("configuration", {})
    before = saved.get("module", {}).get("optimizer")
    now = OmegaConf.to_container(config.module.get("optimizer", {}), resolve=True)
    if config.resume.drop:
        return before != now or not saved.get("resume", {}).get("drop")
    if before and before.get("name") != now.get("name"):  # type: ignore[union-attr]
        raise ValueError(
            f"module.optimizer.name={config.module.optimizer.name} -> the checkpoint of step "
            f"{manifest['step']} has what {before['name']} remembers, which another optimizer "
            "cannot take -> go on without it with resume.drop=optimizer, or take the change back"
        )
    return False


def differences(one: DictConfig, other: DictConfig) -> list[str]:
    """Lines on the keys by which two configurations cannot be of one run, whichever is older."""
    there, back = changed_keys(one, other), changed_keys(other, one)
    free = FREE_KEYS + LENGTH_KEYS
    return [line for key, line in there.items() if key in back and not is_within(key, free)]


def changed_keys(old: DictConfig, new: DictConfig) -> dict[str, str]:
    """Keys whose written values differ, interpolations compared as written, each with a line.

    One of `ADDED_KEYS` that was not there has not changed.
    """
    before, after = (flatten(OmegaConf.to_container(each, resolve=False)) for each in (old, new))
    return {
        key: f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not (key not in before and is_within(key, ADDED_KEYS))
    }


def flatten(config: Any) -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted key; lists and empty dictionaries are leaves."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    walk(config, "")
    return flat


def is_within(key: str, roots: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `roots`, patterns of keys, or below one."""
    return any(fnmatchcase(key, root) or fnmatchcase(key, f"{root}.*") for root in roots)
