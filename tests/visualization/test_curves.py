import sys

import pytest

from mmitp.visualization import plot_budget, plot_channels, plot_hw_losses, plot_robustness

pytestmark = pytest.mark.filterwarnings("error")


def test_the_budget_curve_has_the_ratio_the_target_and_the_loss(tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_budget([0, 1, 2], [1.0, 0.7, 0.5], tmp_path / "a/budget.svg", target=0.5, hw_loss=[0.5, 0.2, 0.0])
    text = path.read_text()
    for part in ("operations kept", "target 0.5", "L_HW", "iteration"):
        assert f"<!-- {part} -->" in text


def test_the_bars_name_every_layer_and_its_share(tmp_path):
    pytest.importorskip("matplotlib")
    text = plot_channels(["conv1", "conv2"], [8, 0], [16, 4], tmp_path / "bars.svg", title="kept").read_text()
    for part in ("conv1", "conv2", "50 %", "0 %", "kept"):
        assert f"<!-- {part} -->" in text or f"<!--  {part} -->" in text


def test_the_robustness_curve_names_its_metrics_and_its_attack(tmp_path):
    pytest.importorskip("matplotlib")
    curves = {"accuracy/top1": [90.0, 40.0], "accuracy/top5": [99.0, 80.0]}
    text = plot_robustness([0, 8], curves, tmp_path / "robust.svg", title="PGD-20").read_text()
    for part in ("accuracy/top1", "accuracy/top5", "PGD-20", "eps [pixels/255]"):
        assert f"<!-- {part} -->" in text


def test_numbers_that_do_not_fit_are_errors(tmp_path):
    with pytest.raises(ValueError, match="as many values a curve"):
        plot_robustness([0, 8], {"top1": [90.0]}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="equally many"):
        plot_budget([0, 1], [1.0], tmp_path / "x.png")
    with pytest.raises(ValueError, match="equally many"):
        plot_budget([0, 1], [1.0, 0.9], tmp_path / "x.png", hw_loss=[0.1])
    with pytest.raises(ValueError, match="equally many"):
        plot_hw_losses({"a": ([0, 1], [0.5])}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="as many"):
        plot_channels(["a"], [1, 2], [3, 4], tmp_path / "x.png")
    with pytest.raises(ValueError, match="layer a cannot keep 5 of 4"):
        plot_channels(["a"], [5], [4], tmp_path / "x.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_budget([0], [1.0], tmp_path / "x.png")
