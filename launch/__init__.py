"""The verbs: `python -m launch.<verb> [hydra overrides]`.

Trainyard's packages have common names. If another `modules` or `trainers` comes first on the
path, the one found is not ours and everything after fails strangely; so say it here.
"""

from importlib.util import find_spec
from pathlib import Path

_HOME = Path(__file__).resolve().parent.parent

for _name in ("conf", "modules", "datamodules", "trainers"):
    _spec = find_spec(_name)
    _found = Path(_spec.origin).resolve().parent if _spec and _spec.origin else None
    if _found != _HOME / _name:
        raise ImportError(
            f"package `{_name}` -> found at {_found}, which is not Trainyard's ({_HOME / _name}) "
            f"-> run from another folder or with `python -P`, or rename that package"
        )
