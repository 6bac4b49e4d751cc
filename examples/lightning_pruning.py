"""In-train pruning in a Lightning Trainer: a callback that prunes, slims in mid-training, and resumes.

    pip install lightning
    python examples/lightning_pruning.py                # generated images, a minute on one core
    python examples/lightning_pruning.py --resume FILE  # goes on from a checkpoint of Lightning's

To use it with a module of your own, take :class:`Pruning` as it is, put masks on in the module's constructor
(``mask_model``), and take :meth:`Classifier.on_load_checkpoint` over: a checkpoint from after the slimming holds a
smaller network, and Lightning loads its weights before it asks callbacks.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L  # noqa: N812  as its own documentation has it
import torch
import torch.nn.functional as F
from plain_pytorch import ResNet, generated
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmitp.pruning import InTrainPruner, SlimPlan, apply_plan, mask_model


class Pruning(L.Callback):
    """Trains the masks of ``module.network`` in a window of epochs, and the small network from its end on.

    Args:
        example: input of one forward pass of the network, of the size that operations are counted for.
        target: part of the operations to keep.
        begin, end: first epoch of the window and first one after it.
        settings: further arguments of :class:`InTrainPruner`.
    """

    def __init__(self, example: Any, target: float, begin: int, end: int, **settings: Any) -> None:
        self.example, self.target, self.begin, self.end, self.settings = example, target, begin, end, settings
        self.pruner: InTrainPruner | None = None
        self.state: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.state.get("slimmed"):
            return  # resumed from after the window
        steps = (self.end - self.begin) * trainer.estimated_stepping_batches // trainer.max_epochs
        self.pruner = InTrainPruner(module.network, self.example, self.target, steps=steps, **self.settings)
        if self.state:
            self.pruner.load_state_dict(self.state)
        self.pruner.attach(trainer.optimizers[0])

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.pruner is not None:
            self.pruner.active = self.begin <= trainer.current_epoch < self.end

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.pruner is None:
            return
        module.log("operations_kept", self.pruner.ratio())
        if trainer.current_epoch + 1 == self.end:
            self.pruner.freeze()
            if trainer.world_size == 1:  # a distributed wrapper remembers sizes: take a copy after fit() there
                self.pruner.slim(trainer.optimizers[0])

    def state_dict(self) -> dict[str, Any]:
        return self.state if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def slim_as_in(checkpoint: dict[str, Any], network: nn.Module) -> None:
    """Gives a masked network the sizes that it had when a Lightning checkpoint was written."""
    state = checkpoint["callbacks"].get("Pruning", {})
    if slimmed := state.get("slimmed"):
        apply_plan(network, SlimPlan.from_spec(slimmed["spec"]))


class Classifier(L.LightningModule):
    """A masked residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mask_model(ResNet())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        slim_as_in(checkpoint, self.network)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        right = (self.network(batch[0]).argmax(1) == batch[1]).float()
        self.log("accuracy", 100 * right.mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        masks = [p for name, p in self.named_parameters() if name.endswith("prune_mask")]
        weights = [p for name, p in self.named_parameters() if not name.endswith("prune_mask")]
        groups = [dict(params=weights, weight_decay=5e-4), dict(params=masks, weight_decay=0.0)]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return dict(optimizer=optimizer, lr_scheduler=schedule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.5, help="part of the operations to keep")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--images", type=int, default=2048, help="generated images to train on")
    parser.add_argument("--resume", metavar="FILE", help="checkpoint to go on from")
    parser.add_argument("--out", default="lightning_run", help="folder of logs and checkpoints")
    args = parser.parse_args()
    L.seed_everything(0)
    pruning = Pruning(
        torch.zeros(1, 3, 32, 32), args.target, begin=max(args.epochs // 15, 1), end=max(args.epochs // 3, 2)
    )
    module = Classifier()
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[pruning, L.pytorch.callbacks.ModelCheckpoint(save_top_k=-1, filename="{epoch}")],
        default_root_dir=args.out,
        devices=1,
    )
    trainer.fit(
        module,
        DataLoader(generated(args.images, seed=0), batch_size=64, shuffle=True, drop_last=True),
        DataLoader(generated(512, seed=1), batch_size=256),
        ckpt_path=args.resume,
    )
    kept = pruning.state_dict()["slimmed"]["report"]
    print(f"MACs {kept['macs_dense']:,} -> {kept['macs_kept']:,} ({kept['ratio']:.4f}), target {args.target}")
    print(f"parameters {kept['params_dense']:,} -> {sum(p.numel() for p in module.network.parameters()):,}")


if __name__ == "__main__":
    main()
