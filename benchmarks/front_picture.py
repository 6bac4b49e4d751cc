"""What a dense and a pruned network see on the same frames, and the channels kept: one picture.

    python benchmarks/front_picture.py work_dirs/demo/dense work_dirs/demo/pruned [--frames 4] [--out FILE.jpg]
        [--attack pgd --steps 10 --eps 2]

The folders are those of two finished runs, as ``make demo`` or ``kitti_sweep.py run`` leave them. The frames are spread
evenly over the test set, ground truth is green, detections are blue; boxes with a score of 0.3 or more are drawn. The
pruned run's network is the slimmed one. With ``--attack`` the detections are those on attacked frames, each network
attacked through itself.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

import mmitp  # noqa: F401  isort: skip  (first: makes the stack below importable without compiled operators)

import cv2
import numpy as np

from mmitp.engine.robust_eval import EvalAttack
from mmitp.files import write_whole
from mmitp.report import read_run
from mmitp.report.measure import Sample, sample_detections

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "detections.jpg"
WIDTH = 1600  # pixels


def halves(folder: str, frames: int, attack: EvalAttack | None, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth and detections of a run, frames below each other."""
    sample = sample_detections(read_run(folder), frames, attack=attack, eps=eps)
    if not isinstance(sample, Sample):
        raise SystemExit(f"{folder}: {sample}")
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(sample.jpeg), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    middle = picture.shape[1] // 2
    return picture[:, :middle], picture[:, middle:]


def titled(picture: np.ndarray, title: str) -> np.ndarray:
    strip = np.full((34, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, title, (6, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([strip, picture])


def channels(folder: str, width: int, height: int = 130) -> np.ndarray:
    """A bar for each masked layer, in order: grey what it had, dark the share of input channels that it keeps."""
    frozen = read_run(folder).frozen
    if frozen is None:
        raise SystemExit(f"{folder} holds no pruning.json: the run's masks have not been frozen")
    layers = [layer for layer in frozen["layers"] if layer["note"] != "dense"]
    bars = np.full((height, width, 3), 255, np.uint8)
    step = width / len(layers)
    for i, layer in enumerate(layers):
        left, right = round(i * step) + 1, max(round((i + 1) * step) - 2, round(i * step) + 2)
        bars[:, left:right] = 215
        bars[height - round(height * layer["in_kept"] / layer["in_channels"]) :, left:right] = (140, 80, 30)
    return titled(bars, f"input channels kept, layer by layer, {frozen['ratio']:.3f} of the operations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="work folder of the dense run")
    parser.add_argument("pruned", help="work folder of the pruned run")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--attack", choices=("fgsm", "fgsm_rs", "pgd"), help="of the truth, as mmitp test's")
    parser.add_argument("--steps", type=int, default=10, help="of pgd; its step is eps / 4")
    parser.add_argument("--eps", type=float, default=2.0, help="size of the attack, pixels/255")
    args = parser.parse_args()
    attack = EvalAttack(args.attack, steps=args.steps) if args.attack else None
    under = f", {args.attack}, eps {args.eps:g}/255" if attack else ""
    truth, dense = halves(args.dense, args.frames, attack, args.eps)
    _, pruned = halves(args.pruned, args.frames, attack, args.eps)
    columns = [titled(truth, "ground truth"), titled(dense, f"dense{under}"), titled(pruned, f"pruned, slimmed{under}")]
    picture = np.concatenate(columns, axis=1)
    height = picture.shape[0] * WIDTH // picture.shape[1]
    picture = cv2.resize(picture, (WIDTH, height), interpolation=cv2.INTER_AREA)
    picture = np.concatenate([picture, channels(args.pruned, WIDTH)])
    quality = [cv2.IMWRITE_JPEG_QUALITY, 80]  # of no account for other formats
    write_whole(args.out, cv2.imencode(args.out.suffix, picture, quality)[1].tobytes())
    print(args.out)


if __name__ == "__main__":
    main()
