from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import open_dict

from trainers import compat

TWO = SimpleNamespace(
    parts={"discriminator": None, "generator": None},
    double_backward=("discriminator",),
    automatic_optimization=False,
    blocks=[],
)
BARE = SimpleNamespace(automatic_optimization=True)
NAIVE = SimpleNamespace(parts=TWO.parts, automatic_optimization=True, blocks=[])
KEY = "+strategy.make.config"
ZERO = "strategy.make.config.zero_optimization"
LOW = "strategy.make.parameters=low"

# Rule -> overrides, ranks, module, and what the message must say.
BROKEN = {
    "_single_among_many": ([], 2, None, "2 ranks"),
    "_nodes_without_ranks": (["strategy=ddp", "cluster.nodes=2"], 2, None, "nodes=2"),
    "_uneven_groups": (["strategy=fsdp", "strategy.make.shard_size=3"], 4, None, "=3 -> 4 rank"),
    "_unknown_deepspeed_key": (
        ["strategy=zero2", f"{KEY}.dump_stat=true"], 2, None, ".dump_stat -> DeepSpeed has no such"
    ),
    "_deepspeed_key_of_ours": (
        ["strategy=zero2", f"{KEY}.gradient_clipping=1"], 2, None, "module.optimizer.gradient_clip"
    ),
    "_unusable_key": (["strategy=zero2", f"+{ZERO}.zenflow.topk_ratio=1"], 2, None, ".zenflow ->"),
    "_offload_to_disk": (
        ["strategy=zero3_offload", f"{ZERO}.offload_optimizer.device=nvme"], 2, None, "device=cpu"
    ),
    "_offload_of_whole_parameters": (
        ["strategy=zero2", f"+{ZERO}.offload_param.device=cpu"], 2, None, "at stage 2"
    ),
    "_stage_of_no_part": (
        ["strategy=zero2", "+strategy.make.part_stages.critic=1"], 2, TWO, "use one of disc"
    ),
    "_stage_too_high": (
        ["strategy=zero2", "+strategy.make.part_stages.discriminator=3"], 2, TWO, "use 2 or less"
    ),
    "_recomputation_of_nothing": (["activation_checkpointing=full"], 1, BARE, "no `blocks`"),
    "_parts_left_to_lightning": ([], 1, NAIVE, "discriminator, generator"),
    "_images_of_none": (["trainer.val_every_images=100"], 1, None, "use trainer.val_every_steps"),
    "_clip_of_other_parts": (
        ["module.optimizer.gradient_clip={critic: 1}"], 1, TWO, "of critic -> the module's parts"
    ),
}  # fmt: skip
NOTED = {
    "_fp16_parameters": (["strategy=zero2", "precision=fp16"], 2, None, "fp16 beside fp32"),
    "_low_is_fp32": (["strategy=fsdp", LOW, "precision=fp32"], 2, None, "are fp32, as without it"),
    "_gathered_at_once": (["strategy=fsdp"], 2, BARE, "no `blocks` to gather"),
    "_stage_lowered": (["strategy=zero3"], 2, TWO, "gradients of discriminator"),
    "_results_for_one_backward": (["activation_checkpointing=selective"], 1, TWO, "recomputed"),
}
# What is near to a combination that is refused, and is not one.
ALLOWED = [
    (["strategy=ddp"], 2, None),
    (["strategy=zero2", "precision=fp16", LOW], 2, None),
    (["strategy=zero2", LOW, f"{KEY[1:]}.bf16.check_grad_overflow=false"], 2, None),
    (["strategy=zero1", f"{KEY}.dump_state=true"], 2, None),
    (["strategy=fsdp"], 2, SimpleNamespace(blocks=[None])),
    (["strategy=fsdp", "strategy.make.shard_size=2"], 4, None),
    (["strategy=zero3", "+strategy.make.part_stages.discriminator=2"], 2, TWO),
    (["strategy=zero3", "+strategy.make.part_stages.generator=3"], 2, NAIVE.__class__(
        parts=TWO.parts, automatic_optimization=False)),
    (["module.optimizer.gradient_clip={discriminator: 1, generator: null}"], 1, TWO),
    (["strategy=zero3_offload", "activation_checkpointing=full"], 2, SimpleNamespace(blocks=[])),
    ([f"+{ZERO}.offload_param.device=cpu", "strategy=zero3"], 2, BARE),
]  # fmt: skip


@pytest.fixture
def check(compose):
    def check_overrides(overrides, ranks, module):
        base = ["experiment=gpt_quickstart", "trainer.accelerator=cpu"]
        return compat.check(compose("train", [*base, *overrides]), ranks, module)

    return check_overrides


@pytest.mark.parametrize("name", BROKEN)
def test_combination_is_refused_with_reason_and_remedy(check, name):
    overrides, ranks, module, words = BROKEN[name]
    with pytest.raises(ValueError, match=r".") as error:
        check(overrides, ranks, module)
    message = str(error.value)
    assert words in message
    assert message.count(" -> ") == 2
    (rule,) = [rule for rule in compat.RULES if rule.find.__name__ == name]
    assert message.endswith(rule.message.rpartition("}")[2])  # this rule's, and no other's


@pytest.mark.parametrize("name", NOTED)
def test_what_is_arranged_differently_is_said(check, name):
    overrides, ranks, module, words = NOTED[name]
    (note,) = check(overrides, ranks, module)
    assert words in note


@pytest.mark.parametrize(("overrides", "ranks", "module"), ALLOWED)
def test_what_is_near_is_allowed(check, overrides, ranks, module):
    assert check(overrides, ranks, module) == []


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("gradient_cliping", "use module.optimizer.gradient_clip"),  # not DeepSpeed's own name
        ("bfloat16", "use bf16"),  # an old name, which the section that is always there overrules
        ("comunication_data_type", "use communication_data_type"),
        ("xyz", "leave it out"),
    ],
)
def test_unknown_deepspeed_key_is_refused_with_what_was_meant(check, key, remedy):
    with pytest.raises(ValueError, match=f"config.{key} -> .* -> {remedy}$"):
        check(["strategy=zero2", f"{KEY}.{key}=1"], 2, None)


@pytest.mark.parametrize("section", ["bf16", "fp16"])
def test_deepspeed_precision_is_that_of_the_run(check, section):
    with pytest.raises(ValueError, match=f"config.{section}.enabled -> the run decides"):
        check(["strategy=zero2", f"{KEY}.{section}.enabled=true"], 2, None)
    with pytest.raises(ValueError, match=r"master_weights_and_grads -> masters are fp32"):
        check(
            ["strategy=zero2", f"{KEY}.{section}.{section}_master_weights_and_grads=true"], 2, None
        )


def test_run_from_before_there_were_cadences_in_images_passes(compose):
    config = compose("train", ["experiment=gpt_quickstart", "trainer.accelerator=cpu"])
    with open_dict(config):
        for node, name in (key.split(".") for key in compat.IMAGE_CADENCES):
            del config[node][name]
    assert compat.check(config, 1, None) == []


def test_every_rule_is_tried():
    names = {rule.find.__name__ for rule in compat.RULES}
    assert names == {*BROKEN, *NOTED}


def test_page_shows_the_table():
    page = Path(__file__).parents[2] / "docs" / "parallelism.md"
    assert compat.table() in page.read_text(), "run `python -m trainers.compat` and paste it"


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("trainer.pictures_every_images", "leave it at null, there are no pictures"),
        ("checkpoints.every_images", "use checkpoints.every_steps"),
        ("checkpoints.keep_every_images", "use checkpoints.keep_every_steps"),
    ],
)
def test_cadence_in_images_is_refused_where_there_are_none(check, key, remedy):
    message = rf"{key}=100 -> samples of this datamodule are no images -> {remedy}$"
    with pytest.raises(ValueError, match=message):
        check([f"{key}=100"], 1, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("~module.optimizer", "gradient_clip -> it is not there"),
        ("module.optimizer.gradient_clip=0", "gradient_clip=0 -> it is the largest norm"),
        ("strategy.make.parameters=bf16", "parameters=bf16 -> unknown -> use one of fp32, low"),
        ("+strategy.make.part_stages.generator=4", "generator=4 -> unknown -> use one of 1, 2, 3"),
        ("trainer.guard.nonfinite=ignore", "nonfinite=ignore -> unknown -> use one of stop, skip"),
    ],
)
def test_unknown_choice_is_refused(check, override, message):
    with pytest.raises(ValueError, match=message):
        check(["strategy=zero2", override], 2, None)
