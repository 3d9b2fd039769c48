"""Training over several processes: the losses of one process, whatever they share out, and whatever number of
them goes on with a run."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import SPEC, fit, losses, rows, tiny
from together import stage, together
from torch import nn

from librobot.cli.export import EXPORTS
from librobot.config.build import build_framework
from librobot.config.compose import compose
from librobot.errors import LibrobotError
from librobot.frameworks.distillation import move_own_parts
from librobot.frameworks.sharding import blocks_of, split_blocks
from librobot.policy import Policy
from librobot.training.checkpoints import check_checkpoint, consolidate
from librobot.training.strategies import built_in_parts, check_machine

LAST = "checkpoints/last.ckpt"
COMMON = ["vlm.num_kv_heads=2", "data.augmentation=null", "optim.lr=1e-2"]
WITH_EMA = "callbacks=[default,ema]"
WITH_PARTS = ["callbacks=[default,ema,statistics]"]
WITH_PARTS += [f"callbacks.{name}.every_n_steps=2" for name in ("losses", "activations")]
WITH_PARTS += [
    f"callbacks.{name}=null" for name in ("action_errors", "gradients", "throughput", "utilisation")
]
PARTS = "trainer.strategy.sharded_checkpoints=true"
BATCH = 8  # of all processes together
STEPS = 4
FRAMEWORKS = ["act", "pi0"]
THREAD = ["callbacks.checkpoints.asynchronous=true", "callbacks.checkpoints.every_n_steps=1"]
WATCHED = [
    "callbacks=[default,ema,statistics,rollouts]",
    "callbacks.rollouts.env={_target_: stick_suite.StickSuite}",
    "callbacks.rollouts.every_n_steps=2",
    "callbacks.rollouts.episodes=4",
    "callbacks.rollouts.num_workers=1",
    "callbacks.gradients.every_n_steps=1",
    "data.val_fraction=0.25",
]


def job(framework, run_dir, trainer, *overrides, processes=2, steps=STEPS):
    """A run whose processes have `BATCH` samples together; pairs share theirs under tensor parallelism."""
    share = BATCH // (processes // 2 if trainer == "tp" else processes)
    given = [
        f"trainer={trainer}",
        *COMMON,
        f"trainer.max_steps={steps}",
        f"data.batch_size={share}",
        *overrides,
    ]
    given += ["framework.dropout=0"] if framework == "act" else []
    return {"framework": framework, "run_dir": str(run_dir), "overrides": [*given, *overrides]}


def alone(framework, run_dir, *overrides, steps=STEPS):
    return job(framework, run_dir, "cpu", *overrides, processes=1, steps=steps)


def curve(run_dir):
    error = run_dir / "error0.txt"
    assert not error.exists(), error.read_text()
    return np.array([float(value) for value in losses(run_dir)])


def assert_same_losses(run_dir, other):
    np.testing.assert_allclose(curve(run_dir), curve(other), rtol=0, atol=1e-5, err_msg=run_dir.name)


def stored(run_dir):
    return torch.load(run_dir / LAST, weights_only=True)


def assert_same_end(run_dir, other):
    """Schedule, average, the optimiser's order; actions but for what Adam makes of rounding."""
    ours, theirs = stored(run_dir), stored(other)
    assert ours["global_step"] == theirs["global_step"] == STEPS
    assert ours["lr_schedulers"][0]["last_epoch"] == theirs["lr_schedulers"][0]["last_epoch"]
    assert ours["average"]["updates"] == theirs["average"]["updates"] == STEPS
    assert ours["average"]["weights"].keys() == theirs["average"]["weights"].keys()
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for number, own in theirs["optimizer_states"][0]["state"].items():
        for key, value in own.items():
            assert ours["optimizer_states"][0]["state"][number][key].shape == value.shape
    assert_same_actions(run_dir, other, tolerance=0.01)


def acted(checkpoint):
    policy = Policy.from_checkpoint(checkpoint, "cpu")
    random = np.random.default_rng(0)
    images = {"front": random.integers(0, 255, (32, 32, 3), dtype=np.uint8)}
    return policy.infer({"images": images, "state": np.zeros(2, np.float32), "prompt": "reach", "seed": 0})[
        "actions"
    ]


def assert_same_actions(one, other, tolerance=0.0):
    np.testing.assert_allclose(acted(one), acted(other), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def short(dataset, tmp_path_factory):
    """Runs of one process, and of two that share gradients or all."""
    folder = tmp_path_factory.mktemp("short")
    both = [(name, trainer) for name in FRAMEWORKS for trainer in ("ddp", "fsdp2")]
    stages = [
        stage(1, [alone(framework, folder / framework / "cpu", *WITH_PARTS) for framework in FRAMEWORKS]),
        stage(
            2,
            [
                job(framework, folder / framework / trainer, trainer, *WITH_PARTS)
                for framework, trainer in both
            ],
        ),
    ]
    together(dataset, folder, stages)
    return folder


@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_two_processes_have_the_losses_of_one(framework, trainer, short):
    assert_same_losses(short / framework / trainer, short / framework / "cpu")
    assert_same_end(short / framework / trainer, short / framework / "cpu")


@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_parts_of_the_loss_and_activations_are_of_both_processes(framework, trainer, short):
    ours, theirs = (rows(short / framework / name)[1] for name in (trainer, "cpu"))
    block = {"act": "encoder.layers.0", "pi0": "expert.layers.0"}[framework]
    assert {"train/dim_loss/x", "train/dim_loss/y", f"activations/{block}/std"} <= set(theirs)
    for name, value in theirs.items():
        if name.startswith(("train/dim_loss/", "activations/")):
            assert float(ours[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def taught(dataset, tmp_path_factory):
    """Policies, and those that learn from them in one process and in two. OFT's denoiser runs the backbone,
    which is then spread over both."""
    folder = tmp_path_factory.mktemp("taught")
    first, both = [], []
    for framework in ("pi0", "openvla_oft"):
        here = folder / framework
        student = ["head=consistency", f"head.teacher={here / 'teacher' / LAST}"]
        first += [alone(framework, here / "teacher", "head=flow_matching", steps=2)]
        first += [alone(framework, here / "cpu", *student)]
        both += [job(framework, here / "fsdp2", "fsdp2", *student)]
    together(dataset, folder, [stage(1, first), stage(2, both)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["pi0", "openvla_oft"])
def test_two_processes_learn_from_a_teacher_as_one(framework, taught):
    runs = taught / framework
    assert_same_losses(runs / "fsdp2", runs / "cpu")
    learned, before = stored(runs / "fsdp2")["state_dict"], stored(runs / "teacher")["state_dict"]
    same = {name for name in before if torch.equal(learned[name], before[name])}
    assert {name for name in before if name.startswith(("vlm.", "normalizer."))} <= same != before.keys()
    assert_same_actions(runs / "fsdp2", runs / "cpu", tolerance=0.01)


@pytest.fixture(scope="module")
def long(dataset, tmp_path_factory):
    """The runs of one process that all others are compared with."""
    folder = tmp_path_factory.mktemp("long")
    jobs = [alone(framework, folder / framework / "cpu", WITH_EMA) for framework in FRAMEWORKS]
    together(dataset, folder, [stage(1, jobs)])
    return folder


@pytest.fixture(scope="module")
def meshes(dataset, long):
    """Other meshes."""
    two, four = [], []
    for framework in FRAMEWORKS:
        here = long / framework
        two += [job(framework, here / name, name, WITH_EMA) for name in ("hsdp", "tp")]
        four += [job(framework, here / f"{name}_4", name, WITH_EMA, processes=4) for name in ("hsdp", "tp")]
    together(dataset, long / "meshes", [stage(2, two), stage(4, four)])
    return long


@pytest.fixture(scope="module")
def resumed(dataset, long):
    """Runs that go on in other numbers of processes."""
    first, second, third, fourth = [], [], [], []
    for framework in FRAMEWORKS:
        here = long / framework
        first += [alone(framework, here / "1_to_2", WITH_EMA, steps=2)]
        second += [
            job(framework, here / "2_to_1_file", "fsdp2", WITH_EMA, steps=2),
            job(framework, here / "2_to_1", "fsdp2", WITH_EMA, PARTS, steps=2),
            job(framework, here / "2_to_1_thread", "fsdp2", WITH_EMA, PARTS, *THREAD, steps=2),
            job(framework, here / "2_to_4", "fsdp2", WITH_EMA, PARTS, steps=2),
            job(framework, here / "tp_to_fsdp2", "tp", WITH_EMA, PARTS, steps=2),
            job(framework, here / "tp_to_fsdp2", "fsdp2", WITH_EMA, "ckpt=last"),
            job(framework, here / "1_to_2", "fsdp2", WITH_EMA, PARTS, "ckpt=last"),
        ]
        third += [
            alone(framework, here / name, WITH_EMA, "ckpt=last")
            for name in ("2_to_1_file", "2_to_1", "2_to_1_thread")
        ]
        fourth += [job(framework, here / "2_to_4", "hsdp", WITH_EMA, "ckpt=last", processes=4)]
    stages = [stage(1, first), stage(2, second), stage(1, third), stage(4, fourth)]
    together(dataset, long / "resumed", stages)
    return long


@pytest.fixture(scope="module")
def watched(dataset, tmp_path_factory):
    """Runs with episodes, validation and statistics."""
    folder = tmp_path_factory.mktemp("watched")
    both = [job("pi0", folder / name, name, *WATCHED) for name in ("ddp", "fsdp2", "tp")]
    together(dataset, folder, [stage(1, [alone("pi0", folder / "cpu", *WATCHED)]), stage(2, both)])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["hsdp", "tp", "hsdp_4", "tp_4"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_other_meshes_have_the_losses_of_one_process(framework, name, meshes):
    assert_same_losses(meshes / framework / name, meshes / framework / "cpu")
    assert_same_end(meshes / framework / name, meshes / framework / "cpu")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["2_to_1_file", "2_to_1", "2_to_1_thread", "2_to_4", "tp_to_fsdp2"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_other_numbers_of_processes_go_on_with_a_run(framework, name, resumed):
    assert_same_losses(resumed / framework / name, resumed / framework / "cpu")
    assert_same_end(resumed / framework / name, resumed / framework / "cpu")
    assert [path.name for path in (resumed / framework / name / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_sharded_checkpoint_acts_as_its_consolidated_file(framework, resumed, tmp_path):
    run = resumed / framework / "1_to_2"
    assert_same_losses(run, resumed / framework / "cpu")
    assert (run / LAST).is_symlink()
    assert {path.name[:10] for path in (run / "checkpoints").iterdir()} == {".last.ckpt", "last.ckpt"}
    output = consolidate(str(run), str(tmp_path / "one.ckpt"))
    np.testing.assert_array_equal(acted(output), acted(run))  # which reads the folder
    assert_same_actions(output, resumed / framework / "cpu", tolerance=0.01)
    check_checkpoint(run / LAST, Policy.from_checkpoint(output, "cpu").framework)
    other = Policy.from_checkpoint(
        resumed / ("act" if framework == "pi0" else "pi0") / "cpu", "cpu"
    ).framework
    with pytest.raises(LibrobotError, match=r"last\.ckpt: .*missing: .*unexpected: "):
        check_checkpoint(run / LAST, other)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp"])
def test_episodes_validation_and_gradient_norms_in_two_processes(name, watched):
    ours, theirs = rows(watched / name), rows(watched / "cpu")
    assert_same_losses(watched / name, watched / "cpu")
    columns = {"eval/success": 0.26, "grad_norm/all": 1e-3}
    if name == "tp":  # otherwise each process validates other samples with the same noise
        columns["val/loss"] = 1e-4
    for column, tolerance in columns.items():
        values = [[float(row[column]) for row in found if row[column]] for found in (ours, theirs)]
        assert len(values[0]) == len(values[1]) >= 1
        np.testing.assert_allclose(values[0], values[1], rtol=0, atol=tolerance, err_msg=column)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(
        LibrobotError, match=r"expected a sharded checkpoint of librobot \(\.metadata and rest\.pt"
    ):
        check_checkpoint(tmp_path / "last.ckpt", None)
    with pytest.raises(LibrobotError, match="expected a sharded checkpoint"):
        consolidate(str(tmp_path / "last.ckpt"), str(tmp_path / "out.ckpt"))
    assert EXPORTS["consolidate"][1] == "consolidate"


class Fake(nn.Module):
    """Only what sharding asks of a framework."""

    def __init__(self, *lists, plan=None, heads=False):
        super().__init__()
        self.vlm, self.block_lists, self.splits_heads = None, lists, heads
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(6, 6)}) for _ in range(2))
        if plan:
            for layer in self.layers:
                layer.tensor_plan = plan


def test_a_process_that_gets_its_weights_later_has_its_teacher_now(dataset, tmp_path, monkeypatch):
    fit(dataset, tmp_path / "teacher", *COMMON, "trainer.max_steps=1", framework="pi0")
    file = tmp_path / "teacher" / LAST
    given = ["trainer=fsdp2", "head=consistency", f"head.teacher={file}"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    cfg = compose([*tiny("pi0"), *COMMON, *given])
    with built_in_parts(cfg):
        student = build_framework(cfg, SPEC)
    assert student.has_teacher
    assert all(parameter.is_meta for parameter in student.parameters())
    assert not any(p.requires_grad for name, p in student.named_parameters() if name.startswith("vlm."))
    (teacher,) = student._teacher
    weights = torch.load(file, weights_only=True)["state_dict"]
    own = {n: p for n, p in teacher.named_parameters() if n.partition(".")[0] in student.denoiser_parts}
    assert own
    assert all(torch.equal(parameter, weights[name]) for name, parameter in own.items())
    assert teacher.vlm is student.vlm  # no second copy
    move_own_parts(student, teacher, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in teacher.expert.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.vlm.parameters()} == {torch.float32}


def test_declared_blocks_that_are_not_there_are_an_error():
    assert list(blocks_of(Fake("layers"))) == ["layers.0", "layers.1"]
    with pytest.raises(
        LibrobotError, match=r"declares the blocks 'layer' \(block_lists\), and has no such part; did"
    ):
        blocks_of(Fake("layer"))


def test_blocks_without_a_plan_are_named(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    mesh = SimpleNamespace(size=lambda: 4)
    fake = Fake("layers")
    with pytest.raises(LibrobotError, match="no block of framework Fake says how its matrices are split"):
        split_blocks(fake, blocks_of(fake), mesh)
    odd = Fake("layers", plan={"q_proj": "column"}, heads=True)
    with pytest.raises(
        LibrobotError, match=r"tensor=4 must divide the width of layers\.0\.q_proj, which is 6"
    ):
        split_blocks(odd, blocks_of(odd), mesh)


@pytest.mark.parametrize(
    ("node", "gpus", "message"),
    [
        (
            {"strategy": {"_target_": "x.FSDPStrategy"}},
            0,
            "FSDPStrategy runs on GPUs alone, and this machine has none",
        ),
        (
            {"strategy": {"_target_": "x.DeepSpeedStrategy"}, "accelerator": "cpu"},
            1,
            "trainer.accelerator is cpu",
        ),
        ({"accelerator": "gpu"}, 0, "torch sees no GPU on this machine; here runs trainer=cpu, or"),
        (
            {"accelerator": "gpu", "devices": 8},
            2,
            "trainer.devices=8: found 2 GPUs here; set it to at most 2",
        ),
    ],
)
def test_what_a_machine_lacks_is_said_with_what_runs(node, gpus, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(LibrobotError, match=message):
        check_machine(node)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_machine({"accelerator": "cpu", "devices": 2, "strategy": {"_target_": "x.DDPStrategy"}})
