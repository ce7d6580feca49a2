import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from test_baselines import load_module
from test_few_calls import NAMES, load_benchmark

from iclevr_diffusion import ConditionalDDPMPipeline, MultiLabelUNet2DModel
from iclevr_diffusion.checkpoint import save_checkpoint
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier

sweeps = load_benchmark("sweeps")

LIST = """
scenes: {resolution: 32, max_objects: 2, num_train: 2, num_compared: 2}
base: {preset: tiny, block_out_channels: [8, 16], attention_levels: [], attention_head_dim: 8, batch_size: 2}
variants:
  base: {}
  wide, slow: {block_out_channels: [16, 16]}
  guided: {trained_as: base, call: {guidance_scale: 3.0, guidance_interval: [0.0, 0.5]}}
  weak: {block_out_channels: [8, 8], ema_lengths: [0.1], share: 0.2}
  led away: {trained_as: base, guide: weak, call: {guidance_scale: 3.0}}
  longer: {trained_as: weak, average: 0.1}
"""


SCENES = sweeps.Scenes(resolution=32, max_objects=2, num_train=2, num_compared=2)


@pytest.fixture
def variants(tmp_path):
    (tmp_path / "sweeps.yaml").write_text(LIST)
    return sweeps.read_variants(tmp_path / "sweeps.yaml")[1]


@pytest.fixture
def make_sweep(variants, tmp_path, monkeypatch):
    """Makes a sweep of scenes and images as few as can be."""
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sweeps, "_device", lambda: "cpu")
    torch.manual_seed(0)
    judge = SmallLabelClassifier(24, 16, label_names=NAMES, block_out_channels=(8, 8))
    judge.save_pretrained(tmp_path / "judge")
    sweep_class = sweeps.Sweep

    def make(**budget):
        few = {"num_conditions": 2, "images_a_condition": 2}
        return sweep_class(SCENES, variants, tmp_path / "out", judge=str(tmp_path / "judge"), **few, **budget)

    return make


@pytest.fixture
def trained(monkeypatch):
    """Trains nothing, and lists what was to be trained: name of the folder, seed and number of steps."""
    calls = []

    def train(self, folder, recipe, seed, num_steps):
        calls.append((folder.name, seed, num_steps))
        sizes = {"sample_size": 32, "patch_size": 4, "block_out_channels": (8, 16), "attention_head_dim": 8}
        unet = MultiLabelUNet2DModel(**sizes, null_condition=True, prediction_type="flow")
        pipeline = ConditionalDDPMPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=4.0), NAMES, 2)
        unet.set_data_statistics(torch.tensor(0.0), 1.0)
        pipeline.save_pretrained(folder / "pipeline")
        torch.nn.init.normal_(unet.class_embedding.bias)
        pipeline.save_pretrained(folder / "pipeline-0.1")
        (folder / "metrics.jsonl").write_text('{"step": 30, "images_per_second": 10.0}\n')
        (folder / "environment.json").write_text('[{"mixed_precision": "bf16"}, {"mixed_precision": "no"}]')
        save_checkpoint(folder / "checkpoints", num_steps, {}, {"seconds": 60.04})

    monkeypatch.setattr(sweeps.Sweep, "_train", train)
    return calls


def test_a_list_of_variants_is_read(variants):
    assert list(variants) == ["base", "wide, slow", "guided", "weak", "led away", "longer"]
    assert variants["wide, slow"].recipe == variants["base"].recipe | {"block_out_channels": [16, 16]}
    assert variants["guided"].recipe == variants["base"].recipe
    trained_as = ["base", "wide, slow", "base", "weak", "base", "weak"]
    assert [variant.trained_as for variant in variants.values()] == trained_as
    assert [variant.share for variant in variants.values()] == [1, 1, 1, 0.2, 1, 0.2]
    assert variants["led away"].drawing == {"guidance_scale": 3.0, "guide": "weak"}
    assert variants["longer"].drawing == {"average": 0.1}


@pytest.mark.parametrize("name", ["sweeps", "sweeps_64"])
def test_the_lists_that_come_along_name_trainings_that_the_script_takes(name):
    train_ddpm = load_module(sweeps.REPOSITORY / "train_scripts" / "train_ddpm.py")
    scenes, variants = sweeps.read_variants(sweeps.REPOSITORY / "benchmarks" / f"{name}.yaml")
    for variant in variants.values():
        config = train_ddpm.DDPMConfig(**variant.recipe, resolution=scenes.resolution)
        with torch.device("meta"):
            sweeps.make_denoiser(config, 24, 3, null_condition=True, empty_condition=False)


def test_a_wider_network_of_more_cells_costs_more_and_another_way_of_drawing_nothing():
    _, variants = sweeps.read_variants(sweeps.REPOSITORY / "benchmarks" / "sweeps.yaml")
    names = ("width 16", "base", "patch 1", "guidance 5")
    costs = {name: sweeps.count_flop(variants[name].recipe, 32) for name in names}
    assert sweeps.count_flop(variants["base"].recipe, 64) > 4 * costs["base"]
    assert costs["width 16"] < costs["base"] < costs["patch 1"]
    assert costs["guidance 5"] == costs["base"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: {}", "must hold `scenes`, `base` and `variants`"),
        ("{scenes: {}, base: {}, variants: {}, solver: Euler}", "may hold `scheduler`"),
        (
            "{base: {}, variants: {}, scheduler: DPMSolver}",
            "`scheduler` must name a scheduler class of .* 'DPMSolver'",
        ),
        ("{base: {}, variants: {}, scheduler: 5}", "`scheduler` must name a scheduler class of diffusers .* got 5"),
        (
            "{scenes: {resolution: 0, max_objects: 2, num_train: 2, num_compared: 2}, base: {}, variants: {}}",
            "`scenes` must hold positive whole numbers",
        ),
        ("{scenes: {}, base: {}, variants: {}}", "`scenes` must hold resolution, max_objects, .* got {}"),
        ("{base: {}, variants: {a: {trained_as: b, call: {}}}}", "'a' must have `trained_as`, which names a variant"),
        ("{base: {}, variants: {a: , b: {trained_as: a, seed: 1}}}", "'b' must have `trained_as`"),
        ("{base: {}, variants: {a: , b: {trained_as: a, guide: c}}}", "'b' must have `trained_as`"),
        ("{base: {}, variants: {a: , b: {trained_as: a}}}", "'b' must have `trained_as`"),
        ("{base: {}, variants: {a: , b: {trained_as: a, average: 0.1}}}", "`average` of 'b' must be one of"),
        ("{base: {}, variants: {'a, b': , a b: }}", "must differ in letters and digits"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, text, message):
    scenes = "{scenes: {resolution: 32, max_objects: 2, num_train: 2, num_compared: 2}, base"
    (tmp_path / "sweeps.yaml").write_text(text.replace("{base", scenes))
    with pytest.raises(ValueError, match=message):
        sweeps.read_variants(tmp_path / "sweeps.yaml")


def test_attention_counts_by_hand(variants):
    recipe = variants["base"].recipe
    # Three more attention layers in the finest level, of 8 channels and 64 tokens: four matrices of 8x8 for each
    # token, and two products of all pairs of tokens; two operations each, once there and twice back, of two images.
    more = 3 * (4 * 64 * 8 * 8 + 2 * 64 * 64 * 8) * 2 * 3 * 2
    once = sweeps.count_flop(recipe, 32)
    assert sweeps.count_flop(recipe | {"attention_levels": [0]}, 32) - once == more
    assert sweeps.count_flop(recipe | {"gradient_accumulation_steps": 3}, 32) == 3 * once


def test_a_row_is_trained_and_measured_once_and_shared_by_other_ways_of_drawing(make_sweep, variants, trained):
    flop = sweeps.count_flop(variants["base"].recipe, 32)
    sweep = make_sweep(tflop=5 * flop / 1e12)
    assert sweep.record("base", 0, run=False) is None
    record = sweep.record("base", 0)
    assert set(record) == {*sweeps.METRICS, "num_steps", "tflop", "seconds", "mixed_precision"}
    assert record["num_steps"] == 5
    assert record["tflop"] == pytest.approx(5 * flop / 1e12)
    assert record["seconds"] == 60.0  # those of the run, also of one that was resumed
    assert record["mixed_precision"] == "no"  # that of the last launch
    assert make_sweep(tflop=5 * flop / 1e12).record("base", 0, run=False) == record
    guided = sweep.record("guided", 0)
    assert guided["kernel_distance"] != record["kernel_distance"]
    assert [(seed, steps) for _, seed, steps in trained] == [(0, 5)]
    assert sweep.strip("guided", 0).size == (2 * 32, 32)  # two label sets
    sweep.record("base", 1)
    assert [(seed, steps) for _, seed, steps in trained] == [(0, 5), (1, 5)]
    # Another budget is another training.
    make_sweep(tflop=10 * flop / 1e12).record("base", 0)
    assert trained[-1][1:] == (0, 10)


def test_a_guide_and_an_average_change_the_drawing_and_a_guides_training_is_paid_for(make_sweep, variants, trained):
    flop = sweeps.count_flop(variants["base"].recipe, 32)
    sweep = make_sweep(tflop=20 * flop / 1e12)
    base = sweep.record("base", 0)
    record = sweep.record("led away", 0)
    weak_steps = round(0.2 * 20 * flop / sweeps.count_flop(variants["weak"].recipe, 32))
    assert [steps for _, _, steps in trained] == [20, weak_steps]
    weak = sweep.record("weak", 0)
    assert record["tflop"] == pytest.approx(base["tflop"] + weak["tflop"]) and record["seconds"] == 120.0
    assert record["kernel_distance"] != base["kernel_distance"]
    assert sweep.record("longer", 0)["kernel_distance"] != weak["kernel_distance"]
    assert len(trained) == 2


def test_one_scheduler_can_draw_the_images_of_all_variants(make_sweep, tmp_path, monkeypatch, trained):
    (tmp_path / "solved.yaml").write_text("scheduler: DPMSolverMultistepScheduler" + LIST)
    _, variants = sweeps.read_variants(tmp_path / "solved.yaml")
    assert variants["guided"].drawing["scheduler"] == "DPMSolverMultistepScheduler"
    sweep = make_sweep(minutes=1.0, tflop=None)
    by_its_own = sweep.record("base", 0)
    monkeypatch.setattr(sweep, "variants", variants)
    drawn_by = []
    monkeypatch.setattr(
        ConditionalDDPMPipeline, "__call__", lambda self, *args, **call: drawn_by.append(self.scheduler)
    )
    with pytest.raises(AttributeError):  # nothing is drawn
        sweep.record("base", 0)
    assert type(drawn_by[0]) is DPMSolverMultistepScheduler and drawn_by[0].config.flow_shift == 4.0
    monkeypatch.undo()
    assert sweep.record("base", 0, run=False) == by_its_own  # which has a record of its own
    assert len(trained) == 2  # a trial and a training, shared


def test_minutes_are_turned_into_steps_by_a_trial(make_sweep, trained):
    sweep = make_sweep(tflop=None, minutes=0.5)
    assert sweep.record("base", 0)["num_steps"] == 150  # 30 seconds of 10 images a second in batches of two
    sweep.record("base", 1)
    assert [steps for _, _, steps in trained] == [sweeps.TRIAL_STEPS, 150, 150]


def record(top_k, kernel, seconds=60.0, mixed_precision="bf16"):
    measures = {"top_k": top_k, "exact_match": 0.5, "kernel_distance": kernel, "frechet_distance": 2 * kernel}
    return measures | {
        "diversity": None,
        "num_steps": 10,
        "tflop": 1.5,
        "seconds": seconds,
        "mixed_precision": mixed_precision,
    }


def test_variants_are_ranked_by_means_over_seeds():
    records = {
        "base": {0: record(0.5, 2.0), 1: record(0.7, 4.0)},
        "better": {0: record(0.6, 2.5), 1: record(0.8, 4.5, seconds=120.0)},
        "half": {1: record(0.9, 1.0, mixed_precision="no")},
        "none": {},
    }
    better, base, half = sweeps.summarize(records)
    assert [row["variant"] for row in (better, base, half)] == ["better", "base", "half"]
    assert better["ranks"] == {"top_k": 1, "kernel_distance": 2, "frechet_distance": 2}
    assert half["ranks"] == {}  # of fewer seeds
    top_k = better["measures"]["top_k"]
    assert top_k["mean"] == pytest.approx(0.7)
    assert top_k["deviation"] == pytest.approx(0.02**0.5)
    assert top_k["above_base"] == pytest.approx(0.1)
    assert top_k["better_than_base"] == 2
    assert better["measures"]["kernel_distance"]["better_than_base"] == 0
    assert half["measures"]["top_k"]["above_base"] == pytest.approx(0.2)
    assert "above_base" not in base["measures"]["top_k"]
    assert better["measures"]["diversity"]["mean"] is None
    assert better["seconds"] == 90

    table = sweeps.render_table([better, half], ["none (seed 0)"], "Summary.")
    assert (
        "| better | 2 | 0.700 ± 0.141 | 0.500 ± 0.000 | 3.500 ± 1.414 | 7.000 ± 2.828 | - | 1, 2, 2 | +0.100 | 2 |"
        in table
    )
    assert "| half | 1 | 0.900 | 0.500 | 1.000 | 2.000 | - | -, -, - | +0.200 | 1 | 10 | 1.50 | 1.0 |" in table
    assert table.endswith("Trained in float32, the others in bf16: half (seed 1).\n\nNot run yet: none (seed 0).\n")
    base["mixed_precision"][0] = None  # of a record from before it was written down
    assert "Trained in an unknown precision, the others in bf16: base (seed 0)." in sweeps.render_table([base], [], "")
    assert "Trained in" not in sweeps.render_table([better], [], "Summary.")  # all alike


def test_the_command_writes_a_table_and_lists_what_is_missing(make_sweep, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sweeps, "Sweep", lambda scenes, variants, out, *, judge, tflop, minutes: make_sweep(tflop=tflop)
    )
    monkeypatch.setattr(sweeps.signal, "signal", lambda *_: None)
    results = tmp_path / "results.json"
    arguments = ["--variants", tmp_path / "sweeps.yaml", "--only", "base", "guided", "--seeds", 0, "--tflop", 0.001]
    sweeps.main([*map(str, arguments), "--results", str(results)])
    result = json.loads(results.read_text())
    assert {row["variant"] for row in result["rows"]} == {"base", "guided"}
    assert result["missing"] == [f"{name} (seed 0)" for name in ("wide, slow", "weak", "led away", "longer")]
    assert "Not run yet: wide, slow (seed 0), " in results.with_suffix(".md").read_text()
    assert results.with_suffix(".png").is_file()
    with pytest.raises(SystemExit, match="`only` must name variants of"):
        sweeps.main([*map(str, arguments[:2]), "--only", "no"])


@pytest.mark.slow
def test_a_row_is_trained_by_the_script(make_sweep, variants):
    sweep = make_sweep(tflop=2 * sweeps.count_flop(variants["base"].recipe, 32) / 1e12)
    assert sweep.record("base", 0)["num_steps"] == 2


def test_a_training_that_fails_says_where_it_is_told(make_sweep, monkeypatch):
    sweep = make_sweep(tflop=0.001)
    monkeypatch.setattr(sweeps, "sys", type("sys", (), {"executable": "false"}))
    with pytest.raises(ValueError, match=r"a training ended with status 1; see .*log\.txt"):
        sweep.record("base", 0)
