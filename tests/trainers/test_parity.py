"""Any strategy trains as one rank does. `test_parity_matrix.py` has many more cells."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.cells import STRATEGIES, Cell, Outcome, run_cells
from benchmarks.parity import (
    exact_reference,
    judge,
    largest_difference,
    sound,
    with_references,
)

pytestmark = pytest.mark.timeout(900)  # the first test waits for the ranks, on a busy machine long
# A covering set: every strategy with each module, every mode of recomputation, with accumulation
# and without.
PAIR_CELLS = [
    *(Cell("encoder_decoder", name, micro=2) for name in ("ddp", "zero2", "fsdp")),
    Cell("encoder_decoder", "zero3", recompute="full"),
    *(Cell("lstm", name, micro=2) for name in ("ddp", "zero1", "zero3", "fsdp")),
    Cell("lstm", "zero2", recompute="selective", micro=2),
]
# Each loss and each strategy.
GAN_CELLS = [
    Cell("gan", "zero3", micro=2),
    Cell("gan", "fsdp", micro=2, recompute="full"),
    Cell("gan_saturating", "ddp", micro=2),
    Cell("gan_hinge", "zero3", micro=2),  # its discriminator in shards, too
    Cell("gan_hinge", "fsdp"),
    Cell("gan_least_squares", "zero1", micro=2),
    Cell("gan_wasserstein", "zero2", micro=2),
    Cell("gan_relativistic", "zero3_offload", micro=2),
]
EQUAL = [
    *GAN_CELLS,
    *(Cell("gpt", name, micro=None if name in ("zero1", "fsdp") else 2) for name in STRATEGIES),
    *(Cell("two_networks", name, micro=2) for name in STRATEGIES),
    Cell("two_networks", "zero3", recompute="selective"),
    Cell("gpt", "zero3", recompute="full"),
    Cell("gpt", "ddp", recompute="selective"),
    Cell("gpt", "zero2", recompute="selective", micro=2),
    Cell("gpt", "fsdp", recompute="every_2", micro=2),
    Cell("two_networks", "fsdp", recompute="full"),
    *(Cell("masked", name, micro=2) for name in ("ddp", "zero1", "zero3", "fsdp")),
    Cell("frozen", "zero3", micro=2),
    *(Cell("given", name, micro=2) for name in ("zero1", "zero3")),
    Cell("let_go", "fsdp"),
    *PAIR_CELLS,
    *(Cell("gpt", name, "bf16", micro=2) for name in ("zero1", "zero3")),
    Cell("two_networks", "zero2", "bf16"),
    *(Cell("two_networks", name, "bf16", parameters="low") for name in ("zero1", "zero3")),
]
# Optimizers that add up over whole tensors.
SUMMED = [
    Cell("gpt", name, optimizer=optimizer)
    for name in ("zero1", "zero3", "fsdp")
    for optimizer in ("adamw_rms", "adafactor")
]
EQUAL += SUMMED
# What must not pass, or the test above would show nothing.
DIFFERENT = [
    Cell("two_networks", "ddp", control="unfrozen"),
    Cell("two_networks", "zero1", control="two_backwards"),
    Cell("two_networks", "zero2", control="two_backwards"),
    Cell("gpt", "zero2", control="no_clipping"),
    Cell("masked", "ddp", control="per_rank_mean"),
    Cell("two_networks", "fsdp", control="no_reshard"),
    Cell("gan", "ddp", control="unfrozen_gan"),
    Cell("gan_relativistic", "ddp", control="own_signs"),
]
# One step is left out, for the loss of one rank at it is no number.
SKIPPED = [
    *(Cell("spoiled", name, guard="skip") for name in ("zero2", "zero3", "fsdp")),
    Cell("spoiled_unfused", "zero2", guard="skip"),
]
SKIPPED_LOW = Cell("spoiled", "zero1", "bf16", parameters="low", guard="skip")
# The same, and the run is to end; then a part of a network that is let go too late.
STOPPED = [
    *(Cell("spoiled", name) for name in ("zero2", "zero3", "fsdp")),
    Cell("spoiled", "zero1", "bf16", parameters="low"),
    *(Cell("spoiled_unfused", name) for name in ("zero2", "zero3")),
]
DISORDERED = [Cell("lstm", name, micro=2, control="as_they_come") for name in ("zero1", "zero2")]
REFUSED = [Cell("let_go", name) for name in ("ddp", "zero1", "zero3")]
# Continued at step 5, and in one go.
RESUMED = [
    *(Cell("gpt", name, "bf16", stop_at=5, optimizer="adamw") for name in STRATEGIES),
    *(Cell("two_networks", name, micro=2, stop_at=5) for name in ("zero2", "zero3", "fsdp")),
    Cell("gan_relativistic", "fsdp", stop_at=5),
    Cell("lstm", "zero3", "bf16", stop_at=5, optimizer="adamw"),
    *(Cell("two_networks", name, "fp16", stop_at=5) for name in ("ddp", "zero1", "zero3")),
    Cell("frozen", "zero1", "bf16", stop_at=5, parameters="low"),
    Cell("given", "zero3", "bf16", stop_at=5, parameters="low"),
    *(
        Cell("gpt", name, "bf16", stop_at=5, optimizer="muon")
        for name in ("zero1", "zero3", "fsdp")
    ),
    *(replace(cell, stop_at=5) for cell in SUMMED),
]
# Continued under another strategy.
CHANGED = [
    Cell("gpt", "zero3", stop_at=5, begun="ddp"),
    Cell("gpt", "fsdp", stop_at=5, begun="zero1"),
    Cell("frozen", "fsdp", stop_at=5, begun="zero3"),
    Cell("given", "zero2", stop_at=5, begun="ddp"),
    Cell("two_networks", "zero2", stop_at=5, begun="fsdp"),
    Cell("gpt", "zero3", stop_at=5, begun="fsdp", optimizer="adafactor"),
]
# What was remembered by rows and columns counts.
LOST = replace(CHANGED[-1], control="lost_state")
# Muon multiplies what fp32 adds up in another order: by one rank under ddp it is 4e-3 away.
MUON = Cell("gpt", "zero3", stop_at=5, begun="fsdp", optimizer="muon")
MUON_TOLERANCE = 1e-2
# The reference of ZeRO in fp16, in fp32: masters by the side change nothing.
MASTERS = [Cell(name, "single", micro=2, control="kept_low") for name in ("gpt", "two_networks")]
KEPT_LOW = Cell("gpt", "single", "fp16", control="kept_low")
# Gradients of low parameters, to be exchanged in fp32.
NOTED = [
    Cell("gpt", name, "bf16", parameters="low", control="noted")
    for name in ("zero1", "zero2", "zero3", "fsdp")
]


def in_one_go(cell):
    return replace(cell, stop_at=None, begun=None)


def reference(cell, outcomes):
    return sound(outcomes, exact_reference(cell))


def apart(one, other):
    """Euclidean distance of all weights."""
    return sum((one.weights[k] - other.weights[k]).square().sum() for k in one.weights) ** 0.5


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every run, on ranks that are started once."""
    folder = tmp_path_factory.mktemp("parity")
    ones, runs = with_references([*EQUAL, *CHANGED, *SKIPPED, MUON])
    cells = [*runs, *DIFFERENT, *RESUMED, *map(in_one_go, RESUMED)]
    cells += [
        LOST,
        *NOTED,
        SKIPPED_LOW,
        *STOPPED,
        *REFUSED,
        *DISORDERED,
        replace(MUON, control="lost_state"),
    ]
    found = run_cells([*ones, *MASTERS, KEPT_LOW], folder, 1, "cpu")
    return found | run_cells(list(dict.fromkeys(cells)), folder, 2, "cpu")


@pytest.mark.parametrize("cell", [*EQUAL, *CHANGED, *SKIPPED], ids=lambda cell: cell.name)
def test_two_ranks_train_as_one(cell, outcomes):
    assert outcomes[cell].error is None
    is_equal, found = judge(cell, outcomes)
    assert is_equal, found


@pytest.mark.parametrize("cell", MASTERS, ids=lambda cell: cell.name)
def test_masters_by_the_side_train_as_parameters_do(cell, outcomes):
    is_equal, found = judge(cell, outcomes)
    assert is_equal, found


def test_masters_by_the_side_are_what_is_saved(outcomes):
    kept = outcomes[KEPT_LOW].weights.values()
    assert all((value != value.half()).any() for value in kept if value.ndim > 1)


@pytest.mark.parametrize("cell", [*DIFFERENT, LOST], ids=lambda cell: cell.name)
def test_what_is_broken_is_seen(cell, outcomes):
    assert outcomes[cell].error is None  # it trains to its end, and only differs
    assert all(map(math.isfinite, largest_difference(outcomes[cell], reference(cell, outcomes))))
    is_equal, found = judge(cell, outcomes)
    assert not is_equal, found


@pytest.mark.parametrize("cell", RESUMED, ids=lambda cell: cell.name)
def test_continued_run_ends_with_the_same_bits(cell, outcomes):
    whole, continued = outcomes[in_one_go(cell)], outcomes[cell]
    assert whole.error is None
    assert continued.error is None
    assert torch.equal(whole.losses, continued.losses)
    assert whole.weights.keys() == continued.weights.keys()
    assert all(torch.equal(whole.weights[name], continued.weights[name]) for name in whole.weights)


def test_muon_continues_under_another_strategy(outcomes):
    expected = reference(MUON, outcomes)
    losses, weights = largest_difference(outcomes[MUON], expected)
    assert losses < weights < MUON_TOLERANCE
    _, lost = largest_difference(outcomes[replace(MUON, control="lost_state")], expected)
    assert 3 * MUON_TOLERANCE < lost < float("inf")


@pytest.mark.parametrize("cell", [*SKIPPED, SKIPPED_LOW], ids=lambda cell: cell.name)
def test_step_that_one_rank_spoils_is_left_out_by_all(cell, outcomes):
    assert outcomes[cell].num_skipped == 1
    skipped = reference(replace(cell, precision="fp32"), outcomes)
    whole = outcomes[Cell("gpt", "single")]
    assert apart(outcomes[cell], skipped) < 0.1 * apart(whole, skipped)


@pytest.mark.parametrize("cell", STOPPED, ids=lambda cell: cell.name)
def test_loss_of_one_rank_that_is_no_number_stops_all(cell, outcomes):
    message = "trainer.guard.nonfinite=stop -> the loss on rank 1 is not finite at step 2: "
    assert outcomes[cell].error.startswith(f"FloatingPointError: {message}")


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.name)
def test_parameter_that_cannot_be_trained_any_more_is_refused(cell, outcomes):
    assert "`network.blocks.0.attention_norm.weight` -> it was False" in outcomes[cell].error


@pytest.mark.parametrize("cell", DISORDERED, ids=lambda cell: cell.name)
def test_gradients_that_come_in_different_orders_are_noticed(cell, outcomes):
    assert "ranks have finished their gradients in different orders" in outcomes[cell].error


@pytest.mark.parametrize("cell", NOTED, ids=lambda cell: cell.name)
def test_low_parameters_have_masters_and_gradients_exchanged_in_fp32(cell, outcomes):
    assert outcomes[cell].exchanged == {"torch.float32"}
    weights = outcomes[cell].weights
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all((value != value.bfloat16()).any() for value in weights.values() if value.ndim > 1)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_moving_average_of_low_parameters_stays_in_fp32(name, outcomes):
    weights = outcomes[Cell("two_networks", name, "bf16", parameters="low")].weights
    averages = [value for name, value in weights.items() if name.startswith("ema_")]
    assert averages
    assert all((value != value.bfloat16()).any() for value in averages)


@pytest.mark.parametrize(("times", "is_sound"), [(2.5, True), (3.5, False)])
def test_reference_that_keeps_parameters_in_fp16_is_not_far_itself(times, is_sound):
    cell = Cell("gpt", "zero1", "fp16")
    ones, runs = with_references([cell])

    def outcome(distance):
        return Outcome(torch.full((2,), distance), {"weight": torch.full((2,), distance)})

    found = {run: outcome(3.0) for run in runs}  # within the bound of either reference
    for one in ones:
        found[one] = outcome(0.0 if one.precision == "fp32" else times if one.control else 1.0)
    if is_sound:
        assert judge(cell, found)[0]
    else:
        with pytest.raises(RuntimeError, match=r"are 3.5 \(losses\) and 3.5 \(weights\) times"):
            judge(cell, found)
