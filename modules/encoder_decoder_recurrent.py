"""The recurrent network of the encoder-decoder family and its initial values.

Legend: B batch, S source tokens, T target tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn

from modules.encoder_decoder_recurrent_blocks import (
    RecurrentCache,
    RecurrentDecoder,
    RecurrentEncoder,
)
from modules.encoder_decoder_recurrent_presets import RecurrentShape
from modules.initial_values import generator_for

INITIAL_BOUND = 0.08
"""Of initial weights: Sutskever et al. 2014, arXiv 1409.3215, section 3.4."""


class RecurrentNetwork(nn.Module):
    """A bidirectional encoder and a decoder of LSTM or GRU layers; plain torch, no buffers.

    Args:
        shape: Architecture and sizes.
        source_vocab: V of the source.
        target_vocab: V of the target.
        source_length: Longest source in tokens; nothing depends on it here.
        target_length: Longest target in tokens; bounds what is decoded.
    """

    def __init__(
        self,
        shape: RecurrentShape,
        *,
        source_vocab: int,
        target_vocab: int,
        source_length: int,
        target_length: int,
    ):
        super().__init__()
        self.shape, self.target_length = shape, target_length
        self.encoder = RecurrentEncoder(shape, source_vocab)
        self.decoder = RecurrentDecoder(shape, target_vocab)

    @property
    def blocks(self) -> list[nn.Module]:
        """Encoder and decoder, each a unit to checkpoint, shard or compile."""
        return [self.encoder, self.decoder]

    def forward(
        self,
        source: Tensor | None,
        source_mask: Tensor | None,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        cache: RecurrentCache | None = None,
        label_smoothing: float = 0.0,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Compute the summed loss where there are targets, else logits.

        One entry for both, so that wrappers that gather sharded weights around a call see it.

        Args:
            source: int64 [B, S]; None where the cache has it encoded.
            source_mask: bool [B, S], false at padding, which is last; None likewise.
            inputs: int64 [B, T], from the start token on.
            targets: int64 [B, T], `IGNORED` where nothing is predicted.
            cache: Of the tokens before `inputs`, extended in place. Its first call encodes the
                source into it; afterwards T is 1. Logits are of the last token only.
            label_smoothing: As `linear_cross_entropy`.
            teacher: bool [T]: where false, a step is fed the token that was most likely after the
                step before, and not its input (scheduled sampling, Bengio et al. 2015, arXiv
                1506.03099). No gradient goes through the choice. The first step is always fed its
                input. None feeds all of `inputs`.

        Returns:
            fp32 scalar, nats summed over targets that are not ignored, or fp32 logits [B, T, V]
            ([B, 1, V] with a cache).
        """
        memory = state = None
        if source is not None:
            memory, state = self.encoder(source, source_mask)
        return self.decoder(
            memory, source_mask, state, inputs, targets, cache, label_smoothing, teacher
        )

    def new_cache(self, batch: int, device: torch.device) -> RecurrentCache:
        """Make an empty cache; the first call gives it its size and device."""
        return RecurrentCache()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to its initial value."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(self.shape, name, parameter.shape, seed))


def initial_value(shape: RecurrentShape, name: str, size: torch.Size, seed: int) -> Tensor:
    """Draw the initial value of one parameter, a function of the seed and its name alone.

    Biases start at 0, all else uniform within `INITIAL_BOUND`.

    Args:
        shape: Of the network.
        name: Of the parameter, as `RecurrentNetwork.named_parameters` has it.
        size: Its shape.
        seed: Of the run.

    Returns:
        fp32 tensor of that size on the CPU.
    """
    value = torch.zeros(size, device="cpu")
    if "bias" in name:
        return value
    return value.uniform_(-INITIAL_BOUND, INITIAL_BOUND, generator=generator_for(name, seed))


def role_of(shape: RecurrentShape, name: str, num_dims: int) -> str:
    """What the parameter `name` is to an optimizer: `matrix`, `embedding`, `head` or `other`."""
    if name.endswith("embedding"):
        return "embedding"
    if name.endswith("head_weight"):
        return "head"
    return "matrix" if num_dims == 2 else "other"
