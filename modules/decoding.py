"""Decoding of encoder-decoders: the most likely token, draws, or beams; with a cache.

Legend: B sources, K beams of a source, R rows of the network (B x K), T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from modules.generation import check_draws, filter_logits


class DecodingCache(Protocol):
    """What a network keeps between calls: the encoded sources, and of the targets so far."""

    length: int
    """Target tokens seen."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [R'], in this order; a row may be there several times."""


class EncoderDecoderNetwork(Protocol):
    """What `decode` needs of a network."""

    target_length: int

    def __call__(
        self,
        source: Tensor | None,
        source_mask: Tensor | None,
        inputs: Tensor,
        *,
        cache: DecodingCache,
    ) -> Tensor:
        """Return logits [R, 1, V] after the tokens int64 [R, 1], extending the cache.

        The first call encodes the sources into the cache; later ones get None for them.
        """
        ...

    def new_cache(self, batch: int, device: torch.device) -> DecodingCache:
        """Make an empty cache for `batch` sources and targets of `target_length` tokens."""
        ...


@torch.no_grad()
def decode(
    network: EncoderDecoderNetwork,
    source: Tensor,
    source_mask: Tensor,
    *,
    start_token: int,
    stop_token: int,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> list[list[int]]:
    """Generate a target for each source.

    A target does not depend on what is beside its source in the batch. Where ranks are connected,
    all have to call this with the same `max_new_tokens`, and all call the network equally often:
    until the targets of all ranks have ended. So it works on sharded parameters, which are
    gathered from all ranks at every call.

    Args:
        network: In evaluation mode.
        source: int64 [B, S].
        source_mask: bool [B, S], false at padding.
        start_token: The decoder's first input.
        stop_token: Ends a target.
        max_new_tokens: Bound on a target, its stop token included; `network.target_length` at most.
        num_beams: K. 1: a target is extended by its most likely token, or by a draw.
        length_penalty: Beams that ended are compared by log probability / T^length_penalty, with
            the stop token counted in T: above 0 favours long targets. One beam has no use for it.
        temperature: Of draws, as `modules.generation.sample`; 0 takes the most likely token.
        top_k: Of draws, as `modules.generation.filter_logits`.
        top_p: Of draws, as `modules.generation.filter_logits`.
        seed: Of draws: source number n of the batch is drawn for with the seed plus n.

    Returns:
        The best target of each source, without start and stop token.

    Raises:
        ValueError: A setting is outside its range, or draws are asked of beams.
    """
    check_generation(
        max_new_tokens=max_new_tokens,
        target_length=network.target_length,
        num_beams=num_beams,
        length_penalty=length_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    num_sources, device = len(source), source.device
    search: _Beams | _Draws
    if num_beams > 1:
        search = _Beams(num_sources, num_beams, max_new_tokens, stop_token, length_penalty, device)
    else:
        search = _Draws(num_sources, stop_token, temperature, top_k, top_p, seed, device)
    cache = network.new_cache(num_sources, device)
    start = torch.full((num_sources, 1), start_token, device=device)
    logits = network(source, source_mask, start, cache=cache)[:, -1]  # [B, V]
    if num_beams > 1:  # sources are encoded once, and then each beam is a row
        rows = torch.arange(num_sources, device=device).repeat_interleave(num_beams)
        cache.select(rows)
        logits = logits[rows]
    for step in range(max_new_tokens):
        tokens, parents = search.advance(logits)
        if step + 1 == max_new_tokens or _is_true_on_all_ranks(search.has_ended):
            break
        if parents is not None:
            cache.select(parents)
        logits = network(None, None, tokens, cache=cache)[:, -1]  # [R, V]
    return [
        tokens[: tokens.index(stop_token)] if stop_token in tokens else tokens
        for tokens in search.targets()
    ]


class _Draws:
    """One target a source, extended by its most likely token or by a draw."""

    def __init__(
        self,
        num_sources: int,
        stop_token: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        device: torch.device,
    ):
        self.stop_token = stop_token
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generators = [
            torch.Generator(device).manual_seed(seed + row) for row in range(num_sources)
        ]
        self.tokens: list[Tensor] = []  # T times [B, 1]
        self.has_ended = torch.zeros(num_sources, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor) -> tuple[Tensor, None]:
        """Choose the next token of each target by `logits` [B, V]."""
        if self.temperature == 0:
            fresh = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = filter_logits(logits / self.temperature, top_k=self.top_k, top_p=self.top_p)
            draws = zip(logits.softmax(dim=-1), self.generators, strict=True)
            fresh = torch.stack([row.multinomial(1, generator=own) for row, own in draws])
        self.tokens.append(fresh)
        self.has_ended |= fresh[:, 0] == self.stop_token
        return fresh, None

    def targets(self) -> list[list[int]]:
        """The targets, with what follows their stop tokens."""
        return torch.cat(self.tokens, dim=1).tolist()


class _Beams:
    """Beam search as `generate` of transformers 5 does it with `early_stopping=False`.

    Of all continuations of K beams the 2 K most likely are candidates: at most K of them end, so K
    always run on. One that ends among the first K is kept if it is among the K best that ended. A
    source is done when K have ended and its best running beam would be no better than the worst of
    them if it ended now. That is a heuristic where `length_penalty` is above 0.
    """

    def __init__(
        self,
        num_sources: int,
        num_beams: int,
        max_new_tokens: int,
        stop_token: int,
        length_penalty: float,
        device: torch.device,
    ):
        self.num_beams, self.max_new_tokens = num_beams, max_new_tokens
        self.stop_token, self.length_penalty = stop_token, length_penalty
        size = (num_sources, num_beams)
        self.length = 0  # T
        self.tokens = torch.full((*size, max_new_tokens), stop_token, device=device)  # [B, K, T]
        # All beams are the same at the start: only the first counts.
        self.scores = torch.full(size, -torch.inf, device=device)  # log probabilities, [B, K]
        self.scores[:, 0] = 0
        self.ended_tokens = self.tokens.clone()
        self.ended_scores = torch.full(size, -torch.inf, device=device)  # with the penalty, [B, K]
        self.has_ended = torch.zeros(num_sources, dtype=torch.bool, device=device)
        self.first_rows = torch.arange(num_sources, device=device).unsqueeze(1) * num_beams

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Extend the beams by `logits` [R, V]; return new tokens [R, 1] and their old rows [R]."""
        vocab_size = logits.size(-1)
        totals = logits.float().log_softmax(dim=-1).view(*self.scores.shape, vocab_size)
        totals = (totals + self.scores.unsqueeze(-1)).flatten(1)  # [B, K V]
        scores, index = totals.topk(2 * self.num_beams, dim=-1)
        parents, fresh = index // vocab_size, index % vocab_size  # [B, 2 K]
        tokens = _pick(self.tokens, parents)
        tokens[:, :, self.length] = fresh
        self.length += 1
        is_last = self.length == self.max_new_tokens
        ends = torch.ones_like(fresh, dtype=torch.bool) if is_last else fresh == self.stop_token
        self._keep_ended(tokens, scores, ends)
        running = scores.masked_fill(ends, -torch.inf)
        self.scores, kept = running.topk(self.num_beams, dim=-1)
        self.tokens = _pick(tokens, kept)
        best = self.scores[:, 0] / self.length**self.length_penalty
        # Of less than K that ended the worst is at minus infinity.
        self.has_ended |= best <= self.ended_scores[:, -1]
        rows = self.first_rows + parents.gather(1, kept)
        return fresh.gather(1, kept).view(-1, 1), rows.flatten()

    def _keep_ended(self, tokens: Tensor, scores: Tensor, ends: Tensor) -> None:
        counts = ends & ~self.has_ended.unsqueeze(1)
        counts[:, self.num_beams :] = False
        scores = (scores / self.length**self.length_penalty).masked_fill(~counts, -torch.inf)
        scores = torch.cat([self.ended_scores, scores], dim=1)
        self.ended_scores, kept = scores.topk(self.num_beams, dim=-1)  # best first
        self.ended_tokens = _pick(torch.cat([self.ended_tokens, tokens], dim=1), kept)

    def targets(self) -> list[list[int]]:
        """The best target of each source, with what follows its stop token."""
        return self.ended_tokens[:, 0].tolist()


def _pick(tokens: Tensor, beams: Tensor) -> Tensor:
    """Rows `beams` [B, N] of `tokens` [B, M, T]."""
    return tokens.gather(1, beams.unsqueeze(-1).expand(-1, -1, tokens.size(-1)))


def _is_true_on_all_ranks(flags: Tensor) -> bool:
    flag = flags.all()
    if dist.is_initialized() and dist.get_world_size() > 1:
        flag = flag.int()
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def check_generation(
    *,
    max_new_tokens: int,
    target_length: int,
    num_beams: int,
    length_penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """Check settings of `decode`.

    Raises:
        ValueError: One is outside its range.
    """
    check_draws(temperature=temperature, top_k=top_k, top_p=top_p)
    if not 1 <= max_new_tokens <= target_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} -> the network is made for targets of 1 to "
            f"{target_length} tokens with their end -> choose a number in that range"
        )
    if num_beams < 1:
        raise ValueError(f"num_beams={num_beams} -> there is no such search -> choose 1 or more")
    if not math.isfinite(length_penalty):
        raise ValueError(
            f"length_penalty={length_penalty} -> it is the power of a length -> choose a number, "
            "such as 1.0 (log probability a token) or 0.0 (none)"
        )
    if num_beams > 1 and temperature > 0:
        raise ValueError(
            f"temperature={temperature} -> num_beams={num_beams} keeps the most likely targets and "
            "draws none -> set temperature=0, or num_beams=1"
        )


def pad_sources(
    sequences: Sequence[list[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Make sources of different lengths a batch.

    Args:
        sequences: Tokens of each, B times.
        padding: Token behind the shorter ones.
        device: Of the result.

    Returns:
        Tokens int64 [B, S], and which of them count, bool [B, S].
    """
    length = max(map(len, sequences))
    rows = [[*tokens, *[padding] * (length - len(tokens))] for tokens in sequences]
    mask = [[place < len(tokens) for place in range(length)] for tokens in sequences]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)
