"""AdversarialHook in real Runners: classifiers, detectors, mixed precision, accumulation, resume."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="the OpenMMLab stack is not installed")

from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from mmitp.engine.attack import ImageBatch, check_pixel_range, image_area, pixel_units, select_losses
from mmitp.engine.hooks.adversarial_hook import AdversarialHook
from mmitp.registry import HOOKS

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


class Images(Dataset):
    """uint8 images of four classes; optionally of different sizes."""

    metainfo: dict = {}  # noqa: RUF012

    def __init__(self, n: int = 8, sizes: tuple[tuple[int, int], ...] = ((8, 8),)) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = [torch.randint(0, 256, (3, *sizes[i % len(sizes)]), generator=generator).byte() for i in range(n)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        sample = BaseDataElement(metainfo={"index": index})
        sample.gt_label = torch.tensor([index % 4])
        return {"inputs": self.images[index], "data_samples": sample}


class Net(BaseModel):
    """A small classifier that keeps what it was given, attack passes included."""

    def __init__(self, preprocessor: dict | None = None, dropout: float = 0.0) -> None:
        super().__init__(preprocessor or dict(type="ImgDataPreprocessor", mean=MEAN, std=STD, bgr_to_rgb=True))
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(4, 4)
        self.seen: list[tuple[str, torch.Tensor, torch.dtype]] = []

    def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
        features = self.conv(inputs)
        self.seen.append((mode, inputs.detach().clone(), features.dtype))
        logits = self.head(self.drop(self.norm(features).relu().mean((2, 3))))
        if mode == "loss":
            labels = torch.cat([sample.gt_label for sample in data_samples])
            cross = nn.functional.cross_entropy(logits, labels)
            return {"loss_cls": cross, "loss_bright": [inputs.sum() * 1e-3], "accuracy": cross.detach() * 0}
        return logits if mode == "tensor" else data_samples


def make_runner(work_dir: Path, hooks: list[Hook | dict], model: BaseModel | None = None, **kwargs: Any) -> Runner:
    defaults: dict[str, Any] = dict(
        model=model or Net(),
        work_dir=str(work_dir),
        train_dataloader=loader(Images()),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        custom_hooks=hooks,
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        randomness=dict(seed=3),
        experiment_name="_".join(work_dir.parts[-3:]),
        log_level="WARNING",
    )
    return Runner(**{**defaults, **kwargs})


def loader(dataset: Dataset, batch_size: int = 4) -> dict:
    return dict(
        dataset=dataset,
        batch_size=batch_size,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="pseudo_collate"),
    )


def clean_inputs(model: BaseModel, indices: range, dataset: Images) -> torch.Tensor:
    items = [dataset[index] for index in indices]
    data = {"inputs": [item["inputs"] for item in items], "data_samples": [item["data_samples"] for item in items]}
    return model.data_preprocessor(data, False)["inputs"]


def passes(model: Net, mode: str = "loss") -> list[torch.Tensor]:
    return [inputs for seen, inputs, _ in model.seen if seen == mode]


def test_the_model_trains_on_attacked_images_in_pixel_units(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, [AdversarialHook(eps=8, alpha=10)])
    runner.train()
    model = runner.model
    attack_1, trained_1, _attack_2, trained_2 = passes(model)
    std, mean = torch.tensor(STD).view(1, 3, 1, 1), torch.tensor(MEAN).view(1, 3, 1, 1)
    for batch, trained in enumerate((trained_1, trained_2)):
        clean = clean_inputs(model, range(batch * 4, batch * 4 + 4), runner.train_dataloader.dataset)
        moved = (trained - clean) * std  # in pixels, whatever the channel
        assert moved.abs().max() <= 8 + 1e-3
        assert (moved.abs() > 7.99).float().mean() > 0.5
        pixels = trained * std + mean
        assert pixels.min() >= -1e-3
        assert pixels.max() <= 255 + 1e-3
    assert not torch.equal(attack_1, trained_1)
    assert runner.message_hub.get_scalar("train/adv_eps").current() == 8.0


def test_the_attack_raises_the_loss_it_is_told_to(tmp_path: Path) -> None:
    """loss_bright is the sum of the inputs: raising it alone moves everything up by eps."""
    runner = make_runner(tmp_path, [AdversarialHook(eps=4, alpha=8, losses=["*_bright"])])
    runner.train()
    clean = clean_inputs(runner.model, range(4), runner.train_dataloader.dataset)
    std, mean = torch.tensor(STD).view(1, 3, 1, 1), torch.tensor(MEAN).view(1, 3, 1, 1)
    expected = ((clean * std + mean) + 4).clamp(max=255)
    torch.testing.assert_close(passes(runner.model)[1] * std + mean, expected, atol=1e-3, rtol=0)


def test_weights_equal_those_of_plain_training_on_the_attacked_images(tmp_path: Path) -> None:
    """Nothing of the attack leaks into gradients or statistics, accumulation over two batches included."""
    wrapper = dict(
        type="OptimWrapper", optimizer=dict(type="Adam", lr=0.01), clip_grad=dict(max_norm=0.1), accumulative_counts=2
    )
    config: dict[str, Any] = dict(optim_wrapper=wrapper, train_cfg=dict(by_epoch=True, max_epochs=3))
    attacked = make_runner(tmp_path / "attacked", [AdversarialHook(batchnorm="batch")], **config)
    attacked.train()
    images = iter(passes(attacked.model)[1::2])

    class Replay(Hook):
        def before_train(self, runner: Runner) -> None:
            runner.model.data_preprocessor.register_forward_hook(lambda *a: {**a[2], "inputs": next(images)})

    replayed = make_runner(tmp_path / "replayed", [Replay()], **config)
    replayed.train()
    for (key, value), other in zip(
        attacked.model.state_dict().items(), replayed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key


@pytest.mark.parametrize(("mode", "updates"), [("train", 4), ("batch", 2), ("eval", 2)])
def test_batchnorm_switch(tmp_path: Path, mode: str, updates: int) -> None:
    runner = make_runner(tmp_path, [AdversarialHook(batchnorm=mode)])  # type: ignore[arg-type]
    runner.train()
    assert runner.model.norm.num_batches_tracked == updates


def test_padding_is_untouched_for_images_of_different_sizes(tmp_path: Path) -> None:
    dataset = Images(4, sizes=((8, 6), (5, 8)))
    preprocessor = dict(type="ImgDataPreprocessor", mean=MEAN, std=STD, pad_size_divisor=8, pad_value=114)
    runner = make_runner(
        tmp_path, [AdversarialHook()], model=Net(preprocessor), train_dataloader=loader(dataset)
    )  # fmt: skip
    runner.train()
    _, trained = passes(runner.model)
    clean = clean_inputs(runner.model, range(4), dataset)
    assert (trained[0, :, :, 6:] == 114).all()
    assert (trained[1, :, 5:, :] == 114).all()
    changed = (trained != clean).any(1)
    assert changed[0, :, :6].float().mean() > 0.9
    assert changed[1, :5].float().mean() > 0.9


def test_detectors_say_themselves_where_their_image_ends() -> None:
    """img_shape after a batch augmentation resized the batch; raw sizes are of no use then."""

    sample = BaseDataElement(metainfo=dict(img_shape=(4, 6), batch_input_shape=(8, 8)))
    area = image_area(torch.zeros(1, 3, 8, 8), [sample], raw=[torch.zeros(3, 2, 3)])
    assert area is not None
    assert area.sum() == 24
    assert area[0, 0, :4, :6].all()
    assert image_area(torch.zeros(1, 3, 8, 8), None) is None


def test_pixel_units_of_an_unnormalising_preprocessor() -> None:
    class Raw(nn.Module):
        pass

    unit, low, high = pixel_units(Raw(), torch.zeros(1, 3, 2, 2))
    assert (unit.item(), low.item(), high.item()) == (1.0, 0.0, 255.0)
    unit, low, high = pixel_units(Raw(), torch.zeros(1, 3, 2, 2), pixel_range=1.0)
    assert (round(unit.item() * 255, 5), low.item(), high.item()) == (1.0, 0.0, 1.0)


def test_evaluation_is_never_attacked(tmp_path: Path) -> None:
    from mmengine.evaluator import BaseMetric

    class Nothing(BaseMetric):
        def process(self, data_batch: Any, data_samples: Any) -> None:
            self.results.append(0)

        def compute_metrics(self, results: list) -> dict:
            return {}

    class Nosy(Hook):
        """Calls the model as if in training, outside an iteration (as precise-BN hooks do)."""

        def after_train_epoch(self, runner: Runner) -> None:
            batch = next(iter(runner.train_dataloader))
            runner.model(**runner.model.data_preprocessor(batch, True), mode="tensor")

    dataset = Images(4)
    runner = make_runner(
        tmp_path,
        [AdversarialHook(), Nosy()],
        train_dataloader=loader(dataset),
        val_dataloader=loader(dataset),
        val_cfg=dict(),
        val_evaluator=[Nothing()],
        test_dataloader=loader(dataset),
        test_cfg=dict(),
        test_evaluator=[Nothing()],
    )
    runner.train()
    runner.test()
    clean = clean_inputs(runner.model, range(4), dataset)
    assert len(passes(runner.model, "predict")) == 2
    for inputs in passes(runner.model, "predict") + passes(runner.model, "tensor"):
        assert torch.equal(inputs, clean)
    runner.model.seen.clear()
    runner.model.data_preprocessor(next(iter(runner.train_dataloader)), True)
    assert not runner.model.seen  # detached after training


def test_schedule_begins_warms_up_and_ends(tmp_path: Path) -> None:
    """Two iterations an epoch: epochs 1 and 2 grow over four iterations, epoch 4 is no longer attacked."""
    eps = []

    class Watch(Hook):
        priority = "LOW"

        def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
            eps.append(runner.message_hub.get_scalar("train/adv_eps").current())

    hook = AdversarialHook(eps=8, begin=1, warmup=2, end=4)
    runner = make_runner(tmp_path, [hook, Watch()], train_cfg=dict(by_epoch=True, max_epochs=5))
    runner.train()
    assert eps == [0, 0, 2, 4, 6, 8, 8, 8, 0, 0]
    assert len(passes(runner.model)) == 10 + 6


def test_schedule_in_iterations_on_an_iteration_loop(tmp_path: Path) -> None:
    hook = AdversarialHook(begin=1, end=3, by_epoch=False)
    runner = make_runner(tmp_path, [hook], train_cfg=dict(by_epoch=False, max_iters=5))
    runner.train()
    assert len(passes(runner.model)) == 5 + 2
    with pytest.raises(ValueError, match="by_epoch=False"):
        make_runner(tmp_path / "b", [AdversarialHook()], train_cfg=dict(by_epoch=False, max_iters=1)).train()


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    def run(name: str, epochs: int, **kwargs: Any) -> Runner:
        runner = make_runner(
            tmp_path / name,
            [AdversarialHook()],
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            **kwargs,
        )
        runner.train()
        return runner

    through = run("through", 2)
    run("half", 1)
    resumed = run("rest", 2, resume=True, load_from=str(tmp_path / "half" / "epoch_1.pth"))
    for key, value in through.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_switched_attack_survives_a_resume_but_not_a_mere_loading_of_weights(tmp_path: Path) -> None:
    hook = AdversarialHook()
    runner = make_runner(tmp_path / "a", [hook])
    hook.switch("pgd", alpha=4.0, steps=2)
    runner.train()
    path = str(tmp_path / "a" / "epoch_1.pth")
    for resume, attack in ((True, "pgd"), (False, "fgsm_rs")):
        later = AdversarialHook()
        config: dict[str, Any] = dict(train_cfg=dict(by_epoch=True, max_epochs=2), load_from=path, resume=resume)
        make_runner(tmp_path / f"b{resume}", [later], **config).train()
        assert later.attack == attack
    assert (later.alpha, later.steps) == (10.0, 1)


class BFloat16Wrapper(OptimWrapper):
    """Autocast on the CPU (mmengine's AmpOptimWrapper asks for a GPU)."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


def test_mixed_precision_trains_in_half_but_attacks_in_float32(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = make_runner(tmp_path, [AdversarialHook()], model=model, optim_wrapper=BFloat16Wrapper(optimizer))
    runner.train()
    assert [dtype for mode, _, dtype in model.seen if mode == "loss"] == [torch.float32, torch.bfloat16] * 2


@pytest.mark.parametrize(
    "attack", [dict(attack="n_fgsm"), dict(attack="pgd", steps=3, alpha=4), dict(attack="pgd", steps=2, norm="l2")]
)
def test_other_attacks(tmp_path: Path, attack: dict) -> None:
    runner = make_runner(tmp_path, [dict(type="mmitp.AdversarialHook", eps=8, **attack)])
    runner.train()
    assert len(passes(runner.model)) == 2 * (attack.get("steps", 1) + 1)


def test_distributed_wrapper_of_one_process(tmp_path: Path) -> None:
    """The wrapper passes `training` by name; the result is the plain run's."""
    import torch.distributed as dist
    from mmengine.model import MMDistributedDataParallel

    plain = make_runner(tmp_path / "plain", [AdversarialHook(dropout="eval")])
    plain.train()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        runner = make_runner(tmp_path / "ddp", [AdversarialHook(dropout="eval")])
        runner.model = MMDistributedDataParallel(runner.model)
        runner.train()
        inner = runner.model.module
    finally:
        dist.destroy_process_group()
    assert len(passes(inner)) == 4
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, inner.state_dict()[key]), key


def test_masked_network_is_attacked_through_its_masks(tmp_path: Path) -> None:
    """A channel the network ignores carries no gradient: it keeps its random start."""

    class Masked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.prune_mask = nn.Parameter(torch.tensor([1.0, 0.0, 1.0]))

        def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
            losses = super().forward(inputs * self.prune_mask.view(1, 3, 1, 1), data_samples, mode)
            self.seen[-1] = (mode, inputs.detach().clone(), inputs.dtype)
            return losses

    model = Masked()
    make_runner(tmp_path, [AdversarialHook(losses=["loss_cls"])], model=model).train()
    start, trained = passes(model)[:2]
    assert torch.equal(start[:, 1], trained[:, 1])
    assert not torch.equal(start[:, 0], trained[:, 0])


class NoReads(TorchDispatchMode):
    """Any value read by the host is an error: on an accelerator it makes the training step wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "attack", [dict(), dict(attack="n_fgsm"), dict(attack="pgd", steps=2), dict(attack="pgd", steps=2, norm="l2")]
)
@pytest.mark.parametrize("sizes", [((8, 8),), ((8, 6), (5, 8))])
def test_an_attack_reads_nothing_from_the_device_once_the_pixel_range_is_known(attack: dict, sizes: Any) -> None:
    dataset, hook = Images(4, sizes), AdversarialHook(**attack)
    model = Net(dict(type="ImgDataPreprocessor", mean=MEAN, std=STD, pad_size_divisor=8))
    items = [dataset[index] for index in range(4)]
    raw = {"inputs": [item["inputs"] for item in items], "data_samples": [item["data_samples"] for item in items]}
    data = model.data_preprocessor(raw, True)
    hook.scale = 1.0
    hook.perturb(model, data, raw)
    with NoReads():
        attacked = hook.perturb(model, data, raw)
    assert not torch.equal(attacked["inputs"], data["inputs"])
    with NoReads(), pytest.raises(AssertionError):
        AdversarialHook().perturb(model, data, raw)  # its first batch: the range is looked at


@pytest.mark.parametrize("dark", [0, 1])
def test_black_images_say_nothing_about_the_pixel_range(tmp_path: Path, dark: int) -> None:
    """Black, or the noise of the last bit; what follows is bright. One image a batch."""
    dataset = Images(3)
    dataset.images[0] = (dataset.images[0] % (dark + 1)).byte()
    runner = make_runner(tmp_path, [AdversarialHook(eps=8, alpha=16)], train_dataloader=loader(dataset, 1))
    runner.train()
    moved = (passes(runner.model)[1] - clean_inputs(runner.model, range(1), dataset)) * torch.tensor(STD).view(3, 1, 1)
    assert moved.max().item() == pytest.approx(8, abs=1e-3)
    assert len(passes(runner.model)) == 6


def test_the_first_image_that_is_not_black_says_it(tmp_path: Path) -> None:
    dataset = Images(3)
    dataset.images = [image.float() / 255 for image in dataset.images]  # type: ignore[misc]
    dataset.images[0].zero_()
    hook, model = AdversarialHook(), Net(dict(type="ImgDataPreprocessor"))
    with pytest.raises(ValueError, match="pixel_range=255"):
        make_runner(tmp_path, [hook], model=model, train_dataloader=loader(dataset, 1)).train()
    assert len(passes(model)) == 2


def test_a_run_of_black_images_is_mentioned_once(tmp_path: Path) -> None:
    dataset = Images(25)
    dataset.images = [torch.zeros_like(image) for image in dataset.images]
    runner = make_runner(tmp_path, [AdversarialHook()], train_dataloader=loader(dataset, 1))
    runner.train()
    assert log_of(runner).count("first 20 batches are all but black, so pixel_range=255 could not be checked") == 1


def test_a_preprocessor_without_an_image_box_is_refused() -> None:
    class Broken(nn.Module):
        mean, std = torch.tensor([0.0]), torch.tensor([0.0])

    images = torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match="mean and std make no image box"):
        check_pixel_range(images, pixel_units(Broken(), images), 255.0)


def photos(scale: float = 1.0) -> torch.Tensor:
    """Blocks in grey levels 0 to 255, with noise; ``scale`` below 1 darkens."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(4, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.rand(4, 3, 32, 32, generator=generator)
    return ((0.8 * blocks + 0.2 * noise) * 255 * scale).floor()


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("pixel_range", [255.0, 1.0])
@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3), ((0.5,) * 3, (0.25,) * 3)],
)
def test_images_that_the_pipeline_normalises_are_refused(
    power: float, pixel_range: float, mean: tuple, std: tuple
) -> None:
    """Bright, middling and dark ones: their values lie around 0, where eps would count in standard deviations."""
    center, width = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
    images = ((photos() / 255) ** power - center) / width
    plain = Net(dict(type="ImgDataPreprocessor")).data_preprocessor
    with pytest.raises(ValueError, match="do not fit pixel_range.*the preprocessor normalises, not the pipeline"):
        check_pixel_range(images, pixel_units(plain, images, pixel_range=pixel_range), pixel_range)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.2, 4.9 / 255])
def test_images_of_the_range_are_taken(normalised: bool, scale: float) -> None:
    """As they are, padded as detectors' batches are, and augmented in floating point beyond black and white."""
    preprocessor = Net(None if normalised else dict(type="ImgDataPreprocessor")).data_preprocessor
    images = photos(scale)
    mean, std = (preprocessor.mean, preprocessor.std) if normalised else (0.0, 1.0)
    units, bright = pixel_units(preprocessor, images), scale > 0.1
    shown = (images - mean) / std
    padded, area = torch.nn.functional.pad(shown, (0, 8, 0, 8), value=114), torch.zeros(4, 1, 40, 40)
    area[..., :32, :32] = 1
    assert check_pixel_range(shown, units, 255.0) is bright
    assert check_pixel_range(padded, units, 255.0, area) is bright
    if bright:
        for brightness in (-16, 16):
            assert check_pixel_range(((images + brightness) * 1.5 - mean) / std, units, 255.0)


class QuickStart(BaseModel):
    """As in mmengine's tutorial: a loader that gives (images, labels), and a model that takes them by position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor, labels: torch.Tensor, mode: str) -> dict:
        self.seen.append(images.detach().clone())
        return {"loss": nn.functional.cross_entropy(self.net(images), labels)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_that_are_sequences(tmp_path: Path, dtype: torch.dtype) -> None:
    images, labels = torch.rand(4, 3, 8, 8, dtype=dtype), torch.arange(4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    model, hook = QuickStart().to(dtype), AdversarialHook(eps=8, alpha=16, pixel_range=1)
    make_runner(tmp_path, [hook], model=model, train_dataloader=loader).train()
    attack, trained = model.seen
    assert trained.dtype == dtype
    assert not torch.equal(attack, trained)
    moved = (trained - images).abs() * 255
    assert moved.max() <= 8 + 1e-3
    assert ((moved - 8).abs() < 1e-3).float().mean() > 0.5


class AnySize(Net):
    """Takes a list of images of any sizes, and is raised by their brightness alone."""

    def forward(self, inputs: Any, data_samples: list | None = None, mode: str = "tensor") -> Any:
        self.seen.extend((mode, image.detach().clone(), image.dtype) for image in inputs)
        logits = torch.stack([self.head(self.conv(image[None]).mean((2, 3)))[0] for image in inputs])
        bright = torch.stack([image.sum() for image in inputs]).sum()
        return {"loss_bright": bright * 1e-3, "loss_none": logits.sum() * 0}


def test_batches_that_are_lists_of_images_of_any_size(tmp_path: Path) -> None:
    """Raising the brightness moves every value of every image up by eps, whatever its size and its companions."""
    dataset = Images(2, sizes=((8, 6), (5, 9)))
    dataset.images = [image.float() for image in dataset.images]  # type: ignore[misc]
    model = AnySize(dict(type="BaseDataPreprocessor"))
    hook = AdversarialHook(eps=4, alpha=8)
    make_runner(tmp_path, [hook], model=model, train_dataloader=loader(dataset)).train()
    trained = passes(model)[2:]
    for image, clean in zip(trained, dataset.images, strict=True):
        torch.testing.assert_close(image, (clean + 4).clamp(max=255), atol=1e-3, rtol=0)


def test_a_list_is_attacked_as_its_images_are_one_by_one() -> None:
    sizes = ((3, 4), (5, 2))
    data = {"inputs": [torch.rand(3, *size) for size in sizes], "data_samples": None}
    batch = ImageBatch.find(data)
    assert batch.images.shape == (2, 3, 5, 4)
    back = batch.replaced(batch.images + 1)
    for image, clean in zip(back["inputs"], data["inputs"], strict=True):
        assert torch.equal(image, clean + 1)


@pytest.mark.parametrize(
    "data",
    [
        {"inputs": {"img": torch.zeros(1, 3, 4, 4)}},
        {"left": torch.zeros(1, 3, 4, 4), "right": torch.zeros(1, 3, 4, 4)},
        [torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)],
        {"inputs": [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)]},
        {"inputs": []},
        torch.zeros(1, 3, 4, 4),
    ],
)
def test_batches_without_one_set_of_images_are_refused_with_what_they_hold(data: Any) -> None:
    with pytest.raises(ValueError, match=r"needs one batch of floating-point images.*found in \{.*\}"):
        ImageBatch.find(data)


def test_labels_that_are_a_plain_tensor(tmp_path: Path) -> None:
    class Labels(Images):
        def __getitem__(self, index: int) -> dict:
            return {"inputs": self.images[index].float(), "data_samples": torch.tensor(index % 4)}

    class Plain(Net):
        def forward(self, inputs: torch.Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
            assert data_samples.shape == (4,)
            logits = self.head(self.norm(self.conv(inputs)).relu().mean((2, 3)))
            return {"loss": nn.functional.cross_entropy(logits, data_samples)}

    loader = torch.utils.data.DataLoader(Labels(8), batch_size=4)
    runner = make_runner(
        tmp_path, [AdversarialHook()], model=Plain(dict(type="BaseDataPreprocessor")), train_dataloader=loader
    )
    runner.train()
    assert runner.iter == 2


def log_of(runner: Runner) -> str:
    return next(Path(runner.log_dir).glob("*.log")).read_text()


def test_a_window_after_the_end_of_the_run_is_refused_and_a_cut_one_mentioned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"begin=1\) attacks nothing: the run ends after 1 epochs"):
        make_runner(tmp_path / "a", [AdversarialHook(begin=1)]).train()
    late = AdversarialHook(begin=2, by_epoch=False)
    with pytest.raises(ValueError, match="the run ends after 2 iterations"):
        make_runner(tmp_path / "b", [late]).train()
    runner = make_runner(tmp_path / "c", [AdversarialHook(end=5, warmup=3)])
    runner.train()
    assert "AdversarialHook(end=5): the run ends before, after 1 epochs" in log_of(runner)
    assert "warmup=3): the attack never reaches its full size, since it ends at 1 epochs" in log_of(runner)
    whole = make_runner(tmp_path / "d", [AdversarialHook(end=1, warmup=1)])
    whole.train()
    assert "AdversarialHook" not in log_of(whole)


def test_two_hooks_may_follow_each_other_but_not_attack_at_once(tmp_path: Path) -> None:
    first = AdversarialHook(by_epoch=False, end=1)
    make_runner(tmp_path / "a", [first, AdversarialHook(by_epoch=False, begin=1)]).train()
    for index, options in enumerate([dict(), dict(by_epoch=False, begin=0), dict(by_epoch=False, end=2)]):
        with pytest.raises(ValueError, match="two AdversarialHooks attack at the same time"):
            make_runner(
                tmp_path / f"b{index}", [AdversarialHook(by_epoch=False, end=1), AdversarialHook(**options)]
            ).train()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_ends_the_run_before_it_is_trained_on(tmp_path: Path, value: float) -> None:
    dataset = Images(8)
    dataset.images = [image.float() for image in dataset.images]  # type: ignore[misc]
    dataset.images[6][0, 2, 3] = value
    model = Net()
    runner = make_runner(tmp_path, [AdversarialHook()], model=model, train_dataloader=loader(dataset))
    with pytest.raises(ValueError, match="image 2 of the batch of iteration 2 holds NaN or infinite values"):
        runner.train()
    assert len(passes(model)) == 2  # the first iteration's
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_images_that_the_preprocessor_ruins_end_the_run_before_anything_is_saved(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, [AdversarialHook()])

    class Ruin(Hook):
        priority = "HIGH"  # attached before the attack is

        def before_train(self, runner: Runner) -> None:
            runner.model.data_preprocessor.register_forward_hook(
                lambda *a: {**a[2], "inputs": a[2]["inputs"] / (runner.iter == 0)}
            )

    runner.register_hook(Ruin())
    with pytest.raises(ValueError, match="attacked images of iteration 2 hold NaN or infinite values"):
        runner.train()
    assert not list(tmp_path.glob("*.pth"))


class Diverging(Net):
    """Its loss is infinite in every forward pass of iteration 2, and its weights NaN after it, or not."""

    weights_too = True

    def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
        losses = super().forward(inputs, data_samples, mode)
        if len(passes(self)) in (3, 4):  # iteration 2: attack, training
            bad = losses["loss_cls"] * torch.inf
            losses["loss_cls"] = bad if self.weights_too or len(passes(self)) == 3 else losses["loss_cls"]
        return losses


def test_a_training_that_has_diverged_ends_before_anything_is_saved(tmp_path: Path) -> None:
    model = Diverging()
    with pytest.raises(ValueError, match=r"diverged: in iteration 2 .* of the model's tensors \(conv.weight"):
        make_runner(tmp_path, [AdversarialHook()], model=model).train()
    assert not list(tmp_path.glob("*.pth"))


def test_a_loss_that_is_not_finite_once_is_mentioned(tmp_path: Path) -> None:
    model = Diverging()
    model.weights_too = False
    model.register_buffer("hidden", torch.tensor(-torch.inf))  # a constant, as attention's masks are
    runner = make_runner(tmp_path, [AdversarialHook()], model=model, train_cfg=dict(by_epoch=True, max_epochs=2))
    runner.train()
    assert log_of(runner).count("the loss under attack is not finite in iteration 2, so its gradient moved") == 1


def test_sizes_that_look_like_another_unit_are_mentioned_once(tmp_path: Path) -> None:
    settings = dict(type="mmitp.AdversarialHook", eps=0.03, alpha=0.04)
    runner = make_runner(tmp_path, [settings], train_cfg=dict(by_epoch=True, max_epochs=2))
    runner.train()
    assert log_of(runner).count("if it was meant in units of the full range, it is eps=7.65") == 1


def test_a_single_step_is_not_switched_to_in_l2() -> None:
    hook = AdversarialHook(attack="pgd", norm="l2", eps=128, alpha=30)
    with pytest.raises(ValueError, match="needs attack='pgd'"):
        hook.switch("fgsm_rs", alpha=10)
    assert hook.attack == "pgd"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": float("nan")}, "eps must be finite"),
        ({"eps": 300}, "eps=300 is in pixels/255"),
        ({"eps": "8"}, "eps must be a number"),
        ({"alpha": 0}, "alpha, the length of a step, must be positive"),
        ({"alpha": -1}, "alpha must be finite and must not be negative"),
        ({"noise": float("nan"), "attack": "n_fgsm"}, "noise must be finite"),
        ({"alpha": None}, "alpha, the length of a step of attack='fgsm_rs', must be a positive number"),
        ({"pixel_range": 0}, "pixel_range, the value of full white, must be positive"),
        ({"begin": float("nan")}, "window is empty"),
        ({"attack": "pgd", "steps": 1.5}, "steps must be a whole number"),
    ],
)
def test_wrong_values_are_answered_at_construction(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialHook(**wrong)


def test_wrong_settings_are_answered_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="attack must be one of"):
        AdversarialHook(attack="fgsm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window is empty"):
        AdversarialHook(begin=3, end=3)
    with pytest.raises(ValueError, match="needs attack='pgd'"):
        AdversarialHook(norm="l2")
    with pytest.raises(ValueError, match="must not be negative"):
        AdversarialHook(eps=-1)
    with pytest.raises(ValueError, match="at least 1"):
        AdversarialHook(attack="pgd", steps=0)
    with pytest.raises(ValueError, match=r"'loss_heat' matches none of the model's \['a', 'loss_b'\]"):
        select_losses({"loss_b": torch.zeros(1), "a": torch.zeros(1)}, ["loss_heat"])


def test_images_that_do_not_fit_the_settings_are_refused(tmp_path: Path) -> None:
    dataset = Images(4)
    dataset.images = [image.float() / 255 for image in dataset.images]  # type: ignore[misc]
    raw = Net(dict(type="ImgDataPreprocessor"))
    runner = make_runner(tmp_path / "a", [AdversarialHook()], model=raw, train_dataloader=loader(dataset))
    with pytest.raises(ValueError, match="pixel_range=255"):
        runner.train()
    uint8 = make_runner(tmp_path / "b", [AdversarialHook()], model=Net(dict(type="BaseDataPreprocessor")))
    with pytest.raises(ValueError, match=r"none found in \{'inputs': list of uint8 \(3, 8, 8\)\}"):
        uint8.train()


def test_images_already_in_unit_range(tmp_path: Path) -> None:
    dataset = Images(4)
    dataset.images = [image.float() / 255 for image in dataset.images]  # type: ignore[misc]
    model = Net(dict(type="ImgDataPreprocessor", mean=[0.5, 0.5, 0.5], std=[0.25, 0.2, 0.3]))
    hook = AdversarialHook(eps=8, alpha=16, pixel_range=1.0)
    make_runner(tmp_path, [hook], model=model, train_dataloader=loader(dataset)).train()
    moved = (passes(model)[1] - clean_inputs(model, range(4), dataset)) * torch.tensor([0.25, 0.2, 0.3]).view(3, 1, 1)
    assert moved.abs().max().item() == pytest.approx(8 / 255, abs=1e-6)


def test_registered_under_its_scope() -> None:
    assert isinstance(HOOKS.build(dict(type="mmitp.AdversarialHook", eps=2, alpha=2.5)), AdversarialHook)
