"""Whether ranks finish their gradients in one order, which ZeRO 1 and 2 take for granted."""

import zlib
from typing import Any

from torch import Tensor


class GradientOrder:
    """A fingerprint of the order in which gradients have come, since the run began.

    DeepSpeed lays gradients into a bucket as the backward pass finishes them, and ranks add buckets
    up place by place. Where the order depends on the batch, as in a network that goes through
    sequences step by step, they add gradients of different parameters, without a word.
    """

    def __init__(self):
        self.fingerprint = 0
        """Of 32 bits; ranks that differ have spoiled their gradients."""

    def watch(self, zero: Any) -> None:
        """Note what comes to the buckets of DeepSpeed's optimizer of stage 1 or 2.

        Of bf16 parameters stage 1 has another optimizer, which exchanges their gradients in the
        order of the parameters, and nothing to note.
        """
        if not hasattr(zero, "reduce_independent_p_g_buckets_and_remove_grads"):
            return
        lay_into_bucket = zero.reduce_independent_p_g_buckets_and_remove_grads

        def noted(parameter: Tensor, group: int) -> None:
            number = zero.get_param_id(parameter).to_bytes(4, "little")
            self.fingerprint = zlib.crc32(number, self.fingerprint)
            lay_into_bucket(parameter, group)

        zero.reduce_independent_p_g_buckets_and_remove_grads = noted
