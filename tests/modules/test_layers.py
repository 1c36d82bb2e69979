from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modules import layers
from modules.layers import linear_cross_entropy
from modules.positions import document_positions


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def problem(num_positions=96, width=16, vocab_size=50) -> Any:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, num_positions // 2, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab_size, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocab_size, (2, num_positions // 2), generator=generator)
    targets[0, :10] = -100
    return hidden, weight, targets


def plain_loss(hidden, weight, targets, softcap, reduction, bias=None, label_smoothing=0.0):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.flatten(0, 1).float()
    return F.cross_entropy(
        logits,
        targets.flatten(),
        ignore_index=-100,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes even the problems here too big to be computed at once: chunks of 30 positions."""
    monkeypatch.setattr(layers, "PLAIN_LOGITS_BYTES", 0)


@pytest.fixture
def without_torch_form(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)


def check_against_plain(softcap, reduction, **more: Any):
    gradients = []
    for function in (linear_cross_entropy, plain_loss):
        hidden, weight, targets = problem()
        bias = torch.linspace(-1, 1, weight.size(0), requires_grad=True)
        loss = function(
            hidden, weight, targets, softcap=softcap, reduction=reduction, bias=bias, **more
        )
        # A factor other than 1 shows whether backward scales what forward computed.
        (3 * loss).backward()
        gradients.append((loss.detach(), hidden.grad, weight.grad, bias.grad))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_plain_loss_equals_cross_entropy(softcap, reduction):
    check_against_plain(softcap, reduction)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.usefixtures("small_chunks")
def test_chunked_loss_equals_cross_entropy(softcap, reduction):
    check_against_plain(softcap, reduction)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunked", [False, True])
def test_smoothed_loss_equals_cross_entropy(chunked, softcap, reduction, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    check_against_plain(softcap, reduction, label_smoothing=0.1)
    hidden, weight, targets = problem()
    losses = [
        linear_cross_entropy(
            hidden, weight, targets, softcap=softcap, reduction="mean", label_smoothing=smoothing
        )
        for smoothing in (0.0, 0.1)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.usefixtures("small_chunks", "without_torch_form")
def test_own_chunked_loss_equals_cross_entropy_without_softcap():
    check_against_plain(None, "mean")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.usefixtures("small_chunks")
def test_chunked_loss_bounds_the_logits(softcap, label_smoothing):
    hidden, weight, targets = problem()
    with LargestTensor() as largest:
        linear_cross_entropy(
            hidden,
            weight,
            targets,
            softcap=softcap,
            reduction="sum",
            label_smoothing=label_smoothing,
        ).backward()
    assert largest.numel <= max(hidden.numel(), weight.numel())
    with LargestTensor() as largest:
        plain_loss(hidden, weight, targets, softcap, "sum")
    assert largest.numel == targets.numel() * weight.size(0) > hidden.numel()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.usefixtures("small_chunks")
def test_chunked_loss_of_ignored_targets_is_zero(softcap):
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(
        hidden, weight, torch.full_like(targets, -100), softcap=softcap, reduction="sum"
    )
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunked", [False, True])
def test_loss_under_autocast_is_fp32_and_near(softcap, chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    hidden, weight, targets = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="mean")
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    reference_hidden, reference_weight, _ = problem()
    reference = plain_loss(reference_hidden, reference_weight, targets, softcap, "mean")
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(hidden.grad, reference_hidden.grad, rtol=5e-2, atol=2e-3)
    torch.testing.assert_close(weight.grad, reference_weight.grad, rtol=5e-2, atol=2e-3)


def test_document_positions_restart_and_mask_is_block_diagonal():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    positions = document_positions(documents)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    mask = layers.document_mask(documents)
    block = [torch.ones(n, n).tril().bool() for n in (2, 3, 1)]
    assert torch.equal(mask[0, 0], torch.block_diag(*block).bool())
    assert torch.equal(mask[1, 0], torch.ones(6, 6).tril().bool())


@pytest.mark.parametrize("form", ["bool", "added"])
def test_attention_under_a_mask_equals_scores_written_out(form):
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 4, 5, 16), *torch.randn(2, 2, 4, 9, 16)
    allowed = torch.arange(9) < torch.tensor([6, 9])[:, None, None, None]
    bias = torch.randn(1, 4, 5, 9, requires_grad=True)
    scores = queries @ keys.mT / 4
    if form == "added":
        scores, mask = scores + bias, torch.where(allowed, bias, -torch.inf)
    else:
        mask = allowed
    reference = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values
    result = layers.attention(queries, keys, values, mask=mask, dropout=0.0)
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)
    if form == "added":
        gradients = [torch.autograd.grad(x.square().sum(), bias)[0] for x in (result, reference)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_equals_fp32(masked):
    torch.manual_seed(0)
    queries = torch.randn(2, 4, 8, 16)
    keys, values = torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    mask = torch.ones(2, 1, 8, 8).tril().bool() if masked else None
    # The reference writes every head and the softmax out.
    scores = queries @ keys.repeat_interleave(2, 1).mT / 4
    scores = scores.masked_fill(~torch.ones(8, 8).tril().bool(), -torch.inf)
    reference = scores.softmax(-1) @ values.repeat_interleave(2, 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        inputs = (x.to(dtype) for x in (queries, keys, values))
        result = layers.attention(*inputs, mask=mask, dropout=0.0)
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), reference, rtol=tolerance, atol=tolerance)
