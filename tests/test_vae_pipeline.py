import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from iclevr_diffusion import ICLEVR_LABELS, export_pipeline, load_pipeline
from iclevr_diffusion.models.vae_multilabel import MultiLabelVAE
from iclevr_diffusion.pipelines.pipeline_conditional_vae import ConditionalVAEPipeline

LABELS = [["red cube"], ["blue sphere", "gray cylinder"], ["red cube"], ["green cube"]]
SEEDS = [3, 1, 4, 1]


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    vae = MultiLabelVAE(6, 24, 16, hidden_widths=(4, 8))
    for _ in range(3):  # so that BatchNorm has statistics of its own
        vae(torch.rand(8, 3, 16, 16), torch.eye(24)[:8])
    return ConditionalVAEPipeline(vae, list(ICLEVR_LABELS.names))


@pytest.fixture
def unlabelled():
    torch.manual_seed(0)
    return ConditionalVAEPipeline(MultiLabelVAE(6, 0, 12, in_channels=1, architecture="mlp", hidden_widths=(16,)))


def draw(pipeline, labels=LABELS, seeds=SEEDS, **arguments):
    return pipeline(labels, seeds=seeds, output_type="pt", **arguments).images


def test_an_image_depends_on_its_labels_and_seed_and_not_on_its_neighbours(pipeline):
    images = draw(pipeline, micro_batch_size=2)
    assert images.shape == (4, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    assert draw(pipeline, micro_batch_size=2).equal(images)
    assert_close(draw(pipeline, LABELS[1:2], SEEDS[1:2])[0], images[1], atol=1e-5, rtol=0)
    assert_close(draw(pipeline, micro_batch_size=3), images, atol=1e-5, rtol=0)
    another_seed, other_labels = images[2], draw(pipeline, [["yellow cube"]], SEEDS[:1])[0]
    assert (images[0] - another_seed).abs().max() > 1e-3
    assert (images[0] - other_labels).abs().max() > 1e-3


def test_the_image_is_what_the_decoder_makes_of_the_latents_in_evaluation_mode(pipeline):
    latents = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    pipeline.vae.eval()
    with torch.no_grad():
        expected = pipeline.vae.decode(latents, ICLEVR_LABELS.encode(LABELS)) / 2 + 0.5
    pipeline.vae.train()
    assert_close(draw(pipeline), expected, atol=1e-5, rtol=0)
    output = pipeline(LABELS, latents=latents, output_type="pt")
    assert_close(output.images, expected, atol=1e-5, rtol=0)
    assert output.seeds == []


def test_a_vae_without_labels_is_told_how_many_images(unlabelled):
    output = unlabelled(num_images=2, seeds=[5, 6])
    assert unlabelled.vocabulary is None and output.seeds == [5, 6]
    assert [image.mode for image in output.images] == ["L", "L"] and output.images[0].size == (12, 12)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("kind", ["pipeline", "unlabelled"])
def test_what_a_call_returns_can_be_encoded(kind, output_type, request):
    pipeline = request.getfixturevalue(kind)
    labels = LABELS if kind == "pipeline" else None
    arguments = {"class_labels": labels} if labels else {"num_images": 4}
    images = pipeline(**arguments, seeds=SEEDS, output_type=output_type).images
    pixel_values = pipeline(**arguments, seeds=SEEDS, output_type="pt").images
    pipeline.vae.train()
    distribution = pipeline.encode(images, labels, micro_batch_size=3)
    with torch.no_grad():
        expected = pipeline.vae.eval().encode(2 * pixel_values - 1, pipeline.encode_labels(labels) if labels else None)
    assert [tuple(part.shape) for part in distribution] == [(4, 6), (4, 6)]
    assert_close(distribution, expected, atol=0.05 if output_type == "pil" else 1e-5, rtol=0)


def test_one_image_is_encoded_like_a_list_of_one(unlabelled):
    image = Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12))
    assert unlabelled.encode(image)[0].equal(unlabelled.encode([image])[0])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(1, 3, 16, 16), None, "`class_labels` must be given"),
        (torch.zeros(1, 3, 16, 16), LABELS, "`class_labels` must hold one row an image, got 4 for 1 images"),
        (torch.zeros(1, 3, 8, 8), LABELS[:1], r"must have shape \(batch, 3, 16, 16\), got \(1, 3, 8, 8\)"),
        (torch.full((1, 3, 16, 16), -0.5), LABELS[:1], r"entries in \[0, 1\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), LABELS[:1], "divide bytes by 255"),
        (np.zeros((16, 16, 3), np.float32), LABELS[:1], "four dimensions"),
        (Image.new("L", (16, 16)), LABELS[:1], r"got \(1, 1, 16, 16\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(pipeline, images, labels, message):
    with pytest.raises(ValueError, match=message):
        pipeline.encode(images, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [["red cub"]]}, "'red cube'"),
        ({}, "`class_labels` must be given, and no `num_images`"),
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


def test_labels_and_model_must_fit(unlabelled, pipeline):
    with pytest.raises(ValueError, match="`num_images` must be given, and no `class_labels`"):
        unlabelled([["red cube"]])
    with pytest.raises(ValueError, match="`class_labels` must be left out: this model knows no labels"):
        unlabelled.encode(torch.zeros(1, 1, 12, 12), [["red cube"]])
    with pytest.raises(ValueError, match="must be left out for a network without labels"):
        ConditionalVAEPipeline(unlabelled.vae, ["red cube"])
    with pytest.raises(ValueError, match="must name the network's 24 labels, got 2"):
        ConditionalVAEPipeline(pipeline.vae, ["a", "b"])


@pytest.mark.parametrize("kind", ["pipeline", "unlabelled"])
def test_a_saved_vae_is_opened_again(kind, request, tmp_path):
    pipeline = request.getfixturevalue(kind)
    pipeline.vae.set_data_statistics(torch.full_like(pipeline.vae.data_mean, 0.25), 0.5)
    pipeline.save_pretrained(tmp_path / "saved")
    arguments = {"class_labels": LABELS} if kind == "pipeline" else {"num_images": 4}
    images = pipeline(**arguments, seeds=SEEDS, output_type="np").images
    reopened = load_pipeline(tmp_path / "saved")
    assert type(reopened) is ConditionalVAEPipeline
    np.testing.assert_array_equal(reopened(**arguments, seeds=SEEDS, output_type="np").images, images)
    labels = arguments.get("class_labels")
    assert_close(reopened.encode(images, labels), pipeline.encode(images, labels), atol=0, rtol=0)


@pytest.mark.slow
def test_a_published_vae_draws_and_encodes_the_same_for_strangers(pipeline, tmp_path):
    folder = export_pipeline(pipeline, tmp_path / "published", dtype=torch.float32)
    images = pipeline(LABELS, seeds=SEEDS, output_type="np").images
    stranger = f"""
import numpy, sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
images = pipe({LABELS!r}, seeds={SEEDS}, output_type="np").images
mean, log_variance = pipe.encode(images, {LABELS!r})
numpy.savez({str(tmp_path / "arrays.npz")!r}, images=images, mean=mean)
assert not any(name.startswith("iclevr_diffusion") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", stranger], check=True, cwd=tmp_path, timeout=120)
    arrays = np.load(tmp_path / "arrays.npz")
    np.testing.assert_array_equal(arrays["images"], images)
    np.testing.assert_array_equal(arrays["mean"], pipeline.encode(images, LABELS)[0])
