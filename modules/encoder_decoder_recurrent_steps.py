"""One step of a recurrent decoder: its cells, and what it attends to.

Legend: B batch, S source tokens, M width of the memory, H hidden width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
"""Of a module, by the names of its parameters."""


class Attended(NamedTuple):
    """What a decoder attends to, the same at every step."""

    memory: Tensor  # fp32 [B, S, M]
    keys: Tensor  # fp32 [B, S, H], the memory's part of the scores
    bias: Tensor  # fp32 [B, S], added to the scores: very low at padding


def attend(weights: Weights, attended: Attended, hidden: Tensor) -> Tensor:
    """Weigh the memory by what `hidden` [B, H] asks for; return the context [B, M]."""
    query = F.linear(hidden, weights["attention_query"]).float()
    # Autocast would round the memory anew at every step.
    with torch.autocast(query.device.type, enabled=False):
        energies = torch.tanh(attended.keys + query.unsqueeze(1))  # [B, S, H]
        scores = energies @ weights["attention_score"].float() + attended.bias
        return torch.bmm(scores.softmax(dim=-1).unsqueeze(1), attended.memory).squeeze(1)


def lstm_step(gates: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One step of an LSTM as torch's `nn.LSTM` has it; gates are input, forget, cell, output."""
    enter, forget, candidate, leave = (gates + recurrent).chunk(4, dim=-1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def gru_step(gates: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One step of a GRU as torch's `nn.GRU` has it; gates are reset, update, candidate."""
    width = state[0].size(-1)
    reset, update = (gates + recurrent)[:, : 2 * width].sigmoid().chunk(2, dim=-1)
    candidate = (gates[:, 2 * width :] + reset * recurrent[:, 2 * width :]).tanh()
    return (torch.lerp(candidate, state[0], update),)
