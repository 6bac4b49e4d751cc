"""Resuming: from the newest whole checkpoint, exactly, or not at all."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from toy_config import VALIDATION, same, tiny_config

from mmitp.engine.resume import newest_good, settle_start
from mmitp.engine.run import build_runner
from mmitp.engine.saving import GRADIENTS
from mmitp.files import write_whole

STATES = ("state_dict", "optimizer", "param_schedulers", "mmitp_prune_hook")


def load(path):
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Four epochs of a run of six."""
    folder = tmp_path_factory.mktemp("base")
    build_runner(tiny_config(folder, epochs=4)).train()
    return folder


@pytest.fixture
def work(base, tmp_path):
    shutil.copytree(base, tmp_path / "work")
    return tmp_path / "work"


def test_a_file_of_weights_alone_starts_a_run_that_averages_its_weights(base, tmp_path):
    weights = load(base / "epoch_1.pth")["state_dict"]
    torch.save(weights, tmp_path / "bare.pth")
    average = dict(type="EMAHook")
    for name, start in (("bare", tmp_path / "bare.pth"), ("whole", base / "epoch_1.pth")):
        runner = build_runner(tiny_config(tmp_path / name, epochs=4, hooks=[average], load_from=str(start)))
        runner.call_hook("before_run")  # as train does
        runner.load_or_resume()
        (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == "EMAHook"]
        for model in (runner.model, hook.ema_model.module):
            assert same(dict(model.state_dict()), dict(weights)), name


def resumed(work):
    return os.path.basename(newest_good(tiny_config(work)) or "")


def hole(raw):
    return raw[: len(raw) // 3] + bytes(4096) + raw[len(raw) // 3 + 4096 :]


DAMAGE = {
    "half": lambda raw: raw[: len(raw) // 2],
    "a byte short": lambda raw: raw[:-1],
    "100 bytes": lambda raw: raw[:100],
    "empty": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "a hole": hole,
    "noise": lambda raw: bytes(torch.randint(256, (len(raw),), dtype=torch.uint8)),
    "text": lambda raw: b"<html>404</html>",
}


@pytest.mark.parametrize("named", [False, True])
def test_a_run_without_a_seed_goes_on_with_its_own(tmp_path, named):
    """The data sets' draws are as torch's initial seed says, the samplers' as the Runner's."""

    def run(epochs, **more):
        cfg = tiny_config(tmp_path, epochs=epochs, **more)
        cfg.pop("randomness")
        (runner := build_runner(cfg)).train()
        sampler = runner.train_dataloader.sampler
        return runner.seed, sampler.seed, load(tmp_path / f"epoch_{epochs}.pth")["meta"]["seed"]

    first = run(5)
    again = run(6, resume=True, load_from=str(tmp_path / "epoch_5.pth") if named else None)
    assert {*first} == {*again}
    assert len({*again}) == 1


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(work, damage, monkeypatch):
    said = []
    monkeypatch.setattr("mmitp.engine.resume.print_log", lambda text, **_: said.append(text))
    newest = work / "epoch_4.pth"
    newest.write_bytes(damage(newest.read_bytes()))
    assert resumed(work) == "epoch_3.pth"
    (reason,) = said
    assert f"passes over {newest} is not a checkpoint, or a damaged one: " in reason
    assert "\n" not in reason


def test_every_hole_of_a_sector_that_matters_is_noticed(base, tmp_path):
    """Zeros over 512 bytes anywhere: refused, or, in the padding between records, without effect."""
    from mmitp.engine.safe_load import load_data

    raw, whole = (base / "epoch_4.pth").read_bytes(), load(base / "epoch_4.pth")
    path, refused = tmp_path / "x.pth", 0
    for start in range(0, len(raw) - 512, 1024):
        path.write_bytes(raw[:start] + bytes(512) + raw[start + 512 :])
        try:
            found = load_data(path)
        except ValueError:
            refused += 1
        else:
            assert all(same(found[key], whole[key]) for key in STATES)
    assert refused > 10


def drop(key):
    def change(checkpoint):
        del checkpoint[key]

    return change


def poison(value):
    def change(checkpoint):
        checkpoint["state_dict"]["fc.weight"][0, 0] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("optimizer"), "lacks optimizer"),
        (drop("mmitp_prune_hook"), "lacks mmitp_prune_hook"),
        (drop("message_hub"), "lacks message_hub"),
        (drop("state_dict"), "lacks state_dict"),
        (poison(float("nan")), "NaN or infinite values in 1 of"),
        (poison(float("-inf")), "NaN or infinite values in 1 of"),
        (lambda c: c["meta"].update(iter="x"), "meta.iter must be a whole number"),
        (lambda c: c["mmitp_prune_hook"].update(input_shape=[8]), "input_shape must be two whole numbers"),
        (lambda c: c.update(state_dict={}), "'state_dict' is empty"),
    ],
)
def test_a_checkpoint_without_all_of_its_state_is_passed_over(work, change, says):
    checkpoint = load(work / "epoch_4.pth")
    change(checkpoint)
    torch.save(checkpoint, work / "epoch_4.pth")
    with pytest.raises(ValueError, match=says):
        build_runner(tiny_config(work, resume=True, load_from=str(work / "epoch_4.pth")))
    assert resumed(work) == "epoch_3.pth"


def point(text):
    return lambda work: (work / "last_checkpoint").write_bytes(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda work: (work / "last_checkpoint").unlink(),
        point(b""),
        point(b"\xff\xfe\x00\x01" * 16),
        point(b"/moved/to/nowhere/epoch_4.pth\n"),
        point(b"epoch_4.pth"),
        point(b"/nowhere/epoch_99.pth"),
        lambda work: (work / "last_checkpoint").write_text(str(work / "epoch_3.pth")),  # killed before it was written
    ],
)
def test_last_checkpoint_is_a_hint_only(work, change):
    os.utime(work / "epoch_4.pth")
    change(work)
    assert resumed(work) == "epoch_4.pth"


def test_an_earlier_runs_checkpoints_do_not_count_because_they_count_further(work):
    shutil.copy(work / "epoch_4.pth", work / "epoch_240.pth")
    os.utime(work / "epoch_240.pth", (1, 1))
    assert resumed(work) == "epoch_4.pth"
    (work / "last_checkpoint").unlink()
    assert resumed(work) == "epoch_4.pth"


def test_nothing_is_overwritten_where_no_checkpoint_is_good(work):
    for path in work.glob("*.pth"):
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="none of the 4 checkpoints .* can be resumed") as refusal:
        build_runner(tiny_config(work, resume=True))
    assert str(refusal.value).count("damaged one") == 4
    assert "\n" not in str(refusal.value)
    assert [path.read_bytes() for path in work.glob("*.pth")] == [b"torn"] * 4


def test_an_empty_folder_starts_a_run(tmp_path):
    cfg = tiny_config(tmp_path, resume=True)
    build_runner(cfg)
    assert (cfg.load_from, cfg.resume) == (None, False)


def test_where_nothing_can_be_resumed_the_configs_weights_start_the_run(base, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("mmitp.engine.resume.print_log", lambda text, **_: said.append(text))
    dense = str(base / "epoch_1.pth")
    cfg = tiny_config(tmp_path, resume="auto", load_from=dense)
    settle_start(cfg)
    assert (cfg.load_from, cfg.resume) == (dense, False)
    assert said == [
        f"--resume: no checkpoints in {tmp_path}, the run starts from the beginning, with the weights of {dense} "
        "(load_from)"
    ]
    with pytest.raises(ValueError, match="no checkpoint file"):
        settle_start(tiny_config(tmp_path, resume="auto", load_from=str(tmp_path / "dense.pth")))
    cfg = tiny_config(base, resume="auto", load_from=str(tmp_path / "dense.pth"))
    settle_start(cfg)  # the weights that the run once began with may be gone
    assert (cfg.load_from, cfg.resume) == (str(base / "epoch_4.pth"), True)


def test_a_checkpoint_folder_of_its_own_is_searched(base, tmp_path):
    shutil.copytree(base, tmp_path / "elsewhere" / "work")
    (tmp_path / "work").mkdir()
    cfg = tiny_config(
        tmp_path / "work", checkpoint=dict(out_dir=str(tmp_path / "elsewhere"), filename_tmpl="e_{:04d}.pth")
    )
    (tmp_path / "elsewhere" / "work" / "epoch_4.pth").rename(tmp_path / "elsewhere" / "work" / "e_0004.pth")
    assert newest_good(cfg) == str(tmp_path / "elsewhere" / "work" / "e_0004.pth")


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pth"
    write_whole(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*epoch_1\.pth"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def killed_while_saving(monkeypatch, number):
    """The number-th save stops half-way: nothing after it happens."""
    import mmitp.engine.saving as saving

    count, original = [0], saving.write_whole

    def write(path, content):
        count[0] += 1
        if count[0] == number:
            Path(f"{path}.part").write_bytes(bytes(content)[: len(content) // 2])
            raise KeyboardInterrupt
        original(path, content)

    monkeypatch.setattr(saving, "write_whole", write)


@pytest.mark.parametrize("number", [2, 4])
def test_the_only_checkpoint_is_kept_until_the_next_is_safe(tmp_path, monkeypatch, number):
    keep = dict(checkpoint=dict(max_keep_ckpts=1))
    with monkeypatch.context() as patch:
        killed_while_saving(patch, number)
        with pytest.raises(KeyboardInterrupt):
            build_runner(tiny_config(tmp_path / "a", epochs=5, **keep)).train()
    assert [p.name for p in (tmp_path / "a").glob("*.pth")] == [f"epoch_{number - 1}.pth"]
    build_runner(tiny_config(tmp_path / "a", epochs=5, resume=True, **keep)).train()
    build_runner(tiny_config(tmp_path / "b", epochs=5, **keep)).train()
    one, two = (load(tmp_path / x / "epoch_5.pth") for x in "ab")
    assert all(same(one[key], two[key]) for key in STATES)
    assert [p.name for p in (tmp_path / "b").glob("*.pth")] == ["epoch_5.pth"]


@METRICS.register_module()
class Rising(BaseMetric):
    """Better at every validation, of whichever run."""

    value = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Rising.value += 1
        return dict(accuracy=float(Rising.value))


def test_the_best_checkpoint_is_kept_until_the_next_is_safe(tmp_path, monkeypatch):
    import mmitp.engine.saving as saving

    original, bests = saving.write_whole, []

    def write(path, content):
        if os.path.basename(path).startswith("best_"):
            bests.append(os.path.basename(path))
            if len(bests) == 2:
                raise KeyboardInterrupt
        original(path, content)

    monkeypatch.setattr(saving, "write_whole", write)
    options = dict(VALIDATION, val_evaluator=dict(type="Rising"))
    with pytest.raises(KeyboardInterrupt):
        build_runner(tiny_config(tmp_path, checkpoint=dict(save_best="accuracy", rule="greater"), **options)).train()
    assert [path.name for path in tmp_path.glob("best_*.pth")] == bests[:1]
    build_runner(
        tiny_config(tmp_path, checkpoint=dict(save_best="accuracy", rule="greater"), resume=True, **options)
    ).train()
    assert [path.name for path in tmp_path.glob("best_*.pth")] == bests[-1:]


@pytest.mark.parametrize("checkpoint", [{}, dict(save_best="accuracy", rule="greater")])
def test_validation_alone_saves_nothing(tmp_path, checkpoint):
    options = dict(VALIDATION, val_evaluator=dict(type="Rising"))
    figures = build_runner(tiny_config(tmp_path, checkpoint=checkpoint, **options)).val()
    assert figures.keys() == {"accuracy"}
    assert not list(tmp_path.rglob("*.pth"))


def test_a_resumed_file_cannot_make_the_run_delete_elsewhere(work, tmp_path):
    victim = tmp_path / "home"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    checkpoint = load(work / "epoch_4.pth")
    info = checkpoint["message_hub"]["runtime_info"]
    info.update(best_ckpt=str(victim), best_score=-1.0)
    checkpoint["message_hub"]["resumed_keys"].update(best_ckpt=True, best_score=True)
    torch.save(checkpoint, work / "epoch_4.pth")
    options = dict(checkpoint=dict(save_best="accuracy", rule="greater"), **VALIDATION)
    build_runner(tiny_config(work, resume=True, **options)).train()
    assert (victim / "thesis.tex").exists()
    assert list(work.glob("best_*.pth"))


@pytest.fixture(scope="module", params=[False, True], ids=["masked", "slimmed"])
def accumulated(request, tmp_path_factory):
    """A run with a step every two iterations: with five an epoch, odd epochs end between two steps."""
    options = dict(accumulate=2, hook=dict(slim_at_end=request.param), hooks=[dict(type="EMAHook")])
    folder = tmp_path_factory.mktemp("accumulated")
    build_runner(tiny_config(folder, **options)).train()
    return folder, options


@pytest.mark.parametrize("epoch", [1, 2, 3, 5])
def test_resuming_between_two_steps_of_an_accumulated_update_is_exact(accumulated, tmp_path, epoch):
    folder, options = accumulated
    path = folder / f"epoch_{epoch}.pth"
    assert (GRADIENTS in load(path)) == (epoch % 2 == 1)
    build_runner(tiny_config(tmp_path, resume=True, load_from=str(path), **options)).train()
    one, two = (load(x / "epoch_6.pth") for x in (folder, tmp_path))
    assert all(same(one[key], two[key]) for key in (*STATES, "ema_state_dict"))


def test_gradients_that_are_not_there_are_not_made_up(tmp_path):
    """Saved by mmengine alone, or by one of several processes."""
    build_runner(tiny_config(tmp_path, epochs=3, accumulate=2)).train()
    checkpoint = load(tmp_path / "epoch_1.pth")
    checkpoint[GRADIENTS] = None
    torch.save(checkpoint, tmp_path / "epoch_1.pth")
    go_on = dict(resume=True, load_from=str(tmp_path / "epoch_1.pth"), accumulate=2)
    with pytest.raises(ValueError, match="between two optimizer steps of several processes"):
        build_runner(tiny_config(tmp_path, **go_on))
    del checkpoint[GRADIENTS]
    torch.save(checkpoint, tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match="saved after iteration 5, between two optimizer steps"):
        build_runner(tiny_config(tmp_path, **go_on))


def test_room_on_the_disk_is_looked_for_before_the_first_iteration(tmp_path, monkeypatch):
    """Three epochs, so three checkpoints, each with weights, averaged weights and SGD's momentum."""
    size, usage = 0, type(shutil.disk_usage(tmp_path))
    for name, missing in (("enough", 0), ("not for all", 1), ("for none", 2)):
        runner = build_runner(tiny_config(tmp_path / name, epochs=3, hooks=[dict(type="EMAHook")]))
        said = []
        monkeypatch.setattr(runner.logger, "warning", lambda text, *_, said=said: said.append(text))
        parameters = sum(p.numel() for p in runner.model.parameters())
        size = 3 * 4 * parameters + 2 * sum(b.numel() * b.element_size() for b in runner.model.buffers())
        free = (3 * size, 3 * size - 1, size - 1)[missing]
        monkeypatch.setattr("mmitp.engine.saving.shutil.disk_usage", lambda path, free=free: usage(10**12, 0, free))
        if missing == 2:
            with pytest.raises(ValueError, match=f"{name} has 0 MiB free, and one checkpoint takes about"):
                runner.train()
            assert runner.iter == 0
            continue
        runner.train()
        texts = [text for text in said if "MiB free" in text]
        assert len(texts) == missing
        assert all("3 checkpoints take about" in text and "max_keep_ckpts" in text for text in texts)


@pytest.mark.parametrize(
    ("setting", "lacks"), [("save_optimizer", "optimizer"), ("save_param_scheduler", "param_schedulers")]
)
def test_a_checkpoint_without_learning_rates_does_not_start_them_anew(base, tmp_path, setting, lacks):
    """The optimizer holds the rate that the schedule goes on from."""
    checkpoint = load(base / "epoch_3.pth")
    del checkpoint[lacks]
    torch.save(checkpoint, tmp_path / "epoch_3.pth")
    cfg = tiny_config(tmp_path, resume=True, checkpoint={setting: False})
    with pytest.raises(ValueError, match=rf"epoch_3.pth: .* it lacks {lacks} .*the config has {setting}=False"):
        build_runner(cfg)


@pytest.mark.parametrize(
    ("schedule", "epochs", "parts"),
    [
        (dict(type="MultiStepLR", milestones=[2, 4]), 4, []),
        (dict(type="MultiStepLR", milestones=[2, 4]), 6, ["MultiStepLR.end is 4 in the checkpoint, 6 in the config"]),
        (
            dict(type="MultiStepLR", milestones=[2], gamma=0.5),
            4,
            ["gamma is 0.1 in", "milestones is Counter({2: 1, 4: 1})"],
        ),
        ([dict(type="MultiStepLR", milestones=[2, 4]), dict(type="ConstantLR")], 4, ["has 1 param_schedulers, the"]),
    ],
)
def test_a_schedule_that_the_config_has_changed_since_is_told(base, tmp_path, monkeypatch, schedule, epochs, parts):
    """mmengine goes on with the checkpoint's."""
    cfg = tiny_config(tmp_path, epochs=epochs, resume=True, load_from=str(base / "epoch_3.pth"))
    cfg.param_scheduler = schedule
    runner, said = build_runner(cfg), []
    monkeypatch.setattr(runner.logger, "warning", lambda text, *_: said.append(str(text)))
    runner.train_loop.stop_training = True
    runner.train()
    told = [text for text in said if "schedule goes on" in text]
    assert len(told) == len(parts)
    assert all(part in text for part, text in zip(parts, told, strict=True))
