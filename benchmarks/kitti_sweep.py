"""Detectors on KITTI-1348, CPU-sized: every row of the table in configs/kitti/README.md, at equal cost.

    python benchmarks/kitti_sweep.py run [--only PATTERN ...] [--jobs 1] [--nice 15] [--work DIR]
    python benchmarks/kitti_sweep.py status [--only PATTERN ...]
    python benchmarks/kitti_sweep.py cost [--only PATTERN ...] [--rounds 12]
    python benchmarks/kitti_sweep.py latency [--only PATTERN ...] [--rounds 100]
    python benchmarks/kitti_sweep.py compare [--only PATTERN ...]
    python benchmarks/kitti_sweep.py fit [--only PATTERN ...]
    python benchmarks/kitti_sweep.py robust [--only PATTERN ...] [--images 128] [--attacks "PGD-20 eps 2" ...]
    python benchmarks/kitti_sweep.py publish [--only PATTERN ...]
    python benchmarks/kitti_sweep.py table [--write | --check]

``run`` works off the declared runs as ``sweep.py`` does: resumable, a metrics file each
(``configs/kitti/metrics/NAME.json``). At its end every finished run's file gets the difference of its AP to the dense
network's and to the control's of the same seed, with the interval of paired draws of the frames, where the detections
of both lie in ``--work``, and the cars' figures at an overlap of 0.5; ``compare`` does that alone. ``table`` makes the
README's tables of the metrics files alone. Cost stands for processor time of training over the dense run's, from paired
steps (``cost``; ``metrics/costs.json``). ``latency`` times the networks left, ``fit`` tests them on their training
frames and ``robust`` under attack, ``publish`` puts the small ones into configs/kitti/weights, for ``mmitp test``.

The rows with a common start (``started_...``) begin with weights trained on generated scenes, the published
``start_s0.pth``, and the narrow control with ``start_narrow50_s0.pth``. ``run --only start_s0 start_narrow50_s0`` and
``publish`` of the same make them anew. RTMDet's rows (``rtmdet_...``) have such starts too, but larger ones: they are
trained first, and stay in ``--work``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep import (
    ROOT,
    Run,
    Sweep,
    between,
    command_line,
    cost,
    latency,
    milliseconds,
    put,
    read,
    relative_cost,
    run_or_tell,
    say,
    seconds,
    selected,
)

if TYPE_CHECKING:
    from mmengine import Config

CONFIGS = ROOT / "configs/kitti"
METRICS = CONFIGS / "metrics"
README = CONFIGS / "README.md"
BEGIN, END = "<!-- kitti1348:begin -->", "<!-- kitti1348:end -->"
DENSE = "centernet_dla34x025_kitti1348_short"
WEIGHTS = CONFIGS / "weights"
SHAPE = (160, 512)
CLASSES = ("Car", "Pedestrian", "Cyclist")
#: steps of PGD and eps in pixels/255, in the order in which they are worked off; no steps are no attack
CLEAN = (0, 0.0)
ATTACKS = ((20, 2.0), (10, 2.0), (20, 4.0), (20, 8.0), (10, 4.0), (10, 8.0))
#: of the validation set, spread evenly: what attacks are tested on
IMAGES = 128
#: cars are evaluated above this overlap, too (official: 0.7): how much of a difference are loose boxes
LOOSE = 0.5
LABELS, SPLIT = "data/kitti/training/label_2", "data/kitti/ImageSets/val.txt"


@dataclass(frozen=True)
class Family:
    """Networks that are compared with each other.

    Attributes:
        dense: config of the dense network, without ``.py``; the others' names begin with it.
        scenes: config of the training on generated scenes that runs start from; the narrow one's name begins with it.
        batch: images a step.
        start: prefix of these trainings' names.
        published: whether small networks and starts are to lie in configs/kitti/weights.
    """

    dense: str
    scenes: str
    batch: int
    start: str
    published: bool


CENTERNET = Family(DENSE, "centernet_dla34x025_scenes_kitti_size", 2, "start", published=True)
RTMDET = Family("rtmdet_tiny_kitti1348_short", "rtmdet_tiny_scenes_kitti_size", 4, "start_rtmdet", published=False)

#: name of a run, less its seed -> config's ending, row of the table, target
ROWS = {
    "dense": ("", "dense", 1.0),
    "prune50": ("_prune50", "pruned, default (early freeze, slimmed on the way)", 0.5),
    "narrow50": ("_narrow50", "control: built narrower", 0.5),
    "prune30": ("_prune30", "pruned, default", 0.3),
    "prune50_paper": ("_prune50_paper", "pruned, paper's mode", 0.5),
    "robust": ("_robust", "dense, FastAT", 1.0),
    "prune50_robust": ("_prune50_robust", "pruned, FastAT", 0.5),
}
#: the same from weights trained on generated scenes
STARTED, RT = "started_", "rtmdet_"
ROWS |= {f"{STARTED}{name}": (ending, f"{row}, common start", target) for name, (ending, row, target) in ROWS.items()}
BRIEF = "window of two epochs, slimmed on the way"
FISHER = f"push='fisher', {BRIEF}"
ROWS[f"{STARTED}prune50"] = ("_prune50_brief", f"pruned, default ({BRIEF}), common start", 0.5)
ROWS[f"{STARTED}prune50_fisher"] = ("_prune50_fisher", f"pruned, {FISHER}, common start", 0.5)
ROWS[f"{STARTED}uniform50"] = ("_uniform50", "control: the same start made narrower (mmitp control), common start", 0.5)
ROWS[f"{STARTED}prune50_tied"] = ("_prune50_tied", "the same with masks tied over streams, common start", 0.5)
ROWS[f"{STARTED}prune50_robust"] = ("_prune50_fisher_robust", f"pruned, {FISHER}, FastAT, common start", 0.5)
ROWS[f"{STARTED}prune50_robust4"] = (
    "_prune50_fisher_robust_eps4",
    f"pruned, {FISHER}, FastAT at eps 4, common start",
    0.5,
)
ROWS |= {
    f"{RT}dense": ("", "RTMDet-tiny, dense, common start", 1.0),
    f"{RT}prune50_fisher": ("_prune50_fisher", f"RTMDet-tiny, pruned, {FISHER}, common start", 0.5),
    f"{RT}prune50": ("_prune50", f"RTMDet-tiny, pruned, default ({BRIEF}), common start", 0.5),
    f"{RT}narrow50": ("_narrow50", "RTMDet-tiny, control: built narrower, common start", 0.5),
}
#: pruned network -> the network built narrower that it has to beat
CONTROLS = {"prune50": "narrow50", "prune50_paper": "narrow50"}
CONTROLS |= {f"{STARTED}{name}": f"{STARTED}{control}" for name, control in CONTROLS.items()}
CONTROLS |= dict.fromkeys((f"{STARTED}prune50_fisher", f"{STARTED}prune50_tied"), f"{STARTED}narrow50")
CONTROLS |= dict.fromkeys((f"{RT}prune50_fisher", f"{RT}prune50"), f"{RT}narrow50")
#: pruned network -> the control that is cut out of the same start
NARROWED = {f"{STARTED}{name}": f"{STARTED}uniform50" for name in ("prune50", "prune50_fisher", "prune50_tied")}


def family_of(name: str) -> Family:
    """The family of a run's name."""
    return RTMDET if name.startswith((RT, RTMDET.start)) else CENTERNET


def dense_of(name: str) -> str:
    """Name, less its seed, of the dense run that one of this name is compared with: of pruned and attacked ones the
    attacked one."""
    prefix = next((prefix for prefix in (STARTED, RT) if name.startswith(prefix)), "")
    return prefix + ("robust" if "_robust" in name.removeprefix(prefix) else "dense")


def run_of(name: str, seed: int) -> Run:
    ending, row, target = ROWS[name]
    family, needs = family_of(name), None
    args = detector_args(family.dense, ending)
    if name.startswith((STARTED, RT)):
        start = start_of(family, "_narrow50" if ending == "_narrow50" else "")
        if family.published:
            file = "start_uniform50_s0" if ending == "_uniform50" else start.name
            args += ("--start", (WEIGHTS / f"{file}.pth").relative_to(ROOT).as_posix())
        else:
            args, needs = (*args, "--start", f"{{work}}/{start.name}/weights.pth"), start.name
    return Run(f"{name}_s{seed}", row, target, seed, "detector_run.py", args, family.dense + ending, needs=needs)


def start_of(family: Family, ending: str) -> Run:
    """The training on generated scenes whose network a family's runs start from."""
    target = ROWS[ending.removeprefix("_") or "dense"][2]
    args, config = detector_args(family.scenes, ending), family.scenes + ending
    return Run(
        f"{family.start}{ending}_s0",
        "common start, trained on generated scenes",
        target,
        0,
        "detector_run.py",
        args,
        config,
        shown=False,
    )


def detector_args(config: str, ending: str) -> tuple[str, ...]:
    dense = f"configs/kitti/{config}.py"
    return (f"configs/kitti/{config}{ending}.py", "--dense", dense, "--shape", *map(str, SHAPE))


def declared() -> list[Run]:
    """All runs, in the order in which they are worked off."""
    three = ("prune50", "narrow50", "dense")
    more = ("prune50_tied", "robust", "prune50_robust", "prune50_robust4", "prune50_paper", "prune30")
    return [
        *(start_of(CENTERNET, ending) for ending in ("", "_narrow50")),
        *(run_of(STARTED + name, seed) for seed in (0, 1) for name in ("prune50_fisher", "uniform50", *three)),
        *(run_of(STARTED + name, 0) for name in more),
        *(start_of(RTMDET, ending) for ending in ("", "_narrow50")),
        *(run_of(RT + name, 0) for name in ("dense", "prune50_fisher", "narrow50", "prune50")),
        *(run_of(name, seed) for seed in (0, 1) for name in three),
    ]


def mean_ap(run: dict[str, Any]) -> float:
    """A finished run's AP R40, moderate, the mean over the classes; a class without detections counts as 0."""
    return sum(run["figures"][name]["R40"][1] if run["figures"].get(name) else 0.0 for name in CLASSES) / len(CLASSES)


def compare(sweep: Sweep, chosen: list[Run]) -> None:
    """Adds ``minus_dense``, ``minus_control`` and ``minus_narrowed`` to the metrics files of finished runs whose
    detections lie there, and ``loose``: the same for cars, and their figures, at an overlap of :data:`LOOSE`.

    Differences to runs whose detections are gone stay as they are.
    """
    from measured import write_json

    for run in (run for run in chosen if run.shown and sweep.finished(run)):
        name, results = run.name.rpartition("_")[0], sweep.work / run.name / "results"
        if not results.is_dir():
            continue
        others = {
            "minus_dense": dense_of(name),
            "minus_control": CONTROLS.get(name),
            "minus_narrowed": NARROWED.get(name),
        }
        known, more = read(sweep.out, run.name), {}
        assert known is not None
        cars = ("Car", "--overlap", str(LOOSE))
        loose = {**known.get("loose", {}), "overlap": LOOSE, "Car": evaluated(results, *cars)["Car"]}
        for key, other in others.items():
            theirs = sweep.work / f"{other}_s{run.seed}" / "results"
            if other in (None, name) or not theirs.is_dir():
                continue
            if not sweep.finished(run_of(str(other), run.seed)):  # its detections are those of an earlier epoch
                continue
            versus = ("--versus", str(theirs))
            more[key] = evaluated(results, *CLASSES, *versus)["difference"]
            loose[key] = evaluated(results, *cars, *versus)["difference"]["Car"]
            say(f"{run.name}: Car moderate R40 {cell(more[key], 'Car', 1, '+')} against {other}_s{run.seed}")
        write_json(sweep.out / f"{run.name}.json", {**known, **more, "loose": loose})


def evaluated(results: Path, *words: str, split: Path = ROOT / SPLIT) -> dict[str, Any]:
    """What ``mmitp eval-kitti`` says of detections, with intervals; ``words``: classes, then options."""
    from detector_run import rounded

    from mmitp.commands import eval_kitti

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder) / "ap.json"
        chosen = ["--split", str(split), "--bootstrap", "--out", str(out), "--classes", *words]
        eval_kitti.main([str(ROOT / LABELS), str(results), *chosen])
        return rounded(json.loads(out.read_text(encoding="utf-8")))


def config_of(sweep: Sweep, run: Run, folder: str) -> Config:
    """Config and weights of the network that a finished run left: the slimmed one where masks were cut out."""
    from mmitp.engine.config import load_config

    work = sweep.work / run.name
    slimmed = work / "slim/config.py"
    config = slimmed if slimmed.is_file() else sweep.configs / f"{run.config}.py"
    cfg = load_config(str(config), work_dir=str(work / folder))
    cfg.load_from = str(work / "weights.pth")
    return cfg


def fit(sweep: Sweep, chosen: list[Run]) -> None:
    """Tests finished networks on their training frames, for their metrics files (``training_frames``, AP R40 moderate).

    Args:
        sweep: where metrics, work folders and configs are.
        chosen: the runs.
    """
    import torch
    from measured import write_json

    from mmitp.engine.run import build_runner

    torch.set_num_threads(1)
    for run in (run for run in chosen if run.shown and sweep.finished(run)):
        cfg = config_of(sweep, run, "fit")
        cfg.test_dataloader.dataset.ann_file = cfg.train_dataloader.dataset.ann_file
        cfg.experiment_name = f"{run.name}_fit"
        figures = build_runner(cfg).test()
        entry = {name: round(figures.get(f"kitti/{name}_R40_moderate", 0.0), 2) for name in CLASSES}
        write_json(sweep.out / f"{run.name}.json", {**(read(sweep.out, run.name) or {}), "training_frames": entry})
        say(f"{run.name}: on the training frames {entry}")


def robust(sweep: Sweep, chosen: list[Run], images: int = IMAGES, only: Sequence[str] | None = None) -> None:
    """Tests finished networks under PGD of the training loss, for their metrics files (``robust``; ``robust_N`` for
    another number of images than the usual one).

    The networks are those that the runs left: the slimmed ones where masks were cut out. Each is attacked through
    itself, step eps / 4, one restart, by every attack of :data:`ATTACKS`. Its detections are kept in ``--work`` and
    every AP gets its interval. An attack that is done is not repeated.

    Args:
        sweep: where metrics, work folders and configs are.
        chosen: the runs.
        images: of the validation set, spread evenly.
        only: names of the attacks (:func:`attacked_by`); all by default.
    """
    import torch
    from measured import write_json

    from mmitp.engine.robust_eval import EvalAttack, attacked, build_test_runner

    torch.set_num_threads(1)
    for run in (run for run in chosen if run.shown and sweep.finished(run)):
        known = read(sweep.out, run.name) or {}
        key = "robust" if images == IMAGES else f"robust_{images}"
        done = known.get(key, dict(images=images))
        wanted = [attack for attack in ATTACKS if only is None or attacked_by(*attack) in only]
        todo = [attack for attack in wanted if attacked_by(*attack) not in done]
        if not todo:
            continue
        folder = sweep.work / run.name / f"attacked_{images}"
        cfg = config_of(sweep, run, "robust")
        cfg.experiment_name = f"{run.name}_robust"
        runner = build_test_runner(cfg, images)
        loop = runner.test_loop
        (metric,) = loop.evaluator.metrics
        write_frames(frames := folder / "frames.txt", loop.dataloader)
        for steps, eps in (CLEAN, *todo):
            name = attacked_by(steps, eps)
            metric.outfile_prefix = folder / name
            largest = 0.0
            if steps == 0:
                runner.test()  # loads the weights
            else:
                with attacked(runner.model, EvalAttack("pgd", steps=steps), eps, loop.dataloader.dataset) as log:
                    loop.run()
                largest = log.largest
            figures = evaluated(folder / name, *CLASSES, split=frames)
            done[name] = {**{label: figures.get(label) for label in CLASSES}, "largest_change": round(largest, 3)}
            write_json(sweep.out / f"{run.name}.json", {**(read(sweep.out, run.name) or {}), key: done})
            say(f"{run.name}: {name}, Car moderate R40 {cell(done[name], 'Car', 1)}")


def attacked_by(steps: int, eps: float) -> str:
    """An attack's name in metrics files: PGD-20 eps 2; no steps are no attack."""
    return f"PGD-{steps} eps {eps:g}" if steps else "clean"


def write_frames(path: Path, loader: Any) -> None:
    """The frames that a test's loader reads, as a split file of KITTI."""
    from mmitp.files import write_whole

    info = loader.dataset.get_data_info
    ids = [Path(info(i)["img_path"]).stem for i in loader.sampler.indices]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(ids) + "\n")


def robust_table(runs: list[Run], out: Path) -> str:
    """The Markdown table of the networks tested under attack; "Not tested yet." before the first."""
    names = [attacked_by(*attack) for attack in (CLEAN, *sorted(ATTACKS))]
    lines = [
        f"| KITTI-1348, AP R40, moderate | seed | images | class | {' | '.join(names)} |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for run in runs:
        known = read(out, run.name) or {}
        tests = [known[key] for key in sorted(known) if key == "robust" or key.startswith("robust_")]
        for tested, name in itertools.product(tests, CLASSES):
            cells = [cell(tested[attack], name, 1) if attack in tested else "not tested" for attack in names]
            first = [run.row if name == CLASSES[0] else "", str(run.seed), str(tested["images"]), name]
            lines.append(f"| {' | '.join([*first, *cells])} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "Not tested yet.\n"


def publish(sweep: Sweep, chosen: list[Run], out: Path) -> None:
    """Writes what finished small networks are made of: weights in half precision, and a config that takes them.

    Args:
        sweep: where metrics and work folders are.
        chosen: the runs; left out are dense ones that nothing starts from, those whose masks were not cut out, and
            RTMDet's, which are too large.
        out: folder of ``NAME.py`` and ``NAME.pth``, beside the configs' folder.

    Raises:
        ValueError: a weight that half precision cannot hold.
    """
    import torch
    from mmengine import Config

    from mmitp.engine.config import load_config
    from mmitp.files import write_whole
    from mmitp.models.slim_config import is_masked

    for run in filter(sweep.finished, chosen):
        if run.target == 1 and run.shown or not family_of(run.name).published:
            continue
        if (
            is_masked(load_config(str(sweep.configs / f"{run.config}.py")).model)
            and not (sweep.work / run.name / "slim/config.py").is_file()
        ):
            say(f"{run.name}: left out, its masks were not cut out")
            continue
        folder, config, model = sweep.work / run.name, run.config, ""
        if (slimmed := folder / "slim/config.py").is_file():
            config, small = family_of(run.name).dense, Config.fromfile(str(slimmed)).model
            spec = small.slim.to_dict()
            model = f'\nmodel = dict(type="mmitp.SlimModel", of="{small.of}", slim={spec!r})\n'
        base = os.path.relpath(sweep.configs / f"{config}.py", out)
        text = f'# {run.row}, seed {run.seed}:\n# the network of {run.name}.pth.\n_base_ = ["{base}"]\n{model}'
        state = torch.load(folder / "weights.pth", weights_only=True)
        half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        if wrong := [name for name, value in half.items() if not bool(torch.isfinite(value).all())]:
            raise ValueError(f"{run.name}: half precision cannot hold {', '.join(wrong[:3])}")
        saved = io.BytesIO()
        torch.save(dict(state_dict=half, meta=dict(run=run.name)), saved)
        write_whole(out / f"{run.name}.pth", saved.getbuffer())
        write_whole(out / f"{run.name}.py", text)
        say(f"{out / run.name}.py and .pth, {saved.tell():,} bytes")


def cell(figures: dict[str, Any], name: str, difficulty: int, sign: str = "") -> str:
    """AP R40 with its interval, or '-' for a class without detections."""
    values = figures.get(name)
    if values is None or values["R40"][difficulty] is None:
        return "-"
    low, high = values["R40_interval"][difficulty]
    return f"{values['R40'][difficulty]:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def table(runs: list[Run], out: Path) -> str:
    """The Markdown table, a line a run, in the declared order of rows, and one of differences to controls."""
    costs = read(out, "costs") or {}
    lines = [
        f"| KITTI-1348 (3DOP ids, JPEG 50, R40, moderate) | seed | {' | '.join(CLASSES)} | "
        f"{' | '.join(f'{name} minus dense' for name in CLASSES)} | ops | params | ms (over dense) | cost | "
        "processor time, s |",
        "|" + "---|" * 13,
    ]
    shown = [(run, known) for run in runs if run.shown and (known := read(out, run.name))]
    finished = [(run, known) for run, known in shown if known["state"] == "finished"]
    order = [f"{row} {target}" for _, row, target in ROWS.values()]
    for run, known in sorted(finished, key=lambda pair: (order.index(f"{pair[0].row} {pair[0].target}"), pair[0].seed)):
        dense = known["config"] == family_of(run.name).dense
        cost = 1.0 if dense else relative_cost(known, costs)
        cells = [
            f"{run.row} (`{known['config']}`)",
            str(run.seed),
            *(cell(known["figures"], name, 1) for name in CLASSES),
            *(cell(known.get("minus_dense", {}), name, 1, "+") for name in CLASSES),
            between([known["ops_kept"]]),
            between([known["params_kept"]]),
            milliseconds([known]),
            "-" if cost is None else f"{cost:.2f}",
            seconds(known),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if loose := [(run, known) for run, known in finished if "loose" in known]:
        titles = (f"at an overlap of {LOOSE:g}", "minus dense", "minus the control", "on the training frames (0.7)")
        lines += ["", f"| Car, moderate, AP R40 | seed | {' | '.join(titles)} |", "|" + "---|" * 6]
    for run, known in loose:
        cells = [run.row, str(run.seed), cell(known["loose"], "Car", 1)]
        cells += [cell(known["loose"], key, 1, "+") for key in ("minus_dense", "minus_control")]
        cells.append(f"{known['training_frames']['Car']:.2f}" if "training_frames" in known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    for key, title in (
        ("minus_control", "minus the control of the same seed"),
        ("minus_narrowed", "minus the same start made narrower, of the same seed"),
    ):
        against = [(run, known[key]) for run, known in finished if key in known]
        if against:
            lines += ["", f"| {title} | seed | {' | '.join(CLASSES)} |", "|" + "---|" * 5]
        for run, change in against:
            cells = [run.row, str(run.seed), *(cell(change, name, 1, "+") for name in CLASSES)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if finished else "No run has ended yet.\n"


def main() -> None:
    more = ("compare", "fit", "publish", "robust")
    parser, arguments = command_line(__doc__, METRICS, "work_dirs/kitti1348", 12, more=more)
    arguments["robust"].add_argument("--images", type=int, default=IMAGES, help="of the validation set, spread evenly")
    arguments["robust"].add_argument("--attacks", nargs="+", choices=[attacked_by(*attack) for attack in ATTACKS])
    args = parser.parse_args()
    runs = declared()
    if args.command == "table":
        put(args, table(runs, args.out), README, BEGIN, END)
        return
    sweep = Sweep(runs, args.out.resolve(), args.work.resolve(), configs=CONFIGS, figure="ap")
    chosen = selected(runs, args.only)
    families = {family: [run for run in chosen if family_of(run.name) is family] for family in (CENTERNET, RTMDET)}
    families = {family: own for family, own in families.items() if own}
    if args.command == "cost":
        for family, own in families.items():
            cost(sweep, own, args.rounds, family.dense, family.batch, SHAPE)
        return
    if args.command == "latency":
        for family, own in families.items():
            latency(sweep, own, args.rounds, family.dense, SHAPE)
        return
    if args.command == "compare":
        compare(sweep, chosen)
        return
    if args.command == "fit":
        fit(sweep, chosen)
        return
    if args.command == "robust":
        robust(sweep, chosen, args.images, args.attacks)
        return
    if args.command == "publish":
        publish(sweep, chosen, WEIGHTS)
        return
    status = run_or_tell(args, sweep, chosen)
    if args.command == "run":
        compare(sweep, list(sweep.runs.values()))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
