import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from iclevr_diffusion import load_pipeline
from iclevr_diffusion.config import parse_config
from iclevr_diffusion.data import BatchLoader, open_store
from iclevr_diffusion.domains import NoiseImages, UnpairedImages
from iclevr_diffusion.rendering import render_dataset

SCRIPTS = Path(__file__).resolve().parents[1] / "train_scripts"
SPEC = importlib.util.spec_from_file_location("train_cyclegan", SCRIPTS / "train_cyclegan.py")
train_cyclegan = sys.modules["train_cyclegan"] = importlib.util.module_from_spec(SPEC)  # dataclasses look for it there
SPEC.loader.exec_module(train_cyclegan)

SMALL = {
    "resolution": 16,
    "batch_size": 2,
    "block_out_channels": (4, 8),
    "num_residual_blocks": 1,
    "discriminator_channels": (4, 8),
    "pool_size": 3,
    "max_steps": 2,
    "sample_every": 2,
    "log_every": 1,
}


@pytest.fixture
def train(tiny_dataset, tmp_path, monkeypatch):
    """Runs train_cyclegan.py in this process and returns the folder of its outputs."""
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name="run", **arguments):
        config = SMALL | {"data": str(tiny_dataset)} | arguments
        train_cyclegan.main(train_cyclegan.CycleGANConfig(output_dir=str(tmp_path / name), **config))
        return tmp_path / name

    return run


def weights(folder):
    folders = [folder / "pipeline" / f"generator_{direction}" for direction in ("a_to_b", "b_to_a")]
    return [load_file(path / "diffusion_pytorch_model.safetensors") for path in folders]


def are_equal(ours, theirs):
    return all(
        value.equal(other[name]) for one, other in zip(ours, theirs, strict=True) for name, value in one.items()
    )


def test_a_cyclegan_trains_logs_draws_and_is_opened(train):
    folder = train(identity_weight=5.0, ema_decay=0.9)
    mapped = load_pipeline(folder / "pipeline")(torch.rand(2, 3, 16, 16), "b_to_a", output_type="pt").images
    assert mapped.shape == (2, 3, 16, 16) and torch.isfinite(mapped).all()
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    losses = {f"{network}_loss_{domain}" for network in ("generator", "discriminator") for domain in "ab"}
    assert losses | {"cycle_loss", "identity_loss"} <= set(line)
    with Image.open(folder / "samples" / "step-00000002.png") as picture:
        assert json.loads(picture.text["rows"])[:3] == ["A", "A to B", "A to B to A"]


def test_a_resumed_cyclegan_ends_with_the_weights_of_an_unbroken_one(train):
    arguments = {"ema_decay": 0.5, "lr_schedule": "constant"}  # so that the recipe may be given more steps
    unbroken = train("unbroken", max_steps=5, **arguments)
    train("stopped", max_steps=3, **arguments)  # 6 images have passed a pool of 3
    resumed = train("stopped", max_steps=5, **arguments)
    assert are_equal(weights(resumed), weights(unbroken))
    pools = [folder / "checkpoints" / "step-00000005" / "pool_a.safetensors" for folder in (resumed, unbroken)]
    ours, theirs = map(load_file, pools)
    assert len(ours) == 3 and all(value.equal(theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("domain_a", ["noise", "smaller"])
def test_domains_of_different_sizes_are_drawn_side_by_side(train, tmp_path, domain_a):
    if domain_a == "smaller":  # two validation images beside three
        domain_a = str(render_dataset(tmp_path / "a", 3, size=16, seed=9, num_workers=1, progress=False))
    folder = train(domain_a=domain_a)
    assert (folder / "samples" / "step-00000002.png").is_file()


def test_the_pool_decides_what_the_discriminators_learn(train):
    assert not are_equal(weights(train("pool", max_steps=4)), weights(train("large", max_steps=4, pool_size=50)))


def test_the_losses_are_least_squares():
    real, fake = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 2.0]])
    assert train_cyclegan.discriminator_loss(real, fake) == 0.5 * (4 / 2 + 4 / 2)
    assert train_cyclegan.generator_loss(fake) == (1 + 1) / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` must be 1 for a GAN"),
        ({"cycle_weight": -1.0}, "`cycle_weight` must be finite and at least 0, got -1.0"),
        ({"identity_weight": float("inf")}, "`identity_weight` must be finite"),
        ({"betas": (0.5,)}, "`betas` must be two numbers"),
        ({"ema_decay": 1.0}, "`ema_decay` must lie in"),
        ({"pool_size": 0}, "`pool_size` must be at least 1, got 0"),
        (
            {"hold_out": "held-out", "domain_a": "digits"},
            "`hold_out` must be none where `domain_a` has images of its own",
        ),
        ({"domain_a": "ICLEVR_ROOT"}, "`domain_a` is ICLEVR_ROOT: set that variable"),
    ],
)
def test_settings_that_make_no_sense_are_refused(train, monkeypatch, arguments, message):
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)
    with pytest.raises(ValueError, match=message):
        train(**arguments)


@pytest.mark.parametrize("recipe", sorted((SCRIPTS / "recipes").glob("cyclegan_*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_one_that_the_script_takes(recipe):
    config = parse_config(train_cyclegan.CycleGANConfig, ["--config", str(recipe)])
    assert config.output_dir == f"outputs/{recipe.stem}"
    assert set(yaml.safe_load(recipe.read_text())) <= set(vars(config))


# Domains


@pytest.fixture
def make_domains(tiny_dataset, tmp_path, monkeypatch):
    """Makes the domains of a process of a run that notes what it is told."""
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    store = open_store(tiny_dataset, resolution=16, progress=False)

    def make(domain_a, num_processes=1, process_index=0, batch_size=4, seed=0):
        places = {"num_processes": num_processes, "process_index": process_index}
        accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, **places)
        facts, files = {}, {}
        noted = {"facts": facts, "files": files, "pin": lambda **names: facts.update(names)}
        run = SimpleNamespace(accelerator=accelerator, describe=files.__setitem__, **noted)
        indices = store.indices("all")
        loader = BatchLoader(store, indices, batch_size, seed=seed, **places)
        config = train_cyclegan.CycleGANConfig(resolution=16, batch_size=batch_size, split="all", seed=seed)
        training_data = SimpleNamespace(store=store, indices=indices, loader=loader)
        return UnpairedImages(run, training_data, config, domain_a), run

    return make


def test_both_domains_of_images_show_all_of_them_in_orders_of_their_own(make_domains, tiny_dataset):
    domains, run = make_domains("images", batch_size=1)
    num_images = len(open_store(tiny_dataset, resolution=16, progress=False))
    passes = [[domains.batch(step)[name].numpy().tobytes() for step in range(num_images)] for name in ("a", "b")]
    assert set(passes[0]) == set(passes[1]) and passes[0] != passes[1]
    assert run.facts == {"domain_a": "images"}
    batch = domains.batch(0)["a"]
    assert batch.dtype == torch.float32 and batch.shape == (1, 3, 16, 16) and -1 <= batch.min() < batch.max() <= 1


def test_noise_is_even_and_belongs_to_its_step_and_process():
    noise = NoiseImages((3, 16, 16), 64, seed=0)
    pixel_values = noise.batch(0)["pixel_values"]
    assert pixel_values.shape == (64, 3, 16, 16) and pixel_values.dtype == torch.uint8
    counts = np.bincount(pixel_values.flatten().numpy(), minlength=256)
    assert len(counts) == 256 and abs(counts - 192).max() < 6 * 192**0.5
    assert pixel_values.equal(NoiseImages((3, 16, 16), 64, seed=0).batch(0)["pixel_values"])
    others = [noise.batch(1), NoiseImages((3, 16, 16), 64, seed=1).batch(0)]
    others += [NoiseImages((3, 16, 16), 64, seed=0, num_processes=2, process_index=1).batch(0)]
    assert not any(pixel_values.equal(other["pixel_values"]) for other in others)


def test_domain_a_may_be_noise_or_another_folder(make_domains, tmp_path):
    noise, _ = make_domains("noise")
    assert noise.batch(0)["a"].shape == noise.batch(0)["b"].shape == (4, 3, 16, 16)
    folder = render_dataset(tmp_path / "other", 2, size=16, seed=9, num_workers=1, progress=False)
    domains, run = make_domains(str(folder))
    other = open_store(folder, resolution=16, progress=False)
    theirs = {image.tobytes() for image in other.pixel_values}
    shown = domains.batch(0)["a"].add(1).mul(127.5).round().to(torch.uint8)
    assert all(image.numpy().tobytes() in theirs for image in shown)
    assert run.facts == {"domain_a": other.sha256}
    assert json.loads(run.files["domain_a.json"])["num_images"] == len(other)


def test_examples_are_the_same_every_time_and_seldom_those_of_the_other_domain(make_domains):
    (domains, _), (again, _) = make_domains("images"), make_domains("images", seed=5)
    examples = domains.examples(4)
    assert all(examples[name].equal(again.examples(4)[name]) for name in "ab")
    assert not examples["a"].equal(examples["b"])
    examples = make_domains("noise")[0].examples(2)
    assert examples["a"].shape == examples["b"].shape == (2, 3, 16, 16)


def test_a_folder_that_is_none_is_refused_by_the_name_of_its_option(make_domains, train):
    with pytest.raises(FileNotFoundError, match="`domain_a`: `nowhere` is not a folder"):
        make_domains("nowhere")
    with pytest.raises(FileNotFoundError, match="`data`: `nowhere` is not a folder"):
        train(data="nowhere")


def test_domains_of_other_channels_are_refused(make_domains):
    with pytest.raises(ValueError, match="`domain_a` must hold images of 3 channels, as `data` does, got 1 in digits"):
        pytest.importorskip("sklearn")
        make_domains("digits")


class Gathered:
    """A process among several, each of which has the images of all."""

    def __init__(self, images, process_index):
        self.images, self.process_index, self.num_processes = images, process_index, len(images)

    def gather(self, images):
        assert images.equal(self.images[self.process_index])
        return torch.cat(self.images)


def test_several_processes_keep_one_pool_and_share_out_what_it_shows():
    pools = [train_cyclegan.ImagePool(4) for _ in range(3)]
    for step in range(5):
        images = list(torch.arange(step * 6.0, step * 6.0 + 6)[:, None, None, None].chunk(2))
        draws = [torch.Generator().manual_seed(step) for _ in range(3)]
        shown = [
            train_cyclegan.recall(SimpleNamespace(accelerator=Gathered(images, i)), pools[i], images[i], draws[i])
            for i in range(2)
        ]
        assert torch.cat(shown).equal(pools[2].exchange(torch.cat(images), draws[2]))
    assert torch.stack(pools[0].images).equal(torch.stack(pools[1].images))


@pytest.mark.slow
def test_two_processes_train_and_resume_to_the_weights_of_an_unbroken_run(
    run_script, tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    flags = [
        "--data",
        tiny_dataset,
        "--resolution",
        16,
        "--batch_size",
        2,
        "--num_residual_blocks",
        1,
        "--pool_size",
        3,
    ]
    flags += ["--identity_weight", 5, "--lr_schedule", "constant", "--sample_every", 0]
    flags += ["--block_out_channels", 4, 8, "--discriminator_channels", 4, 8]
    for name, steps in (("unbroken", 4), ("stopped", 2), ("stopped", 4)):
        run_script("train_cyclegan.py", *flags, "--output_dir", tmp_path / name, "--max_steps", steps, num_processes=2)
    assert are_equal(weights(tmp_path / "stopped"), weights(tmp_path / "unbroken"))
