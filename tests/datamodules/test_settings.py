from typing import Any

import pytest

from datamodules.text import TextDataModule

SETTINGS: dict[str, Any] = {
    **{"corpus": None, "data_dir": "", "sequence_length": 8, "packing": "cut"},
    **{"document_mask": False, "batch_samples": 8, "micro_batch": 8, "max_samples": 8},
    **{"num_workers": 0, "repeat_first_batch": False, "window_mb": 0.5, "tail": "drop", "seed": 0},
    **{"val_max_samples": None, "on_bad_sample": "raise", "max_bad_samples": 0},
}
CACHE: dict[str, Any] = {
    **{"folder": "x", "gb": 0.1, "num_connections": 1, "max_attempts": 1, "timeout_s": 1},
    "storage_options": {},
}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tail", "keep", "unknown -> choose one of drop, carry, pad_mask"),
        ("packing", "first_fit", "unknown -> choose one of cut, best_fit"),
        ("on_bad_sample", "skip", "unknown -> choose one of raise, substitute"),
        ("sequence_length", 0, "a whole number -> use 1 or more"),
        ("window_mb", 0, "an amount -> use more than 0"),
        ("num_workers", -1, "a whole number -> use 0 or more"),
        ("max_bad_samples", None, "a whole number -> use 0 or more"),
        ("seed", -1, "a whole number -> use 0 or more"),
        ("val_max_samples", 0, "a whole number -> use 1 or more, or null for all"),
        ("cache.gb", 0, "an amount -> use more than 0"),
        ("cache.timeout_s", "60", "an amount -> use more than 0"),
        ("cache.num_connections", 0, "a whole number -> use 1 or more"),
        ("cache.max_attempts", 1.5, "a whole number -> use 1 or more"),
    ],
)
def test_setting_that_cannot_be_is_refused_when_the_datamodule_is_made(
    key: str, value: Any, message: str
) -> None:
    TextDataModule(**SETTINGS, cache=CACHE)
    node, _, name = key.rpartition(".")
    cache = {**CACHE, **({name: value} if node else {})}
    settings = {**SETTINGS, **({} if node else {name: value})}
    with pytest.raises(ValueError, match=rf"datamodule.{key}={value} -> .*{message}"):
        TextDataModule(**settings, cache=cache)
