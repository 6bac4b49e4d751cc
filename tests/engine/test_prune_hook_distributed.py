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


VARIED = """
import json, sys
import mmitp
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_prune_hook as toy
from mmengine.dist import get_rank
from mmengine.registry import FUNCTIONS
from mmengine.runner import Runner
from mmitp.pruning import mask_model, masked_layers
from torch import nn

class Pads(toy.ToyPreprocessor):
    def forward(self, data, training=False):
        width = max(x.shape[2] for x in data["inputs"])
        padded = [nn.functional.pad(x, (0, width - x.shape[2])) for x in data["inputs"]]
        return dict(inputs=torch.stack(padded), data_samples=torch.stack(data["label"]))

class Varied(toy.ToyData):
    def __getitem__(self, i):
        return dict(inputs=torch.randn(3, 8, 8 + i, generator=torch.Generator().manual_seed(i)), label=self.y[i])

class Head(toy.Toy):
    # body's operations go with the image, those of head do not
    def __init__(self):
        super().__init__(masked=False, width=16, norm=False)
        self.data_preprocessor = Pads()
        self.head = nn.Conv2d(16, 16, 3, padding=1)
        mask_model(self)
        for layer in masked_layers(self).values():
            layer.prune_mask.data = 0.5 + torch.rand(16)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = nn.functional.adaptive_avg_pool2d(self.body(self.stem(inputs).relu()).relu(), 8)
        x = self.fc(self.head(x).relu().mean((2, 3)))
        return x if mode == "tensor" else dict(loss=nn.functional.cross_entropy(x, data_samples))

FUNCTIONS.register_module(
    name="as_lists", module=lambda batch: dict(inputs=[b["inputs"] for b in batch], label=[b["label"] for b in batch])
)
torch.manual_seed(0)
runner = Runner(
    model=Head(), work_dir={work!r}, launcher="pytorch", env_cfg=dict(dist_cfg=dict(backend="gloo")),
    train_dataloader=dict(batch_size=2, dataset=Varied(), num_workers=0, collate_fn=dict(type="as_lists"),
                          sampler=dict(type="DefaultSampler", shuffle=True)),
    train_cfg=dict(by_epoch=True, max_epochs=4), optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.05)),
    custom_hooks=[dict(type="mmitp.PruneHook", target=0.3, b=60.0, begin=0, end=3, slim_at_end=True)],
    default_hooks=dict(logger=dict(type="LoggerHook", interval=100)), default_scope="mmengine",
    randomness=dict(seed=0), experiment_name="varied",
)
runner.train()
hook = toy.hook_of(runner)
state = dict(slim=hook.slimmed, shape=hook.input_shape)
state["weights"] = {{n: p.flatten().tolist() for n, p in runner.model.module.named_parameters()}}
with open({work!r} + f"/rank{{get_rank()}}.json", "w") as file:
    json.dump(state, file)
"""


def test_images_of_different_sizes_give_one_budget_and_one_network(tmp_path, run_in_two_processes):
    script = tmp_path / "train.py"
    script.write_text(VARIED.format(tests=str(Path(__file__).parent), work=str(tmp_path)))
    run_in_two_processes(script)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first == second
    assert first["slim"]["ratio"] <= 0.3
