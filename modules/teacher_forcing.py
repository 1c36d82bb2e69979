"""Scheduled teacher forcing of recurrent decoders."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


class TeacherForcing:
    """Which steps of a decoder are fed the target, and which what was predicted before.

    Scheduled sampling, Bengio et al. 2015, arXiv 1506.03099, section 2.4 with linear decay: the
    share of steps that are fed the target goes in a line from `start` to `end`. A coin is thrown
    for each step of the decoder, not for each sample, as is usual in tutorials.

    Args:
        start: Share at the begin of the run, 0 to 1.
        end: Share from `decay_samples` on.
        decay_samples: Samples of the run; None for all of it.
        is_recurrent: Whether the network can be fed what it predicts.
        length: The most steps of a target: as many coins are thrown, whatever a batch needs.
        plan: `max_samples` of the run.
        seed: Of the coins.

    Raises:
        ValueError: A share is none, or the network cannot do with less than all targets.
    """

    def __init__(
        self,
        *,
        start: float,
        end: float,
        decay_samples: int | None,
        is_recurrent: bool,
        length: int,
        plan: Mapping[str, int],
        seed: int,
    ):
        for key, value in (("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise ValueError(
                    f"module.teacher_forcing.{key}={value} -> it is a share of the decoder's steps "
                    "-> choose 0 to 1"
                )
            if value != 1 and not is_recurrent:
                raise ValueError(
                    f"module.teacher_forcing.{key}={value} -> a Transformer predicts all steps at "
                    "once, each from the targets before it -> set 1, or take a recurrent preset"
                )
        if decay_samples is not None and decay_samples < 1:
            raise ValueError(
                f"module.teacher_forcing.decay_samples={decay_samples} -> samples of the run -> "
                "use 1 or more, or null for all of it"
            )
        self.start, self.end, self.length, self.seed = start, end, length, seed
        self.decay_samples = decay_samples or plan["max_samples"]

    def share(self, samples: int) -> float:
        """Share of steps that are fed the target after so many samples."""
        return self.start + (self.end - self.start) * min(1.0, samples / self.decay_samples)

    def coins(self, samples: int, num_steps: int) -> Tensor | None:
        """Throw the coins of an optimizer step, the same for all its micro-batches and ranks.

        Args:
            samples: Of the run before the step.
            num_steps: T.

        Returns:
            bool [T] on the CPU, true where the target is fed; None: everywhere.
        """
        if (share := self.share(samples)) >= 1:
            return None
        key = hashlib.blake2b(f"{self.seed}/teacher/{samples}".encode(), digest_size=8).digest()
        # 63 bits: torch takes seeds as signed integers.
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        return (torch.rand(self.length, generator=generator) < share)[:num_steps]
