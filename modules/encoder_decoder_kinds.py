"""Which network a preset of the encoder-decoder family names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from modules import encoder_decoder_networks as transformer
from modules import encoder_decoder_presets as transformer_presets
from modules import encoder_decoder_recurrent as recurrent
from modules import encoder_decoder_recurrent_presets as recurrent_presets
from modules.presets import choose


@dataclass(frozen=True)
class Kind:
    """A network of some shape, before it is built.

    Attributes:
        is_recurrent: Whether it goes through a target step by step, also in training.
        build: Makes it from `source_vocab`, `target_vocab`, `source_length` and `target_length`.
        initial_value: (name, size, seed) -> fp32 on the CPU.
        role_of: (name, number of dimensions) -> what the parameter is to an optimizer.
        flops: (sizes by name, source tokens, target tokens) -> operations of a pair, both ways.
    """

    is_recurrent: bool
    build: Callable[..., Any]
    initial_value: Callable[..., Tensor]
    role_of: Callable[[str, int], str]
    flops: Callable[..., float]


def choose_network(preset: str, overrides: Mapping[str, Any]) -> Kind:
    """Look a preset up among transformers and recurrent networks.

    Args:
        preset: A name of the `PRESETS` of either.
        overrides: Fields of its shape; None means as the preset has it.

    Raises:
        ValueError: There is no such preset, or an override is none of its shape.
    """
    chosen = {key: value for key, value in overrides.items() if value is not None}
    for module, presets, network in (
        (transformer, transformer_presets, transformer.TransformerNetwork),
        (recurrent, recurrent_presets, recurrent.RecurrentNetwork),
    ):
        if preset in presets.PRESETS:
            shape = choose(presets.PRESETS, preset, chosen)
            return Kind(
                is_recurrent=module is recurrent,
                build=partial(network, shape),
                initial_value=partial(module.initial_value, shape),
                role_of=partial(module.role_of, shape),
                flops=partial(presets.flops, shape),
            )
    known = [*transformer_presets.PRESETS, *recurrent_presets.PRESETS]
    raise ValueError(f"module.preset={preset} -> unknown -> choose one of {', '.join(known)}")
