"""A LightningDataModule whose training stream resumes at the next sample; kinds of data extend it.

What Lightning 2.6 would do wrong is kept off it here: the state lies in the datamodule, because the
loader's own is lost in some orders of calls; it reaches a loader that exists already, because
DeepSpeed and FSDP restore after set-up; and the loader has a length, without which a batch would be
lost at each resume. Micro-batches counted by Lightning are put right by
`trainers.callbacks.checkpointing` when the number of ranks has changed.
"""

import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from datamodules.block_cache import BlockCache
from datamodules.index import Index
from datamodules.loader import EvaluationLoader, TrainLoader, order_of
from datamodules.order import TAILS, RunOrder, count_lanes
from datamodules.reader import ACTIONS, BadSamples
from datamodules.remote import Fetcher, is_remote, is_sequential
from datamodules.settings import check_choice, check_numbers
from datamodules.workers import SampleSource


class StreamDataModule(LightningDataModule):
    """Batches of a sample source for training, validation and test.

    Extended by a kind of data with `source`, and where there is another order than one data set's
    with `order`.

    Args:
        batch_samples: samples of an optimizer step, over all ranks.
        micro_batch: samples per rank and forward.
        max_samples: samples of the whole run, over all ranks.
        num_workers: processes that read ahead in training; 0 reads in the training process.
            Evaluation always reads there.
        repeat_first_batch: train on the samples of the first step again and again.
        window_mb: budget in MiB for the samples that the shuffle mixes at a time.
        tail: what becomes of the samples behind an epoch's last whole step: `drop`, `carry` or
            `pad_mask` (`datamodules.order.EpochsOrder`).
        seed: key of the order.
        val_max_samples: samples of a validation, evenly spread over the split; None takes all.
        on_bad_sample: `raise`, or `substitute` another one for a sample that cannot be read.
        max_bad_samples: bad samples that a process substitutes at most.
        cache: of blocks of remote and compressed shards on this node's disk: `folder`, `gb`, and of
            each process `num_connections`, `max_attempts` at reading a block, `timeout_s` for an
            answer; `storage_options` of the fsspec file system.
    """

    def __init__(
        self,
        *,
        batch_samples: int,
        micro_batch: int,
        max_samples: int,
        num_workers: int,
        repeat_first_batch: bool,
        window_mb: int,
        tail: str,
        seed: int,
        val_max_samples: int | None,
        on_bad_sample: str,
        max_bad_samples: int,
        cache: Mapping[str, Any],
    ) -> None:
        super().__init__()
        check_choice("on_bad_sample", on_bad_sample, ACTIONS)
        check_choice("tail", tail, TAILS)
        check_numbers(
            {
                **{"num_workers": num_workers, "max_bad_samples": max_bad_samples, "seed": seed},
                **{"window_mb": window_mb, "val_max_samples": val_max_samples},
                **{f"cache.{key}": value for key, value in cache.items()},
            }
        )
        self._on_bad_sample, self._max_bad_samples = on_bad_sample, max_bad_samples
        self._batch_samples, self._micro_batch = batch_samples, micro_batch
        self._max_samples, self._num_workers = max_samples, num_workers
        self._window_mb, self._tail, self._seed = window_mb, tail, seed
        self._repeat_first_batch = repeat_first_batch
        self._val_max_samples, self._cache = val_max_samples, cache
        self._block_cache: BlockCache | None = None
        self._train_loader: TrainLoader | None = None
        self._stream_state: dict[str, Any] = {}

    def source(self, split: str) -> SampleSource:
        """Give the samples of a split."""
        raise NotImplementedError

    def order(self, source: SampleSource) -> RunOrder:
        """Give the order in which training takes the samples."""
        return order_of(
            source,
            seed=self._seed,
            batch_samples=self._batch_samples,
            window_mb=self._window_mb,
            tail=self._tail,
        )

    @property
    def seconds_waited(self) -> float:
        """Time that training has waited for batches in this process."""
        return self._train_loader.seconds_waited if self._train_loader else 0.0

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each data set by name that training has made, with fractions."""
        return self._train_loader.epochs if self._train_loader else {"": 0.0}

    @property
    def epoch(self) -> int:
        """Whole passes over the data that training has completed; of a blend the least."""
        return int(min(self.epochs.values()))

    def counters(self) -> dict[str, int]:
        """What has been read for this rank's training; see `datamodules.meter.Counter`."""
        return self._train_loader.counters() if self._train_loader else {}

    def train_dataloader(self) -> TrainLoader:
        """Give the rest of the run: shuffled samples, over as many epochs as it takes."""
        source = self.source("train")
        self._train_loader = TrainLoader(
            source,
            self.order(source),
            batch_samples=self._batch_samples,
            micro_batch=self._micro_batch,
            max_samples=self._max_samples,
            num_workers=self._num_workers,
            repeat_first_batch=self._repeat_first_batch,
            rank=self.rank,
            world_size=self.world_size,
        )
        if self._stream_state:
            self._train_loader.restore(self._stream_state)
        return self._train_loader

    def val_dataloader(self) -> EvaluationLoader:
        """Give the validation split, or `val_max_samples` of it, each sample once."""
        return self._evaluation("val", self._val_max_samples)

    def test_dataloader(self) -> EvaluationLoader:
        """Give the test split, each sample once."""
        return self._evaluation("test", None)

    def state_dict(self) -> dict[str, Any]:
        """Describe the next training sample in a few integers, the same on every rank."""
        if self._train_loader is not None:
            return self._train_loader.stream_state()
        return self._stream_state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the stream that the state describes, also in a loader that exists already.

        Raises:
            ValueError: the state belongs to another stream.
        """
        # Lightning looks for state in the loader itself, and warns where it finds none.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable", UserWarning)
        self._stream_state = state_dict
        if self._train_loader is not None:
            self._train_loader.restore(state_dict)

    @property
    def bad_samples(self) -> BadSamples:
        """What happens to samples that cannot be read; they are listed in the run's directory."""
        run = Path(self.trainer.default_root_dir) if self.trainer is not None else None
        list_file = run / "bad_samples.jsonl" if run else None
        return BadSamples(self._on_bad_sample, self._max_bad_samples, list_file)

    def cache_for(self, index: Index) -> BlockCache | None:
        """Give a cache for the shards of a data set, if they need one.

        Raises:
            ValueError: it is smaller than what the shuffle mixes at a time.
        """
        if not any(is_remote(shard.url) or is_sequential(shard.url) for shard in index.shards):
            return None
        lanes, max_bytes = count_lanes(self._batch_samples), int(self._cache["gb"] * 2**30)
        # A lane's window begins and ends within blocks. Half of the cache is for what is used.
        block = int(index.blocks[:, 1].max())
        active = self._window_mb * 2**20 + 2 * lanes * block
        if max_bytes < 2 * active:
            raise ValueError(
                f"datamodule.cache.gb={self._cache['gb']} -> the shuffle mixes {lanes} lanes in "
                f"datamodule.window_mb={self._window_mb}, {active / 2**30:.3g} GiB with the blocks "
                "at their edges, which may be half of it -> raise the first, or lower the second"
            )
        if self._block_cache is None:  # one, or what evaluation holds would leave training no room
            ranks = self.trainer.num_devices if self.trainer is not None else 1
            self._block_cache = BlockCache(
                # A node's own: locks and maps of a file system that nodes share are no use.
                Path(self._cache["folder"], platform.node()),
                max_bytes=max_bytes,
                num_readers=ranks * max(1, self._num_workers),
                num_parents=ranks if self._num_workers else 0,
                num_connections=self._cache["num_connections"],
                fetcher=Fetcher(
                    storage_options=self._cache["storage_options"],
                    max_attempts=self._cache["max_attempts"],
                    timeout_s=self._cache["timeout_s"],
                ),
            )
        return self._block_cache

    def _evaluation(self, split: str, max_samples: int | None) -> EvaluationLoader:
        return EvaluationLoader(
            self.source(split),
            micro_batch=self.eval_micro_batch,
            max_samples=max_samples,
            rank=self.rank,
            world_size=self.world_size,
        )

    @property
    def eval_micro_batch(self) -> int:
        """Samples per rank and forward in evaluation; those of training by default."""
        return self._micro_batch

    @property
    def rank(self) -> int:
        """Of this process; data-parallel."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of ranks that share a batch."""
        return self.trainer.world_size if self.trainer is not None else 1
