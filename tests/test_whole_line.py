"""The way of a set of one's own images through all commands, on pairs of handwritten digits that a package ships."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from iclevr_diffusion import export_pipeline, load_pipeline
from iclevr_diffusion.compare import main as compare
from iclevr_diffusion.digit_pairs import main as digit_pairs
from iclevr_diffusion.evaluate import main as evaluate
from iclevr_diffusion.inspect_data import main as inspect
from iclevr_diffusion.judging import load_judge
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.sample import main as sample

SCRIPTS = Path(__file__).resolve().parents[1] / "train_scripts"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path_factory.getbasetemp() / "stores"))
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)


def train(script, **fields):
    """Runs a train script in this process and returns the run's folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    module = load_script(script)
    config_class = next(
        item for name, item in vars(module).items() if name.endswith("Config") and item.__module__ == script
    )
    module.main(
        config_class(**{name: str(value) if isinstance(value, Path) else value for name, value in fields.items()})
    )
    return Path(fields["output_dir"])


def test_pairs_of_digits_go_from_a_folder_to_a_published_model(tmp_path, capsys):
    pairs, scores = tmp_path / "pairs", tmp_path / "scores"
    digit_pairs(["--out", str(pairs), "--num_images", "600"])
    inspect([str(pairs), "--resolution", "16", "--out", str(tmp_path / "inspection")])
    assert "tens 3" in (tmp_path / "inspection" / "inspection.json").read_text()

    judge = train(
        "train_classifier",
        data=(str(pairs),),
        output_dir=tmp_path / "judge",
        resolution=16,
        max_steps=60,
        batch_size=32,
        warmup_steps=5,
    )
    (held_out,) = json.loads((judge / "results.json").read_text())["held_out"].values()
    assert held_out["top_k"] > 0.3  # a guess finds a tenth

    options = {"block_out_channels": (16, 32), "attention_levels": (), "attention_head_dim": 8, "patch_size": 2}
    run = train(
        "train_ddpm",
        data=pairs,
        output_dir=tmp_path / "model",
        hold_out="combinations",
        resolution=16,
        max_steps=30,
        batch_size=32,
        num_inference_steps=4,
        sample_every=0,
        score_every=0,
        **options,
    )
    combinations = json.loads((run / "combinations.json").read_text())
    seen = json.loads((run / "conditions.json").read_text())
    assert combinations and not {tuple(labels) for labels in combinations} & {tuple(labels) for labels in seen}

    published = export_pipeline(load_pipeline(run / "pipeline"), tmp_path / "published", training=run)
    sample(["tens 3, units 7", "--pipeline", str(published), "--out", str(tmp_path / "images")])
    with Image.open(next((tmp_path / "images").glob("0000*.png"))) as image:
        assert image.mode == "L" and image.size == (16, 16)

    evaluate(
        [
            "--pipeline",
            str(published),
            "--judges",
            str(judge / "judge"),
            "--data",
            str(pairs),
            "--out",
            str(scores),
            "--protocols",
            "seen",
            "matched",
            str(run / "combinations.json"),
            "--seeds",
            "10",
        ]
    )
    results = json.loads((scores / "results.json").read_text())
    assert set(results["protocols"]) == {"seen", "matched", "combinations"}
    assert results["protocols"]["combinations"]["judges"]["judge"]["by_seen"].keys() == {"unseen"}
    assert results["protocols"]["seen"]["num_conditions"] == len(seen)
    compare([str(scores), "--out", str(tmp_path / "comparison")])
    assert "published" in (tmp_path / "comparison" / "leaderboard.md").read_text()


def write_images(folder, mode, size=48, number=60):
    """Writes bright or dark squares with one or two labels each, in a mode of Pillow."""
    folder.mkdir()
    names, lines = ["bright", "dark", "top"], []
    generator = np.random.default_rng(0)
    for i in range(number):
        labels = [names[i % 2]] + (["top"] if i % 3 == 0 else [])
        values = generator.integers(0, 60, (size, size, len(Image.new(mode, (1, 1)).getbands())))
        values[: size // 2 if "top" in labels else size] += 190 if "bright" in labels else 40
        Image.fromarray(values.astype(np.uint8).squeeze(), mode).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "labels": labels}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("mode", "size", "script"),
    [("L", 32, "train_gan"), ("RGBA", 32, "train_ddpm"), ("RGBA", 48, "train_vae"), ("RGB", 128, "train_ddpm")],
)
def test_images_of_any_channels_and_size_are_trained_on_judged_and_drawn(tmp_path, mode, size, script):
    images = write_images(tmp_path / "images", mode)
    common = {"resolution": size, "max_steps": 2, "batch_size": 8}
    judge = train("train_classifier", data=(str(images),), output_dir=tmp_path / "judge", **common) / "judge"
    assert load_judge(judge).config.in_channels == len(mode)
    own = {
        "train_gan": {"base_channels": 8, "discriminator_channels": 8, "diff_augment": ("color", "cutout")},
        "train_ddpm": {"block_out_channels": (8, 16), "attention_levels": (), "attention_head_dim": 8},
        "train_vae": {"hidden_widths": (8, 8)},
    }[script]
    watch = {"sample_every": 2, "score_every": 2} | ({} if script == "train_vae" else {"judge": judge})
    if script == "train_ddpm":
        own["num_inference_steps"] = 2
    run = train(script, data=images, output_dir=tmp_path / "run", **common, **own, **watch)
    assert list((run / "samples").glob("*.png"))

    published = export_pipeline(load_pipeline(run / "pipeline"), tmp_path / "published", training=run)
    assert {1: "grey", 3: "RGB", 4: "RGBA"}[len(mode)] in (published / "README.md").read_text()
    sample(["bright, top", "--pipeline", str(published), "--out", str(tmp_path / "drawn")])
    with Image.open(next((tmp_path / "drawn").glob("0000*.png"))) as image:
        assert image.mode == mode and image.size == (size, size)
    # Under another name than the one that watched the training.
    shutil.copytree(judge, tmp_path / "stranger")
    arguments = ["--pipeline", str(published), "--judges", str(tmp_path / "stranger"), "--data", str(images)]
    evaluate([*arguments, "--out", str(tmp_path / "scores"), "--seeds", "1", "--micro_batch_size", "4"])
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert set(results["protocols"]) == {"seen", "matched"}
    with Image.open(tmp_path / "scores" / "seen_grid.png") as grid:
        assert grid.mode == "RGB"


def test_a_judge_of_other_channels_is_refused(tmp_path):
    images = write_images(tmp_path / "images", "L")
    common = {"data": images, "resolution": 16, "max_steps": 1, "batch_size": 4}
    run = train("train_vae", output_dir=tmp_path / "run", hidden_widths=(8,), **common)
    SmallLabelClassifier(3, 16, label_names=["bright", "dark", "top"]).save_pretrained(tmp_path / "judge")
    arguments = ["--pipeline", str(run / "pipeline"), "--judges", str(tmp_path / "judge")]
    with pytest.raises(SystemExit, match="must judge images of 1 channels like the pipeline's, but takes 3"):
        evaluate([*arguments, "--out", str(tmp_path / "scores")])


def test_a_judge_mirrors_where_the_labels_are_those_of_i_clevr_or_it_is_told_to(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", "L")
    module, mirrored = load_script("train_classifier"), []
    monkeypatch.setattr(module, "augment", lambda images, flip: mirrored.append(flip) or images)
    for flip in (None, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        fields = {"resolution": 16, "max_steps": 1, "batch_size": 4, "flip": flip}
        module.main(module.ClassifierConfig(data=(str(images),), output_dir=str(tmp_path / str(flip)), **fields))
    assert mirrored == [False, True]


def test_a_judge_reads_its_images_in_threads_and_shows_rare_labels_more_often(tmp_path):
    images = write_images(tmp_path / "images", "L")
    fields = {"data": (str(images),), "resolution": 16, "max_steps": 2, "batch_size": 8}

    def weights(name, **more):
        judge = load_judge(train("train_classifier", output_dir=tmp_path / name, **fields, **more) / "judge")
        return judge.classifier.weight

    resident = weights("resident")
    assert torch.equal(weights("read", resident=False, num_workers=2), resident)
    repeated = weights("repeated", repeat_threshold=0.9)
    assert not torch.equal(repeated, resident)
    assert torch.equal(weights("repeated and read", repeat_threshold=0.9, resident=False, num_workers=0), repeated)
    with pytest.raises(ValueError, match=r"`repeat_threshold` must lie in \(0, 1\]"):
        train("train_classifier", output_dir=tmp_path / "wrong", repeat_threshold=2.0, **fields)


@pytest.mark.parametrize(
    ("script", "size", "message"),
    [
        ("train_ddpm", 100, r"`resolution` must be a multiple of .* = 16, got 100; resize the images to 96 or 112"),
        ("train_gan", 48, r"`resolution` must be a power of two of at least 16, got 48; .* 32x32 or 64x64"),
        ("train_vae", 40, r"`resolution` must be a multiple of .* = 16, got 40; resize the images to 32 or 48"),
    ],
)
def test_a_size_that_a_network_cannot_have_is_refused_before_anything_is_read(tmp_path, script, size, message):
    with pytest.raises(ValueError, match=message):
        train(script, data=tmp_path / "nothing", output_dir=tmp_path / "run", resolution=size)
    assert not list(tmp_path.iterdir())


def test_i_clevrs_sets_cannot_be_held_out_of_other_labels(tmp_path):
    images = write_images(tmp_path / "images", "RGB")
    expected = r"`hold_out` must be combinations .*, got 'held-out', which does not fit the 3 labels of `data` \(bright, dark, top\); take combinations"
    with pytest.raises(ValueError, match=expected) as fault:
        train("train_ddpm", data=images, output_dir=tmp_path / "run", resolution=16, hold_out="held-out")
    assert "seen" not in str(fault.value)


def test_a_judge_tells_its_scores_in_a_short_line_and_logs_all_of_them(tmp_path, capsys):
    fields = {"resolution": 16, "max_steps": 7, "batch_size": 8}
    images = write_images(tmp_path / "images", "L")
    run = train("train_classifier", data=(str(images),), output_dir=tmp_path / "judge", **fields)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "validation images" in line]
    assert "exact_match 0." in line and len(line) < 160 and "{" not in line
    logged = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(
        {"validation_exact_match", "validation_recall", "validation_exact_match_1"} <= set(row) for row in logged
    )


def test_one_label_is_added_to_a_trained_model(tmp_path, capsys):
    images = write_images(tmp_path / "images", "RGB")
    common = {"resolution": 16, "max_steps": 1, "batch_size": 4, "block_out_channels": (8, 16)}
    common |= {"attention_levels": (), "attention_head_dim": 8, "sample_every": 0}
    first = train("train_ddpm", data=images, output_dir=tmp_path / "first", **common)
    lines = (images / "metadata.jsonl").read_text().splitlines()
    lines = [line.replace('"bright"', '"bright", "big"') if i % 5 == 0 else line for i, line in enumerate(lines)]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    second = train(
        "train_ddpm",
        data=images,
        output_dir=tmp_path / "second",
        init_from=first / "pipeline",
        learning_rate=1e-12,
        **common,
    )
    assert "3 (bright, dark, top) labels kept, 1 (big) new, 0 dropped" in capsys.readouterr().err
    before, after = (load_pipeline(run / "pipeline") for run in (first, second))
    assert list(after.vocabulary) == ["big", "bright", "dark", "top"]
    weights = before.unet.class_embedding.weight
    expected = torch.cat([weights.mean(1, keepdim=True), weights], dim=1)
    torch.testing.assert_close(after.unet.class_embedding.weight, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("script", "component", "options"),
    [
        ("train_gan", "generator", {"base_channels": 8, "standardize": True, "sample_every": 0}),
        ("train_vae", "vae", {"hidden_widths": (8,), "sample_every": 0}),
        ("train_classifier", None, {}),
    ],
)
def test_every_family_goes_on_from_weights_of_other_labels(tmp_path, capsys, script, component, options):
    images = write_images(tmp_path / "images", "L")
    options = options | {"resolution": 16, "max_steps": 1, "batch_size": 4}
    options["data"] = (str(images),) if script == "train_classifier" else images
    first = train(script, output_dir=tmp_path / "first", **options)
    table = images / "metadata.jsonl"
    table.write_text(table.read_text().replace('"dark"', '"gloomy"'))
    source = first / ("pipeline" if component else "judge")
    options |= {"init_from": str(source), "learning_rate": 1e-12}
    second = train(script, output_dir=tmp_path / "second", **options)
    assert "2 (bright, top) labels kept, 1 (gloomy) new, 1 (dark) dropped" in capsys.readouterr().err
    if component is None:
        before, after = (load_judge(run / "judge").stem[0].weight for run in (first, second))
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
        return
    before, after = (getattr(load_pipeline(run / "pipeline"), component) for run in (first, second))
    names = [name for name, _ in before.named_parameters() if "label" not in name]
    for name in names[-2:]:
        torch.testing.assert_close(after.state_dict()[name], before.state_dict()[name], atol=1e-6, rtol=0)
