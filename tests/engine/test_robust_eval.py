"""A classifier's own test under attack: units, invariants, determinism, reports."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

import mmpretrain.evaluation
import mmpretrain.models  # noqa: F401
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample

from mmitp.attacks import NormalizedClassifier, autoattack_accuracy
from mmitp.datasets import EvenSubset
from mmitp.engine.attack import class_labels
from mmitp.engine.robust_eval import AttackLog, EvalAttack, RobustReport, attacked, classification, evaluate
from mmitp.pruning import freeze_masks, mask_model, randomize_masks, slim

MEAN, STD = [125.0, 120.0, 110.0], [60.0, 62.0, 64.0]
MODEL: dict[str, Any] = dict(
    type="mmpretrain.ImageClassifier",
    data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor", mean=MEAN, std=STD, to_rgb=True, num_classes=4),
    backbone=dict(type="mmitp.ResNetCifar", depth=8),
    neck=dict(type="mmpretrain.GlobalAveragePooling"),
    head=dict(
        type="mmpretrain.LinearClsHead", num_classes=4, in_channels=64, loss=dict(type="mmpretrain.CrossEntropyLoss")
    ),
)
needs_torchattacks = pytest.mark.skipif(
    importlib.util.find_spec("torchattacks") is None, reason="torchattacks is not installed"
)
needs_suite = pytest.mark.skipif(importlib.util.find_spec("pyautoattack") is None, reason="pyautoattack not installed")


class Photos(Dataset):
    """Faint noise with a brighter quarter, which is the class, between a black and a white row."""

    metainfo: dict = {}  # noqa: RUF012

    def __init__(self, n: int = 24, sizes: tuple[tuple[int, int], ...] = ((8, 8),)) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images, self.labels = [], []
        for i in range(n):
            height, width = sizes[i % len(sizes)]
            image = torch.randint(112, 136, (3, height, width), generator=generator)
            label = int(torch.randint(0, 4, (1,), generator=generator))
            top, left = label // 2 * height // 2, label % 2 * width // 2
            image[:, top : top + height // 2, left : left + width // 2] += 12
            image[:, 0], image[:, -1] = 0, 255
            self.images.append(image.byte())
            self.labels.append(label)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"inputs": self.images[index], "data_samples": DataSample().set_gt_label(self.labels[index])}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A tiny classifier that knows the photos, masks in place."""
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(MODEL))
    mask_model(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    data = Photos()
    batch = {"inputs": torch.stack(data.images), "data_samples": [data[i]["data_samples"] for i in range(len(data))]}
    for _ in range(25):
        optimizer.zero_grad()
        sum(model(**model.data_preprocessor(copy.deepcopy(batch), True), mode="loss").values()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def make_runner(work_dir: Path, model: nn.Module, dataset: Dataset | None = None, **loader: Any) -> Runner:
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        test_dataloader={
            "dataset": dataset or Photos(),
            "batch_size": 10,
            "num_workers": 0,
            "sampler": dict(type="DefaultSampler", shuffle=False),
            "collate_fn": dict(type="pseudo_collate"),
            **loader,
        },
        test_cfg=dict(),
        test_evaluator=dict(type="mmpretrain.Accuracy", topk=(1,)),
        default_scope="mmpretrain",
        experiment_name="_".join(work_dir.parts[-3:]),
        log_level="WARNING",
    )
    return runner


def seen_by(runner: Runner, attack: EvalAttack | None, eps: float = 0.0) -> tuple[torch.Tensor, dict]:
    """What the network is shown in a test, and the metrics."""
    seen: list[torch.Tensor] = []
    predict = runner.model.predict

    def recorded(inputs: torch.Tensor, data_samples: list, **kwargs: Any) -> Any:
        seen.append(inputs.clone())
        return predict(inputs, data_samples, **kwargs)

    runner.model.predict = recorded
    try:
        if attack is None:
            metrics = runner.test()
        else:
            with attacked(runner.model, attack, eps, runner.test_loop.dataloader.dataset):
                metrics = runner.test()
    finally:
        del runner.model.predict
    return torch.cat(seen), metrics


def in_pixels(change: torch.Tensor) -> torch.Tensor:
    return change * torch.tensor(STD).view(1, 3, 1, 1)


ATTACKS = [
    EvalAttack("fgsm"),
    EvalAttack("fgsm_rs"),
    EvalAttack("pgd", steps=3),
    EvalAttack("pgd", steps=2, restarts=2),
    EvalAttack("pgd", steps=3, norm="l2"),
]
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.name}-{a.norm}-{a.restarts}")


@every_attack
def test_eps_zero_is_the_clean_test_exactly(tmp_path: Path, trained: nn.Module, attack: EvalAttack) -> None:
    runner = make_runner(tmp_path, trained)
    clean, metrics = seen_by(runner, None)
    shown, under_attack = seen_by(runner, attack, 0.0)
    assert torch.equal(shown, clean)
    assert under_attack == metrics
    assert metrics["accuracy/top1"] > 90


@every_attack
def test_an_attack_moves_pixels_by_eps_at_most_and_stays_in_the_image_box(
    tmp_path: Path, trained: nn.Module, attack: EvalAttack
) -> None:
    runner = make_runner(tmp_path, trained)
    clean, metrics = seen_by(runner, None)
    eps = 60.0 if attack.norm == "l2" else 6.0
    shown, under_attack = seen_by(runner, attack, eps)
    change = in_pixels(shown - clean)
    sizes = change.flatten(1).norm(dim=1) if attack.norm == "l2" else change.abs().flatten(1).amax(1)
    assert (sizes <= eps + 1e-3).all()
    assert (sizes > 0.9 * eps).all()
    pixels = in_pixels(shown) + torch.tensor(MEAN).view(1, 3, 1, 1)
    assert pixels.min() >= -1e-3
    assert pixels.max() <= 255 + 1e-3
    assert under_attack["accuracy/top1"] < metrics["accuracy/top1"]


def test_a_test_under_attack_leaves_no_trace(tmp_path: Path, trained: nn.Module) -> None:
    runner = make_runner(tmp_path, trained)
    clean, metrics = seen_by(runner, None)
    before = copy.deepcopy(trained.state_dict())
    learning = [parameter.requires_grad for parameter in trained.parameters()]
    state = torch.get_rng_state()
    with attacked(trained, EvalAttack("pgd", steps=2), 8.0):
        trained.test_step({"inputs": Photos().images, "data_samples": [Photos()[i]["data_samples"] for i in range(24)]})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert [parameter.requires_grad for parameter in trained.parameters()] == learning
    again, same = seen_by(runner, EvalAttack("fgsm"), 0.0)
    assert torch.equal(again, clean)
    assert same == metrics


def test_random_starts_depend_on_seed_and_batch_alone(tmp_path: Path, trained: nn.Module) -> None:
    runner = make_runner(tmp_path, trained)
    first, _ = seen_by(runner, EvalAttack("fgsm_rs", seed=1), 8.0)
    torch.rand(5)
    again, _ = seen_by(runner, EvalAttack("fgsm_rs", seed=1), 8.0)
    other, _ = seen_by(runner, EvalAttack("fgsm_rs", seed=2), 8.0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Batches differ: the same images in two batches get different starts.
    data = Photos(n=10)
    data.images, data.labels = data.images * 2, data.labels * 2
    twice, _ = seen_by(make_runner(tmp_path / "twice", trained, data), EvalAttack("fgsm_rs"), 8.0)
    assert not torch.equal(twice[:10], twice[10:])


def test_padding_is_not_attacked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = copy.deepcopy(MODEL)
    cfg["data_preprocessor"].update(pad_size_divisor=8, pad_value=7)
    runner = make_runner(tmp_path, MODELS.build(cfg), Photos(n=2, sizes=((8, 6), (5, 8))))
    clean, _ = seen_by(runner, EvalAttack("fgsm"), 0.0)
    shown, _ = seen_by(runner, EvalAttack("pgd", steps=2), 8.0)
    assert torch.equal(shown[0, :, :, 6:], clean[0, :, :, 6:])
    assert torch.equal(shown[1, :, 5:], clean[1, :, 5:])
    assert (shown[0, :, :, :6] != clean[0, :, :, :6]).float().mean() > 0.8


@needs_torchattacks
def test_accuracy_agrees_with_torchattacks(tmp_path: Path, trained: nn.Module) -> None:
    """The same deterministic attack by another hand, on the whole image classifier in [0, 1]: one image in 1000."""
    import torchattacks

    data = Photos(n=1000)
    x, y = torch.stack(data.images)[:, [2, 1, 0]] / 255, torch.tensor(data.labels)  # BGR to RGB, as the preprocessor
    # In eval mode: torchattacks puts back the mode it finds, for the modules inside as well.
    net = NormalizedClassifier(Logits(trained), MEAN, STD).eval()
    expected = (net(torchattacks.FGSM(net, eps=4 / 255)(x, y)).argmax(1) == y).float().mean().item() * 100
    _, metrics = seen_by(make_runner(tmp_path, trained, data, batch_size=250), EvalAttack("fgsm"), 4.0)
    assert metrics["accuracy/top1"] == pytest.approx(expected, abs=0.1 + 1e-4)
    assert 0 < expected < 90


class Logits(nn.Module):
    """An image classifier as suites know them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, mode="tensor")


def test_masked_and_slimmed_classifier_meet_the_same_attack(tmp_path: Path, trained: nn.Module) -> None:
    masked = copy.deepcopy(trained)
    randomize_masks(masked, 0.7, torch.Generator().manual_seed(0))
    freeze_masks(masked)
    small = slim(masked, torch.randn(1, 3, 8, 8))
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in masked.parameters())
    attack = EvalAttack("pgd", steps=5, restarts=2)
    of_masked, a = seen_by(make_runner(tmp_path / "a", masked), attack, 4.0)
    of_small, b = seen_by(make_runner(tmp_path / "b", small), attack, 4.0)
    torch.testing.assert_close(of_small, of_masked, rtol=0, atol=1e-4)
    assert a == b


@needs_suite
def test_autoattack_is_shown_to_the_metric_with_its_flags(
    tmp_path: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The whole suite takes minutes even here; its bridge has tests of its own.
    quick = functools.partial(autoattack_accuracy, version="custom", attacks=["apgd-ce", "fab-t"])
    monkeypatch.setattr(classification, "autoattack_accuracy", quick)
    runner = make_runner(tmp_path, trained, sampler=dict(type="mmitp.EvenSubset", images=12))
    report = evaluate(runner, EvalAttack("autoattack"), [0.0, 4.0])
    pgd = evaluate(runner, EvalAttack("pgd", steps=10), [4.0])
    assert report.attacked[0] == report.clean
    assert report.attacked[1]["accuracy/top1"] <= pgd.attacked[0]["accuracy/top1"] < report.clean["accuracy/top1"]
    assert 0 < report.largest[1] <= 4 + 1e-3
    assert report.flags == ["fab-t aims at 3 classes, not the published 9"]
    assert "AutoAttack flag: fab-t aims at 3 classes" in report.table()
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_a_subset_is_spread_over_the_test_set_and_said(tmp_path: Path, trained: nn.Module) -> None:
    assert list(EvenSubset(range(10), 4)) == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="cannot take 11 of 10"):
        EvenSubset(range(10), 11)
    runner = make_runner(tmp_path, trained, sampler=dict(type="mmitp.EvenSubset", images=6))
    report = evaluate(runner, EvalAttack("fgsm"), [2.0])
    assert (report.images, report.total) == (6, 24)
    assert "6 of 24 images" in report.table()


def test_the_report_is_a_table_and_a_sweep_draws_a_curve(tmp_path: Path) -> None:
    report = RobustReport(
        attack=EvalAttack("pgd", steps=7, alpha=2.0),
        eps=[4.0, 8.0],
        clean={"accuracy/top1": 81.5},
        attacked=[{"accuracy/top1": 60.25}, {"accuracy/top1": 40.65}],
        images=100,
        total=100,
        seconds=[1.0, 2.0, 3.0],
        largest=[4.0, 8.0],
        flags=[],
    )
    lines = report.table().splitlines()
    assert lines[0] == "PGD-7 (linf, step 2/255, restarts 1), objective truth, seed 0; all 100 images"
    assert lines[1].split() == ["clean", "eps", "4/255", "eps", "8/255"]
    assert lines[2].split() == ["accuracy/top1", "81.5", "60.25", "40.65"]
    pytest.importorskip("matplotlib")
    written = report.save(tmp_path / "out" / "robust.json")
    folder = tmp_path / "out"
    assert written == [f"wrote {folder / 'robust.json'}", f"wrote {folder / 'robust.png'}"]
    saved = json.loads((folder / "robust.json").read_text())
    assert saved["attacked"][1] == {"accuracy/top1": 40.65}
    assert saved["attack"]["steps"] == 7
    assert (folder / "robust.png").stat().st_size > 0
    again = report.save(folder / "robust.json", dict(seed=3))
    assert [line.split()[0] for line in again] == ["wrote", "the", "wrote", "the"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "robust.json", "robust.png", "robust_2.json", "robust_2.png",
    ]  # fmt: skip
    assert json.loads((folder / "robust_2.json").read_text()) == saved
    assert json.loads((folder / "robust.json").read_text())["run"] == dict(seed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="bim"), "name must be one of"),
        (dict(norm="l1"), "norm must be one of"),
        (dict(objective="targeted"), "objective must be one of"),
        (dict(steps=0), "at least 1"),
        (dict(pixel_range=float("inf")), "pixel_range positive and finite"),
        (dict(name="fgsm_rs", norm="l2"), "l-inf attack"),
        (dict(name="fgsm", alpha=1.0), "takes no alpha"),
        (dict(name="autoattack", objective="own"), "for classifiers"),
        (dict(alpha=0.0), "alpha, the length of a step, must be positive"),
        (dict(alpha=float("nan")), "alpha must be finite"),
        (dict(alpha=300), "alpha=300 is in pixels/255"),
        (dict(restarts=0), "restarts must be a whole number"),
        (dict(pixel_range=float("nan")), "pixel_range positive"),
        (dict(score_thr=float("nan")), "score_thr in"),
        (dict(score_thr="x"), "score_thr in"),
        (dict(pixel_range="255"), "pixel_range positive"),
        (dict(pixel_range=True), "pixel_range positive"),
        (dict(seed="a"), "seed must be a whole number"),
        (dict(seed=1.5), "seed must be a whole number"),
    ],
)
def test_settings_that_make_no_attack_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalAttack(**settings)


def test_default_steps_follow_the_published_settings() -> None:
    """CIFAR-10: eps 8, step 2; ImageNet: eps 2, step 0.5; FGSM-RS: 1.25 eps."""
    assert EvalAttack("pgd").step(8) == 2
    assert EvalAttack("pgd").step(2) == 0.5
    assert EvalAttack("fgsm_rs").step(8) == 10
    assert EvalAttack("fgsm").step(3) == 3


def test_models_and_data_that_do_not_fit_are_answered(tmp_path: Path, trained: nn.Module) -> None:
    samples = [Photos()[i]["data_samples"] for i in range(2)]
    batch = {"inputs": Photos().images[:2], "data_samples": samples}
    with attacked(trained, EvalAttack("pgd", objective="own"), 8.0), pytest.raises(ValueError, match="for detectors"):
        trained.test_step(copy.deepcopy(batch))
    unlabelled = {**batch, "data_samples": [DataSample(), DataSample()]}
    with attacked(trained, EvalAttack("fgsm"), 8.0), pytest.raises(ValueError, match="have neither"):
        trained.test_step(unlabelled)
    with attacked(trained, EvalAttack("autoattack"), 8.0), pytest.raises(ValueError, match="one gt_label"):
        trained.test_step(unlabelled)

    class Plain(nn.Module):  # labels as one tensor, as a plain mmengine model's
        def forward(self, data: dict, training: bool = False) -> dict:
            return {"inputs": torch.stack(data["inputs"]).float(), "data_samples": torch.tensor([0, 1])}

    plain = copy.deepcopy(trained)
    plain.data_preprocessor = Plain()
    for attack in ("fgsm", "autoattack"):
        with attacked(plain, EvalAttack(attack), 8.0), pytest.raises(ValueError, match="one gt_label"):
            plain.test_step(copy.deepcopy(batch))
    with (
        attacked(trained, EvalAttack("fgsm", pixel_range=1.0), 8.0),
        pytest.raises(ValueError, match="do not fit pixel_range"),
    ):
        trained.test_step(copy.deepcopy(batch))
    headless = MODELS.build({**copy.deepcopy(MODEL), "head": None, "neck": None}).eval()
    with attacked(headless, EvalAttack("fgsm"), 8.0), pytest.raises(ValueError, match=r"\(images, classes\)"):
        headless.test_step(copy.deepcopy(batch))
    trained.train()
    try:
        with attacked(trained, EvalAttack("fgsm"), 8.0), pytest.raises(ValueError, match="eval mode"):
            trained.data_preprocessor(copy.deepcopy(batch), False)
    finally:
        trained.eval()


@pytest.mark.parametrize(
    ("attack", "eps", "message"),
    [
        ({}, [2.0, 2.0], "none twice"),
        ({}, [], "at least one size"),
        ({}, [2.0, -1.0], "eps must be finite and must not be negative, got -1"),
        ({}, [float("nan")], "eps must be finite"),
        ({}, [300.0], "eps=300 is in pixels/255"),
        (dict(objective="own"), [8.0], "for detectors"),
    ],
)
def test_what_cannot_be_evaluated_is_answered_before_anything_is_tested(
    tmp_path: Path, trained: nn.Module, attack: dict, eps: list[float], message: str
) -> None:
    runner = make_runner(tmp_path, trained)
    runner.test = lambda: pytest.fail("the clean test ran first")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        evaluate(runner, EvalAttack(**attack), eps)


def test_autoattack_on_samples_that_are_not_classified_is_answered_before_anything_is_tested(
    tmp_path: Path, trained: nn.Module
) -> None:
    class Unlabelled(Photos):
        def __getitem__(self, index: int) -> dict:
            return {**super().__getitem__(index), "data_samples": DataSample()}

    runner = make_runner(tmp_path, trained, Unlabelled())
    runner.test = lambda: pytest.fail("the clean test ran first")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="AutoAttack is for classifiers"):
        evaluate(runner, EvalAttack("autoattack"), [8.0])


def test_multi_label_classifiers_are_not_attacked_as_others(tmp_path: Path, trained: nn.Module) -> None:
    """Samples with one label each, which these may have by chance: their loss is no cross-entropy over the classes."""
    head = dict(type="mmpretrain.MultiLabelLinearClsHead", num_classes=4, in_channels=64)
    model = MODELS.build({**copy.deepcopy(MODEL), "head": head}).eval()
    samples = [Photos()[i]["data_samples"] for i in range(2)]
    assert class_labels(samples, trained) is not None
    assert class_labels(samples, model) is None
    for name in ("fgsm", "autoattack"):
        with attacked(model, EvalAttack(name), 8.0), pytest.raises(ValueError, match="a multi-label one"):
            model.test_step({"inputs": Photos().images[:2], "data_samples": samples})
    runner = make_runner(tmp_path, model)
    runner.test = lambda: pytest.fail("the clean test ran first")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="MultiLabelLinearClsHead is the head of a multi-label one"):
        evaluate(runner, EvalAttack("fgsm"), [8.0])


def test_a_model_that_cannot_be_attacked_is_found_out_before_the_clean_test(tmp_path: Path, trained: nn.Module) -> None:
    class Unlabelled(Photos):
        def __getitem__(self, index: int) -> dict:
            return {**super().__getitem__(index), "data_samples": DataSample()}

    runner = make_runner(tmp_path, trained, Unlabelled())
    hooks = list(runner.hooks)
    model = copy.copy(trained)
    model.predict = lambda *args, **kwargs: pytest.fail("the clean test ran first")
    runner.model = model
    with pytest.raises(ValueError, match="have neither"):
        evaluate(runner, EvalAttack("pgd"), [8.0])
    assert runner.hooks == hooks


def test_what_is_measured_before_a_size_fails_is_kept(tmp_path: Path, trained: nn.Module) -> None:
    class Fails(mmpretrain.evaluation.Accuracy):
        tests = 0

        def compute_metrics(self, results: list) -> dict:
            self.tests += 1
            if self.tests == 4:
                raise RuntimeError("out of memory")
            return super().compute_metrics(results)

    kept: list[RobustReport] = []
    runner = make_runner(tmp_path, trained)
    runner.test_loop.evaluator.metrics = [Fails(topk=(1,))]
    whole = evaluate(make_runner(tmp_path / "whole", trained), EvalAttack("fgsm"), [1.0, 2.0])
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(runner, EvalAttack("fgsm"), [1.0, 2.0, 4.0, 8.0], kept.append)
    (part,) = kept
    assert (part.eps, part.clean, part.attacked, part.largest) == (
        whole.eps, whole.clean, whole.attacked, whole.largest,
    )  # fmt: skip
    assert part.save(tmp_path / "part.json")[0] == f"wrote {tmp_path / 'part.json'}"


def test_a_size_on_another_scale_is_mentioned(tmp_path: Path, trained: nn.Module) -> None:
    runner = make_runner(tmp_path, trained)
    evaluate(runner, EvalAttack("fgsm"), [0.0, 0.03])
    log = next(Path(runner.log_dir).glob("*.log")).read_text()
    assert log.count("if it was meant in units of the full range, it is eps=7.65") == 1


def test_a_black_batch_is_tested_and_nan_is_not(tmp_path: Path, trained: nn.Module) -> None:
    dark = Photos(n=12)
    dark.images = [torch.zeros_like(image) if i < 10 else image for i, image in enumerate(dark.images)]
    shown, _ = seen_by(make_runner(tmp_path / "dark", trained, dark), EvalAttack("fgsm"), 8.0)
    assert len(shown) == 12
    broken = Photos(n=12)
    broken.images = [image.float() for image in broken.images]
    broken.images[11][0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="batch 2 of the test holds images with NaN"):
        seen_by(make_runner(tmp_path / "broken", trained, broken), EvalAttack("fgsm"), 8.0)


def test_networks_in_double_precision_are_attacked_in_it(tmp_path: Path, trained: nn.Module) -> None:
    class Double(nn.Module):
        def forward(self, data: dict, training: bool = False) -> dict:
            out = trained.data_preprocessor(data, training)
            return {**out, "inputs": out["inputs"].double()}

    clean, single = seen_by(make_runner(tmp_path / "single", trained), EvalAttack("fgsm"), 8.0)
    model = copy.deepcopy(trained).double()
    model.data_preprocessor = Double()
    model.data_preprocessor.mean, model.data_preprocessor.std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    shown, double = seen_by(make_runner(tmp_path / "double", model), EvalAttack("fgsm"), 8.0)
    assert shown.dtype == torch.float64
    # Two signs of gradients next to 0 may differ.
    assert ((shown - clean).abs() < 1e-4).float().mean() > 0.99
    assert double == single


def test_nothing_is_attacked_outside_the_block(trained: nn.Module) -> None:
    with attacked(trained, EvalAttack("fgsm"), 8.0) as log:
        pass
    samples = [Photos()[0]["data_samples"]]
    trained.test_step({"inputs": Photos().images[:1], "data_samples": samples})
    assert log == AttackLog()
