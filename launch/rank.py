"""One rank of a run, started by `launch.ranks.start` from the run directory alone."""

import sys
from pathlib import Path

from launch import runtime
from launch.cluster import code_for_starter
from launch.completion import check_datamodule
from launch.deafness import end_if_deaf
from launch.ranks import die_with_parent
from launch.run_directory import RunDirectory
from launch.train import fit


def main() -> int:
    """Train as one rank; give the exit code."""
    die_with_parent()
    run = RunDirectory(Path(sys.argv[1]))

    def work() -> int:
        end_if_deaf(run, run.config)
        with run.noting_failed_start():
            check_datamodule(run.config)
            return code_for_starter(fit(run, run.config))

    return runtime.outcome_of(work, "train")[0]


if __name__ == "__main__":
    sys.exit(main())
