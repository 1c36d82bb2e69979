"""Runs that are killed and go on with other ranks, workers and micro-batches, drawn at random."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules import loader as loader_module
from datamodules import workers
from datamodules.loader import TrainLoader
from datamodules.order import GlobalOrder
from datamodules.workers import TrainBatches
from tests.datamodules.lives import EPOCHS, PADDING, Case, Life, run, uninterrupted


def draw_case(seed: int) -> Case:
    rng = random.Random(seed)
    batch_samples = rng.choice([1, 2, 6, 8, 12, 40, 67, 96])
    # Shards of one block each, empty ones among them; often fewer than ranks x workers.
    blocks = [rng.choice([0, 1, 2, 9, 50]) for _ in range(rng.randint(1, 12))]
    blocks.append(rng.randint(0, 30))
    tail = rng.choice(["drop", "carry", "pad_mask"])
    if sum(blocks) < batch_samples:
        blocks.append(batch_samples if tail == "drop" else 1)
    window_mb = rng.choice([0.001, 0.05, 0.3, 4])
    case = Case(blocks, batch_samples, window_mb, tail, seed=rng.randint(0, 5))
    case.lives = [draw_life(rng, case) for _ in range(3)]
    case.lives[-1].killed_after = None
    return case


def draw_life(rng: random.Random, case: Case) -> Life:
    world = rng.choice(divisors(case.batch_samples))
    micro_batch = rng.choice(divisors(case.batch_samples // world)[-3:])
    # Often in the middle of an accumulation; the last step may be over before that.
    num_micro_batches = case.max_samples // (world * micro_batch)
    return Life(world, micro_batch, rng.randint(0, 3), rng.randint(0, num_micro_batches // 2))


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, 16) + 1) if number % divisor == 0]


def find_faults(case: Case, samples: list[int], reference: list[int]) -> list[str]:
    """Everything that is wrong with the samples of a run."""
    faults = []
    if samples != reference:
        faults.append("another order than that of the uninterrupted run")
    if len(samples) != case.max_samples:
        faults.append("another number of samples")
    size, everything = case.samples_per_epoch, set(range(case.num_samples))
    epochs = [samples[number * size : (number + 1) * size] for number in range(EPOCHS)]
    for own in epochs:
        seen = [sample for sample in own if sample != PADDING]
        expected = min(size, case.num_samples)
        if not len(seen) == len(set(seen)) == expected or not everything.issuperset(seen):
            faults.append("an epoch that has not each sample once")
        if own[len(seen) :] != [PADDING] * (size - expected):
            faults.append("padding elsewhere than at the end")
    if case.num_samples >= max(40, 2 * case.batch_samples) and epochs[0] == epochs[1] == epochs[2]:
        faults.append("epochs of the same order")
    return faults


@pytest.fixture(autouse=True)
def simulated_workers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Take the processes out of workers, and leave their arithmetic: hundreds of cases a second."""
    if "real_workers" in request.fixturenames:
        return

    def in_turn(batches: TrainBatches, num_workers: int) -> Iterator[Any]:
        if num_workers == 0:
            return iter(batches)
        return ask_in_turn(monkeypatch, batches, range(num_workers))

    monkeypatch.setattr(loader_module, "open_batches", in_turn)


def ask_in_turn(
    monkeypatch: pytest.MonkeyPatch, batches: TrainBatches, numbers: Any
) -> Iterator[Any]:
    """As `DataLoader` asks its workers; one that has no more is left out."""
    iterators = {number: iter(batches) for number in numbers}
    while iterators:
        for number, iterator in list(iterators.items()):
            info = SimpleNamespace(id=number, num_workers=len(numbers))
            monkeypatch.setattr(workers, "get_worker_info", lambda info=info: info)
            batch = next(iterator, None)
            monkeypatch.setattr(workers, "get_worker_info", lambda: None)
            if batch is None:
                del iterators[number]
            else:
                yield batch


@pytest.fixture
def real_workers() -> None:
    """Let workers be processes."""


@pytest.mark.parametrize("seed", range(50))
def test_killed_run_equals_the_uninterrupted_one(seed: int) -> None:
    case = draw_case(seed)
    assert find_faults(case, run(case), uninterrupted(case)) == []


@pytest.mark.slow
def test_killed_run_equals_the_uninterrupted_one_in_many_cases() -> None:
    for seed in range(1000, 1600):
        case = draw_case(seed)
        assert find_faults(case, run(case), uninterrupted(case)) == [], case


# Three workers are more than the cores of a small machine, and meant.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("tail", ["drop", "carry", "pad_mask"])
def test_killed_run_with_worker_processes_equals_the_uninterrupted_one(
    tail: str, real_workers: None
) -> None:
    case = Case([9, 0, 50, 2], batch_samples=8, window_mb=0.1, tail=tail, seed=1)
    case.lives = [Life(2, 2, 3, 5), Life(1, 4, 2, 3), Life(4, 1, 0, None)]
    assert find_faults(case, run(case), uninterrupted(case)) == []


CONTROL = Case([9, 0, 50, 2, 40], batch_samples=12, window_mb=0.05, tail="drop", seed=3)
LIVES = [Life(2, 3, 0, 9), Life(3, 2, 2, 7), Life(4, 3, 3)]


def faults_of(lives: list[Life] | None = None) -> list[str]:
    return find_faults(CONTROL, run(CONTROL, lives or LIVES), uninterrupted(CONTROL))


def test_checker_finds_nothing_in_the_control() -> None:
    assert faults_of() == []


@pytest.mark.parametrize("steps", [-1, 1])
def test_checker_finds_a_state_one_step_off(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = TrainLoader.restore

    def restore_another(self: TrainLoader, state: dict[str, Any]) -> None:
        restore(self, {**state, "position": state["position"] + steps * CONTROL.batch_samples})

    monkeypatch.setattr(TrainLoader, "restore", restore_another)
    assert "another order than that of the uninterrupted run" in faults_of()
    assert "an epoch that has not each sample once" in faults_of()


def test_checker_finds_an_order_without_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    locate = GlobalOrder.locate
    monkeypatch.setattr(
        GlobalOrder, "locate", lambda self, epoch, positions: locate(self, 0, positions)
    )
    assert faults_of() == ["epochs of the same order"]


def test_checker_finds_swapped_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    make = TrainBatches.__init__

    def make_swapped(self: TrainBatches, *args: Any, rank: int, **settings: Any) -> None:
        make(self, *args, rank={0: 1, 1: 0}.get(rank, rank), **settings)

    reference = uninterrupted(CONTROL)
    monkeypatch.setattr(TrainBatches, "__init__", make_swapped)
    faults = find_faults(CONTROL, run(CONTROL, LIVES), reference)
    assert faults == ["another order than that of the uninterrupted run"]


def test_checker_finds_workers_asked_out_of_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_turn(batches: TrainBatches, num_workers: int) -> Iterator[Any]:
        numbers = range(num_workers)[::-1] if num_workers else range(1)
        return ask_in_turn(monkeypatch, batches, numbers)

    monkeypatch.setattr(loader_module, "open_batches", out_of_turn)
    assert "another order than that of the uninterrupted run" in faults_of()


def test_checker_finds_a_lost_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(TrainBatches):
        def __iter__(self) -> Iterator[Any]:
            self.first += self.first > 0  # one of each resume
            return super().__iter__()

    monkeypatch.setattr(loader_module, "TrainBatches", Forgetful)
    assert "another number of samples" in faults_of()


def test_dropped_samples_are_others_in_each_epoch() -> None:
    samples, size = uninterrupted(CONTROL), CONTROL.samples_per_epoch
    dropped = [
        set(range(CONTROL.num_samples)) - set(samples[start : start + size])
        for start in range(0, EPOCHS * size, size)
    ]
    assert all(0 < len(own) < CONTROL.batch_samples for own in dropped)
    assert len({frozenset(own) for own in dropped}) == EPOCHS
