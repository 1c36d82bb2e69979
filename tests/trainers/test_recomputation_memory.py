"""Memory that recomputation saves; `python -m benchmarks.recomputation` measures real shapes."""

import pytest
import torch

from benchmarks import recomputation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def module():
    # Long rows and wide blocks over a small vocabulary, as in a large model, in small.
    recomputation.VOCABULARY, real = 64, recomputation.VOCABULARY
    yield recomputation.build("gpt2_tiny", 256, num_layers=4, num_heads=2, width=64)
    recomputation.VOCABULARY = real


def bytes_packed(module, mode, batch):
    """What autograd saves by its hooks alone, parameters and batch excluded."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in batch.values()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = recomputation.forward(module, mode, batch, "fp32")
    assert loss.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.fixture(scope="module")
def saved(module):
    batch = recomputation.make_batch(4, 256)
    recomputation.step_seconds(module, "none", batch, "fp32")
    return {
        mode: recomputation.saved_bytes(module, mode, batch, "fp32") for mode in recomputation.MODES
    }


def test_full_recomputation_saves_most(saved):
    assert saved["full"] < 0.45 * saved["none"]
    assert saved["full"] < saved["selective"] < saved["none"]
    assert saved["full"] < saved["every_2"] < saved["none"]


def test_plain_count_is_that_of_autograd_hooks(module, saved):
    packed = bytes_packed(module, "none", recomputation.make_batch(4, 256))
    assert packed == pytest.approx(saved["none"], rel=0.05)


def test_what_selective_caches_is_counted_though_hooks_miss_it(module, saved):
    packed = bytes_packed(module, "selective", recomputation.make_batch(4, 256))
    assert packed < 1.05 * saved["full"] < saved["selective"]
