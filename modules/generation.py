"""Sampling from decoders: filters on the next token's distribution, and the cached decode loop.

Legend: S sequences generated together, T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from modules.layers import KeyValueCache


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that a preview needs."""

    def encode(self, sequence: str, /) -> Any:
        """Return an encoding whose `ids` are the tokens of the text."""

    def decode(self, ids: list[int], /) -> str:
        """Return the text of the tokens."""
        ...


class Decoder(Protocol):
    """What `generate` needs of a network."""

    sequence_length: int

    def __call__(self, inputs: Tensor, *, cache: KeyValueCache) -> Tensor:
        """Return logits [S, 1, V] of the last of the tokens int64 [S, T], extending the cache."""
        ...

    def new_cache(self, batch: int, device: torch.device) -> KeyValueCache:
        """Make an empty cache for `batch` sequences of `sequence_length` tokens."""
        ...


def merge_settings(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model, where they are not given otherwise.

    Raises:
        ValueError: One is given that the model does not have.
    """
    for key, value in given.items():
        if key not in own:
            raise ValueError(
                f"{key}={value} -> this model has no such setting of generation -> leave it out; "
                f"there are {', '.join(own)}"
            )
    return {**own, **given}


def filter_logits(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set logits outside the most likely tokens to minus infinity.

    Args:
        logits: [S, V].
        top_k: Keep this many (ties with the last one stay too); 0 keeps all. Fan et al. 2018,
            arXiv 1805.04833.
        top_p: Of these, keep the smallest set whose probability reaches `top_p`; 1 keeps all.
            Holtzman et al. 2019, arXiv 1904.09751, equation 3.
    """
    if 0 < top_k < logits.size(-1):
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        outside = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def sample(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Tensor:
    """Draw one token a sequence.

    Args:
        logits: [S, V].
        temperature: Divides the logits before the filters; 0 takes the most likely token.
        top_k: As `filter_logits`.
        top_p: As `filter_logits`.
        generator: On the device of `logits`.

    Returns:
        int64 [S, 1].
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probabilities = filter_logits(logits / temperature, top_k=top_k, top_p=top_p).softmax(dim=-1)
    return probabilities.multinomial(1, generator=generator)


@torch.no_grad()
def generate(
    network: Decoder,
    prompt: Sequence[int],
    *,
    device: torch.device,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    num_sequences: int,
    stop_token: int | None,
    seed: int,
) -> list[list[int]]:
    """Continue one prompt `num_sequences` times.

    Goes on beyond `network.sequence_length`: when the context is full, its later half is encoded
    anew as the context. So a token is predicted from the whole text while it fits, and then from
    between half and all of `sequence_length` tokens, with learned and rotary positions alike.

    Args:
        network: In evaluation mode.
        prompt: Token ids, at least one; of a longer one the last `sequence_length` count.
        device: Where the network is.
        max_new_tokens: Bound on the length of each continuation.
        temperature: As `sample`.
        top_k: As `sample`.
        top_p: As `sample`.
        num_sequences: S.
        stop_token: A sequence ends before it; None for never.
        seed: Of the draws.

    Returns:
        The continuations, without prompt and stop token.

    Raises:
        ValueError: The prompt is empty, or a setting is outside its range.
    """
    if not prompt:
        raise ValueError("prompt='' -> it has no tokens to continue -> give it at least one")
    check_draws(temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator(device).manual_seed(seed)
    context = torch.tensor([list(prompt)] * num_sequences, device=device)  # [S, T]
    context = context[:, -network.sequence_length :]
    cache = network.new_cache(num_sequences, device)
    fresh, new = context, []
    finished = torch.zeros(num_sequences, 1, dtype=torch.bool, device=device)
    while len(new) < max_new_tokens and not finished.all():
        if cache.length + fresh.size(1) > network.sequence_length:
            cache.length = 0
            fresh = context[:, -max(1, network.sequence_length // 2) :]
        logits = network(fresh, cache=cache)[:, -1]
        fresh = sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        context = torch.cat([context, fresh], dim=1)
        new.append(fresh)
        if stop_token is not None:
            finished |= fresh == stop_token
    sequences = torch.cat(new, dim=1).tolist() if new else [[] for _ in range(num_sequences)]
    return [_until(tokens, stop_token) for tokens in sequences]


def check_draws(*, temperature: float, top_k: int, top_p: float) -> None:
    """Check the settings of `sample`.

    Raises:
        ValueError: One is outside its range.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} -> negative -> choose 0 (greedy) or above")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} -> negative -> choose 0 (all tokens) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} -> no probability to reach -> choose one in (0, 1]")


def _until(tokens: list[int], stop_token: int | None) -> list[int]:
    return tokens[: tokens.index(stop_token)] if stop_token in tokens else tokens
