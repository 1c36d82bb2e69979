"""Images that a run's model generates, as files: what `launch.generate` does for image families."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch import runtime
from launch.run_directory import RunDirectory

IMAGE_SETTINGS = ("num_images", "truncation", "classes", "out")
_GRID_IMAGES = 64  # 8 by 8; also how many are made at a time, and when nothing else is asked for


def write_images(config: DictConfig, run: RunDirectory, checkpoint: str, module: Any) -> None:
    """Write numbered images and a grid of the first ones as PNG, and print where they are.

    Args:
        config: Of `launch.generate`.
        run: Whose model it is.
        checkpoint: Name of the checkpoint, for the folder.
        module: Has `synthesize(numbers, seed, truncation, classes)`, which gives uint8 images
            [n, C, H, W] of a range of n numbers, and `tile(images)`, which lays them out as uint8
            [height, width, 3].

    Raises:
        ValueError: `num_images` or `truncation` cannot be.
    """
    from PIL import Image
    from rich.progress import track

    from trainers.build import resolve_accelerator

    num_images = _GRID_IMAGES if config.num_images is None else config.num_images
    truncation = 1.0 if config.truncation is None else config.truncation
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images={num_images} -> no number of images -> choose 1 or more")
    if not isinstance(truncation, int | float) or truncation < 0:
        raise ValueError(
            f"truncation={truncation} -> it is a factor of the noise -> choose one from 0 (all "
            "images alike) to 1 (as trained)"
        )
    classes = runtime.plain(config)["classes"]
    folder = Path(config.out) if config.out else run.path / "generated" / _name(config, checkpoint)
    module.to(resolve_accelerator(config.accelerator))
    firsts = range(0, num_images, _GRID_IMAGES)
    for first in track(firsts, "generating", disable=len(firsts) == 1):
        numbers = range(first, min(first + _GRID_IMAGES, num_images))
        images = module.synthesize(
            numbers, seed=config.seed, truncation=float(truncation), classes=classes
        ).cpu()
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in zip(numbers, images.permute(0, 2, 3, 1).numpy(), strict=True):
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            picture.save(folder / f"{number:06d}.png")
        if first == 0:
            Image.fromarray(module.tile(images)).save(folder / "grid.png")
    shown = "them" if len(firsts) == 1 else f"the first {_GRID_IMAGES}"
    print(f"{num_images} images of checkpoint {checkpoint}, and grid.png of {shown}, in {folder}")


def _name(config: DictConfig, checkpoint: str) -> str:
    """Another for all that changes what is generated, so that no two are mixed."""
    keys = ("seed", "num_images", "truncation", "classes")
    given = {key: config[key] for key in keys if config[key] is not None}
    if "classes" in given:
        given["classes"] = ",".join(map(str, given["classes"]))  # a shell reads brackets
    return "-".join([checkpoint, *(f"{key}={value}" for key, value in given.items())])
