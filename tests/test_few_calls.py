import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from iclevr_diffusion import ICLEVR_LABELS, ConditionalDDPMPipeline, ConditionalGANPipeline, MultiLabelUNet2DModel
from iclevr_diffusion.data import open_store
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.models.dcgan import DCGANGenerator

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = list(ICLEVR_LABELS.names)


def load_benchmark(name):
    """Loads a script as `python benchmarks/<name>.py` does, which finds its neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


few_calls = load_benchmark("few_calls")
Point, Yardstick = few_calls.Point, few_calls.Yardstick


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return SmallLabelClassifier(24, 16, label_names=NAMES, block_out_channels=(8, 8)).eval()


@pytest.fixture
def yardstick(tiny_dataset, tmp_path, judge):
    store = open_store(tiny_dataset, resolution=16, cache_dir=tmp_path)
    return Yardstick(store, store.indices("all"), judge, num_conditions=3, images_a_condition=2)


def solve(scheduler, num_steps, prediction_type, noise, deviation):
    """Samples with the best possible network for images that are normal with this deviation around 0."""
    scheduler.set_timesteps(num_steps)
    sample, calls = noise * getattr(scheduler, "init_noise_sigma", 1.0), 0
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        if prediction_type == "flow":
            sigma = float(t) / 1000
            alpha = 1 - sigma
        else:
            products = scheduler.alphas_cumprod.double().numpy()
            alpha = np.interp(float(t), np.arange(1000), products) ** 0.5
            sigma = (1 - alpha**2) ** 0.5
        x_0, epsilon = (w * x_t / ((alpha * deviation) ** 2 + sigma**2) for w in (alpha * deviation**2, sigma))
        prediction = {"flow": epsilon - x_0, "epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * x_0}
        sample, calls = scheduler.step(prediction[prediction_type].float(), t, sample).prev_sample, calls + 1
    return sample, calls


# What each may be wrong by, relative to the largest value, after 100 looks. Those of second order come closer.
ERRORS = {
    "flow": {"euler": 0.04, "euler-even": 0.04, "heun": 0.002, "dpm-solver++": 0.01, "unipc": 0.005},
    "epsilon": {"euler": 0.02, "dpm-solver++": 0.002, "unipc": 0.001},
    "v_prediction": {"euler": 0.02, "dpm-solver++": 0.002, "unipc": 0.001},
}


@pytest.mark.parametrize(("prediction_type", "sampler"), [(kind, name) for kind in ERRORS for name in ERRORS[kind]])
def test_every_sampler_goes_to_the_image_that_belongs_to_the_noise(prediction_type, sampler):
    # The path that carries N(0, 1) to N(0, d^2) multiplies the noise by d.
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    if prediction_type == "flow":
        own = FlowMatchEulerDiscreteScheduler(shift=4.0)
    else:
        schedule = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}
        own = DDIMScheduler(prediction_type=prediction_type, **schedule)
    pipeline = SimpleNamespace(
        scheduler=own, unet=SimpleNamespace(config=SimpleNamespace(prediction_type=prediction_type))
    )
    errors = {}
    for steps in (10, 100):
        scheduler = few_calls.make_scheduler(pipeline, sampler)
        taken = Point(sampler, steps).num_inference_steps
        sample, calls = solve(scheduler, taken, prediction_type, noise, 0.5)
        assert steps - 1 <= calls <= steps
        errors[steps] = ((sample - 0.5 * noise).abs().max() / (0.5 * noise).abs().max()).item()
    assert errors[100] < ERRORS[prediction_type][sampler]
    assert errors[100] < errors[10] / 4


def test_heun_is_refused_where_its_first_step_would_reach_from_almost_no_signal(tiny_pipeline):
    tiny_pipeline.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    with pytest.raises(ValueError, match="`sampler` must be one of euler, dpm-solver"):
        few_calls.make_scheduler(tiny_pipeline, "heun")


def test_a_point_says_how_many_steps_and_what_it_is():
    assert Point("euler", 20).num_inference_steps == 20
    assert [Point("heun", steps).num_inference_steps for steps in (5, 10, 20)] == [3, 5, 10]
    assert Point(few_calls.SHIPPED).num_inference_steps is None
    assert Point("euler", 20, 3.0, (0.2, 0.8)).name == "euler, 20, guidance 3, from 0.2 to 0.8"
    assert Point(few_calls.REFERENCE, 1000).name == "1000 steps"


@pytest.mark.parametrize(
    ("point", "calls"),
    [
        (Point("euler", 4), 4),
        (Point("euler", 4, 3.0), 8),
        (Point("euler", 4, 3.0, (0.0, 0.5)), 6),
        (Point("heun", 5), 5),
        (Point(few_calls.SHIPPED), 2),
    ],
)
def test_network_calls_are_counted_and_the_pipeline_stays_as_it_was(tiny_pipeline, point, calls):
    own = DDPMScheduler(clip_sample=False)
    pipeline = ConditionalDDPMPipeline(tiny_pipeline.unet, own, NAMES, default_num_inference_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    class_labels = torch.eye(24)[:3]
    images, facts = few_calls.draw(pipeline, point, class_labels, range(3), 2)
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == np.uint8
    assert facts["network_calls_per_image"] == calls
    assert pipeline.scheduler is own
    assert not pipeline.unet._forward_pre_hooks


def test_a_student_is_drawn_as_it_ships_only(tiny_pipeline, yardstick, tmp_path):
    student = ConditionalDDPMPipeline(tiny_pipeline.unet, tiny_pipeline.scheduler, NAMES, 4)

    def points_of(pipeline, steps):
        few = few_calls.FewCalls(pipeline, yardstick, tmp_path, num_reference_conditions=1, batch_size=4)
        return [point.name for point in few.points(["euler", "euler-even"], steps, [None], [(0.0, 1.0)])]

    assert points_of(student, [5])[1:] == [
        "euler, 5",
        "1000 steps",
    ]  # more than it takes by default, which is a choice
    student.register_to_config(student_num_inference_steps=4)
    assert points_of(student, [4, 10]) == ["as it ships"]
    # This teacher predicts epsilon, for which `euler` has the pipeline's own times.
    assert points_of(tiny_pipeline, [5, 10]) == ["as it ships", "euler, 5", "euler, 10", "1000 steps"]
    # A GAN takes no steps.
    gan = ConditionalGANPipeline(DCGANGenerator(24, 16, latent_dim=6, base_channels=4), NAMES)
    assert points_of(gan, [1]) == ["as it ships"]


def test_what_was_drawn_is_not_drawn_again_and_others_are_measured_against_it(
    tiny_pipeline, yardstick, tmp_path, monkeypatch
):
    monkeypatch.setattr(few_calls, "NUM_REFERENCE_STEPS", 6)
    pipeline = ConditionalDDPMPipeline(tiny_pipeline.unet, tiny_pipeline.scheduler, NAMES, 3)
    pipeline.set_progress_bar_config(disable=True)

    def measure():
        few = few_calls.FewCalls(pipeline, yardstick, tmp_path, num_reference_conditions=2, batch_size=4)
        return few.measure(few.points(["euler", "heun"], [3], [None], [(0.0, 1.0)]))

    records, shown = measure()
    own, euler, heun, slow = records
    assert [record["name"] for record in records] == ["as it ships", "euler, 3", "heun, 3", "1000 steps"]
    assert own["top_k_above_shipped"] == {"value": 0.0, "low": None, "high": None}
    assert euler["top_k_above_shipped"]["value"] == pytest.approx(euler["top_k"]["value"] - own["top_k"]["value"])
    assert slow["on_reference"]["root_mean_square_difference"] == 0
    assert slow["on_reference"]["num_images"] == 4
    assert euler["on_reference"]["root_mean_square_difference"] > 0
    assert {len(images) for images in shown.values()} == {3, 2}  # label sets, of which the slow one draws two
    monkeypatch.setattr(few_calls, "draw", None)
    assert measure()[0] == records
    assert "3 calls" in few_calls.describe(heun)


def test_points_that_draw_the_same_are_drawn_once(tiny_pipeline, yardstick, tmp_path):
    scheduler = few_calls.make_scheduler(tiny_pipeline, "unipc")
    pipeline = ConditionalDDPMPipeline(tiny_pipeline.unet, scheduler, NAMES, 2)
    pipeline.set_progress_bar_config(disable=True)
    few = few_calls.FewCalls(pipeline, yardstick, tmp_path, num_reference_conditions=1, batch_size=4)
    drawn = [few.draw(point)[0] for point in (Point(few_calls.SHIPPED), Point("unipc", 2), Point("dpm-solver++", 2))]
    assert np.array_equal(drawn[0], drawn[1])
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_label_sets_are_taken_by_number_of_labels_and_held_against_as_many_real_images(yardstick):
    assert yardstick.class_labels.sum(dim=1).tolist() == [1, 2, 3]
    counts = yardstick.real_numbers.bincount().tolist()
    assert max(counts) <= 2
    assert yardstick.drawn_labels.shape == (6, 24)
    assert yardstick.measure_real()["num_images"] == sum(counts)


def test_images_are_measured_by_what_the_judge_reads_in_them(yardstick, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    logits = 2 * yardstick.drawn_labels - 1
    logits[0] = -logits[0]  # of a single label: not found
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    reading = SimpleNamespace(logits=logits, features=features)
    monkeypatch.setattr(yardstick, "read", lambda pixel_values: reading)
    monkeypatch.setattr(yardstick, "real_reading", SimpleNamespace(features=features))
    measures = yardstick.measure(images)
    assert torch.equal(measures["logits"], logits.view(3, 2, 24))
    assert measures["top_k"]["value"] == pytest.approx(11 / 12)
    assert measures["exact_match"]["value"] == pytest.approx(5 / 6)
    assert measures["by_num_objects"]["1"]["top_k"]["value"] == pytest.approx(1 / 2)
    assert measures["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_a_judge_of_another_size_is_shown_enlarged_images(yardstick):
    small = np.full((2, 3, 8, 8), 200, dtype=np.uint8)
    large = np.full((2, 3, 16, 16), 200, dtype=np.uint8)
    assert_close(yardstick.read(small), yardstick.read(large))


def test_one_image_of_each_label_set_is_refused(tiny_dataset, tmp_path, judge):
    store = open_store(tiny_dataset, resolution=16, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="`images_a_condition` at least 2, got 3 and 1"):
        Yardstick(store, store.indices("all"), judge, num_conditions=3, images_a_condition=1)


@pytest.mark.parametrize(("text", "interval"), [("0:1", (0.0, 1.0)), ("0.2:0.8", (0.2, 0.8))])
def test_an_interval_is_read(text, interval):
    assert few_calls.parse_interval(text) == interval


@pytest.mark.parametrize("text", ["0.5", "0.8:0.2", "a:1", "0:2", "nan:1"])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(few_calls.argparse.ArgumentTypeError, match="must be START:STOP"):
        few_calls.parse_interval(text)


def test_the_label_of_a_tick_close_to_another_joins_that_ones():
    assert few_calls.label_ticks([10, 18, 20, 38, 40]) == ["10", "18", "20", "", "38, 40"]
    assert few_calls.label_ticks([1.5, 2, 3]) == ["1.5", "2", "3"]


def test_the_command_writes_numbers_a_plot_and_a_sheet(tmp_path, judge, monkeypatch):
    monkeypatch.setenv("ICLEVR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(few_calls, "NUM_REFERENCE_STEPS", 6)
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "block_out_channels": (8, 16), "attention_head_dim": 8}
    unet = MultiLabelUNet2DModel(**sizes, null_condition=True, prediction_type="flow")
    ConditionalDDPMPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=4.0), NAMES, 3, 2.0).save_pretrained(
        tmp_path / "model"
    )
    judge.save_pretrained(tmp_path / "judge")
    command = [tmp_path / "model", "--out", tmp_path / "out", "--results", tmp_path / "few.json", "--steps", 3]
    command += ["--judge", tmp_path / "judge", "--resolution", 16, "--num_scenes", 3, "--conditions", 3]
    few_calls.main([*map(str, command), "--reference_conditions", "1", "--device", "cpu"])
    result = json.loads((tmp_path / "few.json").read_text())
    points = {point["name"]: point for point in result["pipelines"]["model"]["points"]}
    assert set(points) == {"as it ships", *(f"{name}, 3" for name in few_calls.SAMPLERS), "1000 steps"}
    assert {points[name]["network_calls_per_image"] for name in points if name != "1000 steps"} == {6}
    assert points["1000 steps"]["network_calls_per_image"] == 12
    # The pipeline's own scheduler is Euler's.
    for name in ("top_k", "kernel_distance", "diversity", "on_reference"):
        assert points["euler, 3"][name] == points["as it ships"][name]
    assert (tmp_path / "few.png").stat().st_size > 10_000
    assert (tmp_path / "few_images.png").is_file()


def test_a_judge_that_taught_a_pipeline_is_refused(monkeypatch, tiny_pipeline):
    monkeypatch.setattr(few_calls, "load_pipeline", lambda *_, **__: tiny_pipeline)
    monkeypatch.setattr(few_calls, "training_facts", lambda _: {"judges": ["judge-small"]})
    with pytest.raises(ValueError, match="`judge` must have no part in the training of x, got judge-small"):
        few_calls.open_named(["x"], "cpu", torch.float32, "judge-small")
