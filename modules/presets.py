"""How shapes of networks are chosen: a named preset, and overrides of its fields."""

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Shape = TypeVar("Shape", bound="DataclassInstance")


def choose(presets: Mapping[str, Shape], preset: str, overrides: Mapping[str, Any]) -> Shape:
    """Look up a preset and replace what `overrides` sets.

    Args:
        presets: Of a family, by name.
        preset: One of the names.
        overrides: Fields of the shape; None means as the preset has it.

    Raises:
        ValueError: The preset or a field is unknown, a value is of another kind than the preset's,
            or the shape is impossible.
    """
    if preset not in presets:
        near = get_close_matches(preset, presets, n=3) or presets
        raise ValueError(f"module.preset={preset} -> unknown -> did you mean {' or '.join(near)}?")
    base = presets[preset]
    names = [field.name for field in fields(base)]
    for name in overrides:
        if name not in names:
            near = get_close_matches(name, names, n=3) or names
            raise ValueError(
                f"module.network.{name} -> no such key -> did you mean {' or '.join(near)}?"
            )
    chosen = {name: value for name, value in overrides.items() if value is not None}
    _refuse_other_kinds(get_type_hints(type(base)), chosen)
    return replace(base, **chosen)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a setting is a number, which a switch is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_other_kinds(kinds: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    for name, value in chosen.items():
        need = None
        if kinds[name] is bool and not isinstance(value, bool):
            need = "a switch -> use true or false"
        elif kinds[name] is int and not (
            isinstance(value, int) and is_number(value) and value >= 1
        ):
            need = "a whole number -> use 1 or more"
        elif kinds[name] is float and not (is_number(value) and value >= 0):
            need = "a number -> use 0 or more"
        elif name == "dropout" and value >= 1:
            need = "a probability -> use 0 or more, and less than 1"
        if need:
            raise ValueError(f"module.network.{name}={value} -> it is {need}")


def refuse_unknown(shape: object, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Check the fields of a shape that name one of several forms.

    Args:
        shape: Whose fields they are.
        choices: What each of them may be.

    Raises:
        ValueError: A field is something else.
    """
    for name, known in choices.items():
        if getattr(shape, name) not in known:
            raise ValueError(
                f"module.network.{name}={getattr(shape, name)} -> unknown -> "
                f"choose one of {', '.join(known)}"
            )
