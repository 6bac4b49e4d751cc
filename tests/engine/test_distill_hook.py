"""DistillHook in real Runners: the extra loss by hand, when it is there, beside attacks, slimming and resume."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

sys.path.insert(0, str(Path(__file__).parent))
import test_prune_hook as toy  # the toy Runner of the hook's other tests
from test_prune_hook_slim import CHECKPOINT, SGD, Losses, Residual
from toy_config import TinyNet

from mmitp.engine.hooks import AdversarialHook, DistillHook, PruneHook
from mmitp.pruning import distillation_loss, masked_layers, open_masks

EMA = dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.2)


class Seen(Hook):
    """Keeps the extra loss of every iteration, or None where there is none."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(outputs["loss_distill"].item() if "loss_distill" in outputs else None)


class Expected(Hook):
    """Works the extra loss out from the outside, before the iteration."""

    priority = "LOWEST"

    def __init__(self, teacher, temperature=2.0):
        self.teacher, self.temperature, self.seen = teacher, temperature, []

    @torch.no_grad()
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = runner.model
        state = {key: value.clone() for key, value in model.state_dict().items()}
        x = torch.stack(data_batch["inputs"])
        student = model(x)
        if self.teacher == "ema":
            teacher = next(h for h in runner.hooks if hasattr(h, "ema_model")).ema_model.module.eval()(x)
        else:
            with open_masks(model):
                teacher = model(x)
        self.seen.append(float(0.5 * distillation_loss(student, teacher, self.temperature)))
        for key, value in model.state_dict().items():
            value.copy_(state[key])


@pytest.mark.parametrize("teacher", ["ema", "open"])
def test_the_extra_loss_is_the_distance_from_the_teacher_in_training_mode(tmp_path, teacher):
    torch.manual_seed(3)
    model = Residual()
    model.body2.prune_mask.data[:3] = -0.5
    seen, expected = Seen(), Expected(teacher)
    distill = DistillHook(teacher, weight=0.5, scores="fc")
    toy.make_runner(tmp_path, None, epochs=2, model=model, extra_hooks=[dict(EMA), distill, seen, expected]).train()
    assert len(seen.seen) == 8
    assert seen.seen[1:] == pytest.approx(expected.seen[1:], rel=1e-4)
    assert all(value > 0 for value in seen.seen[1:])


def test_a_probe_within_an_iteration_does_not_see_the_loss(tmp_path):
    """CollapseGuardHook by iterations, listed before: it prepares its images in evaluation mode."""

    class Probe(Hook):
        terms = []  # noqa: RUF012

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            data = runner.model.data_preprocessor(data_batch, False)
            self.terms.append([*outputs, *runner.model._run_forward(data, mode="loss")].count("loss_distill"))

    probe = Probe()
    hooks = [probe, DistillHook("open", scores="fc")]
    toy.make_runner(tmp_path, None, epochs=1, model=Residual(), extra_hooks=hooks).train()
    assert probe.terms == [1, 1, 1, 1]


def test_it_moves_the_weights_and_leaves_the_task_loss_in_the_log(tmp_path):
    task, extra = {}, Seen()
    for weight in (None, 50.0):
        torch.manual_seed(3)
        model, losses = Residual(), Losses()
        model.body2.prune_mask.data[:4] = -0.5
        hooks = [losses] if weight is None else [DistillHook("open", weight=weight, scores="fc"), extra, losses]
        toy.make_runner(tmp_path / str(weight), None, epochs=2, model=model, extra_hooks=hooks).train()
        task[weight] = losses.seen
    assert extra.seen[0] > 1e-3
    assert task[50.0][0] == task[None][0]
    assert task[50.0][1:] != pytest.approx(task[None][1:], rel=1e-4)


@pytest.mark.parametrize(("teacher", "there"), [("ema", range(4, 16)), ("open", range(4, 8))])
def test_it_begins_when_told_and_the_open_network_ends_at_the_freeze(tmp_path, teacher, there):
    seen = Seen()
    hooks = [dict(EMA), DistillHook(teacher, begin=1, scores="fc"), seen]
    hook = PruneHook(target=0.5, b=0, begin=0, end=2, slim_at_end=True)
    runner = toy.make_runner(tmp_path, hook, epochs=4, model=Residual(), extra_hooks=hooks, optim=SGD)
    runner.train()
    assert not masked_layers(runner.model)
    assert [i for i, value in enumerate(seen.seen) if value is not None] == list(there)
    assert not runner.model.fc._forward_hooks  # nothing stays behind


def test_a_run_resumed_after_the_slimming_goes_on_exactly(tmp_path):
    def run(folder, **kwargs):
        torch.manual_seed(3)
        losses = Losses()
        hook = PruneHook(target=0.5, b=0, begin=0, end=2, slim_at_end=True)
        hooks = [dict(EMA), DistillHook(scores="fc"), losses]
        options = dict(epochs=5, model=Residual(), extra_hooks=hooks, optim=SGD, default_hooks=CHECKPOINT)
        toy.make_runner(tmp_path / folder, hook, **options, **kwargs).train()
        return losses.seen

    whole = run("a")
    for epoch in (1, 3):
        path = str(tmp_path / f"a/epoch_{epoch}.pth")
        assert run(f"b{epoch}", load_from=path, resume=True) == whole[4 * epoch :]


def test_attacks_do_not_raise_the_extra_loss_and_the_teacher_sees_the_attacked_images(tmp_path):
    class Passes(TinyNet):
        def __init__(self):
            super().__init__()
            self.passes = []

        def forward(self, inputs, data_samples=None, mode="tensor"):
            self.passes.append((mode, inputs.detach().clone()))
            return super().forward(inputs, data_samples, mode)

    from toy_config import TinyData

    torch.manual_seed(0)
    model, seen = toy.mask_model(Passes()), Seen()
    hooks = [DistillHook("open", scores="fc"), AdversarialHook(eps=8, alpha=10), seen]
    toy.make_runner(tmp_path, None, epochs=1, model=model, extra_hooks=hooks, dataset=TinyData(8)).train()
    (attack, start), (training, attacked), (teaching, shown) = model.passes
    assert (attack, training, teaching) == ("loss", "loss", "tensor")
    assert torch.equal(attacked, shown)
    assert not torch.equal(start, attacked)
    assert seen.seen == [0.0]  # all masks are on: the teacher is the student


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(teacher="best"), "teacher must be 'ema' or 'open'"),
        (dict(weight=0.0), "weight must be a positive finite number"),
        (dict(temperature=float("nan")), "temperature must be a positive finite number"),
        (dict(begin=-1), "begin must be a whole number"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillHook(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(scores="fc"), "the run has none"),
        (dict(teacher="open"), "no module 'head'.*detectors"),
        (dict(teacher="open", scores="body"), r"'body' of Residual gives \(8, 8, 8, 8\)"),
    ],
)
def test_runs_without_scores_or_average_are_refused(tmp_path, arguments, message):
    runner = toy.make_runner(tmp_path, None, model=Residual(), extra_hooks=[DistillHook(**arguments)])
    with pytest.raises(ValueError, match=message):
        runner.train()


@pytest.mark.parametrize(
    ("model", "prune", "arguments", "message"),
    [
        (TinyNet, None, dict(teacher="open"), "the model has no masks: take teacher='ema'"),
        (Residual, None, dict(teacher="open", begin=2), r"begin=2\) teaches nothing: the run ends after 2 epochs"),
        (Residual, dict(end=1), dict(teacher="open", begin=1), "masks are frozen by then.*end is 1 epochs"),
        (Residual, dict(end=4, by_epoch=False), dict(teacher="open", begin=1), "end is 4 iterations"),
    ],
)
def test_a_term_that_would_never_be_there_is_refused(tmp_path, model, prune, arguments, message):
    hook = None if prune is None else PruneHook(target=0.5, b=0, begin=0, **prune)
    hooks = [DistillHook(scores="fc", **arguments)]
    with pytest.raises(ValueError, match=message):
        toy.make_runner(tmp_path, hook, epochs=2, model=model(), extra_hooks=hooks).train()
