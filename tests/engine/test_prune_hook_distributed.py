"""PruneHook under DistributedDataParallel: two processes, one network."""

import json
from pathlib import Path

SCRIPT = """
import json, sys
import mmitp
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_prune_hook as toy
from mmengine.dist import get_rank
from mmengine.runner import Runner
from mmitp.pruning import masked_layers

runner = toy.make_runner(
    {work!r}, dict(type="mmitp.PruneHook", target=0.5, b=200.0, begin=0, end=3), epochs=4,
    model=toy.Toy(width=16), launcher="pytorch", env_cfg=dict(dist_cfg=dict(backend="gloo")),
)
runner.train()
layers = masked_layers(runner.model.module)
state = {{n: dict(mask=m.prune_mask.tolist(), pattern=m.prune_pattern.tolist(), weight=m.weight.flatten().tolist())
         for n, m in layers.items()}}
hook = toy.hook_of(runner)
state["ratio"] = float(hook.budget.ratio())
state["wrapper"] = type(runner.model).__name__
with open({work!r} + f"/rank{{get_rank()}}.json", "w") as file:
    json.dump(state, file)
"""


def test_masks_weights_and_pattern_are_the_same_in_every_process(tmp_path, run_in_two_processes):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), work=str(tmp_path)))
    run_in_two_processes(script)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first["wrapper"] == "MMDistributedDataParallel"
    assert first == second
    assert first["ratio"] <= 0.5
    assert any(m != 1.0 for m in first["body"]["mask"])
