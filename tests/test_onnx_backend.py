import errno
import importlib.util
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close

from iclevr_diffusion import ConditionalDDPMPipeline, MultiLabelUNet2DModel, export_pipeline, load_pipeline
from iclevr_diffusion import onnx_backend as backend
from iclevr_diffusion.onnx_backend import OnnxDDPMPipeline, tabulate_steps
from iclevr_diffusion.pipelines.composition import Condition

NAMES = ["red cube", "blue sphere", "gray cylinder"]
LABELS = [["red cube", "gray cylinder"], ["blue sphere"], ["gray cylinder"]]
SHARED = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 4.0}


def make_pipeline(null_condition: bool = True) -> ConditionalDDPMPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = MultiLabelUNet2DModel(
            num_classes=3,
            sample_size=16,
            patch_size=2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_levels=(1,),
            attention_head_dim=8,
            prediction_type="flow",
            null_condition=null_condition,
        ).eval()
        unet.set_data_statistics(torch.rand(3, 16, 16) - 0.5, 0.3)
        for weight in [unet.class_embedding.weight, *([unet.null_embedding] if null_condition else [])]:
            torch.nn.init.normal_(weight, std=3.0)  # so that labels and guidance make a difference that can be seen
    pipeline = ConditionalDDPMPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=4.0), NAMES, 3, 2.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def needs_runtime() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def graphs(needs_runtime: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that lasts as long as the tests of this file, so that the same network is exported once."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def pipeline() -> ConditionalDDPMPipeline:
    return make_pipeline()


@pytest.fixture
def onnx_pipeline(pipeline: ConditionalDDPMPipeline, graphs: Path) -> OnnxDDPMPipeline:
    made = OnnxDDPMPipeline.from_torch(pipeline, graphs)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: ConditionalDDPMPipeline, labels: object = LABELS, **options: object) -> np.ndarray:
    return pipeline(labels, seeds=[3, 4, 5][: len(labels)], output_type="np", **options).images


# What a scheduler does


def test_the_table_of_two_straight_steps_is_that_of_a_hand_count():
    steps = tabulate_steps(FlowMatchEulerDiscreteScheduler(), 2)
    assert_close(steps.timesteps, torch.tensor([1000.0, 1.0]))  # sigmas 1, 0.001 and, at the end, 0
    assert_close(steps.states, torch.tensor([[1.0, 0.0, 0.0], [1.0, -0.999, 0.0], [1.0, -0.999, -0.001]]))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(clip_sample=False),
        DDIMScheduler(clip_sample=True),
        EulerAncestralDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_that_draws_noise_or_clips_is_refused_and_leaves_the_random_stream_alone(scheduler):
    before = torch.random.get_rng_state()
    with pytest.raises(
        ValueError, match=f"must draw no noise and clip nothing .* got {type(scheduler).__name__} with settings"
    ):
        tabulate_steps(scheduler, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_more_steps_than_a_graph_holds_are_refused():
    with pytest.raises(ValueError, match='at most 100 under ONNX Runtime, got 101; .* backend="torch"'):
        tabulate_steps(FlowMatchEulerDiscreteScheduler(), 101)


# What is drawn


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=4.0),
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero", **SHARED),
        DPMSolverMultistepScheduler(solver_order=2, **SHARED),
        UniPCMultistepScheduler(**SHARED),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}{scheduler.config.get('solver_order', '')}",
)
def test_images_are_those_of_torch_whatever_the_deterministic_scheduler(pipeline, onnx_pipeline, scheduler):
    pipeline.scheduler = onnx_pipeline.scheduler = scheduler
    for num_steps in (1, 4):
        expected = draw(pipeline, num_inference_steps=num_steps)
        np.testing.assert_allclose(draw(onnx_pipeline, num_inference_steps=num_steps), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 5.0, "guidance_interval": (0.3, 0.7)},
        {"micro_batch_size": 2},
        {"micro_batch_size": 1, "num_inference_steps": 2},
        {"labels": [[Condition(["red cube"]), Condition(["blue sphere"], -0.5)], [Condition([1, 2])]]},
    ],
    ids=str,
)
def test_images_are_those_of_torch_whatever_the_call(pipeline, onnx_pipeline, options):
    expected = draw(pipeline, **options)
    assert np.ptp(expected) > 0.1  # not all of one colour
    np.testing.assert_allclose(draw(onnx_pipeline, **options), expected, atol=1e-4)


def test_guidance_labels_and_seeds_make_a_difference_under_onnx_too(onnx_pipeline):
    image = draw(onnx_pipeline, LABELS[:1])
    others = [draw(onnx_pipeline, LABELS[:1], guidance_scale=1.0), draw(onnx_pipeline, LABELS[1:2])]
    others.append(onnx_pipeline(LABELS[:1], seeds=[9], output_type="np").images)
    assert min(np.abs(image - other).max() for other in others) > 1e-2


def test_calls_of_the_network_are_counted_a_row_each(onnx_pipeline):
    draw(onnx_pipeline)
    assert onnx_pipeline.network_calls_per_image == 6  # three steps, each of which asks twice for guidance
    draw(onnx_pipeline, guidance_scale=1.0, num_inference_steps=2)
    assert onnx_pipeline.network_calls_per_image == 2


def test_images_without_a_condition_and_states_on_the_way_are_those_of_torch(pipeline, onnx_pipeline):
    options = {"seeds": [1, 2], "num_states": 3, "output_type": "pt"}
    expected, found = pipeline(None, 2, **options), onnx_pipeline(None, 2, **options)
    assert_close(found.images, expected.images, atol=1e-4, rtol=0)
    assert_close(found.states, expected.states, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_student_without_a_null_row_draws_as_under_torch(graphs):
    student = make_pipeline(null_condition=False)
    expected = draw(student, guidance_scale=1.0)
    np.testing.assert_allclose(
        draw(OnnxDDPMPipeline.from_torch(student, graphs), guidance_scale=1.0), expected, atol=1e-4
    )


# The file


def test_a_second_pipeline_of_the_same_weights_reads_what_the_first_has_written(onnx_pipeline, graphs, monkeypatch):
    expected = draw(onnx_pipeline)
    monkeypatch.setattr(backend, "_write_graph", lambda *_: pytest.fail("it was written again"))
    np.testing.assert_array_equal(draw(OnnxDDPMPipeline.from_torch(make_pipeline(), graphs)), expected)


def test_other_weights_have_another_file(pipeline, graphs, monkeypatch):
    written = []
    monkeypatch.setattr(backend, "_write_graph", lambda unet, path: written.append(path) or path.touch())
    first = backend.graph_file(pipeline.unet, graphs / "others")
    pipeline.unet.data_std.mul_(2)
    assert backend.graph_file(pipeline.unet, graphs / "others") != first and len(written) == 2


def test_a_file_is_written_whole_or_not_at_all(pipeline, needs_runtime, tmp_path, monkeypatch):
    def fail(unet, path):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "_write_graph", fail)
    with pytest.raises(KeyboardInterrupt):
        backend.graph_file(pipeline.unet, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_first_drawing_says_nothing_of_packages_that_are_not_needed(pipeline, needs_runtime, tmp_path, capfd):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            backend.graph_file(pipeline.unet, tmp_path)
        logger.warning("torchvision is not installed. Skipping %s", "torchvision::nms")  # by someone else, later
    finally:
        logger.removeHandler(handler)
    assert [record.args for record in records] == [("torchvision::nms",)]
    out, err = capfd.readouterr()
    assert out == "" and err.count("torchvision") <= 2  # the line above


# What is refused


def test_a_callback_is_refused(onnx_pipeline):
    with pytest.raises(ValueError, match='`callback_on_step_end` must be left out .* backend="torch"'):
        draw(onnx_pipeline, callback_on_step_end=lambda *_: None)


def test_half_precision_is_refused_at_once_and_later(pipeline, onnx_pipeline):
    onnx_pipeline.to(torch.bfloat16)
    with pytest.raises(ValueError, match="must be float32 on the CPU under ONNX Runtime, got torch.bfloat16 on cpu"):
        draw(onnx_pipeline)
    with pytest.raises(ValueError, match="got torch.bfloat16 on cpu; leave `device` and `dtype` out"):
        OnnxDDPMPipeline.from_torch(pipeline)  # which shares its network


def test_missing_packages_are_named_with_the_way_to_get_them(pipeline, monkeypatch):
    monkeypatch.setattr(backend.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"needs onnxscript; .* `pip install onnxscript`"):
        OnnxDDPMPipeline.from_torch(pipeline)


def test_saving_is_left_to_the_pipeline_under_torch(onnx_pipeline, tmp_path):
    with pytest.raises(ValueError, match='opened with backend="torch"'):
        onnx_pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got .*OnnxDDPMPipeline; open the folder it came from"):
        export_pipeline(onnx_pipeline, tmp_path / "exported")


# The way there


def test_a_saved_pipeline_is_opened_with_this_backend(pipeline, graphs, tmp_path, monkeypatch):
    monkeypatch.setenv("ICLEVR_CACHE", str(graphs))
    pipeline.save_pretrained(tmp_path / "saved")
    opened = load_pipeline(tmp_path / "saved", backend="onnx")
    assert type(opened) is OnnxDDPMPipeline and opened.config._name_or_path == str(tmp_path / "saved")
    assert opened.config.default_guidance_scale == 2.0
    np.testing.assert_allclose(draw(opened), draw(pipeline), atol=1e-4)
    assert type(load_pipeline(tmp_path / "saved")) is ConditionalDDPMPipeline


def test_a_cache_that_is_full_is_told_with_the_way_out(pipeline, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backend, "_write_graph", refuse)
    with pytest.raises(PermissionError, match="Cannot write the network's graph into .*No space left.*ICLEVR_CACHE"):
        backend.graph_file(pipeline.unet, tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_unknown_backend_and_a_model_without_steps_are_refused(needs_runtime):
    with pytest.raises(ValueError, match="`backend` must be one of torch, compiled, onnx, got 'abacus'."):
        load_pipeline(backend="abacus")
    with pytest.raises(ValueError, match='must be "torch" for a ConditionalGANPipeline, got "onnx"'):
        load_pipeline("dcgan-evaluator-cured-real", backend="onnx")


# benchmarks/cpu_latency.py


def load_benchmark():
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "cpu_latency.py"
    spec = importlib.util.spec_from_file_location("cpu_latency", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_measures_what_runs_and_says_what_does_not_and_goes_on_after_the_last(
    pipeline, tmp_path, monkeypatch, capsys
):
    benchmark = load_benchmark()
    pipeline.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(benchmark, "reported_call", lambda device: lambda: None)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    command = ["cpu_latency.py", str(tmp_path / "tiny"), "--systems", "torch", "bfloat16", "openvino"]
    command += ["--num_rounds", "2", "--batch_sizes", "1", "2", "--out", str(tmp_path / "latency.json")]

    def run(*num_steps):
        monkeypatch.setattr(sys, "argv", [*command, "--num_steps", *num_steps])
        benchmark.main()
        return benchmark.json.loads((tmp_path / "latency.json").read_text())["runs"]

    (one_step,) = run("1").values()
    assert one_step["pipeline"] == "tiny" and one_step["num_steps"] == 1
    systems = one_step["systems"]
    assert systems["torch"]["difference"] == 0 and systems["torch"]["within_tolerance"]
    assert systems["bfloat16"]["difference"] > 1e-3 and not systems["bfloat16"]["within_tolerance"]
    assert {size: times["number"] for size, times in systems["torch"]["seconds_an_image"].items()} == {"1": 2, "2": 2}
    assert systems["openvino"] == {"missing": "ImportError: openvino is not installed"}
    assert "bfloat16" in capsys.readouterr().out

    monkeypatch.setattr(benchmark, "make_system", lambda *_: pytest.fail("it was measured again"))
    assert list(run("1").values()) == [one_step]


# Other networks

TWO_HEADS = {"block_out_channels": (8, 16), "attention_levels": (1,), "attention_head_dim": 8}


@pytest.mark.parametrize(
    ("changes", "scheduler"),
    [
        ({"prediction_type": "edm"}, EDMDPMSolverMultistepScheduler(sigma_data=1.0)),
        ({"label_encoding": "tokens"} | TWO_HEADS, FlowMatchEulerDiscreteScheduler(shift=4.0)),
        (
            {"prediction_type": "flow", "network_output": "sample", "label_encoding": "tokens"} | TWO_HEADS,
            FlowMatchEulerDiscreteScheduler(shift=4.0),
        ),
    ],
    ids=["preconditioned", "of tokens", "of tokens and images"],
)
def test_networks_of_every_kind_draw_as_under_torch(pipeline, graphs, changes, scheduler):
    torch.manual_seed(0)
    unet = MultiLabelUNet2DModel.from_config({**pipeline.unet.config, **changes}).eval()
    torch.nn.init.normal_(unet.class_embedding.weight, std=3.0)
    pipeline = ConditionalDDPMPipeline(unet, scheduler, NAMES, 3, 2.0)
    expected = draw(pipeline)
    drawn = draw(OnnxDDPMPipeline.from_torch(pipeline, graphs))
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    assert np.abs(draw(pipeline, LABELS[::-1]) - expected).max() > 1e-3  # the labels are seen


def test_a_guide_is_refused_as_a_graph_holds_one_network(pipeline, needs_runtime):
    guided = ConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, NAMES, guide=make_pipeline().unet)
    with pytest.raises(ValueError, match='`backend` must be "torch" for a pipeline with a `guide`, got "onnx"'):
        OnnxDDPMPipeline.from_torch(guided)
    opened = OnnxDDPMPipeline.from_torch(pipeline)
    opened.guide = make_pipeline().unet
    with pytest.raises(ValueError, match='`backend` must be "torch" for a pipeline with a `guide`, got "onnx"'):
        draw(opened)
