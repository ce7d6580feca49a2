import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from iclevr_diffusion import load_pipeline
from iclevr_diffusion.config import parse_config
from iclevr_diffusion.data import open_store
from iclevr_diffusion.gan_networks import StandardizedDiscriminator

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
        ({"loss": "nonsaturating", "ema_decay": 0.9}, ()),
        ({"discriminator": "acgan", "auxiliary_weight": 100.0, "ramp_steps": 2}, ("auxiliary_loss",)),
        ({"generator": "sagan", "discriminator": "sagan"}, ()),
        ({"generator": "cgan", "discriminator": "cgan", "loss": "nonsaturating"}, ()),
        ({"generator": "cgan_embedding", "discriminator": "cgan_embedding", "loss": "nonsaturating"}, ()),
        ({"discriminator": "wgan", "loss": "wasserstein", "clip_weights": 0.01, "num_critic_steps": 2}, ()),
        ({"discriminator": "wgan", "loss": "wasserstein", "gradient_penalty_weight": 10.0}, ("gradient_penalty",)),
        ({"discriminator": "wgan", "loss": "nonsaturating", "r1_weight": 10.0, "r1_every": 1}, ("r1_penalty",)),
        ({"discriminator": "projection", "diff_augment": ("color", "translation", "cutout")}, ()),
        ({"standardize": True, "discriminator": "projection", "r1_weight": 0.1, "r1_every": 1}, ("r1_penalty",)),
        ({"standardize": True, "generator": "sagan", "discriminator": "sagan"}, ()),
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


def test_a_generator_of_standardized_images_carries_the_mean_of_the_data(train, tiny_dataset):
    weights_of = weights(train(standardize=True))
    store = open_store(tiny_dataset, resolution=16)
    mean, std = store.statistics(store.indices("train"))
    assert torch.allclose(weights_of["data_mean"], torch.from_numpy(mean)) and weights_of["data_std"].item() == (
        pytest.approx(std)
    )


def test_a_discriminator_of_standardized_images_is_shown_those_alone():
    seen = []
    mean, real = torch.rand(3, 4, 4), torch.rand(2, 3, 4, 4)
    network = StandardizedDiscriminator(lambda images, labels: seen.append((images, labels)), mean, 0.5)
    network(real, "labels")
    assert torch.allclose(seen[0][0], 2 * (real - mean)) and seen[0][1] == "labels"


RESUMED = {
    "discriminator": "projection",
    "num_critic_steps": 2,
    "ema_decay": 0.9,
    "diff_augment": ("translation",),
    "r1_weight": 1.0,
    "r1_every": 2,
}


def test_a_resumed_gan_ends_with_the_weights_of_an_unbroken_one(train):
    unbroken = weights(train("unbroken", max_steps=4, **RESUMED))
    train("stopped", max_steps=2, **RESUMED)
    resumed = weights(train("stopped", max_steps=4, **RESUMED))
    assert all(value.equal(unbroken[name]) for name, value in resumed.items())


def test_a_gan_without_labels_draws_as_many_images_as_are_asked_for(train):
    folder = train(generator="cgan", discriminator="cgan", loss="nonsaturating", conditional=False)
    pipeline = load_pipeline(folder / "pipeline")
    assert pipeline.vocabulary is None
    assert pipeline(num_images=3, seeds=[0, 1, 2], output_type="pt").images.shape == (3, 3, 16, 16)
    assert (folder / "samples" / "step-00000002.png").is_file()


@pytest.fixture
def made(monkeypatch):
    """The discriminators that are made, oldest first."""
    discriminators, make = [], train_gan.make_gan

    def make_and_keep(*arguments):
        networks = make(*arguments)
        discriminators.append(networks[1])
        return networks

    monkeypatch.setattr(train_gan, "make_gan", make_and_keep)
    return discriminators


def test_weights_of_a_clipped_critic_stay_small(train, made):
    train(discriminator="wgan", loss="wasserstein", clip_weights=0.01)
    assert max(weight.abs().max().item() for weight in made[0].parameters()) <= 0.01


@pytest.mark.parametrize(
    ("arguments", "norm"),
    [({"gradient_penalty_weight": 10.0}, "layer"), ({"r1_weight": 1.0, "r1_every": 2}, "layer"), ({}, "batch")],
)
def test_a_critic_whose_gradient_is_penalized_scores_each_image_by_itself(train, made, arguments, norm):
    train(discriminator="wgan", **arguments)
    assert made[0].config.norm == norm


def test_an_evaluator_of_weight_nothing_is_not_even_opened(train):
    folder = train(evaluator="no such judge", evaluator_weight=0.0)
    assert "evaluator_loss" not in (folder / "metrics.jsonl").read_text()


def test_the_evaluator_reads_images_that_are_not_augmented(train, monkeypatch):
    seen, shown = [], []

    class Evaluator(torch.nn.Module):
        def forward(self, pixel_values):
            seen.append(pixel_values.detach())
            return SimpleNamespace(logits=pixel_values.mean((1, 2, 3))[:, None].expand(-1, 24))

    monkeypatch.setattr(train_gan, "open_reader", lambda *_: Evaluator())
    discriminate = train_gan.discriminate
    monkeypatch.setattr(train_gan, "discriminate", lambda *args: shown.append(args[1].detach()) or discriminate(*args))
    folder = train(evaluator="any", diff_augment=("color",), max_steps=1)
    assert seen[0].equal(shown[-1])  # what the discriminator is given before it is changed
    assert "evaluator_loss" in (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auxiliary_weight": 1.0}, "`auxiliary_weight` must be above 0 for the discriminator acgan.* for dcgan"),
        ({"discriminator": "acgan"}, "`auxiliary_weight` must be above 0 for the discriminator acgan.* for acgan"),
        ({"gradient_penalty_weight": 1.0}, "`gradient_penalty_weight` must be 0 for the discriminator dcgan"),
        ({"clip_weights": 0.0}, "`clip_weights` must be positive"),
        ({"conditional": False, "generator": "cgan"}, "`conditional` must be true"),
        ({"standardize": True, "generator": "cgan"}, "`standardize` must be false for the generator cgan"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` must be 1 for a GAN"),
        ({"betas": (0.5,)}, "`betas` must be two numbers"),
        ({"num_critic_steps": 0}, "`num_critic_steps` must be at least 1"),
        ({"ema_decay": 1.0}, "`ema_decay` must lie in"),
        ({"auxiliary_weight": -1.0}, "`auxiliary_weight` must be finite and at least 0, got -1.0"),
        ({"evaluator_weight": -1.0}, "`evaluator_weight` must be finite and at least 0, got -1.0"),
        ({"r1_weight": float("nan")}, "`r1_weight` must be finite"),
        ({"ramp_steps": -1}, "`ramp_steps` must be at least 0, got -1"),
        ({"num_conditions": 0}, "`num_conditions` must be at least 1, got 0"),
        ({"discriminator_learning_rate": 0.0}, "`discriminator_learning_rate` must be positive or none, got 0.0"),
        ({"diff_augment": ("colour",)}, "`diff_augment` must be some of color, translation, cutout, got colour"),
        ({"r1_weight": 10.0}, "`r1_weight` must be 0 for the discriminator dcgan, whose batch normalization"),
        ({"r1_weight": 10.0, "discriminator": "acgan", "auxiliary_weight": 1.0}, "`r1_weight` must be 0 .* acgan"),
        ({"r1_every": 4}, "`r1_every` must be 16, its default, without `r1_weight`, got 4"),
        ({"r1_every": 0}, "`r1_every` must be at least 1, got 0"),
        (
            {"discriminator": "projection", "r1_weight": 1.0, "r1_every": 3},
            "`r1_every` must not exceed `max_steps` 2, or no step is penalized, got 3",
        ),
        ({"ramp_steps": 4}, "`ramp_steps` must be 0, its default, without `auxiliary_weight` or `evaluator`, got 4"),
        ({"evaluator_weight": 0.5}, "`evaluator_weight` must be 1.0, its default, without `evaluator`, got 0.5"),
        ({"num_critic_steps": 3}, "`num_critic_steps` must not exceed `max_steps` 2.*got 3"),
        (
            {"clip_weights": 0.01, "discriminator": "projection"},
            "`clip_weights` must be none for the discriminator projection, whose spectral norm",
        ),
        (
            {"conditional": False, "generator": "cgan", "discriminator": "cgan", "evaluator": "judge-small"},
            "`evaluator` must be none where `conditional` is false, got judge-small",
        ),
        ({"loss": "wasserstein"}, "`loss` must not be wasserstein where nothing bounds the critic's slope"),
        ({"evaluator": "no such judge"}, "`evaluator`: .*no such judge"),
        ({"evaluator": "judge-small"}, r"`evaluator`: `pixel_values` must have shape .*64"),
    ],
)
def test_settings_that_make_no_sense_are_refused(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(**arguments)


def test_a_ramp_may_wait_for_an_evaluator_whose_weight_is_nothing():
    assert train_gan.GANConfig(evaluator="judge-small", evaluator_weight=0.0, ramp_steps=10).ramp_steps == 10


@pytest.mark.parametrize(
    "arguments", [{"discriminator": "sagan"}, {"clip_weights": 0.01}, {"discriminator": "wgan", "r1_weight": 1.0}]
)
def test_a_wasserstein_loss_is_taken_where_the_critics_slope_is_bounded(arguments):
    assert train_gan.GANConfig(loss="wasserstein", **arguments).loss == "wasserstein"


GAN_RECIPES = [path for path in sorted((SCRIPTS / "recipes").glob("*.yaml")) if "\ngenerator:" in path.read_text()]


@pytest.mark.parametrize("path", GAN_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_makes_networks_and_writes_into_a_folder_of_its_own_name(path):
    config = parse_config(train_gan.GANConfig, ["--config", str(path)])
    assert Path(config.output_dir).name == path.stem
    assert "Hardware: " in path.read_text()
    with torch.device("meta"):
        statistics = np.zeros((1, config.resolution, config.resolution), dtype=np.float32), 1.0
        train_gan.make_gan(config, 10 if config.conditional else 0, 1, statistics)


@pytest.mark.slow
def test_two_processes_train_and_resume_to_the_weights_of_an_unbroken_gan(
    run_script, tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    arguments = SMALL | RESUMED | {"batch_size": 2, "data": tiny_dataset, "sample_every": 2}
    flags = []
    for name, value in arguments.items():
        flags += [f"--{name}", *(value if isinstance(value, tuple) else [value])]
    for name, steps in (("unbroken", 4), ("stopped", 2), ("stopped", 4)):
        run_script("train_gan.py", *flags, "--output_dir", tmp_path / name, "--max_steps", steps, num_processes=2)
    folders = [tmp_path / name / "checkpoints" / "step-00000004" for name in ("stopped", "unbroken")]
    names = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert {"model_0.safetensors", "model_1.safetensors", "ema.safetensors"} <= set(names)
    for name in names:
        resumed, unbroken = (load_file(folder / name) for folder in folders)
        assert all(value.equal(unbroken[key]) for key, value in resumed.items()), name
