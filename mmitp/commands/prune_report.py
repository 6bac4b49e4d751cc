"""Tell what can be pruned of a config's model, and check that slimming it is exact.

    mmitp prune-report CONFIG [--shape H W] [--linear] [--check]

Lists layers, MACs, the cheapest ratio, and whether the config's own target can be met. CONFIG is a file or a packaged
config such as mmdet::retinanet/retinanet_r50_fpn_1x_coco. --check trains three iterations on random data, switches
masks off at random to about half of the operations, freezes, slims, and fails unless outputs (1e-5 relative) and MACs
agree; outputs at a second image size too, where the model takes one. It fails as well where the target cannot be met.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmitp.engine.cli import UserError, add_config, command, parser, positive, raised_by_us

if TYPE_CHECKING:
    from mmitp.pruning import MacBudget
    from mmitp.pruning.cost import Cost


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__, __name__)
    add_config(options)
    options.add_argument(
        "--shape",
        type=positive,
        nargs=2,
        metavar=("H", "W"),
        help="input size, best that of the training; by default PruneHook's input_shape, else the training pipeline's "
        "if it is fixed, else the first training image's, else 224 224 for classifiers and 320 320 for detectors",
    )
    options.add_argument("--check", action="store_true", help="train, mask, freeze, slim and compare")
    options.add_argument("--linear", action="store_true", help="mask linear layers too (transformers, ConvNeXt)")
    args = options.parse_args(argv)

    from mmitp.engine.config import load_config
    from mmitp.engine.example import blank_example, second_example
    from mmitp.models.report import build_masked, stated_shape, train_on_noise
    from mmitp.models.slim_config import prune_hook_of
    from mmitp.pruning import MacBudget
    from mmitp.pruning.check import check_slimming
    from mmitp.pruning.report import report_text

    cfg = load_config(args.config, args.cfg_options)
    try:
        model = build_masked(cfg, args.linear)
    except ValueError as error:
        hint = "" if args.linear or isinstance(error, UserError) else "; see --linear"
        raise UserError(f"{args.config}: {error}{hint}") from error
    shape, source = stated_shape(cfg, model, args.shape)
    example = blank_example(model, shape)
    print(f"{type(model).__name__} of {args.config} at {shape[0]}x{shape[1]}, batch 1")
    if source:
        print(f"{shape[0]}x{shape[1]} is {source}")
    second = second_example(model, shape)
    more = [] if second is None else [second]
    budget = MacBudget(model, example, more_examples=more)
    print(report_text(budget))
    reachable = target_line(
        budget, prune_hook_of(cfg), lambda cost: MacBudget(model, example, cost=cost, more_examples=more)
    )
    if not args.check:
        return 0
    try:
        losses = train_on_noise(model, shape)
    except NotImplementedError as error:  # distilled networks that mmpretrain can only run
        raise UserError(f"{args.config}: --check needs a training step, and this model has none: {error}") from error
    except Exception as error:  # any kind: the model's own code
        if raised_by_us(error):
            raise
        *_, line = traceback.extract_tb(error.__traceback__)
        text = str(error) or f"{line.line} in {line.name} of {line.filename}"
        said = " ".join(f"{type(error).__name__}: {text}".split())
        raise UserError(
            f"{args.config}: --check trains on random images with labels or boxes, as mmpretrain's and mmdet's models "
            f"take them, and {type(model).__name__} does not: {said[:300]}. What can be pruned is listed without it, "
            "and slimming compares the networks whatever trained them"
        ) from error
    print("losses on random data: " + ", ".join(f"{loss:.4g}" for loss in losses))
    outcome = check_slimming(model, example, more_examples=more)
    print(f"MACs at ratio {outcome.ratio:.4f}: {outcome.macs_budget:,} by the budget, {outcome.macs_counted:,} counted")
    precision = " (in float64: rounding in float32 reorders proposals)" if outcome.in_double else ""
    print(f"slimmed outputs equal the masked ones{precision}: {'no: ' + outcome.problem if outcome.problem else 'yes'}")
    if second is None:
        print("compared at this size only: the model does not run at another")
    else:
        print("compared at this size, and on two images of {}x{}".format(*second["inputs"].shape[-2:]))
    passed = outcome.passed and reachable
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def target_line(budget: MacBudget, pruning: Mapping[str, Any] | None, counting: Callable[[Cost], MacBudget]) -> bool:
    """Prints whether a PruneHook of the config can meet its target, and returns it.

    Args:
        budget: of MACs.
        pruning: the PruneHook's settings; None without one, of which nothing is said.
        counting: gives the budget of another cost. One of latency is looked at by the run, at its table's size.
    """
    from mmengine.registry import HOOKS

    from mmitp.pruning.freeze import require_reachable

    if pruning is None:
        return True
    cost = pruning.get("cost", "macs")
    if isinstance(cost, Mapping) and cost.get("type") == "latency":
        print("the config's own target is one of latency: the run looks at it when it begins")
        return True
    hook = HOOKS.build(dict(pruning))
    budget = budget if hook.cost is None else counting(hook.cost)
    try:
        require_reachable(budget, hook.target, hook.arguments["divisor"], hook.arguments["min_keep"])
    except ValueError as error:
        print(f"the config's own {error}")
        return False
    print(f"the config's own target {hook.target} can be met")
    return True
