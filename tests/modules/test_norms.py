import torch
import torch.nn.functional as F

from modules import norms


def test_rms_norm_and_its_gradient_equal_torch():
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 1e-4  # where the epsilon matters
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y, expected = norms.rms_norm(ours), F.rms_norm(reference, (16,), eps=1e-5)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_rms_norm_computes_the_mean_in_fp32():
    norm = norms.RMSNorm(64, gain=True)
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # whose square is not in fp16's range
    y = norm(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y))


def test_layer_norm_computes_in_fp32_from_bf16_weights():
    norm = norms.LayerNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = 100 + torch.randn(2, 64)  # a mean that bf16 would round away
    expected = F.layer_norm(x, (64,), norm.weight.bfloat16().float(), norm.bias)
    y = norm.bfloat16()(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected)
