"""What a whole run costs: phases stand side by side, and what is slimmed is what a trained window leaves."""

import importlib
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "configs/cifar10"


@pytest.fixture
def whole_run() -> Any:
    return importlib.import_module("whole_run")


def test_a_window_has_about_thirty_steps_whatever_its_unit(whole_run: Any) -> None:
    length = whole_run.epoch_length
    assert length(None, 10) == 100
    assert length(dict(begin=1, end=2), 17) == 30
    assert length(dict(begin=1, end=4), 12) == 10
    assert length(dict(begin=20, end=240), 300) == 1
    assert length(dict(begin=1 / 15, end=1 / 3), 15) == 8  # 30 / 4, to even


def test_the_slimmed_network_is_what_the_closed_loop_leaves(whole_run: Any, tmp_path: Path) -> None:
    """At 0.3 in multiples of 8 the tied masks of ResNet-20's stream leave 8 of 16 channels; random ones would not."""
    file = CONFIGS / "resnet20_cifar10_psi30_tied_short.py"
    runner, _ = whole_run.stand(file, "slimmed", 2, (32, 32), str(tmp_path))
    assert 0.29 < whole_run.hook_of(runner).slimmed["ratio"] <= 0.3
    backbone = runner.model.backbone
    assert backbone.conv1.out_channels == backbone.layer1[2].conv2.out_channels == 8
    assert backbone.layer2[0].shortcut.in_channels == 8


def test_a_runs_phases_are_those_of_its_schedule(whole_run: Any) -> None:
    file, dense = (CONFIGS / f"resnet20_cifar10_{n}.py" for n in ("psi30_tied_short", "short"))
    entry = whole_run.whole_run_cost(file, dense, rounds=2, size=2)
    assert entry["epochs"] == dict(before=1, window=1, slimmed=15)
    assert entry["dense_epochs"] == 10
    assert all(entry[phase]["median"] > 0 for phase in ("before", "window", "slimmed"))


def test_the_network_that_a_run_left_takes_the_place_of_one_slimmed_on_noise(
    whole_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one of other widths, beside the hooks of the config that are not the pruner."""
    file, dense = (CONFIGS / f"resnet20_cifar10_{n}.py" for n in ("psi30_brief_distill_short", "short"))
    seen: dict[str, Any] = {}
    turns = whole_run.take_turns
    monkeypatch.setattr(whole_run, "take_turns", lambda runners, *rest: seen.update(runners) or turns(runners, *rest))
    left = CONFIGS / "resnet20_cifar10_narrow30_short.py"
    entry = whole_run.whole_run_cost(file, dense, rounds=2, size=2, left=left)
    runner, _ = seen["slimmed"]
    assert runner.model.backbone.conv1.out_channels == 9
    assert [h.__class__.__name__ for h in runner.hooks if "Distill" in h.__class__.__name__] == ["DistillHook"]
    assert entry["slimmed"]["median"] > 0


def test_a_window_may_begin_with_the_run(whole_run: Any) -> None:
    assert whole_run.window_epochs(dict(begin=0, end=1 / 16, by_epoch=False), 4) == (0, 0.25)


def test_a_window_in_iterations_is_weighed_by_its_part_of_the_run(whole_run: Any, tmp_path: Path) -> None:
    file, dense = (CONFIGS / f"resnet20_cifar10_{n}.py" for n in ("psi30_brief_short", "short"))
    entry = whole_run.whole_run_cost(file, dense, rounds=2, size=2)
    assert entry["epochs"] == pytest.approx(dict(before=0.25, window=0.5, slimmed=17.25))
    distilled = CONFIGS / "resnet20_cifar10_psi30_brief_distill_short.py"  # learns from its average after the window
    for phase, has in (("window", False), ("slimmed", True)):
        runner, batch = whole_run.stand(distilled, phase, 2, (32, 32), str(tmp_path / phase))
        losses = {}
        runner.model.register_forward_hook(lambda *args, losses=losses: losses.update(args[-1]))
        runner.train_loop.run_iter(1, batch)
        assert ("loss_distill" in losses) == has
    with pytest.raises(SystemExit, match="parts of the run"):
        whole_run.window_epochs(dict(begin=100, end=300, by_epoch=False), 18)


def test_progressive_slimming_is_weighed_part_by_part(whole_run: Any, tmp_path: Path) -> None:
    """The network of each part of the window is no larger than the one before: channels are off for a fifth of it."""
    file, dense = (CONFIGS / f"resnet20_cifar10_{n}.py" for n in ("psi30_tied_short", "short"))
    slimming = dict(slim_every=0.2, slim_at_end=True)
    sizes = []
    for cuts in range(5):
        runner, _ = whole_run.stand(file, "window", 2, (32, 32), str(tmp_path / str(cuts)), slimming, cuts)
        sizes.append(sum(p.numel() for p in runner.model.parameters()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.7 * sizes[0]
    entry = whole_run.whole_run_cost(file, dense, rounds=2, size=2, slim_every=0.5)
    assert entry["epochs"] == dict(before=1, window_1=0.5, window_2=0.5, slimmed=15)
