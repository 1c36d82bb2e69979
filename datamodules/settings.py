"""What settings of a datamodule may be by themselves, checked when it is made.

The process that starts a run makes its datamodule once for that, before there are ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_WHOLE = {"num_workers": 0, "max_bad_samples": 0, "seed": 0}
_WHOLE_OR_NULL = {"val_max_samples": 1}
_ABOVE_0 = ("window_mb", "cache.gb", "cache.timeout_s")
_WHOLE_OF_CACHE = {"cache.num_connections": 1, "cache.max_attempts": 1}


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a value that is not one of some.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        raise ValueError(
            f"datamodule.{key}={value} -> unknown -> choose one of {', '.join(map(str, choices))}"
        )


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Refuse numbers that cannot be.

    Args:
        settings: of `datamodules.stream.StreamDataModule`, those of `cache` as `cache.<key>`.

    Raises:
        ValueError: the first that is too small, or no number.
    """
    for key, least in (_WHOLE | _WHOLE_OR_NULL | _WHOLE_OF_CACHE).items():
        value = settings.get(key)
        if (key in _WHOLE_OR_NULL and value is None) or key not in settings:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            null = ", or null for all" * (key in _WHOLE_OR_NULL)
            raise ValueError(
                f"datamodule.{key}={value} -> it is a whole number -> use {least} or more{null}"
            )
    for key in _ABOVE_0:
        value = settings.get(key, 1)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"datamodule.{key}={value} -> it is an amount -> use more than 0")
