"""Generate: text or images from a checkpoint of a run."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch import runtime
from launch.evaluate import load_module
from launch.pictures import IMAGE_SETTINGS, write_images
from launch.run_directory import RunDirectory
from launch.run_home import find_run

SETTINGS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "num_sequences"),
    *("num_beams", "length_penalty"),
)
TEXT_SETTINGS = ("prompt", "prompt_file", *SETTINGS, "stop")


def generate(config: DictConfig) -> None:
    """Write images, or print texts, as the run's family generates the ones or the others.

    Raises:
        ValueError: It generates neither, or a setting belongs to the other.
    """
    run = find_run(config.run, config, str(config.checkpoint))
    checkpoint, module = load_module(run, config.checkpoint, config.accelerator)
    if hasattr(module, "synthesize"):
        refuse(config, TEXT_SETTINGS, f"{type(module).__name__} generates images", IMAGE_SETTINGS)
        write_images(config, run, checkpoint, module)
    elif hasattr(module, "generate"):
        refuse(config, IMAGE_SETTINGS, f"{type(module).__name__} generates text", TEXT_SETTINGS)
        generate_text(config, run, module)
    else:
        raise ValueError(
            f"run={run.path.name} -> {type(module).__name__} generates nothing -> use a run of a "
            "family of texts or of images"
        )


def refuse(config: DictConfig, foreign: tuple[str, ...], reason: str, own: tuple[str, ...]) -> None:
    """Refuse settings that mean nothing for what a run generates.

    Raises:
        ValueError: One of `foreign` is given.
    """
    given = [f"{key}={config[key]}" for key in foreign if config[key] is not None]
    if given:
        raise ValueError(
            f"{' '.join(given)} -> {reason} -> leave it out; there are {', '.join(own)}"
        )


def generate_text(config: DictConfig, run: RunDirectory, module: Any) -> None:
    """Continue the prompts, or answer them, and print what comes of it."""
    from trainers.build import resolve_accelerator

    prompts = read_prompts(config)
    tokenizer, target_tokenizer = load_tokenizers(run)
    # A prompt is text, also where it spells `<|...|>`, unless the model fills sentinels in.
    fills_in = "objective" in run.config.datamodule
    tokenizer.encode_special_tokens = not fills_in
    module.to(resolve_accelerator(config.accelerator))
    settings = {key: config[key] for key in SETTINGS if config[key] is not None}
    settings.setdefault("num_sequences", 1)
    if config.stop is False:
        if not module.continues_prompts:
            raise ValueError(
                f"stop=false -> an answer of {type(module).__name__} ends where the model ends it "
                "-> leave it out, and set max_new_tokens for shorter ones"
            )
        settings["stop_token"] = None
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    generated = module.generate(ids, seed=config.seed, **settings)
    for prompt, sequences in zip(prompts, generated, strict=True):
        for tokens in sequences:
            text = target_tokenizer.decode(tokens, skip_special_tokens=not fills_in)
            print((prompt if module.continues_prompts else "") + text)
            if sum(map(len, generated)) > 1 and module.continues_prompts:
                print("-" * 40)


def load_tokenizers(run: RunDirectory) -> tuple[Any, Any]:
    """Tokenizers of what a run reads and of what it writes, which may be one."""
    from tokenizers import Tokenizer

    paths = [run.path / name for name in ("tokenizer.json", "target_tokenizer.json")]
    tokenizer = Tokenizer.from_file(str(paths[0]))
    return tokenizer, Tokenizer.from_file(str(paths[1])) if paths[1].exists() else tokenizer


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Encode a prompt.

    Raises:
        ValueError: The tokenizer has no token for one of its characters.
    """
    try:
        return tokenizer.encode(prompt, add_special_tokens=False).ids
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(
            f"prompt={prompt!r} -> the run's tokenizer cannot encode it ({error}) -> use the "
            f"characters of its training text"
        ) from error


def read_prompts(config: DictConfig) -> list[str]:
    """Take `prompt`, or the lines of `prompt_file`; without either an empty line.

    Raises:
        ValueError: The file does not exist or holds no prompt.
    """
    if config.prompt_file is None:
        return ["\n" if config.prompt is None else str(config.prompt)]
    if config.prompt_file == "-":
        lines = sys.stdin.read().splitlines()
    elif Path(config.prompt_file).is_file():
        lines = Path(config.prompt_file).read_text().splitlines()
    else:
        raise ValueError(f"prompt_file={config.prompt_file} -> no such file -> mend the path")
    if not lines:
        raise ValueError(f"prompt_file={config.prompt_file} -> it is empty -> a prompt a line")
    return lines


main = runtime.verb("generate")(generate)

if __name__ == "__main__":
    main()
