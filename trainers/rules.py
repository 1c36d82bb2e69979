"""What a rule about a launch is; the rules themselves are in `trainers/compat.py`."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Facts = dict[str, Any] | None


def is_submission(config: Mapping[str, Any]) -> bool:
    """Whether the run is to become a job of Slurm's: it will be on other machines than this."""
    return config["cluster"].get("name") == "slurm" and "SLURM_JOB_ID" not in os.environ


@dataclass(frozen=True)
class Launch:
    """What is to run; rules about the module do not apply before it is built."""

    config: Mapping[str, Any]
    ranks: int
    module: Any

    @property
    def make(self) -> Mapping[str, Any]:
        """Settings of the strategy."""
        return self.config["strategy"].get("make") or {}

    @property
    def zero(self) -> Mapping[str, Any]:
        """What DeepSpeed is told about ZeRO."""
        return (self.make.get("config") or {}).get("zero_optimization") or {}

    @property
    def deepspeed(self) -> dict[str, Any]:
        """What DeepSpeed is told: `section.key` -> value, sections too."""
        return dict(_with_sections(self.make.get("config") or {}))

    @property
    def parts(self) -> list[str]:
        """Names of the module's parts; one that names none is one."""
        return list(getattr(self.module, "parts", None) or ["model"])

    @property
    def twice(self) -> list[str]:
        """Names of the parts whose gradients are differentiated once more."""
        return list(getattr(self.module, "double_backward", ()))


@dataclass(frozen=True)
class Rule:
    """A combination of module, strategy, precision and optimizer, and what is said about it."""

    message: str
    find: Callable[[Launch], Facts]
    is_refused: bool = True
    module: str = "any"
    strategy: str = "any"
    precision: str = "any"
    optimizer: str = "any"


def _with_sections(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield prefix + key, value
        if isinstance(value, Mapping):
            yield from _with_sections(value, f"{prefix}{key}.")


RULES: list[Rule] = []


def rule(message: str, **columns: Any) -> Callable[[Callable[[Launch], Facts]], None]:
    """Add the rule that a function finds the facts of."""

    def add(find: Callable[[Launch], Facts]) -> None:
        RULES.append(Rule(message, find, **columns))

    return add
