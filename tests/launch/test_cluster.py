"""Whoever starts the ranks, they know who they are."""

import os

import pytest

from launch import cluster, ranks, runtime
from launch.completion import refuse_impossible
from launch.run_directory import RunDirectory

SRUN = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07,09-10]",
}
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """An environment of which nothing stays."""
    before = dict(os.environ)
    for name in [*TORCH, "MASTER_PORT", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", *SRUN]:
        os.environ.pop(name, None)
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def config(compose):
    return lambda *overrides: compose("train", [*overrides])


def test_task_of_srun_is_the_rank_that_slurm_says(environment, config):
    environment |= SRUN | {"SLURM_CPUS_PER_TASK": "6"}
    composed = config()
    cluster.adopt(composed)
    assert [environment[name] for name in TORCH] == ["3", "4", "1", "2", "1", "gpu07"]
    assert environment["OMP_NUM_THREADS"] == "6"
    assert cluster.starter() == "srun"
    assert cluster.count_ranks(composed) == 4
    assert (composed.trainer.devices, composed.cluster.nodes) == (2, 2)


def test_port_is_one_for_a_step_and_another_after_a_requeue(environment, config):
    ports = []
    for changed in (
        {},
        {"SLURM_PROCID": "0"},
        {"SLURM_RESTART_COUNT": "1"},
        {"SLURM_STEP_ID": "1"},
    ):
        for name in TORCH:
            environment.pop(name, None)
        environment |= SRUN | changed
        cluster.adopt(config())
        ports.append(environment["MASTER_PORT"])
    assert ports[0] == ports[1]
    assert len(set(ports)) == 3


@pytest.mark.parametrize("said", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_batch_script_and_single_task_are_no_ranks(environment, config, said):
    environment |= (SRUN | said) if said else {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    cluster.adopt(config())
    assert not cluster.is_rank()


def test_torchrun_inside_an_allocation_has_the_say(environment, config):
    environment |= SRUN | {"RANK": "0", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}
    cluster.adopt(config())
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "8")
    assert cluster.starter() == "torchrun"


def test_interface_is_told_to_gloo_and_nccl(environment, config):
    cluster.adopt(config("cluster.interface=eth7"))
    assert {environment.pop(name) for name in cluster.INTERFACE_VARIABLES} == {"eth7"}


def test_settings_of_the_network_are_said_where_there_is_one(environment):
    for name in [name for name in environment if name[:5] in cluster.NETWORK]:
        del environment[name]
    assert cluster.network_notes(4) == []
    environment |= {"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth0"}
    assert cluster.network_notes(4) == ["network: GLOO_SOCKET_IFNAME=eth0 NCCL_DEBUG=WARN"]
    assert cluster.network_notes(1) == []


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a-b3,a-b4", "a-b3"),
        ("r[1,3]-ib", "r1-ib"),
    ],
)
def test_first_host_is_read_from_slurms_lists(nodes, first):
    assert cluster.first_host(nodes) == first


@pytest.mark.parametrize(
    "overrides",
    [["trainer.devices=3"], ["cluster.nodes=3"], ["cluster.nodes=3:4", "trainer.devices=2"]],
)
def test_other_numbers_than_those_started_are_refused(environment, config, overrides):
    environment |= {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(
        ValueError, match=r"somebody has started 4 rank\(s\), 2 of them on this node"
    ):
        cluster.count_ranks(config(*overrides))


@pytest.mark.parametrize("nodes", ["1:3", "2", "1"])
def test_numbers_that_were_started_are_filled_in(environment, config, nodes):
    environment |= {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    composed = config(f"cluster.nodes={nodes}")
    assert cluster.count_ranks(composed) == 4
    assert (composed.trainer.devices, composed.cluster.nodes) == (2, 2)


@pytest.mark.parametrize("nodes", ["two", "3:1", "0", "1:"])
def test_nodes_that_are_no_range_are_refused(config, nodes):
    with pytest.raises(ValueError, match=f"cluster.nodes={nodes} -> "):
        cluster.node_range(config(f"cluster.nodes='{nodes}'"))


@pytest.mark.parametrize(
    ("who", "rank", "code"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, "0", 0),  # or it would be started again
        ({}, "0", runtime.PREEMPTED),
        ({}, "1", 0),  # or rank 0 would be killed before it has written why
    ],
)
def test_preempted_rank_ends_as_its_starter_understands(environment, who, rank, code):
    environment |= who | {"RANK": rank, "WORLD_SIZE": "2"}
    assert cluster.code_for_starter(runtime.PREEMPTED) == code
    assert cluster.code_for_starter(runtime.FAILED) == runtime.FAILED


@pytest.mark.parametrize(
    ("per_node", "fewest", "code"),
    [
        ("1", 1, runtime.PREEMPTED),  # started again, with one node less
        ("1", 2, 0),
        ("2", 1, 0),  # ranks of one node are stopped together
    ],
)
def test_run_goes_on_without_a_node_that_leaves(environment, monkeypatch, per_node, fewest, code):
    monkeypatch.setattr(cluster, "AGENT_IS_LATE_S", 0.0)
    environment |= {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}
    environment["LOCAL_WORLD_SIZE"] = per_node
    assert cluster.code_for_starter(runtime.LEFT_BEHIND, fewest) == code


def test_batch_must_divide_among_any_number_of_nodes(config):
    refuse_impossible(config("cluster.nodes='1:3'", "experiment=gpt_char_cpu"))
    with pytest.raises(ValueError, match=r"^cluster.nodes=1:5 may become 5: .* 5 ranks -> .* -> "):
        refuse_impossible(config("cluster.nodes='1:5'", "experiment=gpt_char_cpu"))


def test_rendezvous_of_one_node_is_refused(config, tmp_path):
    alone = config("cluster.rendezvous=node1:29500")
    with pytest.raises(ValueError, match=r"nodes=1 cluster.rendezvous=node1:29500 -> .* -> give"):
        ranks.start_on_node(RunDirectory(tmp_path), alone)
