import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from iclevr_diffusion import ICLEVR_LABELS, ConditionalDDPMPipeline
from iclevr_diffusion.checkpoint import newest_checkpoint, read_manifest
from iclevr_diffusion.config import TrainConfig, parse_config
from iclevr_diffusion.data import BatchLoader
from iclevr_diffusion.denoiser import ARCHITECTURE
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.models.unet_small import SmallMultiLabelUNet
from iclevr_diffusion.provenance import training_facts
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.training import TrainingRun, run_script
from iclevr_diffusion.training_data import TrainingData

SCRIPTS = Path(__file__).resolve().parents[1] / "train_scripts"
TINY = {
    "resolution": 16,
    "block_out_channels": (8, 16),
    "attention_levels": (),
    "attention_head_dim": 8,
    "patch_size": 2,
    "batch_size": 4,
    "warmup_steps": 1,
    "sample_every": 0,
    "num_inference_steps": 2,
    "num_conditions": 4,
}
SMALL = {**dict.fromkeys(ARCHITECTURE["unet2d"]), "network": "small", "base_channels": 8, "prediction_type": "epsilon"}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_ddpm = load_script("train_ddpm")


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    """Each test finds Accelerate as a new process would, and keeps its image stores to itself."""
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path_factory.getbasetemp() / "stores"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(tiny_dataset):
    """Trains in this process and returns the run's folder."""

    def run(folder, **fields):
        AcceleratorState._reset_state(reset_partial_state=True)
        fields = {"data": str(tiny_dataset), "max_steps": 2, **TINY, **fields}
        train_ddpm.main(train_ddpm.DDPMConfig(output_dir=str(folder), **fields))
        return Path(folder)

    return run


def flags(**fields):
    words = []
    for name, value in fields.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def load_pipeline_of(folder):
    pipeline = ConditionalDDPMPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hashes(folder):
    return read_manifest(newest_checkpoint(folder / "checkpoints"))["files"]


def test_a_short_run_leaves_everything_that_was_promised(train, tmp_path):
    folder = train(tmp_path / "run", sample_every=2)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "data.json"):
        assert (folder / name).exists()
    assert [path.name for path in folder.glob(".*")] == [".lock"]
    pipeline = ConditionalDDPMPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline([["red cube"]], seeds=[0]).images
    assert image.size == (16, 16) and pipeline.unet.dtype == torch.float32
    assert pipeline.config.default_num_inference_steps == 2 and pipeline.config.default_guidance_scale == 2.0
    grid = Image.open(folder / "samples" / "step-00000002.png")
    assert json.loads(grid.text["step"]) == 2 and json.loads(grid.text["labels"])
    conditions = json.loads((folder / "conditions.json").read_text())
    assert conditions and all(name in ICLEVR_LABELS.names for labels in conditions for name in labels)


def test_the_saved_pipeline_holds_the_averaged_weights(train, tmp_path):
    folder = train(tmp_path / "run", max_steps=3)
    pipeline = ConditionalDDPMPipeline.from_pretrained(folder / "pipeline")
    unet = pipeline.unet.state_dict()

    averaged = load_file(newest_checkpoint(folder / "checkpoints") / "ema.safetensors")
    current = load_file(newest_checkpoint(folder / "checkpoints") / "model_0.safetensors")
    assert all(torch.equal(unet[name], averaged[f"model/{name}"]) for name in unet)
    assert not torch.equal(unet["class_embedding.weight"], current["class_embedding.weight"])


def test_the_same_command_again_goes_on_to_the_same_end(train, tmp_path):
    unbroken = train(tmp_path / "unbroken", max_steps=4, lr_schedule="constant", gradient_accumulation_steps=2)
    train(tmp_path / "broken", max_steps=1, lr_schedule="constant", gradient_accumulation_steps=2)
    resumed = train(tmp_path / "broken", max_steps=4, lr_schedule="constant", gradient_accumulation_steps=2)
    assert hashes(unbroken) == hashes(resumed)


def test_images_read_by_index_train_the_same_model(train, tmp_path):
    assert hashes(train(tmp_path / "a", resident=True)) == hashes(train(tmp_path / "b", resident=False))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow", "edm"])
def test_every_target_trains_weighted_and_draws(train, tmp_path, prediction_type):
    folder = train(
        tmp_path / "run", prediction_type=prediction_type, min_snr_gamma=5.0, mixed_precision="bf16", flip=True
    )
    pipeline = ConditionalDDPMPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert torch.isfinite(pipeline([["red cube"]], seeds=[0], output_type="pt").images).all()


def test_the_reported_sampler_and_raw_pixels_go_without_label_dropout(train, tmp_path):
    folder = train(
        tmp_path / "run",
        prediction_type="epsilon",
        sampler="ddpm",
        standardize=False,
        label_dropout=0.0,
        guidance_scale=1.0,
        sample_every=1,
    )
    pipeline = ConditionalDDPMPipeline.from_pretrained(folder / "pipeline")
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler" and not pipeline.unet.config.null_condition
    assert pipeline.unet.data_std == 1


def test_a_judge_scores_validation_labels_and_the_best_pipeline_is_kept(train, tmp_path):
    judge = SmallLabelClassifier(num_classes=24, image_size=16, label_names=list(ICLEVR_LABELS.names))
    judge.save_pretrained(tmp_path / "judge")
    folder = train(tmp_path / "run", judge=str(tmp_path / "judge"), score_every=1)
    scores = [json.loads(line)["validation_score"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = json.loads((folder / "best_pipeline.json").read_text())
    assert len(scores) == 2 and best["score"] == max(scores) and min(scores) >= 0
    assert (folder / "best_pipeline" / "model_index.json").exists()
    assert 1 <= best["measure"].pop("num_conditions") <= 4
    assert best["measure"] == {
        "judge": str(tmp_path / "judge"),
        "default_guidance_scale": 2.0,
        "default_num_inference_steps": 2,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"label_encoding": "tokens", "prediction_type": "edm"},
        {"label_encoding": "tokens", "network_output": "sample", "time_sampling": "uniform", "time_shift": 1.0},
    ],
    ids=["preconditioned", "of images"],
)
def test_several_averages_and_tokens_go_on_to_the_same_end(train, tmp_path, fields):
    fields |= {"ema_lengths": (0.05, 0.2), "lr_schedule": "constant"}
    unbroken = train(tmp_path / "unbroken", max_steps=3, **fields)
    train(tmp_path / "broken", max_steps=1, **fields)
    resumed = train(tmp_path / "broken", max_steps=3, **fields)
    assert hashes(unbroken) == hashes(resumed)
    averaged = {}
    for name in ("pipeline", "pipeline-0.05", "pipeline-0.2"):
        weights, other = (load_file(next((run / name / "unet").glob("*.safetensors"))) for run in (unbroken, resumed))
        assert all(torch.equal(weights[key], other[key]) for key in weights)
        averaged[name] = weights["class_embedding.weight"]
    assert len({tuple(weight.flatten().tolist()) for weight in averaged.values()}) == 3
    assert not (unbroken / "averages.json").exists()  # nothing scored them


def test_more_averages_leave_the_training_and_its_own_average_alone(train, tmp_path):
    alone, beside = train(tmp_path / "alone"), train(tmp_path / "beside", ema_lengths=(0.1,))
    first, second = (hashes(folder) for folder in (alone, beside))
    assert first.items() <= second.items() and set(second) - set(first) == {"ema-0.1.json", "ema-0.1.safetensors"}


def test_an_average_is_chosen_by_a_judge_after_the_training(train, tmp_path, capfd):
    judge = SmallLabelClassifier(num_classes=24, image_size=16, label_names=list(ICLEVR_LABELS.names))
    judge.save_pretrained(tmp_path / "judge")
    folder = train(tmp_path / "run", ema_lengths=(0.1,))
    before = hashes(folder)
    train(tmp_path / "run", ema_lengths=(0.1,), judge=str(tmp_path / "judge"))  # the same command, with a judge
    chosen = json.loads((folder / "averages.json").read_text())
    assert list(chosen["scores"]) == ["pipeline", "pipeline-0.1"]
    assert chosen["scores"][chosen["best"]] == max(chosen["scores"].values())
    assert chosen["step"] == 2 and chosen["measure"]["judge"] == str(tmp_path / "judge")
    assert f"the best is {folder / chosen['best']}" in capfd.readouterr().err
    assert (folder / chosen["best"] / "model_index.json").exists() and hashes(folder) == before


def test_training_starts_from_another_pipelines_weights(train, tmp_path):
    first = train(tmp_path / "first")
    second = train(tmp_path / "second", init_from=str(first / "pipeline"), learning_rate=1e-12, max_steps=1)
    ours, theirs = (
        ConditionalDDPMPipeline.from_pretrained(folder / "pipeline").unet.state_dict() for folder in (first, second)
    )
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_a_resumed_run_does_not_need_the_weights_it_started_from(train, tmp_path):
    first = train(tmp_path / "first", split="all")
    seen = training_facts(first / "pipeline")["conditions"]
    train(tmp_path / "run", init_from=str(first / "pipeline"), lr_schedule="constant")
    shutil.rmtree(first)
    folder = train(tmp_path / "run", init_from=str(first / "pipeline"), lr_schedule="constant", max_steps=3)
    facts = training_facts(folder / "pipeline")  # of which it knows what they had seen
    assert facts["split"] == "all" and set(map(frozenset, facts["conditions"])) >= set(map(frozenset, seen))
    assert json.loads((folder / "data.json").read_text())["split"] == "train"


def test_raw_pixels_stay_raw_whatever_weights_they_start_from(train, tmp_path):
    first = train(tmp_path / "first")
    folder = train(tmp_path / "run", init_from=str(first / "pipeline"), standardize=False)
    source, unet = (ConditionalDDPMPipeline.from_pretrained(path / "pipeline").unet for path in (first, folder))
    assert source.data_std != 1 and unet.data_std == 1 and (unet.data_mean == 0).all()


def test_refused_data_leave_the_folder_as_it_was(train, tmp_path):
    folder = train(tmp_path / "run", max_steps=1)
    names = ("data.json", "conditions.json", "config.yaml", "environment.json")
    before = [(folder / name).read_text() for name in names]
    other = render_dataset(tmp_path / "other", 2, size=16, num_workers=1, progress=False)
    with pytest.raises(ValueError, match="`data` must be"):
        train(folder, max_steps=1, data=str(other))
    assert [(folder / name).read_text() for name in names] == before


def test_a_stopped_run_leaves_its_pipeline_and_no_late_samples(train, tmp_path, monkeypatch):
    batch = BatchLoader.batch

    def stop_in_step_2(loader, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(loader, step)

    monkeypatch.setattr(BatchLoader, "batch", stop_in_step_2)
    with pytest.raises(SystemExit):
        train(tmp_path / "run", max_steps=5, sample_every=1)
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-00000001.png"]
    unet = ConditionalDDPMPipeline.from_pretrained(tmp_path / "run" / "pipeline").unet.state_dict()
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    averaged = load_file(checkpoint / "ema.safetensors")
    assert checkpoint.name == "step-00000002" and all(torch.equal(unet[k], averaged[f"model/{k}"]) for k in unet)


def test_gradient_checkpointing_trains_the_same_model(train, tmp_path, monkeypatch):
    calls, recompute = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *args, **options: calls.append(0) or recompute(*args, **options)
    )
    saving, plain = train(tmp_path / "saving", gradient_checkpointing=True), train(tmp_path / "plain")
    assert calls and hashes(saving) == hashes(plain)


def test_a_run_on_all_images_is_marked(train, tmp_path, capfd):
    folder = train(tmp_path / "run", split="all")
    assert json.loads((folder / "data.json").read_text())["split"] == "all"
    assert "nothing is held out" in capfd.readouterr().err


def write_sets(folder, sets):
    path = folder / "sets.json"
    path.write_text(json.dumps(sets))
    return str(path)


def test_no_image_that_shows_a_held_out_set_is_trained_on(train, tiny_dataset, tmp_path, capfd):
    labels = json.loads((tiny_dataset / "train.json").read_text())
    # The train split of these four scenes is 1 and 2. A pair takes the triple that it grows into along, not its parts.
    single, pair, triple = (labels[f"CLEVR_train_000001_{k}.png"] for k in range(3))
    other_single, other_pair, other_triple = (labels[f"CLEVR_train_000002_{k}.png"] for k in range(3))
    sets = [pair[::-1], other_triple]
    folder = train(tmp_path / "run", hold_out=write_sets(tmp_path, sets), sample_every=2)

    data = json.loads((folder / "data.json").read_text())
    assert data["num_images"] == 3
    assert data["hold_out"] == {
        "name": "sets",
        "sha256": hashlib.sha256(json.dumps(sets).encode()).hexdigest(),
        "num_images_left_out": 3,
    }
    conditions = list(map(set, json.loads((folder / "conditions.json").read_text())))
    assert sorted(map(sorted, conditions)) == sorted(map(sorted, [single, other_single, other_pair]))
    drawn = json.loads(Image.open(folder / "samples" / "step-00000002.png").text["labels"])
    assert not any(set(held_out) <= set(names) for held_out in sets for names in drawn)
    assert "3 of 6 images are left out: each shows one of the 2 label sets" in capfd.readouterr().err


def test_a_resumed_run_must_hold_out_the_same_sets_wherever_their_file_lies(train, tiny_dataset, tmp_path):
    sets = [json.loads((tiny_dataset / "train.json").read_text())["CLEVR_train_000001_1.png"]]
    file = write_sets(tmp_path, sets)
    folder = train(tmp_path / "run", hold_out=file, lr_schedule="constant", max_steps=1)
    (tmp_path / "elsewhere").mkdir()
    train(folder, hold_out=shutil.move(file, tmp_path / "elsewhere"), lr_schedule="constant")
    with pytest.raises(ValueError, match="`hold_out` must be '[0-9a-f]{64}' to go on from .*, got 'none'"):
        train(folder, lr_schedule="constant", max_steps=3)
    with pytest.raises(ValueError, match="`hold_out` must be '[0-9a-f]{64}' to go on from"):
        train(folder, hold_out="held-out", lr_schedule="constant", max_steps=3)


def test_a_hold_out_that_is_none_or_leaves_nothing_is_refused(train, tmp_path):
    for misspelt, hint in {"nothing": "and there is no file", "combination": "did you mean combinations"}.items():
        with pytest.raises(
            FileNotFoundError, match=f"`hold_out` must be combinations .*got '{misspelt}'.*{hint}"
        ) as fault:
            train(tmp_path / "run", hold_out=misspelt)
        assert "unseen" not in str(fault.value)
    with pytest.raises(ValueError, match="`hold_out`: .*Unknown label 'red cub'; did you mean 'red cube'"):
        train(tmp_path / "run", hold_out=write_sets(tmp_path, [["red cub"]]))
    singles = [[name] for name in ICLEVR_LABELS]
    with pytest.raises(ValueError, match="`hold_out` must leave images to train on, but all 6 show a label set of"):
        train(tmp_path / "run", hold_out=write_sets(tmp_path, singles))
    assert not (tmp_path / "run" / "data.json").exists()


def test_validation_labels_leave_out_what_is_held_out(tiny_dataset, tmp_path):
    labels = json.loads((tiny_dataset / "train.json").read_text())
    single, pair, _ = (
        labels[f"CLEVR_train_000003_{k}.png"] for k in range(3)
    )  # the only scene of four to validate on
    fields = {"data": str(tiny_dataset), **TINY, "output_dir": str(tmp_path / "run")}
    config = train_ddpm.DDPMConfig(**fields, hold_out=write_sets(tmp_path, [pair]))
    assert TrainingData(TrainingRun(config), config).validation_conditions == [tuple(single)]


@pytest.mark.slow
def test_without_data_scenes_are_rendered_into_the_outputs(train, tmp_path):
    folder = train(tmp_path / "run", data=None, num_scenes=2)
    assert len(json.loads((folder / "data" / "train.json").read_text())) == 6


def test_the_real_images_are_taken_only_where_they_are_asked_for(train, tmp_path, monkeypatch):
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)
    with pytest.raises(ValueError, match="`data` is ICLEVR_ROOT: set that variable"):
        train(tmp_path / "run", data="ICLEVR_ROOT")


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"label_injection": "early"},
        {"num_levels": 3},
        {"use_time_embedding": False},
        {"use_label_embedding": False, "label_dropout": 0.0, "guidance_scale": 1.0},
    ],
    ids=["as reported", "early", "deeper", "no time", "no labels"],
)
def test_the_small_network_trains_with_each_of_its_switches(train, tmp_path, switches):
    folder = train(tmp_path / "run", **SMALL, **switches, ema_decay=0.0, sample_every=2)
    pipeline = load_pipeline_of(folder)
    assert type(pipeline.unet) is SmallMultiLabelUNet
    architecture = {name: value for name, value in switches.items() if name in ARCHITECTURE["small"]}
    assert {name: pipeline.unet.config[name] for name in architecture} == architecture
    assert torch.isfinite(pipeline([["red cube"]], seeds=[0], output_type="pt").images).all()
    current = load_file(newest_checkpoint(folder / "checkpoints") / "model_0.safetensors")
    assert all(torch.equal(value, current[name]) for name, value in pipeline.unet.state_dict().items())


def test_the_small_networks_running_statistics_are_resumed_too(train, tmp_path):
    fields = {**SMALL, "lr_schedule": "constant"}
    unbroken = train(tmp_path / "unbroken", **fields, max_steps=3)
    train(tmp_path / "broken", **fields, max_steps=1)
    assert hashes(unbroken) == hashes(train(tmp_path / "broken", **fields, max_steps=3))


def test_masked_labels_guide_digits_asked_for_by_integers(train, tmp_path):
    pytest.importorskip("sklearn")
    noise = {"beta_schedule": "linear", "num_train_timesteps": 400, "sampler": "ddpm", "num_inference_steps": 4}
    folder = train(tmp_path / "run", **{**SMALL, **noise, "data": "digits", "resolution": 8, "num_levels": 1})
    pipeline = load_pipeline_of(folder)
    assert pipeline.unet.config.num_train_timesteps == pipeline.scheduler.config.num_train_timesteps == 400
    assert pipeline.scheduler.config.beta_schedule == "linear"
    digits = torch.tensor([3, 7])
    plain, guided = (pipeline(digits, seeds=[0, 1], guidance_scale=1 + w, output_type="pt").images for w in (0.0, 2.0))
    assert plain.shape == (2, 1, 8, 8) and not torch.equal(plain, guided)
    named = pipeline([["3"], ["7"]], seeds=[0, 1], guidance_scale=3.0, output_type="pt").images
    assert torch.equal(named, guided)
    assert pipeline(digits[:1], seeds=[0]).images[0].mode == "L"


def test_a_grid_is_drawn_after_each_epoch(train, tmp_path):
    folder = train(tmp_path / "run", batch_size=3, max_steps=5, sample_every=1, sample_unit="epochs")  # of 6 images
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_channels": 8}, "`base_channels` must be left out for the network unet2d, .* got 8"),
        ({"network": "small", "preset": "base"}, "`preset` must be left out for the network small, .* got base"),
        ({"network": "small", "gradient_checkpointing": True}, "`gradient_checkpointing` must be left out"),
        ({"num_train_timesteps": 400}, "`num_train_timesteps` must be 1000 where `prediction_type` is flow, got 400"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` must be at least 1, got 0"),
        ({"ema_lengths": (0.1, 0.3)}, r"`ema_lengths` must differ and lie between 0 and 0.289, got \[0.1, 0.3\]"),
        ({"prediction_type": "edm", "time_sampling": "uniform"}, "must be logit-normal .* got uniform and True"),
        ({"prediction_type": "edm", "standardize": False}, "`standardize` true for edm, got logit-normal and False"),
        (
            {"prediction_type": "epsilon", "num_train_timesteps": 10},
            "`num_inference_steps` must lie between 1 and the 10 of `num_train_timesteps`, got 20",
        ),
        (
            {"network": "small", "use_label_embedding": False},
            "`label_dropout` must be 0 without `use_label_embedding`, got 0.1",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_any_work(fields, message):
    with pytest.raises(ValueError, match=message):
        train_ddpm.DDPMConfig(**fields)


def test_guidance_without_label_dropout_is_refused_before_any_work():
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 without `label_dropout`, got 2.0"):
        train_ddpm.DDPMConfig(label_dropout=0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("ema_decay", 1.0),
        ("ema_decay", float("nan")),
        ("time_shift", 0.0),
        ("min_snr_gamma", 0.0),
        ("label_dropout", 1.0),
        ("num_inference_steps", 0),
    ],
)
def test_a_number_out_of_range_is_refused_before_any_work(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must .*, got {value}"):
        train_ddpm.DDPMConfig(**{field: value})


def test_a_noise_schedule_that_diffusers_lacks_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_config(train_ddpm.DDPMConfig, ["--beta_schedule", "cosine"])
    assert "must be linear or scaled_linear or squaredcos_cap_v2, got 'cosine'" in capsys.readouterr().err


def config_class_for(recipe):
    """The configuration of the script that runs a recipe."""
    scripts = {
        "judge": "train_classifier",
        "vae": "train_vae",
        "cyclegan": "train_cyclegan",
        "student": "train_student",
    }
    kind = "train_gan" if "\ndiscriminator:" in recipe.read_text() else "train_ddpm"
    script = load_script(scripts.get(recipe.stem.split("_")[0], kind))
    (found,) = (
        item
        for item in vars(script).values()
        if isinstance(item, type) and issubclass(item, TrainConfig) and item.__module__ == script.__name__
    )
    return found


@pytest.mark.parametrize("recipe", sorted((SCRIPTS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_by_its_script_and_states_its_hardware(recipe):
    config = parse_config(config_class_for(recipe), ["--config", str(recipe)])
    assert config.output_dir == f"outputs/{recipe.stem}"
    assert "Hardware:" in recipe.read_text().split("output_dir")[0]


def test_each_ablation_of_the_small_network_differs_in_nothing_else():
    ablations = {
        "no_time": {"use_time_embedding": False},
        "no_labels": {"use_label_embedding": False},
        "early": {"label_injection": "early"},
        "deep": {"num_levels": 4, "max_steps": 127150},
    }
    reported = yaml.safe_load((SCRIPTS / "recipes" / "small_unet_real.yaml").read_text())
    for name, changes in ablations.items():
        recipe = f"small_unet_{name}_real"
        fields = yaml.safe_load((SCRIPTS / "recipes" / f"{recipe}.yaml").read_text())
        assert fields == reported | changes | {"output_dir": f"outputs/{recipe}"}


@pytest.mark.parametrize("path", sorted((SCRIPTS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_file_is_one(path):
    from accelerate.commands.config.config_args import ClusterConfig

    assert (
        ClusterConfig.from_yaml_file(yaml_file=str(path)).num_processes
        == yaml.safe_load(path.read_text())["num_processes"]
    )


def test_the_script_stays_short_with_its_loop_in_sight():
    text = (SCRIPTS / "train_ddpm.py").read_text()
    assert len(text.splitlines()) < 150 and "for batch in run.batches(" in text and "optimizer.step()" in text


def launch(*arguments, config_file="cpu"):
    """Starts the script as a user would; returns the process of the launcher."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(SCRIPTS / "accelerate" / f"{config_file}.yaml"), str(SCRIPTS / "train_ddpm.py")]
    return subprocess.Popen(
        [*command, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_end_bit_equal_to_unbroken_ones(tiny_dataset, tmp_path):
    def run(folder, max_steps):
        fields = {**TINY, "data": tiny_dataset, "lr_schedule": "constant", "log_every": 1, "max_steps": max_steps}
        process = launch(*flags(**fields, output_dir=tmp_path / folder), config_file="two_cpu")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    run("unbroken", 4)
    run("broken", 3)
    run("broken", 4)
    assert hashes(tmp_path / "unbroken") == hashes(tmp_path / "broken")
    environment = json.loads((tmp_path / "broken" / "environment.json").read_text())
    assert [launched["num_processes"] for launched in environment] == [2, 2]
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "unbroken" / "metrics.jsonl").open()]
    assert rates == [pytest.approx(6e-4)] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("config_file", "number"), [("cpu", signal.SIGTERM), ("two_cpu", signal.SIGINT)])
def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(tiny_dataset, tmp_path, config_file, number):
    folder = tmp_path / "run"
    fields = {
        **TINY,
        "data": tiny_dataset,
        "max_steps": 100_000,
        "log_every": 1,
        "save_every": 0,
        "output_dir": folder,
    }
    process = launch(*flags(**fields, lr_schedule="constant"), config_file=config_file)
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    while newest_checkpoint(folder / "checkpoints") is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "the same command goes on from there" in output
    step = read_manifest(newest_checkpoint(folder / "checkpoints"))["step"]
    fields["max_steps"] = step + 1
    again = launch(*flags(**fields, lr_schedule="constant"), config_file=config_file)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and f"Going on after step {step} of {step + 1}" in output


def test_a_compiled_network_trains_the_same_model(train, tmp_path, monkeypatch):
    graphs = []
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph)
    )
    compiled = load_file(
        train(tmp_path / "compiled", compile=True) / "pipeline/unet/diffusion_pytorch_model.safetensors"
    )
    plain = load_file(train(tmp_path / "plain") / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert graphs
    assert compiled.keys() == plain.keys()
    for name, weight in plain.items():
        assert (compiled[name] - weight).abs().mean() < 1e-5  # a step of the optimizer moves weights by 6e-4


def test_a_script_tells_what_is_wrong_with_its_input_in_one_line_and_shows_faults_of_its_own(monkeypatch, capfd):
    def refuse(config):
        raise ValueError(f"`data` must be images, got {config.output_dir}.")

    monkeypatch.setattr(sys, "argv", ["train_ddpm.py", "--output_dir", "nothing"])
    monkeypatch.setattr(TrainingRun, "has_begun", False)
    with pytest.raises(SystemExit) as end:
        run_script(refuse, TrainConfig)
    assert end.value.code == 2
    assert capfd.readouterr().err == "train_ddpm.py: error: `data` must be images, got nothing.\n"
    monkeypatch.setattr(TrainingRun, "has_begun", True)
    with pytest.raises(ValueError, match="must be images"):
        run_script(refuse, TrainConfig)


def test_a_script_whose_data_are_missing_ends_without_a_traceback(tmp_path):
    command = [
        sys.executable,
        str(SCRIPTS / "train_ddpm.py"),
        "--output_dir",
        str(tmp_path / "run"),
        "--data",
        "nothing",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("train_ddpm.py: error: `data`")
