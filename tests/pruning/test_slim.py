"""Gathers and scatters: what they compute, and that the network's memory layout survives them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmitp.pruning import MacBudget, freeze_masks, mask_model, masked_layers, project, slim
from mmitp.pruning.layers import kind_of
from mmitp.pruning.slim import LayerPlan, SlimPlan, apply_plan, shrink_layer
from mmitp.pruning.slim_layers import SlimLayer, gather, scatter, zeros

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
INDEX = torch.tensor([4, 0, 3])


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    return request.param


def image(layout: torch.memory_format, channels: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, channels, 3, 4).contiguous(memory_format=layout)


def test_gather_reads_the_indexed_channels_in_the_layout_given(layout: torch.memory_format) -> None:
    x = image(layout, 5)
    out = gather(x, -3, INDEX)
    assert torch.equal(out, torch.stack([x[:, 4], x[:, 0], x[:, 3]], 1))
    assert out.is_contiguous(memory_format=layout)


def test_scatter_writes_the_indexed_channels_in_the_layout_given(layout: torch.memory_format) -> None:
    x = image(layout, 3)
    out = scatter(x, -3, INDEX, 5)
    nothing = torch.zeros(2, 3, 4)
    assert torch.equal(out, torch.stack([x[:, 1], nothing, nothing, x[:, 2], x[:, 0]], 1))
    assert out.is_contiguous(memory_format=layout)


def test_the_gradients_go_back_where_the_channels_came_from(layout: torch.memory_format) -> None:
    x = image(layout, 5).requires_grad_()
    scatter(gather(x, -3, INDEX), -3, INDEX, 5).square().sum().backward()
    expected = torch.zeros_like(x)
    expected[:, INDEX] = 2 * x.detach()[:, INDEX]
    assert torch.equal(x.grad, expected)


def test_features_and_images_without_a_batch_are_gathered_and_scattered_too() -> None:
    features, single = torch.randn(2, 5), torch.randn(5, 3, 4)
    assert torch.equal(gather(features, -1, INDEX), features[:, INDEX])
    assert torch.equal(scatter(features[:, INDEX], -1, INDEX, 5)[:, INDEX], features[:, INDEX])
    assert torch.equal(gather(single, -3, INDEX), single[INDEX])


def test_zeros_in_place_of_a_dead_layer_have_the_inputs_layout(layout: torch.memory_format) -> None:
    out = zeros(image(layout, 3), 2, 6, 3, 4)
    assert out.shape == (2, 6, 3, 4)
    assert out.is_contiguous(memory_format=layout)
    assert not out.any()


class Residual(nn.Module):
    """Streams with several readers: slimmed, they gather and scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(4)
        )
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    model = mask_model(Residual())
    budget = MacBudget(model, EXAMPLE)
    for _, layer in budget.masked:
        nn.init.normal_(layer.prune_mask)
    freeze_masks(model, budget.split(project(budget, 0.4).pattern))
    return slim(model, EXAMPLE, budget)


def test_a_slimmed_network_stays_channels_last_throughout(small: nn.Module) -> None:
    layers = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert any(isinstance(m, SlimLayer) and m.in_index is not None for m in layers)
    assert any(isinstance(m, SlimLayer) and m.out_index is not None for m in layers)
    layouts = []
    for layer in layers:
        layer.register_forward_hook(
            lambda m, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    out = small(EXAMPLE.contiguous(memory_format=torch.channels_last))
    assert len(layouts) == len(layers)
    assert all(layouts)
    torch.testing.assert_close(out, small(EXAMPLE))


def test_an_onnx_file_of_it_transposes_nothing(small: nn.Module, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    file = str(tmp_path / "small.onnx")
    example = EXAMPLE.contiguous(memory_format=torch.channels_last)
    torch.onnx.export(small.eval(), (example,), file, dynamo=False)
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert "Gather" in kinds
    assert "Transpose" not in kinds


class Stream(nn.Module):
    """A residual stream whose readers drop different channels, through convolution, transposed one and linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.down = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(8, 8, 2, stride=2)
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x + self.b(x)
        x = (x + self.down(self.up(x))).mean((2, 3))
        return self.out(x + self.fc(x))


def slimmed_stream() -> tuple[nn.Module, Tensor]:
    net, x = mask_model(Stream().eval(), linear=True), torch.randn(2, 3, 8, 8)
    for name, off in dict(b=[0, 1], up=[2, 3, 4], down=[0, 7], fc=[0, 5], out=[0, 1, 2]).items():
        getattr(net, name).prune_mask.data[off] = -1.0
    small = slim(net, x)
    wired = {type(m).__name__: m for m in small.modules() if isinstance(m, SlimLayer)}
    assert set(wired) == {"SlimConv2d", "SlimConvTranspose2d", "SlimLinear"}
    return small, x


def test_a_slimmed_network_is_traced_and_scripted(layout: torch.memory_format) -> None:
    small, x = slimmed_stream()
    x = x.contiguous(memory_format=layout)
    expected = small(x)
    for graph in (torch.fx.symbolic_trace(small), torch.jit.script(small)):
        assert torch.equal(graph(x), expected)
        assert graph(x[:1, :, :6, :6]).shape == (1, 3)


def test_a_slimmed_network_is_quantised_after_training() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    small, x = slimmed_stream()
    engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    try:
        prepared = quantize_fx.prepare_fx(small, get_default_qconfig_mapping(engine), (x,))
        expected = prepared(x)
        quantised = quantize_fx.convert_fx(prepared)(x)
    finally:
        torch.backends.quantized.engine = before
    assert (quantised - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(4, 5, 3, padding="same", dilation=2),
        nn.Conv2d(4, 5, 3, padding="valid"),
        nn.ConvTranspose2d(4, 5, (3, 2), stride=2, padding=(1, 0), output_padding=(1, 0), dilation=(1, 2)),
        nn.Linear(4, 5),
    ],
    ids=str,
)
def test_a_layer_without_readers_gives_zeros_of_the_same_shape(layer: nn.Module) -> None:
    x = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 7, 8)
    expected = torch.zeros_like(layer(x))
    kind = kind_of(layer)
    assert kind is not None
    shrink_layer(layer, kind, LayerPlan(torch.tensor([1]), torch.arange(0), torch.tensor([1]), torch.arange(0), 5))
    for call in (
        layer(x),
        layer(input=x),
        torch.fx.symbolic_trace(nn.Sequential(layer))(x),
        torch.jit.script(layer)(x),
    ):
        assert torch.equal(call, expected)
    if not isinstance(layer, nn.Linear):
        assert layer(x[0]).shape == expected[0].shape
    if isinstance(layer, nn.ConvTranspose2d):
        assert layer(x, output_size=[13, 18]).shape[-2:] == (13, 18)


def test_a_budget_of_another_model_is_refused_by_name() -> None:
    net, x = mask_model(Stream()), torch.randn(1, 3, 4, 4)
    budget = MacBudget(net, x)
    with pytest.raises(ValueError, match=r"recorded on another model: its layer 'a' .*a copy is another model"):
        slim(copy.deepcopy(net), x, budget)


def test_layers_that_follow_each_other_need_no_gather_and_no_scatter() -> None:
    net = mask_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)))
    masked_layers(net)["2"].prune_mask.data[[0, 1, 5]] = -1.0
    masked_layers(net)["3"].prune_mask.data[[0, 1, 7]] = -1.0
    small = slim(net, torch.randn(1, 3, 9, 9))
    assert not [name for name, layer in small.named_modules() if isinstance(layer, SlimLayer)]
    assert [(layer.in_channels, layer.out_channels) for layer in small if isinstance(layer, nn.Conv2d)] == [
        (3, 5), (5, 5), (5, 4),
    ]  # fmt: skip


def test_a_network_that_looks_at_the_width_of_its_tensors_keeps_them(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y / y.shape[1])

    net = mask_model(Scaled())
    net.b.prune_mask.data[:3] = -1.0
    x = torch.randn(1, 3, 4, 4)
    small = slim(net, x)
    assert "narrow tensors do not suit Scaled" in caplog.text
    assert small.a.weight.shape[0] == 5  # computes what is read, and fills up with zeros
    torch.testing.assert_close(small(x), net(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_network_that_holds_tensors_of_the_last_pass_slims(norm: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), norm(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = [self.c(self.b(self.a(x)).relu())]
            return self.seen[0]

    net, x = mask_model(Net()), torch.randn(1, 3, 4, 4)
    net.c.prune_mask.data[:3] = -1
    budget = MacBudget(net, x)
    net(x).sum().backward()
    assert slim(net, x, budget).c.in_channels == 5


@pytest.mark.parametrize(("name", "channels"), [("1", 9), ("2", 3)])
def test_a_spec_with_norms_of_another_model_is_refused(name: str, channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.PReLU())
    apply_plan(net, SlimPlan.from_spec(dict(layers={}, norms={"1": 8, "3": 8})))
    with pytest.raises(ValueError, match=f"the slim spec gives '{name}' {channels} channels.*made from another model"):
        apply_plan(net, SlimPlan.from_spec(dict(layers={}, norms={name: channels})))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "a slim spec is a dictionary, got None"),
        (dict(norms={}), "spec's layers must be a dictionary by layer name, got None"),
        (dict(layers={"0": dict(inputs=3)}, norms={}), r"layers\['0'\].outputs must be a number of channels, got None"),
        (dict(layers={"0": dict(inputs="3", outputs=8)}, norms={}), r"layers\['0'\].inputs must be .*, got '3'"),
        (dict(layers={}, norms={"1": 2.5}), r"norms\['1'\] must be a number of channels, got 2.5"),
        (dict(layers={}, norms={}, pads={"2": [1, 2]}), r"pads\['2'\] must be three numbers .*, got \[1, 2\]"),
    ],
)
def test_a_spec_that_was_edited_into_another_shape_is_refused_by_its_part(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: take it as 'mmitp slim' wrote it"):
        SlimPlan.from_spec(spec)
