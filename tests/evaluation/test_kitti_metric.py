"""KittiMetric through mmengine's Evaluator."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement, InstanceData

import mmitp.evaluation.kitti_ap as kitti_ap
from mmitp.registry import METRICS

CLASSES = ("Pedestrian", "Car", "Cyclist")
PEDESTRIAN, CAR, CYCLIST = range(3)
LABEL = "{} 0.00 0 -10 0.00 0.00 {} 100.00 -1 -1 -1 -1000 -1000 -1000 -10\n"


@pytest.fixture
def label_dir(tmp_path):
    folder = tmp_path / "training" / "label_2"
    folder.mkdir(parents=True)
    for i in range(41):
        (folder / f"{i:06d}.txt").write_text(LABEL.format("Car", 100) + LABEL.format("Pedestrian", 50))
    return folder


def sample(frame, *detections, **fields):
    """A data sample of (label, box, score), as mmdet's detectors hand over."""
    pred = InstanceData()
    pred.bboxes = torch.tensor([d[1] for d in detections], dtype=torch.float32).reshape(-1, 4)
    pred.scores = torch.tensor([d[2] for d in detections], dtype=torch.float32)
    pred.labels = torch.tensor([d[0] for d in detections], dtype=torch.int64)
    meta = {"img_id": frame, "img_path": f"/data/image_2/{frame:06d}.png", "ori_shape": (375, 1242)}
    return BaseDataElement(metainfo={**meta, **fields}, pred_instances=pred)


def evaluator(known=CLASSES, **kwargs):
    result = Evaluator(dict(type="mmitp.KittiMetric", **kwargs))
    result.dataset_meta = {"classes": known} if known else {}
    return result


def cars(frames=41):
    return [sample(i, (CAR, (0, 0, 100, 100), 0.1 + i / 64)) for i in range(frames)]


def run(metric, samples, batch=4):
    for start in range(0, len(samples), batch):
        metric.process(data_samples=samples[start : start + batch])
    return metric.evaluate(len(samples))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_beyond_the_classes_is_refused(label_dir, tmp_path, label):
    metric = evaluator(data_root=str(tmp_path))
    strange = sample(7, (CAR, (0, 0, 9, 9), 0.5), (label, (0, 0, 9, 9), 0.5))
    with pytest.raises(ValueError, match=f"frame 000007: .* label {label}, and .* 3 classes, .*num_classes"):
        metric.process(data_samples=[strange])


def test_metrics_of_every_class_and_their_mean(label_dir, tmp_path):
    metrics = run(evaluator(data_root=str(tmp_path)), cars())
    assert len(metrics) == 3 * 2 * 3 + 1
    for difficulty in ("easy", "moderate", "hard"):
        for rule in ("R11", "R40"):
            assert metrics[f"kitti/Car_{rule}_{difficulty}"] == pytest.approx(100)
            # Never detected: not evaluated officially, zero here.
            assert metrics[f"kitti/Pedestrian_{rule}_{difficulty}"] == 0
    assert metrics["kitti/mAP_R40_moderate"] == pytest.approx(100 / 3)


def test_one_class_detector(label_dir):
    metrics = run(evaluator(("car",), label_dir=str(label_dir)), [sample(0, (0, (0, 0, 100, 100), 0.5))])
    assert list(metrics) == [f"kitti/Car_{r}_{d}" for r in ("R11", "R40") for d in ("easy", "moderate", "hard")] + [
        "kitti/mAP_R40_moderate"
    ]


@pytest.mark.parametrize("classes", [["Car"], "Car"])
def test_classes_and_prefix_by_argument(label_dir, classes):
    metric = evaluator(None, label_dir=str(label_dir), classes=classes, prefix="val")
    assert run(metric, [sample(0, (0, (0, 0, 100, 100), 0.5))])["val/Car_R11_hard"] == pytest.approx(100 / 11)


def test_frame_comes_from_img_id_without_img_path(label_dir):
    metric = evaluator(label_dir=str(label_dir))
    metrics = run(metric, [sample(3, (CAR, (0, 0, 100, 100), 0.5), img_path=None)])
    assert metrics["kitti/Car_R11_easy"] == pytest.approx(100 / 11)
    metrics = run(metric, [sample(0, (CAR, (0, 0, 100, 100), 0.5), img_path=None, img_id="000004")])
    assert metrics["kitti/Car_R11_easy"] == pytest.approx(100 / 11)


def test_written_files_give_the_same_figures(label_dir, tmp_path):
    out = tmp_path / "results"
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(41):
        boxes = torch.tensor([0.0, 0, 100, 100]) + 12 * torch.randn(3, 4, generator=generator)
        scores = torch.rand(3, generator=generator)
        labels = (PEDESTRIAN, CAR, CAR)
        rows = zip(labels, boxes.tolist(), scores.tolist(), strict=True)
        samples.append(sample(i, *rows))
    samples[0] = sample(0)
    metrics = run(evaluator(label_dir=str(label_dir), outfile_prefix=str(out)), samples)
    assert (out / "000000.txt").read_text() == ""
    assert len(list(out.iterdir())) == 41
    result = kitti_ap.evaluate_folders(label_dir, out)
    assert 0 < result["Car"].r40[0] < 100
    assert result["Cyclist"] is None
    for name in ("Car", "Pedestrian"):
        for i, difficulty in enumerate(kitti_ap.DIFFICULTIES):
            assert metrics[f"kitti/{name}_R11_{difficulty}"] == result[name].r11[i]
            assert metrics[f"kitti/{name}_R40_{difficulty}"] == result[name].r40[i]


def test_boxes_are_clipped_to_the_image(label_dir, tmp_path):
    outside = sample(0, (CAR, (-50, -3, 1300, 380), 0.5))
    run(evaluator(label_dir=str(label_dir), outfile_prefix=str(tmp_path / "out")), [outside])
    written = kitti_ap.read_detections(tmp_path / "out" / "000000.txt")
    assert written.boxes.tolist() == [[0, 0, 1241, 374]]


def test_format_only_needs_no_labels(tmp_path):
    out = tmp_path / "out"
    assert run(evaluator(label_dir="nowhere", outfile_prefix=str(out), format_only=True), cars(2)) == {}
    assert sorted(path.name for path in out.iterdir()) == ["000000.txt", "000001.txt"]
    with pytest.raises(ValueError, match="outfile_prefix"):
        METRICS.build(dict(type="mmitp.KittiMetric", format_only=True))


def test_half_precision_predictions(label_dir):
    half = sample(0, (CAR, (0, 0, 100, 100), 0.5))
    half.pred_instances.bboxes = half.pred_instances.bboxes.bfloat16()
    half.pred_instances.scores = half.pred_instances.scores.half()
    assert run(evaluator(label_dir=str(label_dir)), [half])["kitti/Car_R11_easy"] == pytest.approx(100 / 11)


def test_detections_that_are_not_finite_are_left_out(label_dir):
    diverged = sample(0, (CAR, (0, 0, math.nan, 100), 0.9), (CAR, (0, 0, 100, 100), math.nan))
    metrics = run(evaluator(label_dir=str(label_dir)), [diverged, *cars(2)[1:]])
    assert metrics["kitti/Car_R11_easy"] == pytest.approx(100 / 11)


def test_evaluating_twice_starts_afresh(label_dir):
    metric = evaluator(label_dir=str(label_dir))
    assert run(metric, cars()) == run(metric, cars())


def test_samples_that_pad_the_last_batch_do_not_count(label_dir):
    metric = evaluator(label_dir=str(label_dir))
    metric.process(data_samples=[*cars(), *cars(1)])
    assert metric.evaluate(41)["kitti/Car_R40_easy"] == pytest.approx(100)


def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(label_dir, tmp_path):
    (tmp_path / "file").write_text("")
    metric = evaluator(data_root=str(tmp_path), outfile_prefix=str(tmp_path / "file" / "results"))
    with pytest.raises(ValueError, match=r"cannot be written to .*results.000000\.txt: Not a directory"):
        metric.process(data_samples=cars(1))


def test_two_processes_give_the_figures_of_one(label_dir, tmp_path):
    # Each process runs this very file (see its end).
    command = [sys.executable, __file__, str(tmp_path / "rendezvous"), str(label_dir), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    expected = run(evaluator(label_dir=str(label_dir)), cars())
    assert expected["kitti/Car_R40_easy"] == pytest.approx(100)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_unknown_class_names_are_warned_of_once(label_dir, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("mmitp.evaluation.metrics.kitti_metric.print_log", lambda text, **_: said.append(text))
    (label_dir / "000000.txt").write_text((label_dir / "000000.txt").read_text().replace("Car", "Vehicle"))
    metric = evaluator(label_dir=str(label_dir))
    run(metric, cars())
    run(metric, cars())
    assert len([text for text in said if "Vehicle (1)" in text]) == 1


def test_mistakes_are_named(label_dir, tmp_path):
    with pytest.raises(ValueError, match=r"000077\.txt does not exist"):
        run(evaluator(label_dir=str(label_dir)), [sample(77)])
    with pytest.raises(ValueError, match="000001 was predicted more than once"):
        run(evaluator(label_dir=str(label_dir)), [sample(1), sample(1)])
    with pytest.raises(ValueError, match="'classes'"):
        run(evaluator(None, label_dir=str(label_dir)), [sample(1)])
    with pytest.raises(ValueError, match="none of the classes"):
        run(evaluator(("dog",), label_dir=str(label_dir)), [sample(1)])


def one_of_two_processes(rendezvous, label_dir, out, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
    metric = evaluator(label_dir=label_dir)
    # As mmengine's sampler hands them out: every second frame, padded to equal length by starting over.
    metric.process(data_samples=[*cars(), *cars(1)][int(rank) :: 2])
    Path(out, f"{rank}.json").write_text(json.dumps(metric.evaluate(41)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])
