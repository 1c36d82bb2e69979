"""SkyPilot's own schema of task files, without what the rest of SkyPilot asks for.

It lies beside the packages of the environment (`setup_venv.py`), since it asks for 60 others, of
versions that do not go with ours. Its schema is a module that imports constants and, for the modes
of `autostop.wait_for`, which our files do not use, the program that watches a machine.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

PLACE = Path(sys.prefix, "skypilot")


def errors_in(task: dict[str, Any]) -> list[str]:
    """What SkyPilot's schema has against a task: of its keys, and of its resources."""
    with _schemas() as (schemas, validator):
        make = validator.get_schema_validator()
        schemas._task_config_schema = lambda: False  # `config:`, of a client's own settings
        parts = [(schemas.get_task_schema(), task)]
        parts += [(schemas.get_resources_schema(), task.get("resources", {}))]
        return [error.message for schema, part in parts for error in make(schema).iter_errors(part)]


@contextmanager
def _schemas() -> Iterator[tuple[Any, Any]]:
    assert PLACE.is_dir(), f"{PLACE} -> SkyPilot is not there -> run `make install`"
    package, watch = ModuleType("sky"), ModuleType("sky.skylet.autostop_lib")
    package.__path__, package.__version__ = [str(PLACE / "sky")], "0"
    watch.AutostopWaitFor = type("AutostopWaitFor", (), {"supported_modes": lambda: []})
    stand_ins = {"sky": package, "sky.skylet.autostop_lib": watch}
    with patch.dict(sys.modules, stand_ins):
        yield tuple(map(importlib.import_module, ("sky.utils.schemas", "sky.utils.validator")))
