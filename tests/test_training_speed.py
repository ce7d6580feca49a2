import json
import sys
from pathlib import Path

import pytest
import torch
from test_baselines import load_module
from torch.testing import assert_close

from iclevr_diffusion.data import BatchLoader, IclevrFolder, open_store
from iclevr_diffusion.rendering import render_dataset

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
training_speed = load_module(REPOSITORY / "benchmarks" / "training_speed.py")
NAMES = [name for name in training_speed.RUNGS if name != "compiled"]


class Clock:
    """A loop whose turns take what they are told to."""

    def __init__(self, name, seconds, calls):
        self.name, self.seconds, self.calls = name, iter(seconds), calls

    def turn(self, num_steps):
        self.calls.append((self.name, num_steps))
        return next(self.seconds)


def test_gains_are_medians_of_the_ratios_of_a_round(monkeypatch):
    monkeypatch.setattr(training_speed, "RUNGS", {"a": "slow", "b": "faster"})
    times = {"a": [9.0, 4.0, 6.0, 8.0], "b": [5.0, 2.0, 2.0, 8.0]}  # the first is the warm-up
    calls, made = [], []

    def make_loop(rungs):
        made.append(list(rungs))
        return Clock(rungs[-1], times[rungs[-1]], calls)

    a, b = training_speed.climb(["a", "b"], make_loop, 10, num_steps=2, num_repeats=3)
    assert made == [["a"], ["a", "b"]]
    assert calls == [("a", 1), ("b", 1)] + [(name, 2) for name in "abbaab"]
    assert a["images_per_second"] == 10 * 2 / 6 and b["images_per_second"] == 10 * 2 / 2
    assert b["gain_over_the_rung_before"] == {"median": 2.0, "low": 1.5, "high": 2.5}  # of 2, 3 and 1
    assert a["gain_over_the_first"]["median"] == 1.0
    assert b["seconds_of_the_first_step"] == 5.0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return render_dataset(tmp_path_factory.mktemp("scenes"), 3, size=64, num_workers=1, progress=False)


@pytest.fixture
def make_loop(root, tmp_path, monkeypatch):
    """Makes loops around a small network."""
    make_network = training_speed.make_network

    def make_smaller(preset, device):
        torch.manual_seed(0)
        class_ = type(make_network("tiny", "meta"))
        return class_.from_preset(
            "tiny", block_out_channels=(8, 16), attention_levels=(1,), attention_head_dim=8, patch_size=8,
            num_classes=24, prediction_type="flow", null_condition=True,
        )  # fmt: skip

    monkeypatch.setattr(training_speed, "make_network", make_smaller)
    store = open_store(root, cache_dir=tmp_path, progress=False)
    loader = BatchLoader(store, store.indices("all"), 4, seed=0)
    return lambda rungs: training_speed.Loop(rungs, "tiny", loader, IclevrFolder(root), 0)


def test_the_last_rung_has_the_losses_of_the_first(make_loop):
    curves = training_speed.compare_curves(NAMES, make_loop, 6)
    first, last, other = (curves["losses"][name] for name in ("first", "last", "first, another noise"))
    assert_close(torch.tensor(last), torch.tensor(first), atol=0.01, rtol=0.01)
    assert first[-1] != first[0]
    differences = curves["difference_from_the_first_in_the_last_half"]
    gaps = [a - b for a, b in zip(other[3:], first[3:], strict=True)]
    assert differences["first, another noise"]["mean"] == pytest.approx(sum(gaps) / 3)
    assert differences["last"]["root_mean_square"] < differences["first, another noise"]["root_mean_square"]


def test_files_and_store_give_the_same_images(make_loop):
    loop = make_loop(NAMES[:1])
    read = next(loop._files)
    stored = training_speed.batch_of(loop.loader, 0)["pixel_values"]
    assert read[0].shape == stored.shape == (4, 3, 64, 64)
    values = {
        image.numpy().tobytes() for i in range(3) for image in training_speed.batch_of(loop.loader, i)["pixel_values"]
    }
    assert all(image.contiguous().numpy().tobytes() in values for image in read[0])


def test_a_turn_takes_time_and_keeps_its_losses(make_loop):
    for rungs in (NAMES[:1], NAMES):
        loop = make_loop(rungs)
        assert loop.turn(3) > 0
        assert len(loop.losses) == 3 and all(0 < loss < 10 for loss in loop.losses)


def test_a_rung_is_what_it_says(make_loop):
    loop = make_loop(NAMES)
    assert loop.optimizer.param_groups[0]["fused"]
    assert loop.model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    kinds = {type(module.processor).__name__ for module in loop.model.modules() if hasattr(module, "processor")}
    assert kinds == {"AttnProcessor"}
    plain = make_loop(NAMES[:1])
    assert not plain.optimizer.param_groups[0]["fused"]
    assert plain.model.unet.conv_in.weight.is_contiguous()


def test_the_table_has_a_line_a_rung():
    gain = {"median": 1.25, "low": 1.0, "high": 2.0}
    row = {
        "rung": "bfloat16",
        "images_per_second": 80.0,
        "gain_over_the_rung_before": gain,
        "gain_over_the_first": gain,
    }
    table = training_speed.format_ladder("tiny", [row]).splitlines()
    assert table[1].split() == ["bfloat16", "80.0", "1.25", "1.25"]


@pytest.mark.parametrize(
    ("device", "has_it", "left_out"),
    [
        ("cpu", True, []),
        ("cpu", False, ["bfloat16", "attention by products"]),
        ("cuda", True, ["attention by products"]),
    ],
)
def test_rungs_that_a_device_has_no_use_for_are_left_out(monkeypatch, device, has_it, left_out):
    monkeypatch.setattr(training_speed, "has_bfloat16", lambda device: has_it)
    rungs = training_speed.choose_rungs(torch.device(device))
    assert [name for name in training_speed.RUNGS if name not in rungs] == left_out


@pytest.mark.slow
def test_the_whole_measurement_is_made_once(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_speed, "SCALING_REPEATS", 1)
    names = training_speed.choose_rungs(torch.device("cpu"), ["compiled"])
    out = tmp_path / "speed.json"
    few = ["--num_workers", "0", "--batch_size", "2", "--num_steps", "1", "--num_repeats", "1", "--curve_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["x", "--root", str(root), "--skip", "compiled", *few, "--out", str(out)])
    training_speed.main()
    record = json.loads(out.read_text())
    row = record["presets"]["tiny"]
    assert [rung["rung"] for rung in row["ladder"]] == names
    assert set(row["scaling"]["images_per_second"]) == {"1", "2"}
    monkeypatch.setattr(training_speed, "climb", None)
    training_speed.main()
    assert json.loads(out.read_text())["presets"] == record["presets"]
    assert "no synchronization" in capsys.readouterr().out
