"""The guard against a collapse provoked for real, and what it does about one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

pytest.importorskip("mmengine", reason="the OpenMMLab stack is not installed")

from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mmitp.engine.hooks.adversarial_hook import AdversarialHook
from mmitp.engine.hooks.collapse_guard import CollapseGuardHook, _draw

CLASSES, SIZE = 4, 8


class Patterns(Dataset):
    """Noisy copies of four sign patterns: easy to classify, barely separable within 56/255."""

    metainfo: dict = {}  # noqa: RUF012

    def __init__(self, n: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(7)
        patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator).sign()
        generator.manual_seed(seed)
        self.labels = torch.randint(0, CLASSES, (n,), generator=generator)
        noise = torch.randn(n, 3, SIZE, SIZE, generator=generator)
        self.images = ((0.5 + 0.2 * patterns[self.labels] + 0.15 * noise).clamp(0, 1) * 255).round().byte()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        sample = BaseDataElement()
        sample.gt_label = self.labels[index : index + 1]
        return {"inputs": self.images[index], "data_samples": sample}


class Net(BaseModel):
    def __init__(self, width: int = 32) -> None:
        super().__init__(dict(type="ImgDataPreprocessor", mean=[127.5] * 3, std=[255.0] * 3))
        layers: list[nn.Module] = []
        for inputs, stride in ((3, 1), (width, 1), (width, 2)):
            layers += [nn.Conv2d(inputs, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (SIZE // 2) ** 2, CLASSES))

    def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
        logits = self.net(inputs)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(logits, torch.cat([s.gt_label for s in data_samples]))}
        return logits if mode == "tensor" else data_samples


class Nothing(BaseMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict:
        return {}


def loader(dataset: Dataset, batch_size: int, shuffle: bool) -> dict:
    return dict(
        dataset=dataset,
        batch_size=batch_size,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=shuffle),
        collate_fn=dict(type="pseudo_collate"),
    )


def make_runner(
    work_dir: Path,
    hooks: list[Hook | dict],
    epochs: int = 1,
    n: int = 32,
    batch_size: int = 16,
    val: bool = True,
    seed: int = 0,
    model: nn.Module | None = None,
    **kwargs: Any,
) -> Runner:
    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        model=model or Net(32 if n > 100 else 4),
        work_dir=str(work_dir),
        train_dataloader=loader(Patterns(n), batch_size, True),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1000),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9)),
        custom_hooks=hooks,
        default_hooks=dict(checkpoint=None, logger=dict(type="LoggerHook", interval=1000)),
        randomness=dict(seed=seed),
        experiment_name="_".join(work_dir.parts[-3:]),
        log_level="WARNING",
    )
    if val:
        dataset = Patterns(64, seed=1)
        config.update(val_dataloader=loader(dataset, 32, False), val_cfg=dict(), val_evaluator=[Nothing()])
    return Runner(**{**config, **kwargs})


def provoke(tmp_path: Path, probes_after: int = 0, **guard: Any) -> tuple[AdversarialHook, list[dict], int]:
    """Train with FGSM-RS and a step of two eps until a run collapses: it learns the corners of the ball alone.

    Two of four seeds did within 10 epochs; five seeds make the test independent of the machine's rounding. Only a
    collapse with at least ``probes_after`` probes left counts.
    Returns the attack, the probes of the run that collapsed and the index of the first that says so.
    """
    for seed in range(5):
        attack = AdversarialHook(eps=52, alpha=104)
        hook = CollapseGuardHook(source="train", **guard)
        work_dir = tmp_path / str(seed)
        make_runner(work_dir, [attack, hook], epochs=14, n=256, batch_size=64, val=False, seed=seed).train()
        for index, probe in enumerate(hook.history):
            if probe["collapsed"] and len(hook.history) - index > probes_after:
                return attack, hook.history, index
    pytest.fail("no run collapsed: the guard has nothing to notice")


def test_a_real_collapse_is_noticed_and_ends_the_training(tmp_path: Path) -> None:
    _, history, first = provoke(tmp_path, action="stop")
    best = max(probe["pgd"] for probe in history[:first])
    assert first == len(history) - 1
    assert history[first]["pgd"] < 0.5 * best  # the single step no longer says anything about PGD ...
    assert history[first]["single"] > best  # ... and looks better than PGD ever did


def test_restore_and_switch_lead_a_run_out_of_a_real_collapse(tmp_path: Path) -> None:
    switch_to = dict(attack="pgd", steps=3, alpha=26)
    attack, history, first = provoke(tmp_path, probes_after=1, action="restore_switch", switch_to=switch_to)
    assert (attack.attack, attack.steps, attack.alpha) == ("pgd", 3, 26)
    after = history[first + 1 :]
    assert not any(probe["collapsed"] for probe in after)
    assert max(probe["pgd"] for probe in after) > history[first]["pgd"]


class Fake:
    """Replaces the probe's measurement by a script of (single, pgd) results."""

    def __init__(self, *script: tuple[float, float]) -> None:
        self.values = iter([value for pair in script for value in pair])

    def __call__(self, *_: Any) -> tuple[float, float, int]:
        return next(self.values), 0.25, 64


def scripted(
    tmp_path: Path,
    script: list[tuple[float, float]],
    *extra: Hook,
    attack: AdversarialHook | None = None,
    **guard: Any,
) -> Any:
    attack, hook = attack or AdversarialHook(), CollapseGuardHook(**guard)
    hook._result = Fake(*script)  # type: ignore[method-assign]
    runner = make_runner(tmp_path, [attack, hook, *extra], epochs=len(script))
    return attack, hook, runner


class Keep(Hook):
    """The weights and moments at the end of each epoch, before the guard acts and after."""

    def __init__(self, priority: str) -> None:
        self.priority = priority
        self.states: list[dict] = []

    def after_train_epoch(self, runner: Runner) -> None:
        moments = runner.optim_wrapper.optimizer.state_dict()["state"]
        self.states.append(
            {
                **{key: value.clone() for key, value in runner.model.state_dict().items()},
                **{f"momentum{key}": value["momentum_buffer"].clone() for key, value in moments.items()},
            }
        )


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


def test_restore_brings_back_weights_and_moments_but_not_the_learning_rate(tmp_path: Path) -> None:
    before, after = Keep("ABOVE_NORMAL"), Keep("VERY_LOW")
    schedule = [dict(type="MultiStepLR", milestones=[2], gamma=0.1)]
    attack, hook, runner = scripted(tmp_path, [(0.5, 0.4), (0.5, 0.45), (0.9, 0.1)], before, after, action="restore")
    runner.param_schedulers = schedule
    runner.train()
    assert [probe["collapsed"] for probe in hook.history] == [False, False, True]
    assert not equal(before.states[2], before.states[1])
    assert equal(after.states[2], before.states[1])
    assert runner.optim_wrapper.get_lr()["lr"] == [pytest.approx(0.005)]
    assert attack.attack == "fgsm_rs"


def test_restore_refuses_what_pruning_froze_since(tmp_path: Path) -> None:
    class Freeze(Hook):
        def after_train_epoch(self, runner: Runner) -> None:
            if runner.epoch == 1:
                runner.model.prune_pattern.fill_(1.0)

    model = Net(4)
    model.register_buffer("prune_pattern", torch.full((3,), -1.0))
    after = Keep("VERY_LOW")
    attack, hook = AdversarialHook(), CollapseGuardHook(action="restore_switch")
    hook._result = Fake((0.5, 0.4), (0.9, 0.1))  # type: ignore[method-assign]
    runner = make_runner(tmp_path, [attack, hook, Freeze(), after], epochs=2, model=model)
    runner.train()
    assert (runner.model.prune_pattern == 1).all()
    assert not equal(after.states[1], after.states[0])
    assert "masks were frozen" in next(Path(runner.log_dir).glob("*.log")).read_text()
    assert attack.attack == "pgd"  # the switch is made all the same


def test_switch_by_default_to_pgd_2_at_half_eps(tmp_path: Path) -> None:
    attack, _, runner = scripted(tmp_path, [(0.5, 0.4), (0.9, 0.1), (0.9, 0.1)], action="switch")
    runner.train()
    assert (attack.attack, attack.steps, attack.alpha) == ("pgd", 2, 4.0)


def test_switch_to_n_fgsm_at_full_eps(tmp_path: Path) -> None:
    attack, _, runner = scripted(tmp_path, [(0.5, 0.4), (0.9, 0.1)], action="switch", switch_to=dict(attack="n_fgsm"))
    runner.train()
    assert (attack.attack, attack.alpha) == ("n_fgsm", 8.0)


def test_stop_restores_and_ends_the_training(tmp_path: Path) -> None:
    after = Keep("VERY_LOW")
    _, hook, runner = scripted(tmp_path, [(0.5, 0.4), (0.9, 0.1), (0.5, 0.4)], after, action="stop")
    runner.train()
    assert len(hook.history) == 2
    assert equal(after.states[1], after.states[0])


def test_stop_by_iterations_ends_an_epoch_at_once_and_saves_what_it_restored(tmp_path: Path) -> None:
    """A loop by epochs looks at stop_training between epochs alone; checkpoints are written elsewhere, or never."""
    after = Keep("VERY_LOW")
    script = [(0.5, 0.4), (0.5, 0.4), (0.9, 0.1)]
    _, hook, runner = scripted(tmp_path, script, after, action="stop", by_epoch=False)
    runner.train()
    assert [probe["iter"] for probe in hook.history] == [1, 2, 3]
    assert runner.iter == 3  # of 4 in two epochs
    assert len(after.states) == 2
    assert equal(after.states[1], after.states[0])
    saved = torch.load(tmp_path / "stopped.pth", weights_only=False)["state_dict"]
    assert equal(saved, runner.model.state_dict())


def test_restore_drops_the_gradients_of_an_accumulated_step(tmp_path: Path) -> None:
    class Look(Hook):
        priority = "LOWEST"
        waiting: list[bool] = []  # noqa: RUF012

        def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
            grads = [parameter.grad for parameter in runner.model.parameters()]
            self.waiting.append(any(grad is not None and bool(grad.any()) for grad in grads))

    optimizer = dict(type="SGD", lr=0.05, momentum=0.9)
    hook, look = CollapseGuardHook(action="restore", by_epoch=False), Look()
    hook._result = Fake((0.5, 0.4), (0.9, 0.1))  # type: ignore[method-assign]
    make_runner(
        tmp_path,
        [AdversarialHook(), hook, look],
        optim_wrapper=dict(type="OptimWrapper", optimizer=optimizer, accumulative_counts=4),
    ).train()
    assert look.waiting == [True, False]


def test_an_interval_that_does_not_fit_the_run_is_answered(tmp_path: Path) -> None:
    hooks = [AdversarialHook(by_epoch=False), CollapseGuardHook()]
    with pytest.raises(ValueError, match="needs an epoch-based loop: set by_epoch=False"):
        make_runner(tmp_path / "a", hooks, train_cfg=dict(by_epoch=False, max_iters=2)).train()
    runner = make_runner(tmp_path / "b", [AdversarialHook(), CollapseGuardHook(interval=3)])
    runner.train()
    assert "CollapseGuardHook(interval=3) never probes: the run ends after 1 epochs" in log_of(runner)


def test_a_classifier_with_several_outputs_is_probed_by_its_last(tmp_path: Path) -> None:
    class Several(Net):
        def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
            output = super().forward(inputs, data_samples, mode)
            return (-output, output) if mode == "tensor" else output

    histories = []
    for name, kind in (("one", Net), ("several", Several)):
        hook = CollapseGuardHook(source="train")
        make_runner(tmp_path / name, [AdversarialHook(eps=1), hook], model=kind(4)).train()
        histories.append(hook.history)
    assert histories[0] == histories[1]


def test_batches_with_labels_and_without_are_all_probed_by_the_loss() -> None:
    class Two(Net):
        def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
            assert mode == "loss"
            return {"loss": inputs.new_tensor(2.0)}

    labelled = [Patterns(4)[index] for index in range(4)]
    bare = [{**item, "data_samples": BaseDataElement()} for item in labelled]
    hook = CollapseGuardHook()
    hook._batches = [{key: [item[key] for item in items] for key in items[0]} for items in (labelled, bare)]
    result, chance, count = hook._result(Two(4), lambda data, raw: data)
    assert (result, chance, count) == (0.5, 0.0, 2)


def log_of(runner: Runner) -> str:
    return next(Path(runner.log_dir).glob("*.log")).read_text()


@pytest.mark.parametrize(("second", "collapsed"), [((0.9, 0.19), True), ((0.3, 0.19), False)])
def test_a_collapse_is_written_to_the_log(tmp_path: Path, second: tuple[float, float], collapsed: bool) -> None:
    _, hook, runner = scripted(tmp_path, [(0.5, 0.4), second])
    runner.train()
    assert hook.history == [
        {"iter": 2, "eps": 8.0, "single": 0.5, "pgd": 0.4, "collapsed": False},
        {"iter": 4, "eps": 8.0, "single": second[0], "pgd": second[1], "collapsed": collapsed},
    ]
    line = "catastrophic overfitting after 4 iterations: 0.19 under PGD against 0.9 under the training attack, and 0.4"
    assert (line in log_of(runner)) is collapsed
    assert ("Nothing is done about it" in log_of(runner)) is collapsed


def test_a_collapse_is_seen_while_eps_still_grows_and_at_the_first_probe(tmp_path: Path) -> None:
    script = [(0.6, 0.5), (0.7, 0.02), (0.8, 0.01)]
    _, hook, runner = scripted(tmp_path / "a", script, attack=AdversarialHook(warmup=3))
    runner.train()
    assert [probe["eps"] for probe in hook.history] == [pytest.approx(8 / 3), pytest.approx(16 / 3), 8]
    assert [probe["collapsed"] for probe in hook.history] == [False, True, True]
    attack, _, runner = scripted(tmp_path / "b", [(0.9, 0.0)], action="restore_switch")
    runner.train()
    assert "there is no good state to restore yet" in log_of(runner)
    assert attack.attack == "pgd"


def states_equal(one: Runner, other: Runner) -> bool:
    moments = [runner.optim_wrapper.optimizer.state_dict()["state"] for runner in (one, other)]
    return equal(one.model.state_dict(), other.model.state_dict()) and all(
        torch.equal(value["momentum_buffer"], moments[1][key]["momentum_buffer"]) for key, value in moments[0].items()
    )


@pytest.mark.parametrize(
    "second",
    [
        pytest.param((0.5, 0.45), id="the checkpoint is the good state"),
        pytest.param((0.24, 0.01), id="the good state is older than the checkpoint"),
    ],
)
def test_a_resumed_run_judges_and_restores_as_it_would_have(tmp_path: Path, second: tuple[float, float]) -> None:
    """After a collapse in epoch 3 the state of the last good probe comes back, interrupted after epoch 2 or not."""
    script = [(0.6, 0.5), second, (0.9, 0.1), (0.5, 0.4)]

    def run(name: str, script: list[tuple[float, float]], epochs: int, **kwargs: Any) -> tuple[Any, Runner]:
        hook = CollapseGuardHook(action="restore")
        hook._result = Fake(*script)  # type: ignore[method-assign]
        saving = dict(checkpoint=dict(type="CheckpointHook", interval=1))
        runner = make_runner(tmp_path / name, [AdversarialHook(), hook], epochs, default_hooks=saving, **kwargs)
        runner.train()
        return hook, runner

    through, whole = run("whole", script, 4)
    run("part", script[:2], 2)
    resumed, rest = run("part", script[2:], 4, resume=True)
    assert [probe["collapsed"] for probe in through.history] == [False, False, True, False]
    assert resumed.history == through.history
    assert resumed.rule.state_dict() == through.rule.state_dict()
    assert states_equal(whole, rest)
    # Loading the weights alone, as another run begins with, brings no past.
    fresh, _ = run("fresh", script[2:3], 1, load_from=str(tmp_path / "part" / "epoch_2.pth"))
    assert len(fresh.history) == 1


def test_what_the_checkpoint_keeps_is_plain_data(tmp_path: Path) -> None:
    """Tensors on the CPU, numbers and strings: nothing that only unpickling arbitrary objects brings back."""
    _, hook, runner = scripted(tmp_path, [(0.5, 0.4)], action="restore")
    runner.train()
    checkpoint: dict[str, Any] = {}
    hook.before_save_checkpoint(runner, checkpoint)
    torch.save(checkpoint, tmp_path / "state.pth")
    (state,) = torch.load(tmp_path / "state.pth", weights_only=True).values()
    assert state["history"] == hook.history
    assert equal(state["good"]["modules"]["model"], runner.model.state_dict())
    assert not any(
        value.data_ptr() == kept.data_ptr()
        for value, kept in zip(
            runner.model.state_dict().values(), state["good"]["modules"]["model"].values(), strict=True
        )
    )
    warns, hook, runner = scripted(tmp_path / "warn", [(0.5, 0.4)])
    runner.train()
    hook.before_save_checkpoint(runner, checkpoint)
    assert checkpoint["mmitp_collapse_guard"]["good"] is None  # nothing to restore, nothing to carry


class Ruin(Hook):
    """Makes one weight NaN, or one statistic infinite, at the end of an epoch, before the guard looks."""

    priority = "ABOVE_NORMAL"

    def __init__(self, epoch: int, key: str, value: float) -> None:
        self.epoch, self.key, self.value = epoch, key, value

    def after_train_epoch(self, runner: Runner) -> None:
        if runner.epoch == self.epoch:
            runner.model.state_dict()[self.key].view(-1)[0] = self.value


@pytest.mark.parametrize(("key", "value"), [("net.0.weight", float("nan")), ("net.1.running_var", float("inf"))])
def test_weights_that_are_not_finite_are_never_kept_as_good(tmp_path: Path, key: str, value: float) -> None:
    """However well the network seems to do."""
    _, hook, runner = scripted(tmp_path, [(0.5, 0.4), (0.5, 0.5)], Ruin(1, key, value), action="restore")
    runner.train()
    assert hook._good["iter"] == 2
    assert all(torch.isfinite(kept).all() for kept in hook._good["modules"]["model"].values())


def test_a_network_of_nan_logits_classifies_nothing(tmp_path: Path) -> None:
    """argmax of NaN is class 0, which a quarter of the images are."""
    attack, hook = AdversarialHook(), CollapseGuardHook(action="restore")
    runner = make_runner(tmp_path, [attack, hook, Ruin(0, "net.10.bias", float("nan"))])
    runner.train()
    (probe,) = hook.history
    assert (probe["single"], probe["pgd"], probe["collapsed"]) == (0.0, 0.0, False)
    assert hook._good is None


def test_a_diverged_training_goes_back_to_the_last_good_state_once(tmp_path: Path) -> None:
    """The weights are ruined after epochs 1 and 2: the first time the good state returns, the second is the end."""

    class Again(Ruin):
        def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
            if runner.iter in (2, 3):
                runner.model.state_dict()[self.key].view(-1)[0] = self.value

    ruin = Again(99, "net.0.weight", float("nan"))
    _, hook, runner = scripted(tmp_path, [(0.5, 0.4), (0.5, 0.4)], ruin, action="restore")
    with pytest.raises(ValueError, match="training has diverged: in iteration 4"):
        runner.train()
    assert "diverged in iteration 3: the state after 2 iterations is restored" in log_of(runner)
    assert len(hook.history) == 1


def test_the_probed_images_are_the_same_in_every_run_and_spread_over_the_data_set(tmp_path: Path) -> None:
    """Of 32 images two batches of 4: every fourth, whatever the run's seed, shuffling and augmentation."""

    class Noisy(Patterns):
        def __getitem__(self, index: int) -> dict:
            noise = torch.randint(0, 9, (1,)).item() + np.random.randint(9) + random.randrange(9)  # noqa: NPY002
            return {**super().__getitem__(index), "inputs": self.images[index] // 2 + noise}

    probed = []
    for seed in (0, 1):
        hook = CollapseGuardHook(source="train")
        runner = make_runner(
            tmp_path / str(seed), [AdversarialHook(), hook], seed=seed, train_dataloader=loader(Noisy(32), 4, True)
        )
        states = torch.get_rng_state(), random.getstate()
        runner.build_train_loop(runner._train_loop)
        hook.before_train(runner)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        probed.append([image for batch in hook._batches for image in batch["inputs"]])
    assert len(probed[0]) == 8
    assert all(torch.equal(one, other) for one, other in zip(*probed, strict=True))
    for image, index in zip(probed[0], range(0, 32, 4), strict=True):
        difference = image.int() - (Patterns(32).images[index] // 2).int()
        assert difference.unique().numel() == 1


@pytest.mark.parametrize("source", ["val", "train"])
def test_watching_changes_nothing(tmp_path: Path, source: str) -> None:
    """Same weights, statistics and modes with and without the guard, validation batches and iterations included."""
    states = []
    for name, guards in (("plain", []), ("guarded", [CollapseGuardHook(interval=1, by_epoch=False, source=source)])):
        runner = make_runner(tmp_path / name, [AdversarialHook(), *guards], epochs=2)
        runner.model.net[1].eval()
        runner.train()
        states.append(runner.model.state_dict())
    assert len(guards[0].history) == 4
    assert equal(*states)


def test_detector_like_models_are_probed_by_their_loss(tmp_path: Path) -> None:
    class NoLabel(Patterns):
        def __getitem__(self, index: int) -> dict:
            item = super().__getitem__(index)
            item["data_samples"].target = item["data_samples"].pop("gt_label")
            return item

    class Regressor(Net):
        def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
            target = torch.cat([sample.target for sample in data_samples or []])
            return {"loss": nn.functional.cross_entropy(self.net(inputs), target)}

    hook = CollapseGuardHook(num_batches=1)
    runner = make_runner(
        tmp_path,
        [AdversarialHook(), hook],
        model=Regressor(4),
        val=False,
        train_dataloader=loader(NoLabel(32), 16, False),
    )
    runner.train()
    (probe,) = hook.history
    assert 0 < probe["pgd"] <= probe["single"] * 1.05  # one over the loss: PGD finds the larger loss
    assert not probe["collapsed"]


def test_wrong_use_is_answered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="action must be"):
        CollapseGuardHook(action="panic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source must be"):
        CollapseGuardHook(source="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drop and gap must lie between 0 and 1"):
        CollapseGuardHook(drop=1.5)
    with pytest.raises(ValueError, match="alpha must be finite"):
        CollapseGuardHook(alpha=float("nan"))
    with pytest.raises(ValueError, match="takes no 'step', only 'attack', 'alpha', 'steps', 'noise'"):
        CollapseGuardHook(action="switch", switch_to={"attack": "pgd", "step": 2})
    for to, message in (
        ({"steps": 2}, "needs the key 'attack'"),
        ({"attack": "pdg"}, "attack must be one of"),
        ({"attack": "pgd", "alpha": 0}, "alpha, the length of a step"),
        ({"attack": "pgd", "alpha": None}, "alpha, the length of a step of attack='pgd'"),
    ):
        guard = CollapseGuardHook(action="switch", switch_to=to)
        with pytest.raises(ValueError, match=message):
            make_runner(tmp_path / "c", [AdversarialHook(), guard]).train()
    alone = make_runner(tmp_path / "a", [dict(type="mmitp.CollapseGuardHook")])
    with pytest.raises(ValueError, match="exactly one AdversarialHook"):
        alone.train()
    blind = make_runner(tmp_path / "b", [AdversarialHook(), CollapseGuardHook(source="val")], val=False)
    with pytest.raises(ValueError, match="validation dataloader"):
        blind.train()


def test_batches_of_data_sets_that_hand_over_whole_ones() -> None:
    """As ``FastCIFAR10`` under ``mmitp.take_batch``, which the robust CIFAR configs have."""

    class Whole(Patterns):
        def __getitems__(self, indices: list[int]) -> dict:
            samples = [self[index] for index in indices]
            return {key: [sample[key] for sample in samples] for key in ("inputs", "data_samples")}

    loader = torch.utils.data.DataLoader(Whole(10), batch_size=4, collate_fn=lambda batch: batch)
    drawn = _draw(loader, 2)
    assert [len(batch["inputs"]) for batch in drawn] == [4, 4]
    assert torch.equal(drawn[0]["inputs"][1], Whole(10).images[1])  # 0, 1, 2, 3, 5, 6, 7, 8 of ten
