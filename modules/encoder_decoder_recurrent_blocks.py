"""Encoder and decoder of the recurrent network, each one module with all its parameters.

Legend: B batch, S source tokens, T target tokens, E embedding width, W width of a direction of the
encoder, M width of its memory (2 W), H hidden width, G width of all gates (3 H of a GRU, 4 H of an
LSTM), L layers, N states of a layer (1 or 2), V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from modules.encoder_decoder_recurrent_presets import RecurrentShape
from modules.encoder_decoder_recurrent_steps import Attended, Weights, attend, gru_step, lstm_step
from modules.layers import linear_cross_entropy
from modules.ordered_gradients import weights_of

_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # in the order of torch's functions


@dataclass
class RecurrentCache:
    """Encoded sources, and the decoder's state after the target tokens so far.

    Attributes:
        state: fp32 [N, L, B, H]; None before the first call.
        attended: What is attended to, if anything.
        length: Target tokens seen.
    """

    state: Tensor | None = None
    attended: Attended | None = None
    length: int = 0

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [B'], in this order; a row may be there several times."""
        assert self.state is not None
        self.state = self.state.index_select(2, rows)
        if self.attended is not None:
            self.attended = Attended(*(part.index_select(0, rows) for part in self.attended))


class RecurrentEncoder(nn.Module):
    """Reads a source in both directions; makes of it a memory and the decoder's first state.

    The first state of a decoder's layer is tanh(A [forward; backward] + b) of the last states of
    the encoder's layer; the cells of an LSTM have a bridge of their own, without tanh. Bahdanau et
    al. 2015, arXiv 1409.0473, appendix A.2.2, take the backward state alone.

    Parameters are called as in `nn.LSTM`. That module keeps a second list of its own, which would
    miss that a strategy has put others in their place.

    Args:
        shape: Of the network.
        vocab_size: V of the source.
    """

    overwrites_products = True
    """On a CPU, by torch's recurrent layers: recomputing activations must not keep them."""

    def __init__(self, shape: RecurrentShape, vocab_size: int):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(vocab_size, shape.embedding_width))  # [V, E]
        for layer in range(shape.num_layers):
            inputs = shape.memory_width if layer else shape.embedding_width
            for direction in ("", "_reverse"):
                _add_cell(self, shape, f"l{layer}{direction}", inputs, shape.encoder_width)
            for kind in shape.states:
                size = (shape.hidden_width, shape.memory_width)
                _add(self, f"{kind}_bridge_weight_l{layer}", *size)
                _add(self, f"{kind}_bridge_bias_l{layer}", shape.hidden_width)

    def forward(self, source: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory, fp32 [B, S, M], and state, fp32 [N, L, B, H], of `source` [B, S].

        Padding (`source_mask`, bool [B, S]) is last, and is not read. Of a row that is all padding
        one token is.
        """
        shape, weights = self.shape, weights_of(self)
        lengths = source_mask.sum(dim=1).clamp(min=1).cpu()
        x = _embed(weights["embedding"], source, self)  # [B, S, E]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        zeros = x.new_zeros(2 * shape.num_layers, source.size(0), shape.encoder_width)
        cells: list[Tensor] = [
            weights[f"{kind}_l{layer}{direction}"].float()  # autocast rounds what it multiplies
            for layer in range(shape.num_layers)
            for direction in ("", "_reverse")
            for kind in _CELL
        ]
        options = (cells, True, shape.num_layers, shape.dropout, self.training, True)
        with _autocast_of_layers(x.device.type):
            if shape.cell == "lstm":
                first = (zeros, zeros)
                output, *last = torch.lstm(packed.data, packed.batch_sizes, first, *options)
            else:
                output, *last = torch.gru(packed.data, packed.batch_sizes, zeros, *options)
        memory, _ = pad_packed_sequence(
            PackedSequence(output, *packed[1:]), batch_first=True, total_length=source.size(1)
        )
        order = packed.unsorted_indices
        assert order is not None
        states = [
            self._bridge(weights, kind, state.index_select(1, order))
            for kind, state in zip(shape.states, last, strict=True)
        ]
        return memory.float(), torch.stack(states)

    def _bridge(self, weights: Weights, kind: str, last: Tensor) -> Tensor:
        """Turn last states [2 L, B, W] of the encoder into first ones [L, B, H] of the decoder."""
        firsts = []
        for layer, pair in enumerate(last.unflatten(0, (-1, 2))):  # [2, B, W]
            weight = weights[f"{kind}_bridge_weight_l{layer}"]
            bias = weights[f"{kind}_bridge_bias_l{layer}"]
            first = F.linear(torch.cat([pair[0], pair[1]], dim=-1), weight, bias).float()
            firsts.append(first.tanh() if kind == "hidden" else first)
        return torch.stack(firsts)


class RecurrentDecoder(nn.Module):
    """Predicts a target token by token; if it attends, with the relevant part of the memory.

    Bahdanau et al. 2015, arXiv 1409.0473, section 3.1. A memory h_j scores v tanh(Q s + K h_j + b)
    with the last layer's state s of the step before. The softmax of the scores weighs the memory
    to a context, which goes into the first layer beside the token, and into the logits beside
    token and state; logits are linear, where the paper has a maxout layer. Without attention they
    are of the state alone (Sutskever et al. 2014, arXiv 1409.3215).

    No module is called in the loop over steps: ranks have different numbers of them, and sharded
    weights are gathered from all ranks at every call.

    Args:
        shape: Of the network.
        vocab_size: V of the target.
    """

    def __init__(self, shape: RecurrentShape, vocab_size: int):
        super().__init__()
        self.shape = shape
        width, embedded, memory = shape.hidden_width, shape.embedding_width, shape.memory_width
        self.embedding = nn.Parameter(torch.empty(vocab_size, embedded))  # [V, E]
        beside = features = 0
        if shape.attention == "additive":
            self.attention_query = nn.Parameter(torch.empty(width, width))
            self.attention_key = nn.Parameter(torch.empty(width, memory))
            self.attention_bias = nn.Parameter(torch.empty(width))
            self.attention_score = nn.Parameter(torch.empty(width))
            beside, features = memory, memory + embedded
        for layer in range(shape.num_layers):
            _add_cell(self, shape, f"l{layer}", width if layer else embedded + beside, width)
        self.head_weight = nn.Parameter(torch.empty(vocab_size, width + features))
        self.head_bias = nn.Parameter(torch.empty(vocab_size))

    def forward(
        self,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        state: Tensor | None,
        inputs: Tensor,
        targets: Tensor | None,
        cache: RecurrentCache | None,
        label_smoothing: float,
        teacher: Tensor | None,
    ) -> Tensor:
        """Compute loss or logits as `RecurrentNetwork.forward`, of what the encoder has made."""
        attended, weights = None, weights_of(self)
        if state is None:
            assert cache is not None
            assert cache.state is not None
            attended, state = cache.attended, cache.state
        elif self.shape.attention == "additive":
            assert memory is not None
            assert memory_mask is not None
            attended = self._attended(weights, memory, memory_mask)
        features, state = self._unroll(weights, attended, state, inputs, teacher)
        if cache is not None:
            cache.attended, cache.state = attended, state
            cache.length += inputs.size(1)
            features = features[:, -1:]
        if targets is None:
            return F.linear(features, weights["head_weight"], weights["head_bias"]).float()
        return linear_cross_entropy(
            features,
            weights["head_weight"],
            targets,
            bias=weights["head_bias"],
            softcap=None,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    def _attended(self, weights: Weights, memory: Tensor, mask: Tensor) -> Attended:
        keys = F.linear(memory, weights["attention_key"], weights["attention_bias"]).float()
        # Not minus infinity: a row that is all padding would have no weights.
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        return Attended(memory, keys, bias)

    def _unroll(
        self,
        weights: Weights,
        attended: Attended | None,
        state: Tensor,
        inputs: Tensor,
        teacher: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what logits are linear in, [B, T, ...], and the state after the last step.

        What does not depend on the step before is computed for all steps at once.
        """
        cells: list[list[Tensor]] = [
            [weights[f"{kind}_l{layer}"] for kind in _CELL]
            for layer in range(self.shape.num_layers)
        ]
        weight, bias = cells[0][0], cells[0][2]
        token_weight = weight[:, : self.shape.embedding_width]
        context_weight = weight[:, self.shape.embedding_width :]
        tokens = _embed(weights["embedding"], inputs, self)  # [B, T, E]
        gates = F.linear(tokens, token_weight, bias).float()  # [B, T, G]
        # `tolist` waits for the device, once.
        is_fed = [True] * inputs.size(1) if teacher is None else [True, *teacher[1:].tolist()]
        states = [layer.unbind(0) for layer in state.unbind(1)]  # L times N times [B, H]
        features: list[Tensor] = []
        for step, (token, gate) in enumerate(zip(tokens.unbind(1), gates.unbind(1), strict=True)):
            if not is_fed[step]:
                with torch.no_grad():
                    likely = F.linear(features[-1], weights["head_weight"], weights["head_bias"])
                token = _embed(weights["embedding"], likely.argmax(dim=-1), self)
                gate = F.linear(token, token_weight, bias).float()
            beside = []
            if attended is not None:
                context = attend(weights, attended, states[-1][0])
                gate = gate + F.linear(context, context_weight).float()
                beside = [context, token]
            states = self._advance(cells, gate, states)
            features.append(torch.cat([states[-1][0], *beside], dim=-1))
        layers = [torch.stack(layer) for layer in states]  # L times [N, B, H]
        return torch.stack(features, dim=1), torch.stack(layers, dim=1)

    def _advance(
        self, cells: list[list[Tensor]], gates: Tensor, states: list[tuple[Tensor, ...]]
    ) -> list[tuple[Tensor, ...]]:
        """Take all layers a step on; `gates` [B, G] are of the first layer's input."""
        step = lstm_step if self.shape.cell == "lstm" else gru_step
        new: list[tuple[Tensor, ...]] = []
        for (weight, recurrent_weight, bias, recurrent_bias), state in zip(
            cells, states, strict=True
        ):
            if new:
                below = F.dropout(new[-1][0], self.shape.dropout, self.training)
                gates = F.linear(below, weight, bias).float()
            recurrent = F.linear(state[0], recurrent_weight, recurrent_bias).float()
            new.append(step(gates, recurrent, state))
        return new


def _autocast_of_layers(device: str) -> torch.autocast:
    """Autocast as it is, but for fp16 on a CPU.

    oneDNN has no LSTM of it, and torch asks oneDNN
    where the sources of a batch are equally long.
    """
    is_on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(
        device, dtype, enabled=is_on and (device, dtype) != ("cpu", torch.float16)
    )


def _embed(table: Tensor, tokens: Tensor, module: RecurrentEncoder | RecurrentDecoder) -> Tensor:
    """Look up `tokens` [...] with dropout, [..., E]; in fp32, as `layers.table_of` explains."""
    return F.dropout(F.embedding(tokens, table.float()), module.shape.dropout, module.training)


def _add_cell(module: nn.Module, shape: RecurrentShape, name: str, inputs: int, width: int) -> None:
    gates = shape.num_gates * width
    _add(module, f"weight_ih_{name}", gates, inputs)
    _add(module, f"weight_hh_{name}", gates, width)
    _add(module, f"bias_ih_{name}", gates)
    _add(module, f"bias_hh_{name}", gates)


def _add(module: nn.Module, name: str, *size: int) -> None:
    module.register_parameter(name, nn.Parameter(torch.empty(size)))
