"""The program of the ranks of `test_zero_start.py`: a GPT on the meta device, started."""

import gc
import os
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.memory import live_storages
from tests.trainers.fsdp_modules import TinyGPT, fit, token_batches, weights
from trainers.strategies.zero import ZeRO

CASES = {  # stage, precision, parameters
    "zero2": (2, "fp32", "fp32"),
    "zero3": (3, "fp32", "fp32"),
    "zero3_low": (3, "bf16", "low"),
}


class StartedGPT(TinyGPT):
    """Notes what lives on this rank each time a value is drawn, and the values it starts from."""

    def __init__(self):
        super().__init__("modern_tiny")
        self.before = live_storages()
        self.most_alive = 0

    def alive(self):
        return sum(n for address, n in live_storages().items() if address not in self.before)

    def initial_value(self, name):
        value = super().initial_value(name)
        self.most_alive = max(self.most_alive, self.alive())
        return value

    def configure_model(self):
        super().configure_model()
        self.most_alive = max(self.most_alive, self.alive())

    def on_train_start(self):
        self.start = weights(self.trainer)


def start(stage, precision, parameters):
    zero = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000}

    def strategy(*, device_type, timeout_s, **_):  # the others are of FSDP
        return ZeRO(
            stage=stage,
            part_stages={},
            parameters=parameters,
            config={"zero_optimization": zero},
            precision=precision,
            device_type=device_type,
            timeout_s=timeout_s,
        )

    module = StartedGPT()
    data = token_batches(int(os.environ["RANK"]))
    fit(module, strategy, steps=1, data=data, precision=precision)
    return module.most_alive, module.start


def main(out):
    warnings.simplefilter("ignore")  # DeepSpeed's
    found = {}
    for name, case in CASES.items():
        gc.collect()
        gc.freeze()  # what is there need not be looked through for every value
        found[name] = start(*case)
    torch.save(found, out / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
