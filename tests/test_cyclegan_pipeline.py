import numpy as np
import PIL.Image
import pytest
import torch
from torch.testing import assert_close

from iclevr_diffusion import export_pipeline, load_pipeline
from iclevr_diffusion.models.cyclegan import CycleGANGenerator
from iclevr_diffusion.pipelines.pipeline_cyclegan import CycleGANPipeline


def make_generator(in_channels=3, out_channels=3):
    return CycleGANGenerator(16, in_channels, out_channels, block_out_channels=(4, 8), num_residual_blocks=1)


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    return CycleGANPipeline(make_generator(), make_generator())


@pytest.fixture
def images():
    """Three images (B, C, H, W) in whole steps of 0 to 255."""
    return torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_each_direction_is_the_call_of_its_generator(pipeline, images):
    with torch.no_grad():
        expected = pipeline.generator_a_to_b(images / 127.5 - 1), pipeline.generator_b_to_a(images / 127.5 - 1)
    assert_close(pipeline(images, output_type="pt").images, expected[0] / 2 + 0.5, atol=1e-6, rtol=0)
    assert_close(pipeline(images, "b_to_a", output_type="pt").images, expected[1] / 2 + 0.5, atol=1e-6, rtol=0)


def test_all_forms_of_an_image_give_the_same(pipeline, images):
    expected = pipeline(images, output_type="pt")
    assert expected.seeds == []
    array = images.movedim(1, -1).numpy()
    pil = [PIL.Image.fromarray(image) for image in array]
    for form in (images / 255, array, array.astype(np.float32) / 255, pil, tuple(pil)):
        assert_close(pipeline(form, output_type="pt").images, expected.images, atol=1e-5, rtol=0)
    for form in (images[1], images[1] / 255, array[1], pil[1]):
        assert_close(pipeline(form, output_type="pt").images, expected.images[1:2], atol=1e-5, rtol=0)


def test_an_image_does_not_depend_on_its_neighbours(pipeline, images):
    together = pipeline(images, micro_batch_size=2, output_type="pt").images
    alone = pipeline(images[2:], micro_batch_size=2, output_type="pt").images
    assert alone[0].equal(together[2]) and not together[0].equal(together[1])


def test_a_pil_image_of_any_size_and_mode_is_resized_as_training_images_are(pipeline):
    image = PIL.Image.effect_noise((30, 20), 90)
    output = pipeline(image)
    assert len(output.images) == 1 and output.images[0].size == (16, 16) and output.images[0].mode == "RGB"
    resized = image.convert("RGB").resize((16, 16), PIL.Image.Resampling.BILINEAR)
    assert (np.asarray(pipeline([resized]).images[0]) == np.asarray(output.images[0])).all()


def test_images_with_alpha_are_mapped():
    pipeline = CycleGANPipeline(make_generator(4, 4), make_generator(4, 4))
    assert pipeline(PIL.Image.new("RGBA", (20, 30)), output_type="np").images.shape == (1, 16, 16, 4)


def test_domains_may_differ_in_their_channels(images):
    pipeline = CycleGANPipeline(make_generator(1, 3), make_generator(3, 1))
    gray = PIL.Image.new("RGB", (16, 16), "gray")
    (array,) = pipeline(gray, output_type="np", return_dict=False)
    assert array.shape == (1, 16, 16, 3) and array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1
    assert pipeline(images, "b_to_a", output_type="pt").images.shape == (3, 1, 16, 16)
    assert pipeline(images, "b_to_a").images[0].mode == "L"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "b"}, "`direction` must be `a_to_b` or `b_to_a`, got 'b'"),
        ({"image": []}, r"`image` must be a PIL image, a list of them, .*, got \[\]"),
        ({"image": "photo.png"}, "`image` must be a PIL image, .* got 'photo.png'"),
        ({"image": np.zeros((16, 16))}, r"got an array of shape \(16, 16\)"),
        ({"image": torch.zeros(2, 1, 16, 16)}, r"3 channels and 16x16 pixels.* got \(B, C, H, W\) = \(2, 1, 16, 16\)"),
        ({"image": torch.zeros(3, 8, 8)}, "`image` must be of the network's 3 channels and 16x16 pixels"),
        ({"image": torch.zeros(0, 3, 16, 16)}, "`image` must be of the network's"),
        ({"image": torch.full((3, 16, 16), -0.5)}, r"floating point in \[0, 1\], got torch.float32 from -0.5 to -0.5"),
        ({"image": torch.full((3, 16, 16), float("nan"))}, r"floating point in \[0, 1\]"),
        ({"image": torch.zeros(3, 16, 16, dtype=torch.int64)}, "got torch.int64 from 0 to 0"),
        ({"output_type": "jpg"}, "`output_type` must be"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be a whole number"),
    ],
)
def test_a_bad_argument_is_refused_by_name(pipeline, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image": images, **arguments})


def test_a_saved_and_an_exported_pipeline_map_alike(pipeline, images, tmp_path):
    expected = pipeline(images, output_type="pt").images
    pipeline.save_pretrained(tmp_path / "saved")
    assert_close(load_pipeline(tmp_path / "saved")(images, output_type="pt").images, expected)
    export_pipeline(pipeline, tmp_path / "exported")
    exported = load_pipeline(tmp_path / "exported")
    assert_close(exported(images, output_type="pt").images, expected, atol=0.01, rtol=0)
    assert not exported(images, "b_to_a", output_type="pt").images.allclose(expected, atol=0.01)
