import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from torch.testing import assert_close

from iclevr_diffusion import ICLEVR_LABELS, export_pipeline, load_pipeline
from iclevr_diffusion.card import render_card
from iclevr_diffusion.models.cgan import CGANGenerator
from iclevr_diffusion.models.dcgan import DCGANGenerator
from iclevr_diffusion.pipelines import pipeline_conditional_gan, pipeline_conditional_vae
from iclevr_diffusion.pipelines.pipeline_conditional_gan import ConditionalGANPipeline

LABELS = [["red cube"], ["blue sphere", "gray cylinder"], ["red cube"], ["green cube"]]
SEEDS = [3, 1, 4, 1]


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    generator = DCGANGenerator(24, 16, latent_dim=6, base_channels=4)
    for _ in range(3):  # so that BatchNorm has statistics of its own
        generator(torch.randn(8, 6), torch.eye(24)[:8])
    return ConditionalGANPipeline(generator, list(ICLEVR_LABELS.names))


@pytest.fixture
def unlabelled():
    torch.manual_seed(0)
    return ConditionalGANPipeline(CGANGenerator(0, 16, latent_dim=6, base_channels=4, hidden_dim=8).eval())


def draw(pipeline, labels=LABELS, seeds=SEEDS, **arguments):
    return pipeline(labels, seeds=seeds, output_type="pt", **arguments).images


def test_an_image_depends_on_its_labels_and_seed_and_not_on_its_neighbours(pipeline):
    images = draw(pipeline, micro_batch_size=2)
    assert images.shape == (4, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    alone = draw(pipeline, LABELS[1:2], SEEDS[1:2], micro_batch_size=2)
    assert alone[0].equal(images[1])
    assert not images[0].equal(images[2])  # the same labels, another seed
    assert not draw(pipeline, [["yellow cube"]], SEEDS[:1], micro_batch_size=2)[0].equal(images[0])
    assert_close(draw(pipeline, micro_batch_size=3), images, atol=1e-5, rtol=0)


def test_the_image_is_the_generators_in_evaluation_mode(pipeline):
    latents = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    pipeline.generator.eval()
    with torch.no_grad():
        expected = pipeline.generator(latents, ICLEVR_LABELS.encode(LABELS)) / 2 + 0.5
    pipeline.generator.train()
    assert_close(draw(pipeline), expected.clamp(0, 1), atol=1e-5, rtol=0)
    assert_close(draw(pipeline, seeds=None, latents=latents), expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_a_generator_without_labels_is_told_how_many_images(unlabelled):
    output = unlabelled(num_images=2, seeds=[5, 6], output_type="np")
    assert unlabelled.vocabulary is None and output.images.shape == (2, 16, 16, 3) and output.seeds == [5, 6]
    assert (unlabelled(num_images=1, seeds=6, output_type="np").images[0] == output.images[1]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [["red cub"]]}, "'red cube'"),
        ({}, "`class_labels` must be given, and no `num_images`"),
        ({"class_labels": LABELS, "num_images": 4}, "`class_labels` must be given, and no `num_images`"),
        ({"class_labels": LABELS, "seeds": [1]}, "`seeds` must hold 4 integers"),
        ({"class_labels": LABELS, "output_type": "jpg"}, "`output_type` must be"),
        ({"class_labels": LABELS, "micro_batch_size": 0}, "`micro_batch_size` must be a whole number"),
        ({"class_labels": LABELS, "latents": torch.zeros(4, 5)}, r"`latents` must have shape \(4, 6\)"),
        ({"class_labels": LABELS, "latents": torch.zeros(4, 6), "seeds": SEEDS}, "`latents` must be given without"),
    ],
)
def test_a_bad_argument_is_refused_by_name(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_labels_and_generator_must_fit(unlabelled, pipeline):
    with pytest.raises(ValueError, match="`num_images` must be given, and no `class_labels`"):
        unlabelled([["red cube"]])
    with pytest.raises(ValueError, match="must be left out for a network without labels"):
        ConditionalGANPipeline(unlabelled.generator, ["red cube"])
    with pytest.raises(ValueError, match="must name the network's 24 labels, got 2"):
        ConditionalGANPipeline(pipeline.generator, ["a", "b"])


@pytest.mark.parametrize("module", [pipeline_conditional_gan, pipeline_conditional_vae])
def test_a_published_pipeline_names_itself_all_the_files_that_it_needs(module):
    source = Path(module.__file__)
    siblings = get_relative_imports(source)
    assert "latent_pipeline" in siblings
    for sibling in siblings:  # from a hub, diffusers fetches no file for the sake of another than the pipeline's
        assert set(get_relative_imports(source.with_name(f"{sibling}.py"))) <= set(siblings)


@pytest.mark.parametrize("kind", ["pipeline", "unlabelled"])
def test_a_published_gan_draws_the_same_image_for_us_and_for_strangers(kind, request, tmp_path):
    pipeline = request.getfixturevalue(kind)
    arguments = {"class_labels": LABELS} if kind == "pipeline" else {"num_images": 4}
    folder = export_pipeline(pipeline, tmp_path / "published", dtype=torch.float32)
    expected = pipeline(**arguments, seeds=SEEDS, output_type="np").images
    reopened = load_pipeline(folder)
    assert type(reopened) is ConditionalGANPipeline
    np.testing.assert_array_equal(reopened(**arguments, seeds=SEEDS, output_type="np").images, expected)
    assert render_card(folder, None) == (folder / "README.md").read_text()

    stranger = f"""
import numpy, sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
images = pipe(**{arguments!r}, seeds={SEEDS}, output_type="np").images
numpy.save({str(tmp_path / "images.npy")!r}, images)
assert not any(name.startswith("iclevr_diffusion") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", stranger], check=True, cwd=tmp_path, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), expected)


@pytest.mark.parametrize("kind", ["pipeline", "unlabelled"])
def test_a_saved_gan_is_opened_again(kind, request, tmp_path):
    pipeline = request.getfixturevalue(kind)
    pipeline.save_pretrained(tmp_path / "saved")
    arguments = {"class_labels": LABELS} if kind == "pipeline" else {"num_images": 4}
    expected = pipeline(**arguments, seeds=SEEDS, output_type="np").images
    np.testing.assert_array_equal(
        load_pipeline(tmp_path / "saved")(**arguments, seeds=SEEDS, output_type="np").images, expected
    )
