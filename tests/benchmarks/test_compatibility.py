"""The table of what mmitp works on: how a row is made, what it says, and that the page is the committed figures'."""

import argparse
import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")


@pytest.fixture
def compatibility() -> Any:
    return importlib.import_module("compatibility")


def test_the_page_is_made_of_the_committed_figures(compatibility: Any) -> None:
    assert compatibility.table(argparse.Namespace(check=True)) == 0


def test_a_page_that_says_something_else_is_noticed(
    compatibility: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(compatibility.PAGE.read_text().replace("| yes |", "| no |", 1))
    monkeypatch.setattr(compatibility, "PAGE", page)
    monkeypatch.setattr(compatibility, "ROOT", tmp_path)
    assert compatibility.table(argparse.Namespace(check=True)) == 1
    assert "python benchmarks/compatibility.py table" in capsys.readouterr().err


def test_a_row_has_the_budgets_figures_and_an_independent_counters(
    compatibility: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 1)
            self.norm = torch.nn.BatchNorm2d(8)
            self.body = torch.nn.Conv2d(8, 4, 1)
            self.grouped = torch.nn.Conv2d(4, 4, 1, groups=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.grouped(self.body(self.norm(self.stem(x)).relu()))

    monkeypatch.setattr(compatibility, "_torchvision", lambda model, side: (Net(), compatibility._noise))
    row = compatibility.measure("torchvision/net")
    pixels = 64 * 64
    assert row["macs_dense"] == pixels * (24 + 32 + 4)
    assert (row["layers"], row["masked"], row["linear"]) == (3, 1, False)
    assert row["cheapest"] == round((3 + 4 + 4) / 60, 4)  # one channel between the stem and the body
    assert row["outcome"] == "equal"
    assert row["macs_slim"] == row["macs_counter"] <= row["macs_dense"] // 2
    assert row["second_size"]
    text = compatibility.cells("timm/some", row)
    assert text == "64x64 | 0.2 | 1 of 3 | 1 stem, 1 grouped | 0.1833 | yes | yes"
    assert "1,000 for" in compatibility.cells("timm/some", dict(row, macs_counter=1000))
    monkeypatch.setitem(compatibility.EXPLAINED, "timm/some", (row["macs_slim"] - 1000, "a reason"))
    assert compatibility.counter_of("timm/some", dict(row, macs_counter=1000)) == f"but for {row['macs_slim'] - 1000:,}"
    assert compatibility.counter_of("timm/some", dict(row, macs_counter=1001)) == ""
    assert "no: output differs" in compatibility.cells(
        "timm/some", dict(row, outcome="differs", problem="output differs")
    )


def test_constant_weights_are_moved_before_networks_are_compared(compatibility: Any) -> None:
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1))
    torch.nn.init.zeros_(net[1].bias)
    net.register_parameter("scale", torch.nn.Parameter(torch.full((4,), 1e-6)))
    compatibility.unsettle(net)
    for t in (net[0].weight, net[0].running_mean, net[0].running_var, net[1].bias, net.scale):
        assert t.unique().numel() == 4
    assert net.scale.min() > 0.5


def test_a_network_that_fails_is_a_row_that_says_why(compatibility: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        raise KeyError("no such layer in /some/folder/file.py")

    monkeypatch.setattr(compatibility, "_torchvision", build)
    row = compatibility.one("torchvision/net", limit=60, memory=64)
    assert row["outcome"] == "failed"
    assert row["problem"] == "KeyError: 'no such layer in file.py'"


def test_families_come_before_their_variants_and_libraries_in_turn(compatibility: Any) -> None:
    names = dict(torchvision=["torchvision/vgg11", "torchvision/vgg13", "torchvision/alexnet"], timm=["timm/a"])
    assert [name for _, name in compatibility.in_order(names)] == [
        "torchvision/vgg11",
        "timm/a",
        "torchvision/alexnet",
        "torchvision/vgg13",
    ]


def test_fused_attention_is_counted_by_its_layers(compatibility: Any) -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    macs, _ = compatibility.counted(layer, torch.randn(1, 5, 8))
    assert macs == 5 * (
        8 * 24 + 8 * 8 + 2 * 8 * 16
    )  # queries, keys and values; what joins the heads; two linear layers
    assert torch.backends.mha.get_fastpath_enabled()
