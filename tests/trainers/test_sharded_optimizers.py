"""Optimizers that need whole tensors where ranks hold stretches, against one rank with the whole.

Up to Muon's iteration everything is elementwise and the iteration gets the same bf16 numbers, so
from equal gradients results are equal to the last bit, and are compared so. The others add up in
another order. What the cases are: `sharded_optimizer_ranks.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXACT = {
    2: [
        *("zero1", "zero1_bf16_clip"),
        *("zero2", "zero2_bf16_clip", "zero2_offload_clip", "zero2_veto", "zero2_linear"),
        *("zero3", "zero3_bf16_clip", "zero3_offload_bf16_clip", "zero3_veto", "zero3_linear"),
        "zero3_small_batches",
        *("fsdp", "fsdp_veto", "fsdp_small_batches", "fsdp_state", "fsdp_linear"),
    ],
    4: ["zero1", "zero2", "zero3", "fsdp", "fsdp_hybrid"],
}
SUMMED = {
    2: [
        *("zero1_rms", "zero2_rms_veto", "zero3_rms_offload_bf16_clip", "fsdp_rms_veto"),
        *("zero1_adafactor", "zero2_adafactor_veto", "zero2_adafactor_offload_clip"),
        *("zero3_adafactor_veto", "zero3_adafactor_small", "fsdp_adafactor_veto"),
        "fsdp_adafactor_small",
    ],
    4: [
        *("zero1_rms", "zero3_rms", "fsdp_rms_hybrid"),
        *("zero1_adafactor", "zero3_adafactor", "fsdp_adafactor_hybrid"),
    ],
}
SUMMED_TOLERANCE = 2e-6
ENOUGH = {"linear": 2e-3}
"""Relative distance allowed. A network's own gradients may differ in the last bit, where DeepSpeed
keeps weights at other addresses; bf16 makes 2^-9 of that in one entry, seldom."""

REFUSED = {"fsdp_columns": "shard by rows"}
CONTROLS = ["zero2_alone", "zero3_alone", "fsdp_alone"]
"""Each stretch orthogonalised by itself."""
SUMMED_CONTROLS = [
    "zero1_rms_alone",
    "zero3_rms_alone",
    "zero3_adafactor_alone",
    "fsdp_adafactor_alone",
]
"""Each stretch with sums of its own."""


@pytest.fixture(scope="module")
def distances(tmp_path_factory):
    """Number of ranks -> case -> its result on each rank."""
    out = tmp_path_factory.mktemp("ranks")
    cases = {
        2: [*EXACT[2], *SUMMED[2], *REFUSED, *CONTROLS, *SUMMED_CONTROLS],
        4: [*EXACT[4], *SUMMED[4], *CONTROLS],
    }
    program = Path(__file__).with_name("sharded_optimizer_ranks.py")
    done = subprocess.run(
        [sys.executable, str(program), str(out), json.dumps(cases)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    results = {n: [json.loads((out / f"{n}_{r}").read_text()) for r in range(n)] for n in cases}
    return {n: {c: [r[c] for r in results[n]] for c in cases[n]} for n in cases}


@pytest.mark.parametrize(("num_ranks", "case"), [(n, c) for n, cs in EXACT.items() for c in cs])
def test_sharded_muon_equals_whole_matrices(distances, num_ranks, case):
    enough = ENOUGH.get(case.partition("_")[2], 0.0)
    assert all(distance <= enough for distance in distances[num_ranks][case])


@pytest.mark.parametrize(("num_ranks", "case"), [(n, c) for n, cs in SUMMED.items() for c in cs])
def test_sums_over_shards_equal_those_of_whole_tensors(distances, num_ranks, case):
    assert all(distance <= SUMMED_TOLERANCE for distance in distances[num_ranks][case])


@pytest.mark.parametrize("case", SUMMED_CONTROLS)
def test_sums_over_stretches_alone_give_another_update(distances, case):
    assert all(distance > 0.01 for distance in distances[2][case])


@pytest.mark.parametrize("num_ranks", EXACT)
@pytest.mark.parametrize("case", CONTROLS)
def test_orthogonalising_stretches_alone_is_another_update(distances, num_ranks, case):
    assert all(distance > 0.1 for distance in distances[num_ranks][case])


@pytest.mark.parametrize(("case", "remedy"), REFUSED.items())
def test_shards_that_cannot_be_put_together_are_refused(distances, case, remedy):
    assert all(remedy in message for message in distances[2][case])
