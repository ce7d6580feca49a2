import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

from iclevr_diffusion import (
    CGANGenerator,
    DCGANGenerator,
    MultiLabelUNet2DModel,
    MultiLabelVAE,
    SmallLabelClassifier,
    SmallMultiLabelUNet,
    environment,
    training,
)
from iclevr_diffusion.checkpoint import newest_checkpoint, read_manifest
from iclevr_diffusion.config import TrainConfig, option
from iclevr_diffusion.ema import ExponentialMovingAverage
from iclevr_diffusion.first_weights import load_weights
from iclevr_diffusion.training import TrainingRun


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings in singletons; each test, and each run in it, starts as a process would."""
    reset()
    yield
    reset()


SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loader:
    """Batches of random rows; batch `step` is a pure function of its number."""

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        return {"x": torch.randn(4, 3, generator=generator)}


def make_config(folder, **fields):
    fields = {"max_steps": 6, "batch_size": 4, "save_every": 2, "log_every": 2, "lr_schedule": "linear", **fields}
    return TrainConfig(output_dir=str(folder), learning_rate=0.1, **fields)


@dataclass(kw_only=True)
class JudgedConfig(TrainConfig):
    judge: str | None = option(None, "a judge that watches", may_change=True)


def train(config, on_step=None, loss_of=None, pinned=None):
    """Runs a loop as a script has it, with dropout and BatchNorm, and returns the run, the model and the average."""
    reset()
    run = TrainingRun(config)
    run.pin(**(pinned or {}))
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    ema = run.track(ExponentialMovingAverage(model, 0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    wrapped, optimizer, lr_scheduler = run.prepare(model, optimizer, run.lr_scheduler(optimizer))
    for batch in run.batches(Loader()):
        prediction = wrapped(batch["x"] + 0.1 * torch.randn_like(batch["x"])).float()
        loss = (prediction - random.random() - np.random.rand()).square().mean()
        run.backward(loss if loss_of is None else loss_of(run, model, loss))
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        run.log(loss=loss)
        if run.weights_moved:
            ema.step(wrapped)
        if run.sync_gradients and on_step is not None:
            on_step(run)
    run.finish()
    return run, model, ema


def hashes(run):
    """Hashes of all that the newest checkpoint holds: weights, average, optimizer, schedule."""
    return read_manifest(newest_checkpoint(run.checkpoints))["files"]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def send(number, step):
    def on_step(run):
        if run.step == step:
            os.kill(os.getpid(), number)

    return on_step


def fail(step):
    def on_step(run):
        if run.step == step:
            raise RuntimeError("the machine fails")

    return on_step


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16"},
        {"max_grad_norm": None, "lr_schedule": "cosine"},
    ],
    ids=["plain", "accumulation", "bf16", "no clipping"],
)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_run_stopped_after_any_step_and_resumed_ends_bit_equal_to_an_unbroken_one(
    tmp_path, monkeypatch, fields, stop
):
    monkeypatch.setattr(training, "has_bfloat16", lambda device: True)  # emulated, if need be
    unbroken, model, _ = train(make_config(tmp_path / "unbroken", **fields))
    state = torch.get_rng_state(), random.getstate()
    with pytest.raises(SystemExit):
        train(make_config(tmp_path / "broken", **fields), on_step=send(signal.SIGTERM, stop))
    torch.manual_seed(99)
    resumed, other_model, _ = train(make_config(tmp_path / "broken", **fields))
    assert len(hashes(unbroken)) == 7
    assert hashes(unbroken) == hashes(resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()


@pytest.mark.parametrize(("has_it", "precision"), [(True, "bf16"), (False, "no")])
def test_bfloat16_that_would_be_emulated_is_float32_and_the_run_says_so(
    tmp_path, monkeypatch, capfd, has_it, precision
):
    monkeypatch.setattr(training, "has_bfloat16", lambda device: has_it)
    run, *_ = train(make_config(tmp_path, mixed_precision="bf16", max_steps=1))
    assert run.accelerator.mixed_precision == precision
    assert ("float32: mixed_precision bf16 would only be emulated on this CPU" in capfd.readouterr().err) is not has_it
    assert [launch["mixed_precision"] for launch in json.loads((tmp_path / "environment.json").read_text())] == [
        precision
    ]


def test_fp16_on_a_cpu_is_float32_and_goes_on_from_what_a_gpu_has_saved(tmp_path, capfd, scaled_losses_on_a_gpu):
    with pytest.raises(SystemExit), scaled_losses_on_a_gpu():
        train(make_config(tmp_path), on_step=send(signal.SIGTERM, 3))
    assert "grad_scaler" in read_manifest(newest_checkpoint(tmp_path / "checkpoints"))["objects"]
    run, *_ = train(make_config(tmp_path))
    assert run.step == 6 and run.accelerator.scaler is None
    run, *_ = train(make_config(tmp_path / "fp16", mixed_precision="fp16"))
    assert run.accelerator.mixed_precision == "no"
    assert "float32: mixed_precision fp16 is for GPUs alone on this CPU" in capfd.readouterr().err


def test_a_run_that_was_killed_repeats_the_steps_since_its_checkpoint(tmp_path):
    unbroken, *_ = train(make_config(tmp_path / "unbroken"))
    with pytest.raises(RuntimeError, match="the machine fails"):
        train(make_config(tmp_path / "broken", log_every=1), on_step=fail(6))
    assert [line["step"] for line in lines(tmp_path / "broken")] == [1, 2, 3, 4, 5]
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed, *_ = train(make_config(tmp_path / "broken", log_every=1))
    assert hashes(unbroken) == hashes(resumed)
    assert [line["step"] for line in lines(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_its_metrics_again(tmp_path):
    with pytest.raises(RuntimeError):
        train(make_config(tmp_path, log_every=1, save_every=0), on_step=fail(3))
    train(make_config(tmp_path, log_every=1, save_every=0))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_broken_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path):
    unbroken, *_ = train(make_config(tmp_path / "unbroken"))
    with contextlib.suppress(RuntimeError):
        train(make_config(tmp_path / "broken"), on_step=fail(5))
    path = tmp_path / "broken" / "checkpoints" / "step-00000004" / "optimizer_0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="step-00000004 is broken"):
        resumed, *_ = train(make_config(tmp_path / "broken"))
    assert hashes(unbroken) == hashes(resumed)


@pytest.mark.parametrize(
    ("number", "code"),
    [(getattr(signal, name), 128 + getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)],
)
def test_a_signal_finishes_the_step_saves_and_leaves_with_the_shells_code(tmp_path, capfd, number, code):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_info:
        # Sent at the end of step 2, noticed in step 3: no step is left half done.
        train(make_config(tmp_path, save_every=0), on_step=send(number, 2))
    assert exit_info.value.code == code
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert (
        "Stopped after step 3 of 6" in said and "saving after this step or the next" in said and "step 2" not in said
    )


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_signal_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        run, *_ = train(make_config(tmp_path), on_step=send(signal.SIGHUP, 2))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.step == 6


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_launch_on_the_cpu_leaves_the_gpu_alone(tmp_path, monkeypatch, mixed_precision):
    asked = []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(PartialState, "default_device", property(lambda state: asked.append(1)))  # a GPU, if any
    run, *_ = train(make_config(tmp_path, max_steps=1, mixed_precision=mixed_precision))
    assert run.accelerator.device.type == "cpu" and not asked


def test_a_device_that_cannot_calculate_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "device_fault", lambda device: "no kernel image is available")
    with pytest.raises(ValueError, match=r"Nothing can be calculated on cpu: no kernel image .*accelerate/cpu\.yaml"):
        train(make_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class DeadStream:
    """What is left of a pipe whose reader has ended."""

    def isatty(self):
        return False

    def fileno(self):
        raise BrokenPipeError

    write = flush = lambda self, *text: self.fileno()


def test_a_stop_whose_terminal_is_gone_still_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "tqdm", eager_tqdm)

    def lose_the_terminal(run):
        if run.step == 2:
            monkeypatch.setattr(sys, "stderr", DeadStream())
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as exit_info:
        train(make_config(tmp_path, save_every=0), on_step=lose_the_terminal)
    assert exit_info.value.code == 130
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-00000003"


class eager_tqdm(training.tqdm):  # noqa: N801
    """A progress bar that writes at every step."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "mininterval": 0, "miniters": 1})


def test_a_stop_that_is_agreed_skips_what_would_delay_the_checkpoint(tmp_path):
    seen = []

    def look(run):
        seen.append((run.step, run.stopping, run.every(1)))
        send(signal.SIGTERM, 2)(run)

    with pytest.raises(SystemExit):
        train(make_config(tmp_path), on_step=look)
    assert seen == [(1, False, True), (2, False, True), (3, True, False)]


@pytest.fixture
def steps_of_a_minute(monkeypatch):
    """Has the clock stand still but for a minute a step."""
    clock = [1000.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])

    def loss_of(run, model, loss):
        clock[0] += 60
        return loss

    return loss_of


def test_a_run_ends_whole_when_its_minutes_are_over(tmp_path, capfd, steps_of_a_minute):
    config = make_config(tmp_path, max_minutes=3.0)
    run, _, _ = train(config, loss_of=steps_of_a_minute)
    assert run.step == read_manifest(newest_checkpoint(run.checkpoints))["step"] == 3
    assert "`max_minutes` are over after step 3 of 6" in capfd.readouterr().err
    again, _, _ = train(config, loss_of=steps_of_a_minute)
    assert again.step == 3 and [line["step"] for line in lines(tmp_path)] == [2, 3]


@pytest.mark.parametrize(
    ("fields", "is_told"),
    [
        ({}, True),
        ({"max_minutes": 20.0}, False),
        ({"lr_schedule": "constant"}, False),
        ({"lr_schedule": "milestones", "milestones": (7,)}, False),
    ],
)
def test_minutes_that_end_a_run_before_its_schedule_are_told_beforehand(
    tmp_path, capfd, steps_of_a_minute, fields, is_told
):
    train(make_config(tmp_path, **{"max_steps": 10, "max_minutes": 8.0} | fields), loss_of=steps_of_a_minute)
    warning = "will end this run near step 8, where the learning rate is at 20% of its height instead of the 0% after"
    assert (warning in capfd.readouterr().err) == is_told


def test_minutes_before_a_run_was_resumed_count_and_more_may_be_given(tmp_path, steps_of_a_minute):
    with pytest.raises(RuntimeError):
        train(make_config(tmp_path, max_minutes=5.0), on_step=fail(4), loss_of=steps_of_a_minute)
    resumed, _, _ = train(make_config(tmp_path, max_minutes=3.0), loss_of=steps_of_a_minute)
    assert resumed.step == 3  # the checkpoint is that of step 2, so one of its minutes was left
    whole, _, _ = train(make_config(tmp_path, max_minutes=None), loss_of=steps_of_a_minute)
    unbroken, _, _ = train(make_config(tmp_path / "unbroken"), loss_of=steps_of_a_minute)
    assert whole.step == 6 and hashes(whole) == hashes(unbroken)


def test_ctrl_c_pressed_twice_aborts_at_once(tmp_path, monkeypatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr("iclevr_diffusion.training.time.monotonic", lambda: next(times))

    def press_twice(run):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_config(tmp_path), on_step=press_twice)


def test_a_run_whose_launcher_is_gone_saves_and_leaves(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` does
    with pytest.raises(SystemExit) as exit_info:
        train(make_config(tmp_path), on_step=lambda run: monkeypatch.setattr(os, "getppid", lambda: 1))
    assert exit_info.value.code == 143
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-00000002"


@pytest.mark.parametrize(
    ("loss_of", "what"),
    [
        (lambda run, model, loss: loss * (float("nan") if run.step == 3 else 1), "loss"),
        (lambda run, model, loss: loss + (float("inf") if run.step == 3 else 0), "loss"),
        (lambda run, model, loss: loss + (0 * model[0].weight).sqrt().sum() if run.step == 3 else loss, "gradient"),
    ],
    ids=["NaN", "infinity", "NaN gradient of a finite loss"],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(tmp_path, loss_of, what, accumulation):
    models, weights = [], []

    def remember(run, model, loss):
        models.append(model)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
        return loss_of(run, model, loss)

    config = make_config(tmp_path, gradient_accumulation_steps=accumulation)
    with pytest.raises(FloatingPointError, match=f"The {what} of step 3 is not finite; the weights did not move"):
        train(config, loss_of=remember)
    assert all(torch.equal(a, b) for a, b in zip(weights[-1], models[-1].parameters(), strict=True))
    assert not torch.equal(weights[0][0], weights[-1][0])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.fixture
def scaled_losses_on_a_gpu(monkeypatch):
    """A context in which losses are scaled as with fp16, which Accelerate grants to GPUs alone."""

    @contextlib.contextmanager
    def scaled():
        with monkeypatch.context() as patch:
            prepare = TrainingRun.prepare

            def prepare_scaled(run, *objects):
                run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
                prepared = prepare(run, *objects)
                run.accelerator.native_amp = True
                patch.setattr(Accelerator, "mixed_precision", "fp16")
                return prepared

            patch.setattr(TrainingRun, "prepare", prepare_scaled)
            yield

    return scaled


@pytest.fixture
def scaled_losses(scaled_losses_on_a_gpu):
    with scaled_losses_on_a_gpu():
        yield


def overflow(run, model, loss):
    return loss + (0 * model[0].weight).sqrt().sum()  # its gradient is NaN


def test_an_overflow_skips_the_step_of_weights_and_average(tmp_path, scaled_losses):
    states = []

    def look(run, model, loss):
        average = run._objects["ema"]
        states.append((model[0].weight.detach().clone(), average.num_updates))
        return overflow(run, model, loss) if run.step == 3 else loss

    run, _, ema = train(make_config(tmp_path, log_every=1, lr_schedule="constant"), loss_of=look)
    assert [num_updates for _, num_updates in states] == [0, 1, 2, 2, 3, 4] and ema.num_updates == 5
    assert torch.equal(states[2][0], states[3][0]) and not torch.equal(states[3][0], states[4][0])
    assert ["grad_norm" in line for line in lines(tmp_path)] == [True, True, False, True, True, True]
    assert run.accelerator.scaler.get_scale() == 4


def test_a_gradient_that_stays_infinite_at_every_scale_stops_the_run(tmp_path, scaled_losses):
    with pytest.raises(
        FloatingPointError, match="The gradient of step 5 is not finite"
    ):  # scales 8, 4, 2, 1, then 1/2
        train(make_config(tmp_path), loss_of=overflow)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    config = make_config(tmp_path, max_grad_norm=0.5, max_steps=2)
    run = TrainingRun(config)
    model = nn.Linear(3, 1)
    (wrapped,) = run.prepare(model)
    for batch in run.batches(Loader()):
        run.backward(1000 * wrapped(batch["x"]).square().mean())
        norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
        torch.testing.assert_close(norm, torch.tensor(0.5))
        model.zero_grad()
    assert lines(tmp_path)[-1]["grad_norm"] > 0.5  # what is noted is the norm before


def test_a_changed_recipe_is_refused_with_the_differing_fields(tmp_path):
    train(make_config(tmp_path))
    with pytest.raises(
        ValueError, match=r"holds 6 steps of another recipe: seed: 0 there, 1 here; batch_size: 4 there, 8"
    ):
        train(make_config(tmp_path, seed=1, batch_size=8))


def test_fields_that_leave_the_weights_alone_may_change(tmp_path):
    unbroken, *_ = train(make_config(tmp_path / "unbroken"))
    with pytest.raises(SystemExit):
        train(make_config(tmp_path / "broken"), on_step=send(signal.SIGTERM, 2))
    (tmp_path / "broken").rename(tmp_path / "moved")
    resumed, *_ = train(make_config(tmp_path / "moved", save_every=5, log_every=1, num_checkpoints=1))
    assert hashes(unbroken) == hashes(resumed)
    assert yaml.safe_load((tmp_path / "moved" / "config.yaml").read_text())["save_every"] == 5


def test_more_steps_are_taken_only_where_the_schedule_so_far_agrees(tmp_path):
    unbroken, *_ = train(make_config(tmp_path / "unbroken", lr_schedule="constant", max_steps=8))
    train(make_config(tmp_path / "longer", lr_schedule="constant"))
    resumed, *_ = train(make_config(tmp_path / "longer", lr_schedule="constant", max_steps=8))
    assert hashes(unbroken) == hashes(resumed)
    with pytest.raises(ValueError, match="max_steps: 8 there, 7 here"):
        train(make_config(tmp_path / "longer", lr_schedule="constant", max_steps=7))
    train(make_config(tmp_path / "linear"))
    with pytest.raises(ValueError, match="max_steps: 6 there, 8 here"):
        train(make_config(tmp_path / "linear", max_steps=8))


def test_more_steps_must_not_change_the_learning_rate_of_the_very_next_one(tmp_path):
    train(make_config(tmp_path, warmup_steps=6))  # its end is that of the warm-up
    with pytest.raises(ValueError, match="max_steps: 6 there, 8 here"):
        train(make_config(tmp_path, warmup_steps=6, max_steps=8))


def test_when_the_learning_rate_falls_may_be_settled_on_the_way(tmp_path):
    late = {"lr_schedule": "warmup-stable-decay", "decay_fraction": 0.25, "max_steps": 8}
    unbroken, *_ = train(make_config(tmp_path / "unbroken", **late))
    train(make_config(tmp_path / "settled", lr_schedule="constant", max_steps=6))
    settled, *_ = train(make_config(tmp_path / "settled", **late))
    assert hashes(unbroken) == hashes(settled)
    train(make_config(tmp_path / "early", lr_schedule="constant", max_steps=6))
    with pytest.raises(ValueError, match="lr_schedule: 'constant' there, .*; decay_fraction: 0.2 there, 0.5 here"):
        train(make_config(tmp_path / "early", **late | {"decay_fraction": 0.5}))


def forget_recipe(folder):
    """Makes the newest checkpoint one from before checkpoints held their recipe."""
    path = newest_checkpoint(folder / "checkpoints") / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["facts"]["config"]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("content", [None, "", "- x", "a: ["])
def test_a_changed_recipe_is_refused_whatever_became_of_config_yaml(tmp_path, content):
    train(make_config(tmp_path))
    path = tmp_path / "config.yaml"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match="batch_size: 4 there, 8 here"):
        train(make_config(tmp_path, batch_size=8))
    forget_recipe(tmp_path)
    with pytest.raises(ValueError, match="must hold the config.yaml of its checkpoint of step 6, which is missing"):
        train(make_config(tmp_path))


def test_checkpoints_from_before_they_held_recipe_and_facts_go_on(tmp_path):
    config = make_config(tmp_path / "old", lr_schedule="constant", max_steps=4)
    train(config)
    forget_recipe(tmp_path / "old")
    resumed, *_ = train(make_config(tmp_path / "old", lr_schedule="constant"), pinned={"data": "abc"})
    unbroken, *_ = train(make_config(tmp_path / "unbroken", lr_schedule="constant"))
    assert hashes(unbroken) == hashes(resumed)


def test_a_field_that_is_newer_than_the_recipe_counts_as_its_default(tmp_path):
    train(make_config(tmp_path))
    forget_recipe(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if "weight" not in line and "seed" not in line)
    )
    train(make_config(tmp_path))
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "seed" not in line))
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        train(make_config(tmp_path, seed=1))


def test_a_recipe_without_a_checkpoint_yet_may_be_changed(tmp_path):
    with pytest.raises(RuntimeError):
        train(make_config(tmp_path), on_step=fail(1))
    train(make_config(tmp_path, seed=1))


def test_other_data_than_those_of_the_checkpoint_are_refused(tmp_path):
    train(make_config(tmp_path, lr_schedule="constant"), pinned={"data": "abc"})
    with pytest.raises(
        ValueError,
        match="`data` must be what the first 6 steps saw, to go on from .*step-00000006: its images or labels are others",
    ):
        train(make_config(tmp_path, lr_schedule="constant", max_steps=8), pinned={"data": "xyz"})


def descriptions(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".yaml")}


@pytest.mark.parametrize(
    ("fields", "pinned", "num_processes"),
    [({"batch_size": 8}, {}, 1), ({}, {"data": "xyz"}, 1), ({}, {}, 2)],
    ids=["recipe", "data", "number of processes"],
)
def test_a_refused_command_leaves_the_descriptions_of_the_run_alone(
    tmp_path, monkeypatch, fields, pinned, num_processes
):
    train(make_config(tmp_path, lr_schedule="constant"), pinned={"data": "abc"})
    before = descriptions(tmp_path)
    assert set(before) == {"config.yaml", "environment.json"}
    monkeypatch.setattr(Accelerator, "num_processes", num_processes)
    with pytest.raises(ValueError, match="there|must be"):
        train(make_config(tmp_path, lr_schedule="constant", max_steps=8, log_every=3, **fields), pinned=pinned)
    assert descriptions(tmp_path) == before


def test_a_run_of_other_objects_leaves_the_descriptions_alone(tmp_path):
    train(make_config(tmp_path))
    before = descriptions(tmp_path)
    reset()
    run = TrainingRun(make_config(tmp_path, log_every=3))
    run.describe("config.yaml", "another")
    run.prepare(nn.Linear(3, 1))
    with pytest.raises(ValueError, match="`objects` must be those of the checkpoint"):
        next(run.batches(Loader()))
    assert descriptions(tmp_path) == before


def test_a_launch_that_has_nothing_left_to_do_is_not_noted(tmp_path):
    train(make_config(tmp_path))
    before = (tmp_path / "environment.json").read_text()
    train(make_config(tmp_path, log_every=3))
    assert (tmp_path / "environment.json").read_text() == before
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["log_every"] == 3


def test_a_commit_is_named_only_where_it_holds_the_source(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "environment.py").touch()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    git("init")
    git("commit", "--allow-empty", "-m", "somebody's project, with this package in its folder")
    assert environment.git_commit() is None
    git("add", "environment.py")
    git("commit", "-m", "the source")
    assert len(environment.git_commit()) == 40


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_learning_rate_follows_the_optimisation_steps_whatever_the_accumulation(tmp_path, accumulation):
    seen = []
    config = make_config(tmp_path, gradient_accumulation_steps=accumulation, warmup_steps=2)

    def look(run, model, loss):
        seen.append(run._objects["optimizer_0"].param_groups[0]["lr"])
        return loss

    train(config, loss_of=look)
    expected = [0.1 * config.learning_rate_factor(step) for step in range(6) for _ in range(accumulation)]
    assert seen == pytest.approx(expected)


def test_metrics_are_means_over_the_steps_since_the_last_line(tmp_path):
    losses = []

    def look(run, model, loss):
        losses.append(loss.item())
        return loss

    train(make_config(tmp_path, log_every=3, save_every=0), loss_of=look)
    metrics = lines(tmp_path)
    assert [line["step"] for line in metrics] == [3, 6]
    assert [line["loss"] for line in metrics] == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])])
    assert set(metrics[0]) == {"step", "loss", "grad_norm", "learning_rate", "images_per_second"}


def test_a_plain_number_stands_in_the_line_of_its_own_step(tmp_path):
    train(
        make_config(tmp_path, log_every=6, save_every=0),
        on_step=lambda run: run.log(score=0.5) if run.step == 4 else None,
    )
    assert [(line["step"], line.get("score")) for line in lines(tmp_path)] == [(4, 0.5), (6, None)]


def test_drawing_random_numbers_between_steps_changes_nothing(tmp_path):
    quiet, *_ = train(make_config(tmp_path / "quiet"))
    noisy, *_ = train(
        make_config(tmp_path / "noisy"), on_step=lambda run: (torch.rand(3), random.random(), np.random.rand())
    )
    assert hashes(quiet) == hashes(noisy)


def test_the_folder_says_what_was_run_on_what(tmp_path):
    train(make_config(tmp_path, lr_schedule="constant"))
    train(make_config(tmp_path, lr_schedule="constant", max_steps=7))
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert first["versions"]["torch"] == torch.__version__ and first["device"] == "cpu"
    assert first["num_processes"] == 1 and "git_commit" in second and second["command"]


def test_trackers_of_accelerate_are_fed(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the `tracking` extra")
    train(make_config(tmp_path, report_to=("tensorboard",)))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_the_estimate_and_the_output_folder_are_printed(tmp_path, capfd):
    train(make_config(tmp_path, max_steps=7))
    printed = capfd.readouterr().err
    assert f"Outputs go to {tmp_path}." in printed
    assert "2 steps of 4 images to go" in printed and "images a second: this will take about 0 seconds" in printed


def test_sharded_launches_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="asks for FSDP, whose sharded weights"):
        TrainingRun(make_config(tmp_path))


def test_a_loader_is_not_prepared(tmp_path):
    with pytest.raises(ValueError, match="got a Loader; batches are made by their number"):
        TrainingRun(make_config(tmp_path)).prepare(Loader())


def test_the_best_pipeline_is_kept_and_a_worse_one_is_not(tmp_path, tiny_pipeline, capfd):
    run = TrainingRun(make_config(tmp_path))
    for run.step, score in enumerate([1 / 3, 0.6, 0.5], start=1):
        tiny_pipeline.unet.data_mean.fill_(run.step)
        run.keep_best(score, tiny_pipeline)
    assert "Step 2: validation score 0.6000, best before 0.3333." in capfd.readouterr().err
    best = type(tiny_pipeline).from_pretrained(tmp_path / "best_pipeline")
    assert (best.unet.data_mean == 2).all()
    assert json.loads((tmp_path / "best_pipeline.json").read_text()) == {"step": 2, "score": 0.6, "measure": {}}
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def test_a_folder_that_another_run_writes_is_refused_and_left_alone(tmp_path):
    train(make_config(tmp_path))
    before = lines(tmp_path)
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="is being written by another run; wait for it"):
        TrainingRun(make_config(tmp_path, seed=1))
    assert lines(tmp_path) == before
    TrainingRun(make_config(tmp_path)).finish()


@pytest.mark.parametrize("broken", [True, False], ids=["broken", "gone"])
def test_what_was_trained_is_not_written_over_where_no_checkpoint_is_left(tmp_path, tiny_pipeline, broken):
    run, *_ = train(make_config(tmp_path))
    run.save_pipeline(tiny_pipeline)
    before = lines(tmp_path)
    for folder in run.checkpoints.iterdir():
        if broken:
            (folder / "manifest.json").write_text("{")
        else:
            shutil.rmtree(folder)
    names = "pipeline, checkpoints/step-0.*, which" if broken else "pipeline, which"
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=f"holds {names} would be written over, and no whole"),
    ):
        warnings.simplefilter("ignore")
        TrainingRun(make_config(tmp_path))
    assert lines(tmp_path) == before and (tmp_path / "pipeline").exists()


def test_all_judges_that_ever_watched_are_kept(tmp_path):
    for judge in ("outputs/first/judge", None, "second"):
        train(JudgedConfig(**vars(make_config(tmp_path)), judge=judge))
    assert json.loads((tmp_path / "judges.json").read_text()) == ["first", "second"]


def test_scores_of_another_measure_are_not_compared(tmp_path, tiny_pipeline):
    run = TrainingRun(make_config(tmp_path))
    for run.step, (score, guidance) in enumerate([(0.9, 1.0), (0.5, 2.0), (0.4, 2.0)], start=1):
        run.keep_best(score, tiny_pipeline, {"guidance_scale": guidance})
    best = {"step": 2, "score": 0.5, "measure": {"guidance_scale": 2.0}}
    assert json.loads((tmp_path / "best_pipeline.json").read_text()) == best


def test_a_best_score_of_steps_that_were_lost_is_forgotten(tmp_path):
    with pytest.raises(RuntimeError):
        train(make_config(tmp_path), on_step=fail(5))
    record = tmp_path / "best_pipeline.json"
    for step in (4, 5):
        record.write_text(json.dumps({"step": step, "score": 1.0}))
        with pytest.raises(RuntimeError):
            train(make_config(tmp_path), on_step=fail(5))
        assert record.exists() == (step == 4)


def test_first_weights_that_lack_a_tensor_are_refused(tmp_path, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["null_embedding"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing or too many: null_embedding"):
        load_weights(type(tiny_pipeline.unet)(**tiny_pipeline.unet.config), tmp_path)


def test_weights_come_from_a_pipeline_or_a_network_folder(tmp_path, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "unet"):
        unet = type(tiny_pipeline.unet)(**tiny_pipeline.unet.config)
        load_weights(unet, folder, tiny_pipeline.vocabulary.names)
        for name, value in tiny_pipeline.unet.state_dict().items():
            assert torch.equal(value, unet.state_dict()[name])


def test_weights_of_another_shape_label_order_or_target_are_refused(tmp_path, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path)
    make, config = type(tiny_pipeline.unet), dict(tiny_pipeline.unet.config)
    with pytest.raises(ValueError, match="24 labels of the data, in their order"):
        load_weights(tiny_pipeline.unet, tmp_path, tiny_pipeline.vocabulary.names[::-1])
    with pytest.raises(ValueError, match="must hold a model that predicts 'flow', got 'epsilon'"):
        load_weights(make(**{**config, "prediction_type": "flow"}), tmp_path)
    of_images = make(**{**config, "prediction_type": "flow", "network_output": "sample"})
    make(**{**config, "prediction_type": "flow"}).save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="whose network puts out the sample, got one that puts out the prediction"):
        load_weights(of_images, tmp_path / "flow")
    with pytest.raises(ValueError, match=r"1 tensors differ: null_embedding \(32,\) there, None here"):
        load_weights(make(**{**config, "null_condition": False}), tmp_path)
    there, here = config["block_out_channels"], (16, 64)
    expected = (
        rf"configuration has block_out_channels: \[{there[0]}, .*\] there, \[16, 64\] here, and \d+ tensors differ: "
    )
    with pytest.raises(ValueError, match=expected):
        load_weights(make(**{**config, "block_out_channels": here}), tmp_path)
    with pytest.raises(ValueError, match="its configuration has .*label_encoding: .linear. there, .tokens. here, and"):
        load_weights(make(**{**config, "label_encoding": "tokens", "attention_levels": (1,)}), tmp_path)
    with pytest.raises(ValueError, match="as many channels as the data's, 1, got one for 3"):
        load_weights(make(**{**config, "in_channels": 1}), tmp_path)
    with pytest.raises(ValueError, match="which has no config.json"):
        load_weights(tiny_pipeline.unet, tmp_path / "scheduler")
    with pytest.raises(
        ValueError, match="must hold a MultiLabelVAE, got a pipeline of DDPMScheduler, MultiLabelUNet2DModel"
    ):
        load_weights(MultiLabelVAE(num_classes=24, sample_size=16), tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        load_weights(tiny_pipeline.unet, tmp_path / "nothing")


NETWORKS = {
    "unet2d": lambda n: MultiLabelUNet2DModel(n, 16, block_out_channels=(8, 16), attention_head_dim=8),
    "small": lambda n: SmallMultiLabelUNet(n, 16, base_channels=8),
    "dcgan": lambda n: DCGANGenerator(n, 16, base_channels=8),
    "cgan": lambda n: CGANGenerator(n, 16, base_channels=8),
    "vae": lambda n: MultiLabelVAE(4, n, 16, hidden_widths=(8, 8)),
    "mlp": lambda n: MultiLabelVAE(4, n, 16, architecture="mlp"),
    "judge": lambda n: SmallLabelClassifier(n, 16, block_out_channels=(8, 8)),
}


def outputs_of(model, labels):
    """What a network makes of the same images, times or latents for multi-hot `labels` (B, num_classes)."""
    model.eval()
    torch.manual_seed(0)
    images, latents = torch.randn(len(labels), 3, 16, 16), torch.randn(len(labels), 100)
    with torch.no_grad():
        if isinstance(model, SmallLabelClassifier):
            return model(images).logits.T  # a row a label
        if isinstance(model, MultiLabelVAE):
            return model.decode(latents[:, :4], labels)
        if "latent_dim" in model.config:
            return model(latents, labels)
        return model(images, torch.full((len(labels),), 500), labels).sample


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_go_with_the_names_of_their_labels(name, tmp_path, monkeypatch):
    theirs, ours = ["red", "blue", "green"], ["blue", "new", "red", "green"]
    torch.manual_seed(1)
    source, model = NETWORKS[name](3), NETWORKS[name](4)
    source.save_pretrained(tmp_path)
    monkeypatch.setattr("iclevr_diffusion.first_weights._find_model", lambda model, source: (tmp_path, theirs))
    change = load_weights(model, tmp_path, ours, other_labels=True)
    assert change == (["blue", "red", "green"], ["new"], [])
    if name == "judge":
        before, after = outputs_of(source, torch.eye(3)[:2]), outputs_of(model, torch.eye(4)[:2])
        torch.testing.assert_close(after[[2, 0, 3]], before)
        torch.testing.assert_close(after[1], before.mean(0))
        return
    # Both see the same label, by its name.
    torch.testing.assert_close(outputs_of(model, torch.eye(4)[[2, 0, 3]]), outputs_of(source, torch.eye(3)))
    # A new label begins as the mean of those that are known: a third of each.
    mean = outputs_of(source, torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(outputs_of(model, torch.eye(4)[1:2]), mean)


def test_a_mean_image_of_another_size_stays_the_models_own(tmp_path):
    source, model = (
        MultiLabelUNet2DModel(2, size, block_out_channels=(8, 16), attention_head_dim=8) for size in (16, 32)
    )
    source.set_data_statistics(torch.full((3, 16, 16), 0.25), 0.5)
    source.save_pretrained(tmp_path)
    assert load_weights(model, tmp_path) is None
    assert (model.data_mean == 0).all() and model.data_std == 0.5
    assert torch.equal(model.class_embedding.weight, source.class_embedding.weight)


def test_first_weights_of_other_labels_are_announced_and_a_resumed_run_leaves_its_own(tmp_path, tiny_pipeline, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "source")
    names = ["orange cube", *tiny_pipeline.vocabulary.names[1:]]
    make, config = type(tiny_pipeline.unet), dict(tiny_pipeline.unet.config)
    run, model = TrainingRun(make_config(tmp_path / "run")), make(**config)
    run.start_from(str(tmp_path / "source"), model, names)
    assert (
        "23 (red cube, blue cube," in (said := capsys.readouterr().err)
        and "1 (orange cube) new, 1 (gray cube)" in said
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run._origin = tmp_path
    run.start_from(str(tmp_path / "nothing"), model, names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_holds_its_group_of_processes_until_the_programs_end(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        TrainingRun(TrainConfig(output_dir=str(tmp_path / "run")))
        assert training._process_groups[-1] is torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()
        training._process_groups.clear()


GROUPS = """
import faulthandler, os, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from iclevr_diffusion.training import hold_process_group

def train(i):
    file, rank = f"{sys.argv[1]}/group-{i}", int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    hold_process_group()
    models = [DistributedDataParallel(torch.nn.Linear(3, 3)) for _ in range(4)]
    sum(model(torch.randn(2, 3)).sum() for model in models).backward()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

for i in range(60):
    faulthandler.dump_traceback_later(60, exit=True)
    train(i)
"""


def run_both(code, folder, **environment):
    """Runs a program as two processes, whose numbers RANK and LOCAL_RANK tell, and expects that both succeed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output


@pytest.mark.slow
def test_two_processes_let_their_group_go_without_waiting_for_each_other(tmp_path):
    """Without `hold_process_group` one of the first ten rounds hangs."""
    run_both(GROUPS, tmp_path)


BUFFERS = """
import sys
import torch
from iclevr_diffusion.config import TrainConfig
from iclevr_diffusion.training import TrainingRun

run = TrainingRun(TrainConfig(output_dir=sys.argv[1]))
network = torch.nn.BatchNorm1d(3)
with torch.no_grad():
    for buffer in network.buffers():
        buffer.fill_(run.accelerator.process_index + 5)
run.share_buffers(network)
assert all((buffer == 5).all() for buffer in network.buffers()), list(network.buffers())
run.finish()
"""


@pytest.mark.slow
def test_processes_share_the_running_statistics_of_the_first(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_both(BUFFERS, tmp_path / "run", **launch)
