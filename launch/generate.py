"""Generate: text from a checkpoint of a run."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch import runtime
from launch.evaluate import load_module
from launch.run_directory import find_run


def generate_text(config: DictConfig) -> None:
    """Continue the prompts and print them with their continuations."""
    run = find_run(config.run, config.runs_dir)
    prompts = read_prompts(config)
    _, module = load_module(run, config.checkpoint, config.accelerator)
    if not hasattr(module, "generate"):
        raise ValueError(
            f"run={run.path.name} -> {type(module).__name__} generates no text -> use a run of a "
            f"text family"
        )
    from tokenizers import Tokenizer

    from trainers.build import resolve_accelerator

    tokenizer = Tokenizer.from_file(str(run.path / "tokenizer.json"))
    module.to(resolve_accelerator(config.accelerator))
    tokenizer.encode_special_tokens = True  # a prompt is text, also where it spells `<|...|>`
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    continuations = module.generate(
        ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        num_sequences=config.num_sequences,
        stop_token=run.config.data.end_token if config.stop else None,
        seed=config.seed,
    )
    for prompt, sequences in zip(prompts, continuations, strict=True):
        for tokens in sequences:
            print(prompt + tokenizer.decode(tokens))
            if len(prompts) * config.num_sequences > 1:
                print("-" * 40)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Encode a prompt.

    Raises:
        ValueError: The tokenizer has no token for one of its characters.
    """
    try:
        return tokenizer.encode(prompt).ids
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(
            f"prompt={prompt!r} -> the run's tokenizer cannot encode it ({error}) -> use the "
            f"characters of its training text"
        ) from error


def read_prompts(config: DictConfig) -> list[str]:
    """Take `prompt`, or the lines of `prompt_file`.

    Raises:
        ValueError: The file does not exist or holds no prompt.
    """
    if config.prompt_file is None:
        return [str(config.prompt)]
    if config.prompt_file == "-":
        lines = sys.stdin.read().splitlines()
    elif Path(config.prompt_file).is_file():
        lines = Path(config.prompt_file).read_text().splitlines()
    else:
        raise ValueError(f"prompt_file={config.prompt_file} -> no such file -> mend the path")
    if not lines:
        raise ValueError(f"prompt_file={config.prompt_file} -> it is empty -> a prompt a line")
    return lines


main = runtime.verb("generate")(generate_text)

if __name__ == "__main__":
    main()
