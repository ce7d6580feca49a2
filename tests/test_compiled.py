import numpy as np
import pytest
import torch

from iclevr_diffusion import load_pipeline

LABELS = [["red cube", "blue sphere"], ["gray cylinder"]]


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    torch.nn.init.normal_(tiny_pipeline.unet.class_embedding.weight, std=1.0)
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def draw(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(LABELS, seeds=[3, 4], num_inference_steps=2, output_type="np", **options).images


@pytest.mark.slow
def test_a_compiled_pipeline_draws_the_same_images(folder):
    expected = draw(load_pipeline(folder), guidance_scale=3.0)
    pipeline = load_pipeline(folder, backend="compiled")
    torch._dynamo.reset()
    np.testing.assert_allclose(draw(pipeline, guidance_scale=3.0), expected, rtol=0, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # all steps run the same one
    assert np.abs(draw(pipeline, guidance_scale=3.0) - draw(load_pipeline(folder))).max() > 1e-2


def test_every_network_is_compiled_for_each_shape_and_nothing_else_of_the_pipeline_changes(
    folder, tmp_path, monkeypatch
):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append((type(module), how)))
    pipeline = load_pipeline(folder, backend="compiled")
    assert compiled == [(type(pipeline.unet), {"mode": "default", "dynamic": False})]
    assert type(pipeline) is type(load_pipeline(folder)) and len(compiled) == 1
    np.testing.assert_array_equal(draw(pipeline), draw(load_pipeline(folder)))


def test_on_a_gpu_all_operations_start_by_one_graph(folder, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *, mode, dynamic: modes.append(mode))
    monkeypatch.setattr(type(load_pipeline(folder)), "device", torch.device("cuda"))
    load_pipeline(folder, backend="compiled")
    assert modes == ["reduce-overhead"]


def test_a_pipeline_that_calls_its_network_once_is_not_compiled():
    with pytest.raises(ValueError, match='must be "torch" for a ConditionalGANPipeline, .* got "compiled"'):
        load_pipeline("dcgan-evaluator-cured-real", backend="compiled")
