"""The process around a verb: configuration, errors, ranks and exit codes."""

import difflib
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import hydra
import hydra.utils
import psutil
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launch.run_directory import StoppedError
from trainers.durable_files import no_room

DONE, FAILED, PREEMPTED = 0, 1, 75
LEFT_BEHIND = 76  # between functions only: preempted, since ranks of other nodes were
STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}
LAUNCHED_AT = "TRAINYARD_LAUNCHED_AT"
"""Environment variable of ranks that our own command has started: when it began."""
_TOGETHER = (
    "parts that go together: module=gpt with datamodule=text, module=encoder_decoder with "
    "datamodule=pairs or denoising, module=gan with datamodule=images"
)
_stops = SimpleNamespace(are_heard=True)  # no lock: a handler may come between


Verb = Callable[[DictConfig], int | None]


@dataclass
class Ending:
    """How a verb has ended, for what is to be said last.

    Attributes:
        config: Its configuration.
        began: Time of the clock when it began.
        code: Its exit code.
        problem: Why it did not come to its end, where it is an error or a signal that says so.
    """

    config: DictConfig
    began: float
    code: int
    problem: str | None


def verb(
    config_name: str,
    say_end: Callable[[Ending], None] = lambda ending: None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Callable[[Verb], Callable[[], None]]:
    """Make a function of a configuration the program of `conf/<config_name>.yaml`.

    What users can mend (an error in the form key -> why -> remedy, an override that does not
    compose) is printed as one message without a traceback. The exit code is what the function
    returns: 0 done, 75 preempted, 1 failed. Hydra works within `around`, and `say_end` has the
    last word.
    """

    def decorate(function: Verb) -> Callable[[], None]:
        def program() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing and leaving
            stop_by_exception()
            began, ended = time.time(), dict[str, Any]()

            def job(config: DictConfig) -> None:
                ended["config"] = config  # and no error goes through Hydra, which would add lines
                ended["how"] = outcome_of(lambda: function(config) or DONE, config_name)

            compose = hydra.main(
                version_base=None, config_path="pkg://conf", config_name=config_name
            )
            try:
                with around():
                    compose(job)()
                code, problem = ended.get("how", (DONE, None))
            except (StoppedError, Exception) as error:
                code, problem = _say(error, config_name)
            if "config" in ended:
                say_end(Ending(ended["config"], began, code, problem))
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # should a library not let it end
            sys.exit(code)

        return program

    return decorate


def _say(error: BaseException, config_name: str) -> tuple[int, str]:
    """Print why a verb has not come to its end; gives the exit code, and that."""
    if isinstance(error, StoppedError):
        problem = f"stopped by {error}: the same command starts again"
        print(problem, file=sys.stderr, flush=True)
        return PREEMPTED, problem
    problem = explain(error, config_name)
    if problem is None:
        traceback.print_exception(error)
        return FAILED, f"{type(error).__name__}: {error}"
    print(f"error: {problem}", file=sys.stderr, flush=True)
    return FAILED, problem


def stop_by_exception() -> None:
    """Until training handles signals itself, let the first end the program in order."""
    _stops.are_heard = True
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)


def hear_no_stops() -> None:
    """From now on a request to stop asks for nothing that is not under way; but for Ctrl-C."""
    _stops.are_heard = False


def has_been_stopped() -> bool:
    """Whether no request to stop is heard any more: one was, or the end has come anyway."""
    return not _stops.are_heard


def _stop(number: int, frame: object) -> None:
    if _stops.are_heard or number == signal.SIGINT:
        _stops.are_heard = False
        raise StoppedError(signal.Signals(number).name)


def outcome_of(work: Callable[[], int], config_name: str) -> tuple[int, str | None]:
    """Do it; an error that users can mend is a line, another its traceback.

    The first request to stop is an exception, until the work handles it in its own way. Once that
    has ended none is heard: all that is left is to say why, and whoever stops the ranks of a run
    that has failed may do so meanwhile.

    Returns:
        Its exit code, and why it did not come to its end.
    """
    stop_by_exception()
    code, problem = DONE, None
    try:
        code = work()
    except (Exception, StoppedError) as error:
        problem = error
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return (code, None) if problem is None else _say(problem, config_name)


def explain(error: BaseException, config_name: str) -> str | None:
    """The message for an error that users can mend; None for one that deserves its traceback."""
    chain: BaseException | None = error
    while chain is not None:
        is_wrapped = isinstance(chain, InstantiationException) and chain.__cause__
        if str(chain).count(" -> ") >= 2 and not is_wrapped:
            return str(chain)
        if message := no_room(chain):
            return message
        chain = chain.__cause__ or chain.__context__
    text = str(error)
    if found := re.search(r"Could not find '([^']+)'", text):
        listed = text.partition("Config search path")[0]
        option, options = found[1], re.findall(r"^\t(.+)$", listed, re.MULTILINE)
        group, _, choice = option.rpartition("/")
        return f"{group}={choice} -> there is none of that name -> {_suggest(choice, options)}"
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1]
        return f"{key} -> no such key -> {_suggest(key, _all_keys(config_name))}"
    if found := re.search(r"Interpolation key '((?:datamodule|data)\.[^']+)' not found", text):
        return (
            f"{found[1]} -> the module reads it, and this datamodule or corpus has none -> choose "
            f"{_TOGETHER}"
        )
    if found := re.search(
        r"unexpected keyword argument '(\w+)'.*full_key: (\w+)$", text, re.DOTALL
    ):
        return (
            f"{found[2]}.{found[1]} -> this {found[2]} has no such setting -> leave it out, or "
            f"choose {_TOGETHER}"
        )
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} -> it has no value -> add {error.full_key}=<value>"
    if isinstance(error, InstantiationException):
        return None
    if isinstance(error, HydraException | OmegaConfBaseException):
        return f"the configuration does not compose -> {text.strip()} -> mend that override"
    return None


def refuse_unknown_keys(config: DictConfig, config_name: str) -> None:
    """Find keys that a YAML file of the user's brings in and nothing reads.

    Hydra refuses unknown keys on the command line only. Nodes with a `_target_` are checked by what
    they are arguments of.

    Raises:
        ValueError: There is such a key.
    """
    known = set(_all_keys(config_name))
    free = {"data", "plan", "hydra", "trainer.callbacks", "cluster.sbatch"}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in free:
                continue
            is_target = isinstance(value, dict) and "_target_" in value
            if name not in known and not is_target:
                near = _suggest(name, sorted(known))
                raise ValueError(f"{name}={value} -> nothing reads such a key -> {near}")
            if isinstance(value, dict) and not is_target:
                walk(value, f"{name}.")

    walk(OmegaConf.to_container(config, resolve=False), "")


def quiet_libraries() -> None:
    """Keep Lightning's own start-up messages out of a run's output; warnings of others stay."""
    import lightning.pytorch  # noqa: F401 - it sets its loggers' levels on import

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.(pytorch|fabric)\..*")
    warnings.filterwarnings("ignore", message=r".*weights_only.*", module=r"lightning.*")
    # Of torch 2.13, about a name that torch 2.11 has no other for.
    warnings.filterwarnings("ignore", message=r"`broadcast_buffers` is deprecated")


def say_once(*notes: str) -> None:
    """Print notes on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)


def launched_at() -> float:
    """When this launch began, by the clock: the command that has started the ranks, or this one."""
    return float(os.environ.get(LAUNCHED_AT) or psutil.Process().create_time())


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as a dictionary, interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def build_loggers(config: DictConfig, directory: Path) -> list[Any]:
    """Loggers beside `metrics.jsonl`: none for `logger=none`, which then needs no import."""
    if "_target_" not in config.logger:
        return []
    # Partial: the configuration it is given holds targets that are not to be made once more.
    make = hydra.utils.instantiate(config.logger, _partial_=True, _convert_="all")
    return [make(directory, run_config=plain(config))]


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near += [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    names = list(dict.fromkeys(near)) or known
    return ("did you mean " if near else "use one of ") + ", ".join(names) + "?" * bool(near)


@cache
def _all_keys(config_name: str) -> tuple[str, ...]:
    outer = GlobalHydra.instance().hydra  # of the command line, while it runs
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("conf", version_base=None):
        # Of clusters this one has all the keys that there are.
        chosen = ["cluster=slurm"] if config_name == "train" else []
        composed = hydra.compose(config_name, overrides=chosen)
    GlobalHydra.instance().hydra = outer

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        return [
            name for key in node for name in (prefix + key, *walk(node[key], f"{prefix}{key}."))
        ]

    return tuple(walk(OmegaConf.to_container(composed, resolve=False), ""))
