import pytest
from omegaconf import OmegaConf

from launch.resume_rules import refuse_changes


def as_before(compose, *overrides):
    """The configuration of a run begun before there were these optimizers and sentinels."""
    config = compose("train", ["experiment=gpt_char_cpu", *overrides])
    OmegaConf.set_struct(config, False)
    for key in ("adamw_rms", "adafactor"):
        del config.module.optimizer[key]
    del config.corpus["num_sentinels"]
    return config


def test_run_goes_on_where_keys_were_added_since(compose):
    old, new = as_before(compose), compose("train", ["experiment=gpt_char_cpu"])
    refuse_changes(old, new, "runs/x")
    with pytest.raises(ValueError, match=r"module\.optimizer\.adafactor\.eps: 1e-30 -> \(absent\)"):
        refuse_changes(new, old, "runs/x")  # a key that was there is not taken away


def test_run_does_not_change_to_an_optimizer_that_was_added_since(compose):
    override = "module.optimizer.name=adafactor"
    new = compose("train", ["experiment=gpt_char_cpu", override])
    with pytest.raises(ValueError, match=r"module\.optimizer\.name: adamw -> adafactor"):
        refuse_changes(as_before(compose), new, "runs/x")


def test_settings_of_an_optimizer_do_not_change(compose):
    old = compose("train", ["experiment=gpt_char_cpu"])
    new = OmegaConf.merge(old, {"module": {"optimizer": {"adafactor": {"clip_rms": 2.0}}}})
    with pytest.raises(ValueError, match=r"adafactor\.clip_rms: 1\.0 -> 2\.0"):
        refuse_changes(old, new, "runs/x")


def test_what_only_evaluations_read_may_change(compose):
    old = compose("train", ["experiment=translation_small"])
    new = compose("train", ["experiment=translation_small", "module.generation.num_beams=4"])
    refuse_changes(old, new, "runs/x")
    other = compose("train", ["experiment=translation_small", "module.label_smoothing=0.1"])
    with pytest.raises(ValueError, match=r"module\.label_smoothing: 0\.0 -> 0\.1"):
        refuse_changes(old, other, "runs/x")
