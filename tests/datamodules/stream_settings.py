"""What the datamodules of the tests have in common."""

from typing import Any

STREAM: dict[str, Any] = {
    "num_workers": 0,
    "repeat_first_batch": False,
    "window_mb": 1,
    "tail": "drop",
    "on_bad_sample": "raise",
    "max_bad_samples": 10,
    "seed": 7,
    "val_max_samples": None,
    "cache": {},
}
