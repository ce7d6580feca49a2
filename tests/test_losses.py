import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.testing import assert_close

from iclevr_diffusion.losses import (
    auxiliary_loss,
    cycle_loss,
    evaluator_loss,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    identity_loss,
    nonsaturating_discriminator_loss,
    nonsaturating_generator_loss,
    r1_penalty,
    ramp_weight,
    vae_loss,
    wasserstein_critic_loss,
    wasserstein_generator_loss,
)

DISCRIMINATOR_LOSSES = [hinge_discriminator_loss, nonsaturating_discriminator_loss, wasserstein_critic_loss]
GENERATOR_LOSSES = [hinge_generator_loss, nonsaturating_generator_loss, wasserstein_generator_loss]
LABEL_LOSSES = [auxiliary_loss, evaluator_loss]
PIXEL_LOSSES = [cycle_loss, identity_loss]


def make_images(batch: int = 4, seed: int = 0, shape=(3, 4, 4)):
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_hinge_asks_for_one_and_no_more():
    loss = lambda real, fake: hinge_discriminator_loss(torch.tensor([real]), torch.tensor([fake])).item()  # noqa: E731
    assert loss(1.0, -1.0) == 0
    assert loss(5.0, -7.0) == 0
    assert loss(0.5, -1.0) == 0.5
    assert loss(1.0, -0.5) == 0.5
    assert loss(-2.0, 3.0) == 3 + 4


@pytest.mark.parametrize(("logit", "slope"), [(0.999, -1.0), (1.001, 0.0)])
def test_the_hinge_bends_at_one_on_real_images_and_at_minus_one_on_fake_ones(logit, slope):
    real, fake = torch.tensor([logit], requires_grad=True), torch.tensor([-logit], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad.item() == slope
    assert fake.grad.item() == -slope


def test_the_hinge_is_the_mean_of_each_batch():
    assert_close(hinge_discriminator_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0, 1.0])).item(), 0.5 + 1.0)


@pytest.mark.parametrize("loss", [hinge_generator_loss, wasserstein_generator_loss])
def test_the_generator_wants_a_high_mean(loss):
    assert loss(torch.tensor([1.0, 4.0])).item() == -2.5


def test_the_critic_wants_real_scores_above_fake_ones():
    assert wasserstein_critic_loss(torch.tensor([1.0, 2.0]), torch.tensor([4.0])).item() == 2.5


def test_the_nonsaturating_losses_are_cross_entropies():
    real, fake = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([1.0, -0.7])
    real_loss, fake_loss = -real.sigmoid().log().mean(), -(1 - fake.sigmoid()).log().mean()
    assert_close(nonsaturating_discriminator_loss(real, fake), (real_loss + fake_loss) / 2)
    assert_close(nonsaturating_generator_loss(fake), -fake.sigmoid().log().mean())
    assert_close(nonsaturating_discriminator_loss(torch.zeros(2), torch.zeros(2)).item(), math.log(2))


def test_the_nonsaturating_loss_of_a_sure_discriminator_is_finite_and_has_a_slope():
    fake = torch.tensor([-1000.0], requires_grad=True)
    loss = nonsaturating_generator_loss(fake)
    loss.backward()
    assert loss.item() == 1000
    assert fake.grad.item() == -1


@pytest.mark.parametrize("loss", DISCRIMINATOR_LOSSES)
def test_logits_of_other_shapes_are_refused(loss):
    with pytest.raises(ValueError, match=r"`real_logits` must have shape \(batch,\), got \(2, 1\)"):
        loss(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`fake_logits` must have shape \(batch,\), got \(\)"):
        loss(torch.zeros(2), torch.zeros(()))


@pytest.mark.parametrize("loss", GENERATOR_LOSSES)
def test_fake_logits_of_other_shapes_are_refused(loss):
    with pytest.raises(ValueError, match=r"`fake_logits` must have shape \(batch,\), got \(2, 1\)"):
        loss(torch.zeros(2, 1))


def test_the_penalty_of_a_linear_critic_is_that_of_its_weight():
    real, fake = make_images(seed=0), make_images(seed=1)
    for length in (1.0, 3.0, 0.25):
        weight = make_images(1, seed=2)[0]
        weight = weight * length / weight.norm()
        penalty = gradient_penalty(lambda x, weight=weight: (x * weight).sum((1, 2, 3)), real, fake)
        assert_close(penalty.item(), (length - 1) ** 2, atol=1e-5, rtol=0)


def test_the_penalty_of_a_quadratic_critic_is_taken_between_real_and_fake_images():
    # The gradient of |x|^2 is 2x, and x = fake + position (real - fake) with one position an image.
    real, fake = make_images(seed=0), make_images(seed=1)
    penalty = gradient_penalty(
        lambda x: x.square().sum((1, 2, 3)), real, fake, generator=torch.Generator().manual_seed(5)
    )
    position = torch.rand(4, generator=torch.Generator().manual_seed(5))
    by_hand = [((2 * (p * r + (1 - p) * f)).norm() - 1) ** 2 for p, r, f in zip(position, real, fake, strict=True)]
    assert position.std() > 0.1
    assert_close(penalty, torch.stack(by_hand).mean())


def test_the_penalty_teaches_the_critic_by_the_derivative_of_its_formula():
    # D(x) = a |x|^2: the penalty is the mean of (2 |a| |x| - 1)^2, whose derivative by a is that of 4 |x| (2 a |x| - 1).
    real = make_images()
    scale = torch.tensor(0.7, requires_grad=True)
    gradient_penalty(lambda x: scale * x.square().sum((1, 2, 3)), real, real).backward()
    norm = real.flatten(1).norm(dim=1)
    assert_close(scale.grad, (4 * norm * (2 * 0.7 * norm - 1)).mean())


def test_the_penalty_of_a_critic_without_slope_is_one_and_its_gradient_is_finite():
    scale = torch.tensor(0.0, requires_grad=True)
    penalty = gradient_penalty(lambda x: scale * x.square().sum((1, 2, 3)), make_images(), make_images(seed=1))
    penalty.backward()
    assert penalty.item() == 1
    assert torch.isfinite(scale.grad)


def test_r1_of_a_linear_discriminator_is_half_the_square_of_its_weight():
    weight = make_images(1, seed=2)[0]
    penalty = r1_penalty(lambda x: (x * weight).sum((1, 2, 3)) + 3, make_images())
    assert_close(penalty, weight.square().sum() / 2)


def test_r1_of_a_quadratic_discriminator_is_twice_the_mean_square_and_so_is_its_derivative():
    # D(x) = a |x|^2: R1 = mean of (2 a |x|)^2 / 2 = 2 a^2 |x|^2, whose derivative by a is 4 a |x|^2.
    real = make_images()
    scale = torch.tensor(0.7, requires_grad=True)
    penalty = r1_penalty(lambda x: scale * x.square().sum((1, 2, 3)), real)
    penalty.backward()
    square = real.square().sum((1, 2, 3)).mean()
    assert_close(penalty.detach(), 2 * 0.7**2 * square)
    assert_close(scale.grad, 4 * 0.7 * square)


def test_r1_of_a_network_is_that_of_finite_differences():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)).double()
    real = make_images(2, shape=(2, 2, 2))
    squares = []
    for image in real.double():
        for index in range(8):
            step = torch.zeros(8, dtype=torch.float64)
            step[index] = 1e-5
            step = step.view(2, 2, 2)
            slope = (network((image + step)[None]) - network((image - step)[None])) / 2e-5
            squares.append(slope.square())
    expected = torch.cat(squares).sum() / 2 / 2
    assert_close(r1_penalty(network.float(), real).double(), expected, rtol=1e-4, atol=0)


def test_penalties_leave_no_gradient_in_the_images():
    real, fake = make_images().requires_grad_(), make_images(seed=1).requires_grad_()
    scale = torch.tensor(1.0, requires_grad=True)
    critic = lambda x: scale * x.square().sum((1, 2, 3))  # noqa: E731
    (gradient_penalty(critic, real, fake) + r1_penalty(critic, real)).backward()
    assert real.grad is None
    assert fake.grad is None


def test_penalties_refuse_a_network_that_gives_more_than_logits():
    with pytest.raises(ValueError, match=r"logits of shape \(4,\), got \(4, 1\)"):
        r1_penalty(lambda x: x.sum((1, 2, 3), keepdim=False)[:, None], make_images())
    with pytest.raises(ValueError, match=r"logits of shape \(4,\), got \(\)"):
        gradient_penalty(torch.sum, make_images(), make_images())


def test_penalties_refuse_images_of_other_shapes():
    critic = lambda x: x.sum((1, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match=r"`fake_pixel_values` .* got \(3, 3, 4, 4\) and \(4, 3, 4, 4\)"):
        gradient_penalty(critic, make_images(4), make_images(3))
    with pytest.raises(ValueError, match=r"`real_pixel_values` .* got \(3, 4, 4\)"):
        r1_penalty(critic, make_images()[0])


@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_label_losses_are_the_mean_cross_entropy_of_images_and_labels(loss):
    logits, labels = torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert_close(loss(logits, labels).item(), (softplus(-2) + softplus(-1) + math.log(2)) / 3)
    assert_close(loss(logits.repeat(5, 1), labels.repeat(5, 1)), loss(logits, labels))


@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_label_losses_refuse_other_shapes(loss):
    with pytest.raises(ValueError, match=r"`class_labels` and 2 dimensions, got \(2, 3\) and \(2, 4\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"2 dimensions, got \(3,\) and \(3,\)"):
        loss(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("loss", PIXEL_LOSSES)
def test_pixel_losses_are_mean_absolute_differences(loss):
    images = make_images()
    other = images.clone()
    other[0, 0, 0, 0] += 1.92
    other[1, 0, 0, 0] -= 1.92
    assert loss(images, images).item() == 0
    assert_close(loss(other, images).item(), 2 * 1.92 / images.numel())


@pytest.mark.parametrize("loss", PIXEL_LOSSES)
def test_pixel_losses_refuse_shapes_that_would_broadcast(loss):
    with pytest.raises(ValueError, match=r"got \(4, 1, 4, 4\) and \(4, 3, 4, 4\)"):
        loss(make_images(shape=(1, 4, 4)), make_images())


def test_the_divergence_is_the_one_of_torch_summed_over_latents_and_averaged_over_images():
    mean, log_variance = torch.randn(3, 5), torch.randn(3, 5)
    _, divergence = vae_loss(make_images(3), make_images(3), mean, log_variance)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0, 1)).sum(1).mean()
    assert_close(divergence, expected)
    assert vae_loss(make_images(3), make_images(3), torch.zeros(3, 5), torch.zeros(3, 5))[1].item() == 0


def test_the_gaussian_reconstruction_is_minus_a_log_density_but_for_its_constant():
    prediction, images, latents = make_images(seed=1), make_images(), torch.zeros(4, 2)
    reconstruction, _ = vae_loss(prediction, images, latents, latents)
    log_density = Normal(prediction, 1).log_prob(images).sum((1, 2, 3)).mean()
    assert_close(reconstruction, -log_density - 3 * 4 * 4 * math.log(2 * math.pi) / 2)


def test_the_bernoulli_reconstruction_is_minus_a_log_probability():
    logits, latents = 3 * make_images(seed=1), torch.zeros(4, 2)
    images = make_images().sign()  # black and white
    reconstruction, _ = vae_loss(logits, images, latents, latents, likelihood="bernoulli")
    expected = -Bernoulli(logits=logits).log_prob((images > 0).float()).sum((1, 2, 3)).mean()
    assert_close(reconstruction, expected)


def test_the_bernoulli_reconstruction_of_gray_is_best_at_its_brightness():
    latents, images = torch.zeros(1, 2), torch.full((1, 1, 1, 1), 0.5)  # brightness 0.75
    logits = torch.tensor(0.75).logit().view(1, 1, 1, 1).requires_grad_()
    vae_loss(logits, images, latents, latents, likelihood="bernoulli")[0].backward()
    assert_close(logits.grad, torch.zeros(1, 1, 1, 1), atol=1e-6, rtol=0)


def test_the_bound_refuses_what_does_not_fit():
    images, latents = make_images(), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="`prediction` must have the shape of `pixel_values`"):
        vae_loss(images[:, :1], images, latents, latents)
    with pytest.raises(ValueError, match="`log_variance` must have the shape of `mean`"):
        vae_loss(images, images, latents, latents[:, :1])
    with pytest.raises(ValueError, match="`mean` must have one row an image, got 3 rows and 4 images"):
        vae_loss(images, images, latents[:3], latents[:3])
    with pytest.raises(ValueError, match='"gaussian" or "bernoulli", got \'bce\''):
        vae_loss(images, images, latents, latents, likelihood="bce")


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (100, 0.0), (101, 3.0), (150, 150.0), (199, 297.0), (200, 300.0), (9999, 300.0)]
)
def test_a_ramp_is_straight_between_its_ends(step, expected):
    assert_close(ramp_weight(300.0, step, start=100, stop=200), expected)


def test_a_ramp_of_no_length_is_a_step():
    assert [ramp_weight(2.0, step, start=5, stop=5) for step in (4, 5, 6)] == [0.0, 2.0, 2.0]
    assert ramp_weight(2.0, 0, start=0, stop=0) == 2.0


def test_a_ramp_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="start=5 and stop=4"):
        ramp_weight(1.0, 0, start=5, stop=4)


def losses_of_halves():
    """Every loss of inputs in bfloat16."""
    logits = torch.randn(4).bfloat16()
    labels, images = torch.zeros(4, 3).bfloat16(), make_images().bfloat16()
    critic = lambda x: x.square().sum((1, 2, 3))  # noqa: E731
    yield from (loss(logits, logits) for loss in DISCRIMINATOR_LOSSES)
    yield from (loss(logits) for loss in GENERATOR_LOSSES)
    yield from (loss(labels, labels) for loss in LABEL_LOSSES)
    yield from (loss(images, images) for loss in PIXEL_LOSSES)
    yield from vae_loss(images, images, labels, labels)
    yield from vae_loss(images, images, labels, labels, likelihood="bernoulli")
    yield gradient_penalty(critic, images, images)
    yield r1_penalty(critic, images)


def test_every_loss_of_half_precision_is_a_scalar_in_float32():
    losses = list(losses_of_halves())
    assert len(losses) == 3 + 3 + 2 + 2 + 2 + 2 + 2
    assert {(loss.dtype, loss.shape) for loss in losses} == {(torch.float32, ())}
