"""Time of the modulated deformable convolution: ours, its grid_sample forms, torchvision's and mmcv's where present.

    python benchmarks/deform_conv.py [--device cpu] [--threads 2] [--repeats 15]

Prints minimum, median and maximum in milliseconds of the forward pass without gradients and of the backward pass alone,
and the ratio of each median to ours. Implementations take turns in each round, so that other load hits all alike.
"""

import argparse
import statistics
import time

import torch

import mmitp  # noqa: F401
from mmitp.ops import deform_conv as ours

# (N, C, H, W, O): stages of CenterNet-DLA34's neck on a 384 x 1280 image
SHAPES = [
    (1, 64, 96, 320, 64),
    (1, 128, 48, 160, 64),
    (1, 256, 24, 80, 256),
    (1, 512, 12, 40, 256),
    (8, 64, 24, 80, 64),
]


def implementations():
    """Name -> function(x, offset, mask, weight) for a 3 x 3 kernel with stride and padding one."""

    def grid_sample(x, offset, mask, weight):
        lay = ours._layout(x, offset, mask, weight, 1, 1, 1, 1, 1)
        return ours._by_grid_sample(x, offset, mask, weight, None, lay)

    def by_images(x, offset, mask, weight):
        lay = ours._layout(x, offset, mask, weight, 1, 1, 1, 1, 1)
        return ours._by_images(x, offset, mask, weight, None, lay)

    found = {
        "mmitp": lambda *a: ours.modulated_deform_conv2d(*a, padding=1),
        "grid_sample": grid_sample,
        "by images": by_images,
    }
    try:
        from torchvision.extension import _has_ops
        from torchvision.ops import deform_conv2d

        if _has_ops():
            found["torchvision"] = lambda x, offset, mask, weight: deform_conv2d(
                x, offset, weight, padding=1, mask=mask
            )
    except ImportError:
        pass
    try:
        from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction, ext_module

        if ext_module.__spec__.origin != "mmitp.compat":
            found["mmcv"] = lambda *a: ModulatedDeformConv2dFunction.apply(*a, None, 1, 1, 1, 1, 1)
    except ImportError:
        pass
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = implementations()
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {options.repeats} repeats")
    for name in ("torchvision", "mmcv"):
        if name not in found:
            print(f"{name}: no working operator here, left out")

    def clock():
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    for n, c, h, w, o in SHAPES:
        torch.manual_seed(0)
        tensors = [torch.randn(n, c, h, w), torch.randn(n, 18, h, w), torch.rand(n, 9, h, w), torch.randn(o, c, 3, 3)]
        tensors = [t.to(options.device).requires_grad_() for t in tensors]
        forward, backward = {name: [] for name in found}, {name: [] for name in found}
        for turn in range(options.repeats + 2):
            for name, function in found.items():
                with torch.no_grad():
                    start = clock()
                    function(*tensors)
                    middle = clock()
                out = function(*tensors)
                gradient = torch.ones_like(out)
                begin = clock()
                torch.autograd.grad(out, tensors, gradient)
                end = clock()
                if turn >= 2:  # warm-up
                    forward[name].append(middle - start)
                    backward[name].append(end - begin)
        print(f"\ninput {n} x {c} x {h} x {w}, {o} outputs")
        for title, times in (("forward", forward), ("backward", backward)):
            base = statistics.median(times["mmitp"])
            for name, values in times.items():
                median = statistics.median(values)
                row = f"{min(values):8.1f} {median:8.1f} {max(values):8.1f} ms   {median / base:5.2f} x ours"
                print(f"  {title:8} {name:12} {row}")


if __name__ == "__main__":
    main()
