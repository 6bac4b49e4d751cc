"""The channel graph against reality: whatever a model does, the slimmed one equals it and costs the budget's MACs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmitp.pruning import MacBudget
from mmitp.pruning.layers import ChannelPad


class Net(nn.Module):
    """Named layers and a function of them and the input."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(i: int, o: int, k: int = 3, **kw: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=kw.pop("padding", k // 2), **kw)


def net(run: Callable[..., Any], **layers: nn.Module) -> Net:
    """A net whose stem ``a`` gives 8 channels and whose readers ``b`` (8 -> 6) and ``c`` (6 -> 4) follow."""
    return Net(run, **{"stem": conv(3, 5), "a": conv(5, 8), "b": conv(8, 6), "c": conv(6, 4), **layers})


def front(m: Any, x: Tensor) -> Tensor:
    return m.a(F.relu(m.stem(x)))


def back(m: Any, x: Tensor) -> Tensor:
    return m.c(F.relu(m.b(x)))


def pure(op: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: back(m, op(front(m, x)))


def split_and_swap(x: Tensor) -> Tensor:
    p, q = x.split([3, 5], dim=1)
    return torch.cat([q, p], 1)


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def in_place_on_a_view(m: Any, x: Tensor) -> Tensor:
    h, z = front(m, x), m.z(m.stem(x))
    h[:, :].add_(torch.cat([z, z], 1))
    return back(m, h)


def in_place_under_a_view(m: Any, x: Tensor) -> Tensor:
    h, z = front(m, x), m.z(m.stem(x))
    view = h[:, :8]
    h += torch.cat([z, z], 1)
    return back(m, view)


def in_place_under_detached(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    same = h.detach()
    same.mul_(m.gate(F.adaptive_avg_pool2d(x, 1)))
    return back(m, h)


def item_assignment(m: Any, x: Tensor) -> Tensor:
    h = front(m, x).clone()
    h[:, 2:6] = m.z(m.stem(x))
    return back(m, h)


def assembled_in_zeros(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    buffer = torch.zeros(x.shape[0], 8, *h.shape[2:])
    buffer[:, :8] = h
    return back(m, buffer)


def written_through_out(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    torch.add(h, m.a(m.stem(x.flip(-1))), out=h)
    return back(m, h)


def residual(m: Any, x: Tensor) -> Tensor:
    h = F.relu_(front(m, x))
    y = m.d(h)
    y += h
    y = m.bn(y).relu_()
    return back(m, y + m.d2(y))


def cross_sum(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    p, q = h.chunk(2, 1)
    return back(m, torch.cat([p + q, q - p], 1))


def squeeze_excite(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    s = F.adaptive_avg_pool2d(h, 1)
    return back(m, h * torch.sigmoid(m.s2(F.relu(m.s1(s)))))


def squeeze_excite_linear(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    n, c = h.shape[:2]
    s = m.l2(F.relu(m.l1(h.mean((2, 3)))))
    return back(m, h * s.sigmoid().view(n, c, 1, 1))


def spatial_gate(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, h * torch.sigmoid(m.g(h)))


def channel_statistics_gate(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    s = torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1)
    return back(m, h * torch.sigmoid(m.g(s)))


def twice(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, m.d(F.relu(m.d(h))) + h)


def shared_head(m: Any, x: Tensor) -> list[Tensor]:
    h = front(m, x)
    return [back(m, m.bn(level)) for level in (h, F.max_pool2d(h, 2), F.interpolate(m.d(h), scale_factor=0.5))]


def reader_of_other_widths(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, m.d(h)) + m.c(h[:, 1:7])


def dead_branch(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    m.d(h)
    return back(m, h)


def unread_half(m: Any, x: Tensor) -> Tensor:
    return m.c(front(m, x).chunk(4, 1)[1].repeat(1, 3, 1, 1))


def normalised_twice(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, torch.cat([m.bn4(h[:, :4]), m.bn4(h[:, 4:])], 1))


def hidden_function(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, h + _Mix.apply(h))


def hidden_in_module(m: Any, x: Tensor) -> Tensor:
    return back(m, m.mix(front(m, x)))


def scripted(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, h * _scripted(h))


def through_numpy(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, h * float(h.numpy().mean()))


def branching_on_data(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, h if h.sum() > 0 else -h)


def dataclass_output(m: Any, x: Tensor) -> Any:
    h = front(m, x)
    return Slotted(h[:, :3], SimpleNamespace(features=[back(m, h)]))


def named_output(m: Any, x: Tensor) -> Any:
    h = front(m, x)
    return Named(back(m, h), {"aux": (m.d(h),)})


def checkpointed(m: Any, x: Tensor) -> Tensor:
    h = checkpoint(m.d, front(m, x), use_reentrant=True)
    return back(m, h + checkpoint(lambda t: F.relu(m.d2(t)), h, use_reentrant=False))


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = m.d(front(m, x))
    return back(m, h.float())


def keyword_arguments(m: Any, x: Tensor) -> Tensor:
    h = torch.permute(input=front(m, x), dims=(0, 2, 3, 1))
    h = torch.cat(tensors=[h[..., :2], h[..., 2:]], axis=-1).permute(dims=(0, 3, 1, 2))
    return back(m, F.relu(input=torch.reshape(input=h, shape=(x.shape[0], 8, 8, 8)), inplace=True))


def flattened(m: Any, x: Tensor) -> Tensor:
    h = F.max_pool2d(back(m, front(m, x)), 4)
    return m.l2(F.relu(m.bn1(m.l1(torch.flatten(h, 1)))))


def flattened_after_permute(m: Any, x: Tensor) -> Tensor:
    h = F.max_pool2d(back(m, front(m, x)), 4)
    return m.l2(m.l1(h.permute(0, 2, 3, 1).reshape(x.shape[0], -1)))


def channels_last_linear(m: Any, x: Tensor) -> Tensor:
    h = m.l2(F.gelu(m.l1(front(m, x).permute(0, 2, 3, 1))))
    return back(m, h.permute(0, 3, 1, 2))


def tokens(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    t = m.l1(h.flatten(2).transpose(1, 2))
    return back(m, m.l2(t).transpose(1, 2).view_as(h))


def token_mixing(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, m.l64(h.flatten(2)).view(h.shape))


def attention(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    t = h.flatten(2).transpose(1, 2)
    return back(m, h + m.att(t, t, t, need_weights=False)[0].transpose(1, 2).reshape(h.shape))


def scaled_by_width(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, h * h.shape[1] ** -0.5)


def squeezed(m: Any, x: Tensor) -> Tensor:
    s = F.adaptive_avg_pool2d(m.b(front(m, x)), 1).squeeze()
    return m.c(s.view(x.shape[0], -1, 1, 1))


def one_channel_expanded(m: Any, x: Tensor) -> Tensor:
    return back(m, m.bn(m.g(front(m, x)).expand(-1, 8, -1, -1)))


def tied(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, m.d2(F.relu(m.d(h))) + h)


def sampled(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    grid = torch.tanh(m.two(h)).permute(0, 2, 3, 1)
    return back(m, F.grid_sample(h, grid, align_corners=False))


def maximum_of_two(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, torch.max(h, m.d(h)) + torch.where(h > 0, m.d2(h), h))


def places_by_number(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    found = torch.where(h.flatten() > 0)[0]
    return back(m, h) + 1e-3 * found[found > 3].float().mean()


def direct_forward(m: Any, x: Tensor) -> Tensor:
    return back(m, m.d.forward(front(m, x)) + m.bn.forward(m.d2(front(m, x))))


def weight_read_elsewhere(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, h + F.conv2d(h, m.dw.weight, groups=8, padding=1) + m.dw(h))


def stacked(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, torch.stack([h, m.d(h), m.d2(h)], 1).mean(1))


def stacked_into_channels(m: Any, x: Tensor) -> Tensor:
    h = m.c(m.b(front(m, x)))
    return back(m, torch.stack([h, h.relu()], 2).flatten(1, 2))


def batch_in_channels(m: Any, x: Tensor) -> Tensor:
    return back(m, front(m, x).reshape(1, -1, 8, 8).view(x.shape[0], 8, 8, 8))


def padded_channels(m: Any, x: Tensor) -> Tensor:
    h = F.pad(m.b(front(m, x)), (0, 0, 0, 0, 1, 1))
    return back(m, h)


def widened_stream(m: Any, x: Tensor) -> Tensor:
    """A residual stream that gets more channels on its way, read by a layer and then by another one."""
    h = front(m, x)
    return back(m, m.r(F.relu(m.p(h) + m.w(h))) + m.r(F.relu(m.p(m.d(h)) + m.w(h))))


def padded_point(m: Any, x: Tensor) -> Tensor:
    s = F.pad(F.adaptive_avg_pool2d(front(m, x), 1), (1, 1, 1, 1))
    return back(m, s)


def loop_over_channels(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, torch.stack([h[:, i] * i for i in range(8)], 1))


def loop_over_batch(m: Any, x: Tensor) -> Tensor:
    return torch.stack([back(m, h[None])[0] for h in front(m, x)])


def random_inside(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return back(m, h + torch.rand_like(h))


def transposed_matrix(m: Any, x: Tensor) -> Tensor:
    h = F.adaptive_avg_pool2d(front(m, torch.cat([x, x, x, x])), 1).flatten(1)
    return m.l1(h.T) + m.l1(h)


def boolean_index(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    keep = torch.tensor([True, False] * 4)
    return m.f(h[:, keep])


def zero_outputs_needed(m: Any, x: Tensor) -> Tensor:
    h = front(m, x)
    return back(m, torch.cat([m.four(h), m.four2(h)], 1)) + back(m, m.d(h))


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1) * x.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _MixModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Mix.apply(x)


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return torch.sigmoid(x.mean(1, keepdim=True))


class _Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@dataclass
class Slotted:
    __slots__ = ("extra", "head")
    head: Tensor
    extra: Any


class Named(NamedTuple):
    main: Tensor
    rest: dict[str, Any]


def with_shared_weight() -> Net:
    out = net(tied, d=conv(8, 8), d2=conv(8, 8))
    out.d2.weight = out.d.weight
    return out


def eights(*names: str) -> dict[str, nn.Module]:
    return {name: conv(8, 8) for name in names}


#: followed channel by channel: nothing is reported, and every channel that no reader keeps goes
FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: net(pure(F.relu)),
    "hardswish": lambda: net(pure(F.hardswish)),
    "residual": lambda: net(residual, bn=nn.BatchNorm2d(8), **eights("d", "d2")),
    "cross_sum": lambda: net(cross_sum),
    "split_and_swap": lambda: net(pure(split_and_swap)),
    "shuffle": lambda: net(pure(shuffle)),
    "joined_with_no_rows": lambda: net(pure(lambda x: torch.cat([x[:, :, :0], x.tanh()], 2))),
    "joined_with_no_channels": lambda: net(pure(lambda x: torch.cat([x[:, :0], x.tanh()], 1))),
    "nothing_joined": lambda: net(pure(lambda x: x + torch.cat([x[:, :, :0], x[:, :, :0]], 2).sum(2, True))),
    "channel_shuffle": lambda: net(pure(lambda x: F.channel_shuffle(x, 4))),
    "roll_and_flip": lambda: net(pure(lambda x: x.roll(3, 1).flip(1))),
    "pool": lambda: net(pure(lambda x: F.avg_pool2d(F.max_pool2d(x, 2), 2) + F.adaptive_max_pool2d(x, 2))),
    "interpolate": lambda: net(pure(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))),
    "softmax_over_places": lambda: net(pure(lambda x: x.flatten(2).softmax(-1).view_as(x))),
    "cat_with_itself": lambda: net(lambda m, x: back(m, torch.cat([h := m.four(m.stem(x)), h], 1)), four=conv(5, 4)),
    "cat_along_places": lambda: net(lambda m, x: back(m, torch.cat([h := front(m, x), m.d(h)], 3)), **eights("d")),
    "squeeze_excite": lambda: net(squeeze_excite, s1=conv(8, 3, 1), s2=conv(3, 8, 1)),
    "squeeze_excite_linear": lambda: net(squeeze_excite_linear, l1=nn.Linear(8, 3), l2=nn.Linear(3, 8)),
    "spatial_gate": lambda: net(spatial_gate, g=conv(8, 1)),
    "layer_scale": lambda: net(lambda m, x: back(m, m.s(front(m, x))), s=_Scale(8, 1, 1)),
    "prelu": lambda: net(lambda m, x: back(m, m.p1(m.p8(front(m, x)))), p1=nn.PReLU(), p8=nn.PReLU(8)),
    "instance_norm": lambda: net(lambda m, x: back(m, m.i(front(m, x))), i=nn.InstanceNorm2d(8, affine=True)),
    "batch_norm_shared": lambda: net(normalised_twice, bn4=nn.BatchNorm2d(4)),
    "depthwise": lambda: net(lambda m, x: back(m, m.dw(front(m, x))), dw=conv(8, 8, groups=8)),
    "grouped": lambda: net(
        lambda m, x: back(m, m.g1(F.relu(m.g(front(m, x))))), g=conv(8, 16, groups=4), g1=conv(16, 8, groups=2)
    ),
    "transposed": lambda: net(lambda m, x: back(m, m.t(front(m, x))), t=nn.ConvTranspose2d(8, 8, 4, 2, 1)),
    "transposed_depthwise": lambda: net(
        lambda m, x: back(m, m.t(front(m, x))), t=nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)
    ),
    "dilated_same": lambda: net(
        lambda m, x: back(m, m.d(front(m, x))), d=nn.Conv2d(8, 8, 3, padding="same", dilation=2, padding_mode="reflect")
    ),
    "module_run_twice": lambda: net(twice, **eights("d")),
    "shared_head": lambda: net(shared_head, bn=nn.BatchNorm2d(8), **eights("d")),
    "widths_differ": lambda: net(reader_of_other_widths, **eights("d")),
    "unread_branch": lambda: net(dead_branch, **eights("d")),
    "unread_channels": lambda: net(unread_half),
    "flattened": lambda: net(flattened, l1=nn.Linear(16, 6), bn1=nn.BatchNorm1d(6), l2=nn.Linear(6, 3)),
    "flattened_after_permute": lambda: net(flattened_after_permute, l1=nn.Linear(16, 6), l2=nn.Linear(6, 3)),
    "channels_last_linear": lambda: net(channels_last_linear, l1=nn.Linear(8, 16), l2=nn.Linear(16, 8)),
    "tokens": lambda: net(tokens, l1=nn.Linear(8, 12), l2=nn.Linear(12, 8)),
    "stacked": lambda: net(stacked, **eights("d", "d2")),
    "stacked_into_channels": lambda: net(stacked_into_channels),
    "clamped_by_another": lambda: net(
        lambda m, x: back(m, (h := front(m, x)).clamp(min=m.d(h)).clip(max=m.d2(h))), **eights("d", "d2")
    ),
    "maximum_of_two": lambda: net(maximum_of_two, **eights("d", "d2")),
    "padded_channels": lambda: net(padded_channels),
    "channel_pad": lambda: net(
        widened_stream, p=ChannelPad(8, 13, front=2), w=conv(8, 13), r=conv(13, 8), **eights("d")
    ),
    "padded_point": lambda: net(padded_point),
    "one_channel_expanded": lambda: net(one_channel_expanded, g=conv(8, 1), bn=nn.BatchNorm2d(8)),
    "loop_over_channels": lambda: net(loop_over_channels),
    "boolean_index": lambda: net(boolean_index, f=conv(4, 5)),
    "named_output": lambda: net(named_output, **eights("d")),
    "slotted_output": lambda: net(dataclass_output),
    "checkpointed": lambda: net(checkpointed, **eights("d", "d2")),
    "keyword_arguments": lambda: net(keyword_arguments),
    "squeezed": lambda: net(squeezed),
    "nothing_needed": lambda: net(zero_outputs_needed, four=conv(8, 4), four2=conv(8, 4), **eights("d")),
    "nested_sequential": lambda: nn.Sequential(
        conv(3, 4), nn.Sequential(nn.ReLU(True), block := nn.Sequential(conv(4, 4), nn.ReLU())), block, conv(4, 2)
    ),
    "scaled_by_width": lambda: net(scaled_by_width),
    "sampled": lambda: net(sampled, two=conv(8, 2)),
    "batch_in_channels": lambda: net(batch_in_channels),
    "loop_over_batch": lambda: net(loop_over_batch),
    "random_inside": lambda: net(random_inside),
    "autocast": lambda: net(autocast, **eights("d")),
    "written_through_out": lambda: net(written_through_out),
}

#: channels are mixed, or nobody can see what is done to them: this is reported, and ``a``, which feeds it, stays whole
WHOLE: dict[str, Callable[[], nn.Module]] = {
    "channel_mean": lambda: net(pure(lambda x: x - x.mean(1, keepdim=True))),
    "channel_softmax": lambda: net(pure(lambda x: x * x.softmax(1))),
    "channel_statistics_gate": lambda: net(channel_statistics_gate, g=conv(2, 1, 7)),
    "l2_normalised": lambda: net(pure(lambda x: F.normalize(x))),
    "divided_by_norm": lambda: net(pure(lambda x: x / x.norm(2, 1, keepdim=True))),
    "einsum": lambda: net(pure(lambda x: torch.einsum("nchw,dc->ndhw", x, torch.eye(8).flip(1)))),
    "group_norm": lambda: net(lambda m, x: back(m, m.n(front(m, x))), n=nn.GroupNorm(2, 8)),
    "layer_norm": lambda: net(lambda m, x: back(m, m.n(front(m, x))), n=nn.LayerNorm([8, 8, 8])),
    "batch_norm_over_tokens": lambda: net(
        lambda m, x: back(m, m.n((h := front(m, x)).flatten(2).transpose(1, 2)).transpose(1, 2).view(h.shape)),
        n=nn.BatchNorm1d(64),
    ),
    "local_response": lambda: net(pure(lambda x: F.local_response_norm(x, 3))),
    "pixel_shuffle": lambda: net(lambda m, x: m.p(F.pixel_shuffle(front(m, x), 2)), p=conv(2, 3)),
    "unfold": lambda: net(lambda m, x: m.l(F.unfold(front(m, x), 2, stride=2).transpose(1, 2)), l=nn.Linear(32, 3)),
    "max_pool_over_channels": lambda: net(
        pure(lambda x: F.max_pool1d(x.flatten(2).transpose(1, 2), 3, 1, 1).transpose(1, 2).view(x.shape))
    ),
    "token_mixing": lambda: net(token_mixing, l64=nn.Linear(64, 64)),
    "attention": lambda: net(attention, att=nn.MultiheadAttention(8, 2, batch_first=True)),
    "variance_of_all": lambda: net(pure(lambda x: x / x.var(False))),
    "dtype_view": lambda: net(pure(lambda x: x.view(torch.int32).view(torch.float32))),
    "transposed_matrix": lambda: net(transposed_matrix, l1=nn.Linear(8, 3)),
    "through_numpy": lambda: net(through_numpy),
    "places_by_number": lambda: net(places_by_number),
    "branching_on_data": lambda: net(branching_on_data),
    "hidden_function": lambda: net(hidden_function),
    "hidden_in_module": lambda: net(hidden_in_module, mix=_MixModule()),
    "hidden_at_the_end": lambda: net(lambda m, x: _Mix.apply(front(m, x))),
    "scripted": lambda: net(scripted),
    # in place and aliased
    "in_place_on_a_view": lambda: net(in_place_on_a_view, z=conv(5, 4)),
    "in_place_under_a_view": lambda: net(in_place_under_a_view, z=conv(5, 4)),
    "in_place_under_detached": lambda: net(in_place_under_detached, gate=conv(3, 8, 1)),
    "item_assignment": lambda: net(item_assignment, z=conv(5, 4)),
    "assembled_in_zeros": lambda: net(assembled_in_zeros),
    # layers torch or the user treats specially
    "shared_weight": with_shared_weight,
    "conv1d": lambda: net(
        lambda m, x: back(m, m.o(front(m, x).flatten(2)).view(x.shape[0], 8, 8, 8)), o=nn.Conv1d(8, 8, 3, padding=1)
    ),
    "conv3d": lambda: net(lambda m, x: back(m, m.v(front(m, x).unsqueeze(2)).squeeze(2)), v=nn.Conv3d(8, 8, 1)),
    "weight_norm": lambda: net(
        lambda m, x: back(m, m.d(front(m, x))), d=nn.utils.parametrizations.weight_norm(conv(8, 8))
    ),
    "spectral_norm": lambda: net(
        lambda m, x: back(m, m.d(front(m, x))), d=nn.utils.parametrizations.spectral_norm(conv(8, 8))
    ),
    "direct_forward": lambda: net(direct_forward, bn=nn.BatchNorm2d(8), **eights("d", "d2")),
    "weight_read_elsewhere": lambda: net(weight_read_elsewhere, dw=conv(8, 8, groups=8)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed_nets_slim_to_the_budget(name: str, prove: Callable[..., MacBudget]) -> None:
    budget = prove(FOLLOWED[name](), torch.randn(2, 3, 8, 8))
    assert [reason for reason in budget.unfollowed.values() if "did not run" not in reason] == []
    assert budget.min_ratio() < 0.45


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_followed_stays_whole_and_right(name: str, prove: Callable[..., MacBudget]) -> None:
    # a batched product of a constant; in evaluation the spectral norm is u . (W v) of a weight of 8 rows
    extra = {"einsum": 2 * 64 * 8 * 8, "spectral_norm": 8 * 72 + 8}.get(name, 0)
    budget = prove(WHOLE[name](), torch.randn(2, 3, 8, 8), keeps=(0.2,), extra=extra)
    assert {row.name: row for row in budget.table()}["a"].out_kept == 8
    assert [reason for reason in budget.unfollowed.values() if "did not run" not in reason]


def test_a_channel_pad_that_also_pads_the_image_keeps_its_width(prove: Callable[..., MacBudget]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return back(m, m.r(m.p(x.repeat(1, 3, 1, 1)[:, :8]))) + back(m, m.r(m.p(front(m, x))))

    budget = prove(net(run, p=ChannelPad(8, 12), r=conv(12, 8)), torch.randn(2, 3, 8, 8))
    assert list(budget.unfollowed.values()) == [
        "'p' pads a tensor whose channels are not followed",
        "reads the model's input: its mask is held open, all input channels stay",
    ]
