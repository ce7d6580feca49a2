import pytest
import torch
from torch.testing import assert_close

from iclevr_diffusion.augmentation import (
    DIFF_AUGMENT_POLICIES,
    diff_augment,
    discriminate,
    random_brightness,
    random_contrast,
    random_cutout,
    random_saturation,
    random_translation,
)

CHANGES = [change for changes in DIFF_AUGMENT_POLICIES.values() for change in changes]
POLICIES = [("color",), ("translation",), ("cutout",), ("color", "translation", "cutout")]


def make_images(batch: int = 3, channels: int = 3, height: int = 16, width: int = 16, dtype=torch.float32):
    return torch.rand(batch, channels, height, width, generator=seed(7), dtype=dtype) * 2 - 1


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture
def draw(monkeypatch):
    """Lets a test say which numbers are drawn, one a batch of one image."""

    def draw(*numbers: float) -> None:
        numbers = list(numbers)
        monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.full(shape, float(numbers.pop(0))))

        def randint(low, high, shape, **kwargs):
            number = numbers.pop(0)
            assert low <= number < high
            return torch.full(shape, number)

        monkeypatch.setattr(torch, "randint", randint)

    return draw


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("policy", POLICIES, ids="+".join)
def test_the_changed_images_have_the_same_shape_and_other_pixels(policy, channels):
    images = make_images(channels=channels, height=12, width=20)
    changed = diff_augment(images, policy, seed(0))
    assert changed.shape == images.shape
    assert not torch.equal(changed, images)


def test_an_empty_policy_changes_nothing():
    images = make_images()
    assert torch.equal(diff_augment(images, ()), images)


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_generator_state_gives_the_same_images_and_another_gives_others(change):
    images = make_images(batch=8)
    assert torch.equal(change(images, seed(3)), change(images, seed(3)))
    assert not torch.equal(change(images, seed(3)), change(images, seed(4)))


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_drawn_from_the_global_source_beside_a_generator(change):
    state = torch.get_rng_state()
    change(make_images(), seed(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", CHANGES)
def test_each_image_of_a_batch_has_its_own_draw(change):
    image = make_images(batch=1)
    changed = change(image.expand(8, -1, -1, -1), seed(0))
    assert not torch.equal(changed[:1].expand_as(changed), changed)


def test_the_parts_of_a_policy_follow_each_other_in_its_order():
    images, generator = make_images(), seed(5)
    expected = random_cutout(images, generator)
    for change in (random_brightness, random_saturation, random_contrast):
        expected = change(expected, generator)
    assert torch.equal(diff_augment(images, ("cutout", "color"), seed(5)), expected)


@pytest.mark.parametrize("policy", POLICIES, ids="+".join)
def test_the_gradient_is_the_one_of_finite_differences(policy):
    images = make_images(batch=2, channels=2, height=8, width=8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, policy, seed(1)), images)


def test_a_moved_pixel_passes_its_gradient_on_and_one_moved_out_has_none(draw):
    images = make_images(batch=1).requires_grad_()
    draw(2, 0)
    random_translation(images).sum().backward()
    assert torch.equal(images.grad[:, :, :14], torch.ones(1, 3, 14, 16))
    assert not images.grad[:, :, 14:].any()


def test_a_cut_pixel_has_no_gradient(draw):
    images = make_images(batch=1).requires_grad_()
    draw(8, 8)
    random_cutout(images).sum().backward()
    expected = torch.ones(1, 3, 16, 16)
    expected[:, :, 4:12, 4:12] = 0
    assert torch.equal(images.grad, expected)


def test_brightness_adds_the_draw_less_a_half(draw):
    images = make_images(batch=1)
    draw(0.75)
    assert_close(random_brightness(images), images + 0.25)


def test_saturation_scales_the_distance_from_gray_by_twice_the_draw(draw):
    red = torch.tensor([0.9, 0.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2)
    for number, expected in ((0.0, [0.3, 0.3, 0.3]), (0.5, [0.9, 0.0, 0.0]), (0.75, [1.2, -0.15, -0.15])):
        draw(number)
        assert_close(random_saturation(red)[0, :, 1, 0], torch.tensor(expected))


def test_contrast_scales_the_distance_from_the_mean_by_the_draw_and_a_half(draw):
    image = torch.tensor([[[[0.0, 0.8]]]])  # mean 0.4
    for number, expected in ((0.0, [0.2, 0.6]), (0.5, [0.0, 0.8]), (0.75, [-0.1, 0.9])):
        draw(number)
        assert_close(random_contrast(image), torch.tensor([[[expected]]]))


def test_a_translation_moves_down_and_right_and_fills_with_gray(draw):
    image = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    draw(1, -1)  # one row down, one column left
    moved = random_translation(image)[0, 0]
    assert not moved[0].any()
    assert not moved[:, 7].any()
    assert torch.equal(moved[1:, :7], image[0, 0, :7, 1:])


def test_a_translation_reaches_an_eighth_of_each_side_and_no_further():
    image = torch.zeros(1, 1, 16, 32)
    image[..., 8, 16] = 1
    rows, columns = random_translation(image.expand(400, -1, -1, -1), seed(0))[:, 0].nonzero()[:, 1:].unbind(1)
    assert set(rows.tolist()) == {6, 7, 8, 9, 10}
    assert set(columns.tolist()) == set(range(12, 21))


@pytest.mark.parametrize(
    ("side", "centre", "first", "stop"),
    [(8, 4, 2, 6), (8, 0, 0, 2), (8, 8, 6, 8), (6, 3, 2, 5), (6, 0, 0, 2), (6, 5, 4, 6)],
)
def test_a_box_of_half_the_side_is_cut_out_around_its_centre(draw, side, centre, first, stop):
    draw(centre, 4)
    cut = random_cutout(torch.ones(1, 2, side, 8))
    expected = torch.ones(1, 2, side, 8)
    expected[:, :, first:stop, 2:6] = 0
    assert torch.equal(cut, expected)


def test_every_centre_of_a_box_is_drawn():
    # Rows that a box of 4 covers when its centre is 0 to 8: the first and the last centre leave two of them inside.
    cut = random_cutout(torch.ones(2000, 1, 8, 8), seed(0))[:, 0] == 0
    covered = {tuple(image.any(1).nonzero().flatten().tolist()) for image in cut}
    assert covered == {tuple(range(max(centre - 2, 0), min(centre + 2, 8))) for centre in range(9)}


@pytest.mark.parametrize("policy", ["color", ("colour",), ("cutout", "flip")])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(ValueError, match="`policy` must be a tuple of 'color', 'translation', 'cutout', got"):
        diff_augment(make_images(), policy)


def test_one_image_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"`pixel_values` must have shape .* got \(3, 16, 16\)"):
        diff_augment(make_images()[0], ("color",))


def test_a_discriminator_tells_changed_images_apart_and_reads_the_labels_of_the_images_as_they_are():
    images, class_labels = make_images(), torch.zeros(3, 2)
    shown = []

    def discriminator(pixel_values, class_labels):
        shown.append(pixel_values)
        return pixel_values.mean((1, 2, 3)), pixel_values.flatten(1)[:, :2]

    torch.manual_seed(0)
    logits, class_logits = discriminate(discriminator, images, class_labels, ("color",))
    assert len(shown) == 2 and not shown[0].equal(images)
    assert logits.equal(shown[0].mean((1, 2, 3)))
    assert class_logits.equal(images.flatten(1)[:, :2])


@pytest.mark.parametrize(("policy", "class_logits"), [((), torch.zeros(3, 2)), (("color",), None)])
def test_a_discriminator_is_asked_once_where_there_is_nothing_to_read_or_to_change(policy, class_logits):
    shown = []

    def discriminator(pixel_values, class_labels):
        shown.append(pixel_values)
        return pixel_values.mean((1, 2, 3)), class_logits

    assert discriminate(discriminator, make_images(), torch.zeros(3, 2), policy)[1] is class_logits
    assert len(shown) == 1
