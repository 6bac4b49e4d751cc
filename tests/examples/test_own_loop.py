"""The guide to loops of one's own does what it says, block by block."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmitp.pruning import masked_layers

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own_loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LOOP, GO_ON, SAVE_SMALL, LOAD_SMALL, EXPORT, AVERAGE, ATTACK, HUGGING_FACE = BLOCKS


class Net(nn.Sequential):
    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 16), (16, 16)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(256, 4))


def run(code: str, epochs: int, **more: Any) -> dict[str, Any]:
    """Executes blocks of the guide with a network, images and a number of epochs at hand."""
    torch.manual_seed(0)
    loader = [(torch.rand(8, 3, 32, 32), torch.randint(0, 4, (8,))) for _ in range(6)]
    names = dict(Net=Net, loader=loader, epochs=epochs, **more)
    exec(compile(code, "own_loop.md", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("stopped", [1, 2, 3])  # before the window, in it, after it
def test_a_stopped_loop_goes_on_exactly(stopped: int) -> None:
    whole = run(LOOP, 5)["model"]
    run(LOOP, stopped)
    again = run(LOOP.replace("train(0)", "") + GO_ON, 5)["model"]
    assert not masked_layers(again)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_the_small_network_is_saved_rebuilt_and_exported() -> None:
    names = run(LOOP + SAVE_SMALL + LOAD_SMALL + EXPORT, 3)
    x = torch.rand(1, 3, 32, 32)
    small, expected = names["small"](x), names["model"].eval()(x)
    assert torch.equal(small, expected)
    torch.testing.assert_close(torch.export.load("small.pt2").module()(x), expected)
    assert sum(p.numel() for p in names["small"].parameters()) < sum(p.numel() for p in Net().parameters())


def test_an_average_is_slimmed_with_the_model() -> None:
    names = run("from mmitp.pruning import apply_plan\n" + LOOP.replace("train(0)", "") + AVERAGE, 2)
    model = names["model"]
    names["average"] = average = AveragedModel(model)
    names["train"](0)
    average.update_parameters(model)
    names["pruner"].freeze()  # as the function begins, to see what it has to leave
    masked = copy.deepcopy(average.module).eval()
    masked.load_state_dict({k: v for k, v in model.state_dict().items() if ".prune_" in k}, strict=False)
    x = torch.rand(2, 3, 32, 32)
    expected = masked(x)
    names["end_of_window"]()
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert not masked_layers(average)
    torch.testing.assert_close(average.eval()(x), expected)
    average.train().update_parameters(model)


def test_the_attack_of_the_guide_keeps_to_its_size_and_to_the_statistics() -> None:
    names = run(LOOP + ATTACK, 2)
    images, labels = names["loader"][0]
    before = names["model"][1].running_mean.clone()
    found = names["attacked"](images, labels)
    assert 0 < (found - images).abs().max() <= 2 / 255 + 1e-6
    assert torch.equal(names["model"][1].running_mean, before)


def test_the_callback_for_hugging_face_prunes() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is no dependency of mmitp")
    net = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
    )
    x = dict(pixel_values=torch.zeros(1, 3, 32, 32))
    names = run("from mmitp.pruning import InTrainPruner, mask_model\n" + HUGGING_FACE, 0)
    callback = names["Pruning"](x, 0.6, 1, 2)
    images = [dict(pixel_values=torch.rand(3, 32, 32), labels=i % 2) for i in range(32)]
    arguments = transformers.TrainingArguments(
        ".", num_train_epochs=3, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True
    )
    model = names["mask_model"](net, linear=True, example_inputs=x)
    transformers.Trainer(model, arguments, train_dataset=images, callbacks=[callback]).train()
    assert 0.55 < callback.pruner.report().ratio <= 0.6
    assert callback.pruner.slim()(**x).logits.shape == (1, 2)
