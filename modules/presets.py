"""How shapes of networks are chosen: a named preset, and overrides of its fields."""

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

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
        ValueError: The preset or a field is unknown, or the shape is impossible.
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
    return replace(base, **{k: value for k, value in overrides.items() if value is not None})


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
