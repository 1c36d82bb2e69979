"""The quickstart of the GAN family learns digits."""

from pathlib import Path

import pytest
from hydra.utils import instantiate

from launch.evaluate import evaluate


@pytest.mark.slow
def test_score_improves_fivefold_within_a_tenth_of_the_run(train, data_dir, tmp_path):
    run = train(
        "experiment=gan_quickstart",
        f"data_dir={data_dir}",
        f"runs_dir={tmp_path}",
        "trainer.accelerator=cpu",
        "max_images=14_016",
        "trainer.val_every_images=7_008",
    )
    untrained = instantiate(run.config.module, _convert_="all").eval()
    before = evaluate(run.config, untrained, "val", "cpu")["val/frechet_distance"]
    assert run.summary["val/frechet_distance"] < before / 5
    grids = {run.summary[f"{which}_grid"] for which in ("last", "best")}
    assert all(Path(grid).is_file() for grid in grids)
    assert {path.parent.name for path in tmp_path.rglob("grid.png")} == {
        "images-000007008",
        "images-000014016",
    }
