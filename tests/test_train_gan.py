import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iclevr_diffusion import load_pipeline

SCRIPTS = Path(__file__).resolve().parents[1] / "train_scripts"
SPEC = importlib.util.spec_from_file_location("train_gan", SCRIPTS / "train_gan.py")
train_gan = sys.modules["train_gan"] = importlib.util.module_from_spec(SPEC)  # where dataclasses look for their module
SPEC.loader.exec_module(train_gan)

SMALL = {"resolution": 16, "batch_size": 4, "latent_dim": 8, "base_channels": 8, "discriminator_channels": 8}


@pytest.fixture
def train(tiny_dataset, tmp_path, monkeypatch):
    """Runs train_gan.py in this process and returns the folder of its outputs."""
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name="run", **arguments):
        config = SMALL | {"data": str(tiny_dataset), "max_steps": 2, "sample_every": 2, "log_every": 1} | arguments
        train_gan.main(train_gan.GANConfig(output_dir=str(tmp_path / name), **config))
        return tmp_path / name

    return run


def weights(folder):
    return load_file(folder / "pipeline" / "generator" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "logged"),
    [
        ({}, ()),
        ({"loss": "nonsaturating", "r1_weight": 10.0, "r1_every": 1, "ema_decay": 0.9}, ("r1_penalty",)),
        ({"discriminator": "acgan", "auxiliary_weight": 100.0, "ramp_steps": 2}, ("auxiliary_loss",)),
        ({"generator": "sagan", "discriminator": "sagan"}, ()),
        ({"generator": "cgan", "discriminator": "cgan", "loss": "nonsaturating"}, ()),
        ({"discriminator": "wgan", "loss": "wasserstein", "clip_weights": 0.01, "num_critic_steps": 2}, ()),
        ({"discriminator": "projection", "diff_augment": ("color", "translation", "cutout")}, ()),
    ],
)
def test_every_kind_of_gan_trains_logs_and_is_opened(train, arguments, logged):
    folder = train(**arguments)
    image = load_pipeline(folder / "pipeline")([["red cube", "blue sphere"]], seeds=[0], output_type="pt").images
    assert image.shape == (1, 3, 16, 16) and torch.isfinite(image).all()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {"discriminator_loss", "generator_loss", "real_logits", "fake_logits", *logged}
    assert names <= set(lines[-1])
    assert (folder / "samples" / "step-00000002.png").is_file()


def test_a_resumed_gan_ends_with_the_weights_of_an_unbroken_one(train):
    arguments = {"ema_decay": 0.9, "diff_augment": ("translation",), "r1_weight": 1.0, "r1_every": 2}
    unbroken = weights(train("unbroken", max_steps=4, **arguments))
    train("stopped", max_steps=2, **arguments)
    resumed = weights(train("stopped", max_steps=4, **arguments))
    assert all(value.equal(unbroken[name]) for name, value in resumed.items())


def test_weights_of_a_clipped_critic_stay_small(train, monkeypatch):
    critics = []
    make = train_gan.DISCRIMINATORS["wgan"]
    monkeypatch.setitem(
        train_gan.DISCRIMINATORS, "wgan", lambda *args, **kwargs: critics.append(make(*args, **kwargs)) or critics[-1]
    )
    train(discriminator="wgan", loss="wasserstein", clip_weights=0.01)
    assert max(weight.abs().max().item() for weight in critics[0].parameters()) <= 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auxiliary_weight": 1.0}, "`auxiliary_weight` must be 0 for the discriminator dcgan"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` must be 1 for a GAN"),
        ({"betas": (0.5,)}, "`betas` must be two numbers"),
        ({"num_critic_steps": 0}, "`num_critic_steps` must be at least 1"),
        ({"ema_decay": 1.0}, "`ema_decay` must lie in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(**arguments)
