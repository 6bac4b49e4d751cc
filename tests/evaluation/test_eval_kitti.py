"""The command line ``tools/eval_kitti.py``, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "eval_kitti.py"
LABEL = "{} 0.00 0 -10 0.00 0.00 100.00 100.00 -1 -1 -1 -1000 -1000 -1000 -10\n"
RESULT = "{} -1 -1 -10 0.00 0.00 100.00 100.00 -1 -1 -1 -1000 -1000 -1000 -10 {}\n"


def run(*arguments, python=()):
    command = [sys.executable, *python, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(sys.executable).anchor)


@pytest.fixture
def folders(tmp_path):
    gt_dir, dt_dir = tmp_path / "label_2", tmp_path / "results"
    gt_dir.mkdir()
    dt_dir.mkdir()
    for i in range(41):
        (gt_dir / f"{i:06d}.txt").write_text(LABEL.format("Car") + LABEL.format("Cyclist"))
        (dt_dir / f"{i:06d}.txt").write_text(RESULT.format("Car", i / 64))
    return gt_dir, dt_dir


def test_table_and_json(folders, tmp_path):
    out = tmp_path / "ap.json"
    done = run(*folders, "--json", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("41 frames\n")
    assert ["Car", "R40", "100.00", "100.00", "100.00"] in [line.split() for line in done.stdout.splitlines()]
    assert ["Cyclist", "R11", "-", "-", "-"] in [line.split() for line in done.stdout.splitlines()]
    perfect = [pytest.approx(100)] * 3
    written = json.loads(out.read_text())
    made = written.pop("run")
    assert written == {"Car": {"R11": perfect, "R40": perfect}, "Pedestrian": None, "Cyclist": None}
    assert (made["images"], made["labels"], made["detections"]) == (41, str(folders[0]), str(folders[1]))
    assert {"python", "mmitp", "numpy"} <= made["versions"].keys()


def test_classes_in_any_case(folders, tmp_path):
    out = tmp_path / "ap.json"
    assert run(*folders, "--classes", "car", "CYCLIST", "--json", out).returncode == 0
    assert list(json.loads(out.read_text())) == ["Car", "Cyclist", "run"]


def test_split_chooses_frames_and_results_may_lie_in_data(folders, tmp_path):
    gt_dir, dt_dir = folders
    for path in dt_dir.glob("*.txt"):
        if path.stem not in ("000003", "000007"):
            path.unlink()
    dt_dir.rename(tmp_path / "data")
    split, out = tmp_path / "val.txt", tmp_path / "ap.json"
    split.write_text("000007\n000003")
    done = run(gt_dir, tmp_path, "--split", split, "--json", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"2 frames of split {split}\n")
    assert json.loads(out.read_text())["Car"]["R40"] == [2.5, 2.5, 2.5]


def test_empty_result_file_is_a_frame_without_detections(folders, tmp_path):
    (folders[1] / "000000.txt").write_text("")
    out = tmp_path / "ap.json"
    assert run(*folders, "--json", out).returncode == 0
    # 40 of 41 found: 40 thresholds.
    assert json.loads(out.read_text())["Car"]["R40"] == [97.5, 97.5, 97.5]


@pytest.mark.parametrize("with_split", [False, True])
def test_missing_result_file_is_an_error_that_names_it(folders, tmp_path, with_split):
    (folders[1] / "000005.txt").unlink()
    split = tmp_path / "val.txt"
    split.write_text("000004\n000005\n")
    done = run(*folders, *(["--split", split] if with_split else []))
    assert done.returncode == 2
    assert str(folders[1] / "000005.txt") in done.stderr
    assert "Traceback" not in done.stderr


def test_result_without_label_is_an_error_but_other_text_files_are_not(folders):
    (folders[1] / "ids.txt").write_text("000000\n")
    assert run(*folders).returncode == 0
    (folders[1] / "000099.txt").write_text("")
    done = run(*folders)
    assert done.returncode == 2
    assert str(folders[1] / "000099.txt") in done.stderr


def test_malformed_line_is_reported_with_file_and_line(folders):
    (folders[1] / "000005.txt").write_text(RESULT.format("Car", 0.5) + "Car 1 2\n")
    done = run(*folders)
    assert done.returncode == 2
    assert f"{folders[1] / '000005.txt'}, line 2: 3 columns" in done.stderr


@pytest.mark.parametrize("position", [0, 1])
def test_missing_folder(folders, position):
    arguments = list(folders)
    arguments[position] = folders[position] / "nowhere"
    done = run(*arguments)
    assert done.returncode == 2
    assert "nowhere is not a folder" in done.stderr


def test_missing_split_and_unknown_class(folders):
    done = run(*folders, "--split", "nowhere.txt")
    assert (done.returncode, "nowhere.txt" in done.stderr) == (2, True)
    done = run(*folders, "--classes", "Tram")
    assert (done.returncode, "'Tram' is not an evaluated class" in done.stderr) == (2, True)


def test_json_that_cannot_be_written(folders, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*folders, "--json", tmp_path / "file" / "ap.json")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "cannot be written" in done.stderr
    assert "frames" not in done.stdout  # said before the work
    assert run(*folders, "--json", tmp_path / "new" / "ap.json").returncode == 0
    assert (tmp_path / "new" / "ap.json").is_file()


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""], ids=["byte order mark", "plain"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["unix", "windows"])
def test_text_files_of_any_editor_give_the_same_figures(folders, tmp_path, mark, end):
    """The first line of a marked file was lost: an AP of 100 became that of the other objects."""
    split, out = tmp_path / "val.txt", tmp_path / "ap.json"
    split.write_text("".join(f"{i:06d}\n" for i in range(41)))
    for path in (*folders[0].iterdir(), *folders[1].iterdir(), split):
        path.write_bytes(mark + path.read_bytes().replace(b"\n", end))
    assert run(*folders, "--split", split, "--json", out).returncode == 0
    assert json.loads(out.read_text())["Car"]["R40"] == [pytest.approx(100)] * 3


@pytest.mark.parametrize("which", ["label", "result", "split"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_other_encodings_are_named(folders, tmp_path, which, encoding):
    split = tmp_path / "val.txt"
    split.write_text("000000\n000001\n")
    path = dict(label=folders[0] / "000000.txt", result=folders[1] / "000000.txt", split=split)[which]
    path.write_bytes(path.read_text().encode(encoding))
    done = run(*folders, "--split", split)
    assert (done.returncode, "Traceback" in done.stderr, done.stderr.count("\n")) == (2, False, 1)
    assert f"{path} is not UTF-8 text" in done.stderr


def test_unknown_class_names_are_counted_and_named(folders):
    known = [LABEL.format(name) for name in ("Misc", "TRAM", "Person_sitting", "dontcare")]
    (folders[0] / "000003.txt").write_text(LABEL.format("Vehicle") * 2 + LABEL.format("Caar") + "".join(known))
    done = run(*folders)
    assert done.returncode == 0
    assert done.stderr.count("warning") == 1
    assert "labels of classes that KITTI does not have count as background: Vehicle (2), Caar (1); it" in done.stderr
    (folders[1] / "000004.txt").write_text(RESULT.format("Caar", 0.5))
    assert f"{folders[1]}: detections of classes that KITTI does not have" in run(*folders).stderr


def test_traceback_is_shown_on_request(folders):
    done = run(*folders, "--split", "nowhere.txt", "--traceback")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mmitp eval-kitti: nowhere.txt: No such file")


def test_imports_neither_openmmlab_nor_torch(folders):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:];\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done: assert done.code == 0, done.code\n"
        "heavy = {'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'torch', 'scipy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = run(*folders, python=("-c", code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_bootstrap_and_a_second_detector(folders, tmp_path):
    gt_dir, dt_dir = folders
    other, out = tmp_path / "other", tmp_path / "ap.json"
    other.mkdir()
    for path in dt_dir.glob("*.txt"):
        (other / path.name).write_text(path.read_text() if int(path.stem) < 30 else "")
    done = run(gt_dir, dt_dir, "--versus", other, "--bootstrap", 50, "--classes", "Car", "--json", out)
    assert done.returncode == 0, done.stderr
    assert "95 % interval of 50 draws, seed 0" in done.stdout
    written = json.loads(out.read_text())
    assert written["run"]["bootstrap"] == {"draws": 50, "seed": 0, "percent": 95}
    assert written["run"]["versus"] == str(other)
    # One perfect detector: every draw of 41 objects has 41 thresholds.
    assert written["Car"]["R40_interval"] == [[pytest.approx(100)] * 2] * 3
    assert written["versus"]["Car"]["R40"] == [pytest.approx(72.5)] * 3  # 30 of 41 are found: slots 1 to 29 of 40
    (low, high) = written["difference"]["Car"]["R40_interval"][1]
    assert written["difference"]["Car"]["R40"][1] == pytest.approx(27.5)
    assert 5 < low < 27.5 < high < 50
    assert any(line.startswith("Car") and "+27.50 (+" in line for line in done.stdout.splitlines())


def test_loose_boxes_count_from_a_lower_overlap_on(folders, tmp_path):
    """Boxes of 100 by 100 moved by 25 pixels overlap by 75 / 125 = 0.6."""
    gt_dir, dt_dir = folders
    for path in dt_dir.glob("*.txt"):
        path.write_text(path.read_text().replace("-10 0.00 0.00 100.00", "-10 25.00 0.00 125.00"))
    figures = []
    for overlap in ((), ("--overlap", 0.5), ("--overlap", 0.6)):
        done = run(gt_dir, dt_dir, *overlap, "--classes", "Car", "--bootstrap", 5, "--out", tmp_path / "ap.json")
        assert done.returncode == 0, done.stderr
        assert ("not the official figures" in done.stdout) == bool(overlap)
        written = json.loads((tmp_path / "ap.json").read_text())
        assert written["run"].get("overlap") == (overlap[1] if overlap else None)
        figures.append((written["Car"]["R40"][1], written["Car"]["R40_interval"][1]))
    assert figures == [(0, [0, 0]), (pytest.approx(100), [pytest.approx(100)] * 2), (0, [0, 0])]
    done = run(gt_dir, dt_dir, "--overlap", 1)
    assert done.returncode != 0
    assert "overlap must be at least 0 and below 1, got 1" in done.stderr


def test_the_second_detector_needs_the_same_frames(folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    done = run(*folders, "--versus", other)
    assert (done.returncode, str(other) in done.stderr) == (2, True)
