"""What an evaluation found: table, JSON and curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmitp.engine.results import set_aside, write_results
from mmitp.engine.robust_eval.settings import EvalAttack
from mmitp.visualization import plot_robustness


@dataclass
class RobustReport:
    """Figures of one model, clean and under an attack of several sizes.

    Attributes:
        attack: the attack.
        eps: its sizes, pixels/255.
        clean: the test's metrics without attack; those that are no single number stay out of table and curve.
        attacked: the same metrics, one dict a size.
        images: images tested.
        total: images of the test set.
        seconds: wall time of the clean test and of each attacked one.
        largest: largest change made to any image at each size, pixels/255.
        flags: AutoAttack's warnings that its figure may be unreliable.
    """

    attack: EvalAttack
    eps: list[float]
    clean: dict[str, Any]
    attacked: list[dict[str, Any]]
    images: int
    total: int
    seconds: list[float]
    largest: list[float]
    flags: list[str]

    def numbers(self) -> list[str]:
        """Names of the metrics that are one number, clean and under every attack."""
        columns = [self.clean, *self.attacked]
        return [name for name in self.clean if all(isinstance(column[name], float) for column in columns)]

    def table(self) -> str:
        """Metrics by rows; clean and each eps by columns."""
        rows = [["", "clean", *(f"eps {eps:g}/255" for eps in self.eps)]]
        for name in self.numbers():
            rows.append([name, *(f"{column[name]:.4g}" for column in [self.clean, *self.attacked])])
        rows.append(["largest change /255", "", *(f"{value:.4g}" for value in self.largest)])
        rows.append(["seconds", *(f"{value:.1f}" for value in self.seconds)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        share = f"all {self.total} images" if self.images == self.total else f"{self.images} of {self.total} images"
        flags = [f"AutoAttack flag: {flag}" for flag in self.flags]
        if not self.clean:
            flags.append("the metrics gave no figure: nothing was detected, with or without attack")
        if self.attack.name == "autoattack" and not flags:
            flags = ["AutoAttack raised no flag"]
        return "\n".join([f"{self.attack.describe()}; {share}", *lines, *flags])

    def save(self, path: str | Path, run: Mapping[str, Any] | None = None) -> list[str]:
        """Writes the figures as JSON and, for more than one eps, their curve beside it (``.png``).

        Args:
            path: of the JSON; former files of the names move aside (:mod:`mmitp.engine.results`).
            run: what was measured with, from :func:`~mmitp.engine.results.provenance`.

        Returns:
            What was written, a line each.
        """
        path = Path(path)
        lines = write_results(path, asdict(self), run or {})
        # A KITTI evaluation gives 19 figures, of which the benchmark ranks by these; COCO's are -1 where no object is.
        names = [name for name in self.numbers() if self.clean[name] != -1]
        names = [name for name in names if name.endswith("R40_moderate")] or names[:6]
        if len(self.eps) == 1 or not names:
            return lines
        points = sorted({0.0: self.clean, **dict(zip(self.eps, self.attacked, strict=True))}.items())
        curves = {name: [metrics[name] for _, metrics in points] for name in names}
        picture = path.with_suffix(".png")
        moved = set_aside(picture)
        plot_robustness([eps for eps, _ in points], curves, picture, title=self.attack.describe())
        return [*lines, f"wrote {picture}", *([f"the former {picture.name} is now {moved}"] if moved else [])]
