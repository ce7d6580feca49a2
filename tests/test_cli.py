import copy
import dataclasses
import json
import os
import subprocess
from pathlib import Path

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from iclevr_diffusion import (
    ICLEVR_LABELS,
    ConditionalDDPMPipeline,
    CycleGANGenerator,
    CycleGANPipeline,
    LabelVocabulary,
    evaluate,
    loading,
    protocols,
    sample,
)
from iclevr_diffusion.command_line import make_scheduler
from iclevr_diffusion.data import open_store
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.scores import top_k_hits


@pytest.fixture
def pipeline_folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def judge_folder(tmp_path):
    judge = SmallLabelClassifier(24, 16, label_names=list(ICLEVR_LABELS.names), block_out_channels=(8, 8))
    judge.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def run_sample(pipeline_folder, tmp_path):
    def run(*arguments, out=tmp_path / "samples"):
        fixed = [
            "--pipeline",
            str(pipeline_folder),
            "--num_inference_steps",
            "2",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
        sample.main([*fixed, *arguments])
        return out

    return run


@pytest.fixture
def run_evaluate(pipeline_folder, judge_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)

    def run(*arguments, out=tmp_path / "evaluation"):
        fixed = ["--pipeline", str(pipeline_folder), "--judges", str(judge_folder), "--num_inference_steps", "2"]
        evaluate.main([*fixed, "--device", "cpu", "--out", str(out), *map(str, arguments)])
        return json.loads((out / "results.json").read_text())

    return run


def pixels(file):
    return np.asarray(Image.open(file))


# iclevr-sample


def test_sample_writes_an_image_for_each_prompt_and_a_grid_and_says_where(run_sample, capsys):
    out = run_sample("red cube, blue sphere", "gray cylinder", "--seed", "1")
    assert {file.name for file in out.iterdir()} == {
        "0000_red-cube_blue-sphere.png",
        "0001_gray-cylinder.png",
        "grid.png",
    }
    assert str(out.resolve()) in capsys.readouterr().out


def test_a_sampled_image_says_how_it_was_drawn(run_sample, pipeline_folder):
    out = run_sample("red cube, blue sphere", "gray cylinder", "--seed", "1", "--guidance_scale", "2.5")
    text = Image.open(out / "0001_gray-cylinder.png").text
    assert text.pop("Software").startswith("iclevr_diffusion ")
    assert text == {
        "labels": "gray cylinder",
        "seed": "2",
        "model": str(pipeline_folder),
        "num_inference_steps": "2",
        "guidance_scale": "2.5",
        "scheduler": "DDPMScheduler",
    }
    assert json.loads(Image.open(out / "grid.png").text["labels"]) == [["red cube", "blue sphere"], ["gray cylinder"]]


@pytest.fixture
def guide_folder(tiny_pipeline, tmp_path):
    """The pipeline of a run that trained a weaker network."""
    guide = copy.deepcopy(tiny_pipeline.unet)
    with torch.no_grad():
        for weight in guide.parameters():
            weight.add_(0.05)
    pipeline = ConditionalDDPMPipeline(guide, tiny_pipeline.scheduler, ICLEVR_LABELS.names)
    pipeline.save_pretrained(tmp_path / "weak" / "pipeline")
    (tmp_path / "weak" / "config.yaml").write_text("judge: runs/small\n")
    return tmp_path / "weak" / "pipeline"


def test_sample_leads_away_from_a_guide_and_writes_it_down(run_sample, guide_folder, tmp_path):
    plain = run_sample("red cube", "--guidance_scale", "2.5", out=tmp_path / "plain")
    led_away = run_sample("red cube", "--guidance_scale", "2.5", "--guide", str(guide_folder))
    assert (pixels(plain / "0000_red-cube.png") != pixels(led_away / "0000_red-cube.png")).any()
    assert Image.open(led_away / "0000_red-cube.png").text["guide"] == str(guide_folder)
    assert "guide" not in Image.open(plain / "0000_red-cube.png").text
    with pytest.raises(SystemExit, match="iclevr-sample: `guide`: "):
        run_sample("red cube", "--guide", str(tmp_path / "nowhere"))


def test_evaluate_knows_which_judge_had_a_part_in_a_guide(run_evaluate, guide_folder, tmp_path):
    (tmp_path / "one.json").write_text('[["red cube"]]')
    arguments = ["--protocols", tmp_path / "one.json", "--seeds", "1", "--guidance_scale", "2.5"]
    with pytest.raises(SystemExit, match="`judges` must hold one that had no part in the training, got \\['small'\\]"):
        run_evaluate(*arguments, "--guide", guide_folder)
    (guide_folder.parent / "config.yaml").write_text("judge: runs/other\n")
    led_away = run_evaluate(*arguments, "--guide", guide_folder)
    plain = run_evaluate(*arguments, out=tmp_path / "plain")
    assert led_away["pipeline"]["num_parameters"] == 2 * plain["pipeline"]["num_parameters"]
    assert led_away["pipeline"]["weights_sha256"] != plain["pipeline"]["weights_sha256"]


def test_sample_takes_composed_conditions_as_text_and_writes_it_down(run_sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("gray cube:0.5\n")
    prompt = " red cube, gray cube AND NOT blue sphere:0.5 "
    out = run_sample(prompt, "gray cylinder", "--prompt_file", str(tmp_path / "prompts.txt"), "--strip")
    name = "0000_red-cube-gray-cube-AND-NOT-blue-sphere-0-5.png"
    assert Image.open(out / name).text["labels"] == prompt.strip()
    labels = json.loads(Image.open(out / "grid.png").text["labels"])
    assert labels == [prompt.strip(), ["gray cylinder"], "gray cube:0.5"]
    plain = run_sample("red cube, gray cube", out=tmp_path / "plain")
    assert (pixels(out / name) != pixels(plain / "0000_red-cube_gray-cube.png")).any()


def test_an_image_drawn_alone_by_its_seed_is_the_same(run_sample, tmp_path):
    many = run_sample("red cube", "gray cylinder", "--seed", "5", "--micro_batch_size", "1")
    alone = run_sample("gray cylinder", "--seed", "6", "--micro_batch_size", "1", out=tmp_path / "alone")
    assert (pixels(many / "0001_gray-cylinder.png") == pixels(alone / "0000_gray-cylinder.png")).all()


def test_several_images_of_a_prompt_differ_and_strips_end_in_them(run_sample):
    out = run_sample("red cube", "--num_images_per_prompt", "2", "--strip")
    assert (pixels(out / "0000_red-cube.png") != pixels(out / "0001_red-cube.png")).any()
    strips = Image.open(out / "strips.png")
    assert strips.width > strips.height / 2  # each row is as wide as three states


def test_drawing_again_replaces_files_of_the_same_names(run_sample):
    before = pixels(run_sample("red cube", "--seed", "1") / "0000_red-cube.png")
    after = pixels(run_sample("red cube", "--seed", "2") / "0000_red-cube.png")
    assert (before != after).any()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "red cube, blue sphere\n\ngray cylinder\n"),
        ("prompts.json", '[["red cube", "blue sphere"], ["gray cylinder"]]'),
    ],
)
def test_prompts_are_read_from_a_file_after_those_of_the_command_line(run_sample, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    out = run_sample("cyan cube", "--prompt_file", str(tmp_path / name))
    names = ["0000_cyan-cube.png", "0001_red-cube_blue-sphere.png", "0002_gray-cylinder.png", "grid.png"]
    assert sorted(file.name for file in out.iterdir()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["red cub"], "prompt 'red cub': Unknown label 'red cub'; did you mean 'red cube'"),
        (["red cube, red cube"], "more than once"),
        (["gray cube AND red cub"], "prompt 'gray cube AND red cub': Unknown label 'red cub'; did you mean"),
        (["red cube NOT gray cube"], "prompt 'red cube NOT gray cube': `NOT` must stand once at the start"),
        ([], "nothing to draw"),
        ([""], "empty scene"),
        (["red cube", "--device", "abacus"], "`device` must be one of this machine's, .* got 'abacus': "),
        (["red cube", "--device", "meta"], "`device` must be one of this machine's, .* got 'meta': "),
        (["red cube", "--scheduler", "UNet2DModel"], "must name a scheduler class of diffusers"),
        (["red cube", "--scheduler", "FlowMatchEulerDiscreteScheduler"], "prediction type"),
        (["--prompt_file", "no such file"], "no such file"),
    ],
)
def test_what_cannot_be_drawn_ends_sample_with_one_line(run_sample, arguments, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run_sample(*arguments)
    assert str(stopped.value).startswith("iclevr-sample: ") and "\n" not in str(stopped.value)


def test_no_step_at_all_is_refused_and_not_replaced_by_the_default(run_sample):
    with pytest.raises(SystemExit, match="`num_inference_steps` must be .*, got 0"):
        run_sample("red cube", "--num_inference_steps", "0")


def test_a_bad_line_of_a_prompt_file_is_named(run_sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("red cube\n\nblue spher\n")
    with pytest.raises(SystemExit, match=r"prompts.txt, line 3: .*'blue sphere'"):
        run_sample("--prompt_file", str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("flag", ["--num_images_per_prompt", "--micro_batch_size"])
def test_counts_below_one_are_refused(run_sample, flag, capsys):
    with pytest.raises(SystemExit):
        run_sample("red cube", flag, "0")
    assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err


# Schedulers by name


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_a_named_scheduler_keeps_the_noise_schedule_and_draws(tiny_pipeline, name):
    tiny_pipeline.scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    tiny_pipeline.scheduler = make_scheduler(name, tiny_pipeline)
    assert type(tiny_pipeline.scheduler).__name__ == name
    assert tiny_pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    tiny_pipeline([["red cube"]], num_inference_steps=2)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_solver_named_for_a_flow_model_follows_straight_paths(tiny_pipeline, name):
    tiny_pipeline.unet.register_to_config(prediction_type="flow")
    tiny_pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    tiny_pipeline.scheduler = make_scheduler(name, tiny_pipeline)
    assert tiny_pipeline.scheduler.config.use_flow_sigmas and tiny_pipeline.scheduler.config.flow_shift == 2.0
    tiny_pipeline([["red cube"]], num_inference_steps=2)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("DPMSolverMultistepScheduler", "flow_shift"),
        ("UniPCMultistepScheduler", "flow_shift"),
        ("FlowMatchEulerDiscreteScheduler", "shift"),
        ("FlowMatchHeunDiscreteScheduler", "shift"),
    ],
)
def test_a_named_scheduler_keeps_the_shift_of_a_solvers_times(tiny_pipeline, name, field):
    tiny_pipeline.unet.register_to_config(prediction_type="flow")
    straight = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 4.0}
    tiny_pipeline.scheduler = diffusers.UniPCMultistepScheduler(**straight)
    tiny_pipeline.scheduler = make_scheduler(name, tiny_pipeline)
    assert tiny_pipeline.scheduler.config[field] == 4.0
    tiny_pipeline([["red cube"]], num_inference_steps=2)


# iclevr-evaluate


def test_evaluate_scores_the_packaged_lists_and_prints_a_table(run_evaluate, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results = run_evaluate("--seeds", "1")
    counts = {name: part["num_images"] for name, part in results["protocols"].items()}
    assert counts == {"test": 32, "new_test": 32}
    assert results["quick"] and results["pipeline"]["name"] == tmp_path.name
    printed = capsys.readouterr().out
    assert "new_test" in printed and "set ICLEVR_ROOT" in printed and str(tmp_path / "evaluation") in printed


def test_evaluate_draws_lists_from_files(run_evaluate, tmp_path):
    (tmp_path / "few.json").write_text('[["red cube"]]')
    scheduler = ["--scheduler", "DDIMScheduler"]
    results = run_evaluate("--protocols", tmp_path / "few.json", "--seeds", "1", "--name", "mine", *scheduler)
    assert results["protocols"]["few"]["num_conditions"] == 1 and results["pipeline"]["name"] == "mine"
    assert results["settings"]["scheduler"]["_class_name"] == "DDIMScheduler"


def test_evaluate_scores_negation_and_picked_images(run_evaluate, capsys, monkeypatch):
    few = [protocols.open_protocol(name, ICLEVR_LABELS) for name in ("negated", "unnegated")]
    few = {
        plain.name: dataclasses.replace(
            plain,
            conditions=plain.conditions[:2],
            prompts=plain.prompts and plain.prompts[:2],
            negated=plain.negated[:2],
        )
        for plain in few
    }
    monkeypatch.setattr(evaluate, "open_protocol", lambda name, vocabulary, **_: few[name])
    results = run_evaluate("--protocols", *few, "--seeds", "4", "--best_of", "2")
    for protocol in results["protocols"].values():
        assert protocol["judges"]["small"]["negation"]["num_images"] == 8
        assert protocol["judges"]["small"]["best_of"]["all"]["num_images"] == 4
    printed = capsys.readouterr().out
    assert "unnegated: all asked for seen" in printed and "best 2 +" in printed


def test_the_shipped_model_picks_the_best_of_its_own_images(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)
    (tmp_path / "few.json").write_text('[["red cube"], ["blue sphere", "gray cylinder"]]')
    options = ["--seeds", "2", "--best_of", "2", "--num_inference_steps", "2", "--micro_batch_size", "2"]
    judge = ["--judges", "judge-small", "--device", "cpu", "--pipeline", "conditional-ddpm-tokens-real"]
    evaluate.main([*judge, *options, "--protocols", str(tmp_path / "few.json"), "--out", str(tmp_path / "scores")])
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    best = results["protocols"]["few"]["judges"]["judge-small"]["best_of"]
    assert best["num_candidates"] == 2 and best["all"]["num_images"] == 2
    records = pq.read_table(tmp_path / "scores" / "records.parquet").to_pylist()
    logits = {(row["position"], row["replicate"]): row["logits judge-small"] for row in records}
    labels = ICLEVR_LABELS.encode([["red cube"], ["blue sphere", "gray cylinder"]])
    possible = {
        sum(top_k_hits(torch.tensor([logits[0, i], logits[1, j]]), labels).tolist()) / 3
        for i in (0, 1)
        for j in (0, 1)
    }
    assert best["all"]["top_k"]["value"] in possible  # one of the two images of each
    assert "few" in capsys.readouterr().out


def test_evaluate_compares_with_held_out_images(run_evaluate, tmp_path, monkeypatch):
    dataset = render_dataset(tmp_path / "dataset", 60, size=16, seed=0, num_workers=1, progress=False)
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "one.json").write_text('[["red cube"]]')
    results = run_evaluate("--protocols", tmp_path / "one.json", "matched", "--seeds", "1", "--data", dataset)
    seen = results["held_out_images"]["judges"]["small"]
    assert seen["num_images"] == sum(part["num_images"] for part in seen["by_num_objects"].values()) > 0
    assert results["protocols"]["matched"]["num_conditions"] == seen["num_images"]
    assert "20 are needed" in results["distribution"]["missing"]  # sixty scenes are too few


def test_what_is_drawn_by_default_depends_on_labels_and_data(tiny_dataset, tmp_path):
    store = open_store(tiny_dataset, resolution=16, cache_dir=tmp_path)

    def names(*arguments):
        return [protocol.name for protocol in evaluate.choose_protocols(None, *arguments, None)]

    assert names(ICLEVR_LABELS, None) == ["test", "new_test"]
    assert names(ICLEVR_LABELS, store) == ["test", "new_test", "matched"]
    assert names(LabelVocabulary(["a", "b"]), None) == ["all"]
    seen = evaluate.choose_protocols(None, LabelVocabulary(["a", "b"]), None, [("a",), ("a", "b")])
    assert [(protocol.name, len(protocol)) for protocol in seen] == [("seen", 2)]  # what it was trained on is known
    assert names(None, store) == ["matched"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[["red cube"], ["red cub"]]', r"mine.json.*\[1\].*'red cube'"),
        ("[]", "mine.json"),
        ("{", "mine.json.*JSON"),
    ],
)
def test_a_list_that_does_not_fit_ends_evaluate_with_file_and_entry(run_evaluate, tmp_path, content, message):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(SystemExit, match=message) as stopped:
        run_evaluate("--protocols", tmp_path / "mine.json")
    assert str(stopped.value).startswith("iclevr-evaluate: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "`num_seeds` must be at least 1"),
        (["--protocols", "test", "test"], "`protocols` must have distinct names"),
        (["--protocols", "missing.json"], "missing.json"),
        (["--protocols", "matched"], "matched needs real images; give --data or set ICLEVR_ROOT"),
        (["--protocols", "unseen"], "unseen"),
        (["--judges", "missing"], "No model named 'missing' comes with this package"),
        (["--judges", "./judge-small"], "there is no folder judge-small"),
        (["--judges", "missing.pth"], "got missing.pth, which is no file"),
        (["--judges", "a/judge", "b/a"], "`judges` must have distinct names, got a/judge and b/a"),
        (["--device", "abacus"], "`device` must be one of this machine's, .* got 'abacus': "),
        (["--data", "missing"], "missing"),
        (["--inception_weights", "missing.pth"], "missing.pth"),
    ],
)
def test_what_cannot_be_evaluated_ends_evaluate_with_one_line(run_evaluate, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run_evaluate(*arguments)


def test_judges_are_named_by_their_run_their_file_or_their_folder():
    sources = ["runs/a/judge", "runs/b/judge/", "c", "course/checkpoint.pth"]
    assert evaluate.judges_by_name(sources) == dict(zip(["a", "b", "c", "checkpoint"], sources, strict=True))


def test_a_pipeline_is_named_by_its_folder_or_by_the_run_it_comes_from():
    named = {None: loading.DEFAULT_PIPELINE, "runs/a/pipeline": "a", "runs/a/best_pipeline/": "a", "me/model": "model"}
    named |= {"runs/a/pipeline-0.05": "a-0.05", "runs/pipeline-of-mine": "pipeline-of-mine"}
    assert {source: evaluate.pipeline_name(source) for source in named} == named


@pytest.mark.parametrize("flag", [[], ["--judges", *loading.DEFAULT_JUDGES]])
def test_the_shipped_judges_are_opened_by_default_and_by_their_plain_names(
    pipeline_folder, judge_folder, tmp_path, monkeypatch, flag
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)
    monkeypatch.setattr(loading, "shipped_folder", dict.fromkeys(loading.DEFAULT_JUDGES, judge_folder).__getitem__)
    (tmp_path / "one.json").write_text('[["red cube"]]')
    fixed = ["--pipeline", str(pipeline_folder), "--num_inference_steps", "2", "--device", "cpu", "--seeds", "1"]
    evaluate.main([*fixed, "--protocols", "one.json", *flag])
    results = json.loads((tmp_path / "outputs" / "scores" / "results.json").read_text())  # the folder by default
    assert list(results["settings"]["judges"]) == list(loading.DEFAULT_JUDGES)


def test_the_demo_forgets_its_last_scores_which_may_be_of_other_weights(tmp_path):
    makefile = Path(__file__).resolve().parents[1] / "Makefile"
    (tmp_path / "demo" / "scores").mkdir(parents=True)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    for name in ("iclevr-sample", "iclevr-evaluate"):
        (tmp_path / "venv" / "bin" / name).symlink_to("/bin/true")
    (tmp_path / "venv" / ".installed").touch()
    command = ["make", "-f", str(makefile), "demo", f"VENV={tmp_path}/venv", f"DEMO_FOLDER={tmp_path}/demo"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert [*(tmp_path / "demo").iterdir()] == []


@pytest.mark.parametrize("command", [sample, evaluate])
def test_help_says_which_pipeline_is_the_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "conditional-ddpm-tokens-rendered-4-steps" in capsys.readouterr().out


def test_a_pipeline_that_maps_images_draws_no_prompts(tmp_path):
    networks = [CycleGANGenerator(16, block_out_channels=(8, 8), num_residual_blocks=1) for _ in range(2)]
    CycleGANPipeline(*networks).save_pretrained(tmp_path / "cyclegan")
    which = ["--pipeline", str(tmp_path / "cyclegan"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="must draw images of labels, got a CycleGANPipeline that knows none"):
        sample.main([*which, "red cube", "--out", str(tmp_path / "samples")])
