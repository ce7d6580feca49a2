import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch.testing import assert_close

from iclevr_diffusion.denoiser import DenoiserConfig, make_scheduler
from iclevr_diffusion.diffusion import (
    add_noise,
    error_weight,
    min_snr_weight,
    noise_levels,
    path_of,
    sample_times,
    shift_times,
    training_target,
)

TIMES = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999])


def levels(schedule):
    return noise_levels(TIMES, path_of_schedule(schedule))


def path_of_schedule(schedule):
    return schedule if schedule in ("flow", "edm") else DDPMScheduler(beta_schedule=schedule).alphas_cumprod


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "sigmoid"])
def test_noise_and_velocity_are_those_of_diffusers(beta_schedule):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule)
    timesteps, alpha, sigma = noise_levels(TIMES, scheduler.alphas_cumprod)
    assert timesteps.tolist() == [0, 100, 500, 900, 999]
    x_0, noise = torch.randn(2, 5, 3, 4, 4)
    assert_close(add_noise(x_0, noise, alpha, sigma), scheduler.add_noise(x_0, noise, timesteps))
    velocity = training_target("v_prediction", x_0, noise, alpha, sigma)
    assert_close(velocity, scheduler.get_velocity(x_0, noise, timesteps))


def test_the_straight_path_is_that_of_the_flow_matching_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    timesteps = scheduler.timesteps[[999, 500, 0]]
    times = timesteps / 1000
    x_0, noise = torch.randn(2, 3, 3, 4, 4)
    ours, alpha, sigma = noise_levels(times)
    assert_close(ours, timesteps)
    assert_close(add_noise(x_0, noise, alpha, sigma), scheduler.scale_noise(x_0, timesteps, noise))


def test_one_euler_step_along_the_flow_target_ends_at_the_image():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(1)
    x_0, noise = torch.randn(2, 1, 3, 4, 4)
    velocity = training_target("flow", x_0, noise, *noise_levels(torch.ones(1))[1:])
    assert_close(scheduler.step(velocity, scheduler.timesteps[0], noise).prev_sample, x_0)


def test_epsilon_is_the_noise_and_sample_the_image():
    x_0, noise = torch.randn(2, 5, 3, 4, 4)
    assert training_target("epsilon", x_0, noise, *levels("linear")[1:]) is noise
    assert training_target("sample", x_0, noise, *levels("linear")[1:]) is x_0
    with pytest.raises(ValueError, match="`prediction_type` must be"):
        training_target("velocity", x_0, noise, *levels("linear")[1:])


def preconditioning(s):
    """Table 1 of Karras et al. (2022), last column, for standardized images: c_skip, c_out, c_in and c_noise."""
    return 1 / (s**2 + 1), s / (s**2 + 1).sqrt(), 1 / (s**2 + 1).sqrt(), s.log() / 4


def test_edm_is_the_preconditioning_of_its_paper():
    s = torch.tensor([0.004, 0.5, 1.0, 7.0, 160.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = (part.view(-1, 1, 1, 1) for part in preconditioning(s))
    x_0, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    timesteps, alpha, sigma = noise_levels(s / (1 + s), "edm")
    assert_close(timesteps, c_noise.flatten())
    noisy = x_0 + s.view(-1, 1, 1, 1) * noise
    assert_close(add_noise(x_0, noise, alpha, sigma), c_in * noisy)
    target = training_target("edm", x_0, noise, alpha, sigma)
    assert_close(target, (x_0 - c_skip * noisy) / c_out)  # eq. 8
    # Its weight of the error of D = c_skip x + c_out F, lambda = (s^2 + 1) / s^2, weighs the errors of F alike.
    prediction = torch.randn_like(target)
    error = (c_skip * noisy + c_out * prediction - x_0).square() * ((s**2 + 1) / s**2).view(-1, 1, 1, 1)
    assert_close(error, (prediction - target).square())


def test_edms_noise_is_log_normal_around_the_shift():
    times = sample_times(20_000, "logit-normal", shift=3.0, generator=torch.Generator().manual_seed(0))
    logarithms = 4 * noise_levels(times, "edm")[0]
    assert abs(logarithms.mean() - torch.tensor(3.0).log()) < 0.03 and abs(logarithms.std() - 1) < 0.03


@pytest.mark.parametrize("steps", [1, 3])
def test_a_scheduler_of_diffusers_turns_the_edm_target_into_the_image(steps):
    scheduler = make_scheduler(DenoiserConfig(prediction_type="edm"))
    scheduler.set_timesteps(steps)
    x_0, noise = torch.randn(2, 1, 3, 4, 4)
    sample = x_0 + scheduler.sigmas[0] * noise
    for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        timesteps, alpha, sigma = noise_levels((s / (1 + s)).view(1), "edm")
        assert_close(t, timesteps[0], atol=1e-3, rtol=1e-4)
        seen = scheduler.scale_model_input(sample, t)
        assert_close(seen, add_noise(x_0, noise, alpha, sigma), atol=1e-4, rtol=1e-4)
        sample = scheduler.step(training_target("edm", x_0, noise, alpha, sigma), t, sample).prev_sample
    assert_close(sample, x_0, atol=1e-3, rtol=1e-3)


def test_each_network_knows_its_own_path():
    scheduler = DDPMScheduler()
    assert path_of("flow", scheduler) == "flow" and path_of("edm", scheduler) == "edm"
    assert torch.equal(path_of("epsilon", scheduler), scheduler.alphas_cumprod)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_paper(gamma):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    timesteps, alpha, sigma = noise_levels(TIMES, scheduler.alphas_cumprod)
    snr = compute_snr(scheduler, timesteps).view(-1, 1, 1, 1)
    capped = snr.clamp(max=gamma)
    assert_close(min_snr_weight("epsilon", alpha, sigma, gamma), capped / snr)
    assert_close(min_snr_weight("v_prediction", alpha, sigma, gamma), capped / (snr + 1))
    assert_close(min_snr_weight("edm", alpha, sigma, gamma), capped / (snr + 1))  # F is -v
    assert_close(min_snr_weight("sample", alpha, sigma, gamma), capped)


@pytest.mark.parametrize(
    ("prediction_type", "schedule"),
    [("epsilon", "linear"), ("v_prediction", "linear"), ("sample", "linear"), ("flow", "flow"), ("edm", "edm")],
)
def test_every_target_weighs_the_same_error_of_the_image_alike(prediction_type, schedule):
    times = torch.tensor([0.1, 0.4, 0.7])
    alpha, sigma = (level.double() for level in noise_levels(times, path_of_schedule(schedule))[1:])
    x_0, noise, error = torch.randn(3, 3, 3, 4, 4, dtype=torch.float64)
    x_t = add_noise(x_0, noise, alpha, sigma)
    wrong_x_0 = x_0 + error
    wrong_noise = (x_t - alpha * wrong_x_0) / sigma  # the same x_t, read as another image
    target = training_target(prediction_type, x_0, noise, alpha, sigma)
    wrong_target = training_target(prediction_type, wrong_x_0, wrong_noise, alpha, sigma)
    weighted = min_snr_weight(prediction_type, alpha, sigma, 5.0) * (wrong_target - target).square()
    assert_close(weighted, (alpha / sigma).square().clamp(max=5.0) * error.square())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow", "edm"])
def test_weights_stay_finite_at_both_ends(prediction_type):
    alpha, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    weight = min_snr_weight(prediction_type, alpha, sigma)
    assert weight.tolist() == ([1.0, 0.0] if prediction_type == "epsilon" else [0.0, 0.0])


def test_unknown_targets_and_gammas_are_refused_by_the_weights():
    with pytest.raises(ValueError, match="`gamma` must be positive"):
        min_snr_weight("epsilon", torch.ones(1), torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="`prediction_type` must be"):
        min_snr_weight("velocity", torch.ones(1), torch.ones(1))


def test_the_shift_is_that_of_the_flow_matching_scheduler():
    plain, shifted = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert_close(shift_times(plain.sigmas, 3.0), shifted.sigmas)
    assert shift_times(torch.tensor(0.5), 3.0) == 0.75
    with pytest.raises(ValueError, match="`shift` must be positive"):
        shift_times(plain.sigmas, 0.0)


@pytest.mark.parametrize(("shift", "median"), [(1.0, 0.5), (4.0, 0.8)])
@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_times_lie_around_the_shifted_middle(sampling, shift, median):
    times = sample_times(20_000, sampling, shift=shift, generator=torch.Generator().manual_seed(0))
    assert times.min() >= 0 and times.max() <= 1
    assert_close(times.median(), torch.tensor(median), atol=0.02, rtol=0)


def test_logit_normal_times_have_the_density_of_the_paper():
    times = sample_times(20_000, "logit-normal", generator=torch.Generator().manual_seed(0))
    logits = times.logit()
    assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03


def test_unknown_time_samplings_are_refused():
    with pytest.raises(ValueError, match="`sampling` must be"):
        sample_times(2, "cosine")


def test_a_time_of_one_falls_on_the_last_step_of_a_schedule():
    timesteps, *_ = noise_levels(torch.ones(1), DDPMScheduler().alphas_cumprod)
    assert timesteps.tolist() == [999]


def test_errors_of_an_image_count_no_more_below_the_least_time():
    sigma = torch.tensor([0.01, 0.04, 0.05, 0.5]).view(-1, 1, 1, 1)
    of_an_image = error_weight("flow", 1 - sigma, sigma, puts_out_images=True) / sigma.square()
    assert_close(of_an_image.flatten(), torch.tensor([400.0, 400.0, 400.0, 4.0]))
    assert (error_weight("flow", 1 - sigma, sigma) == 1).all()
    both = error_weight("flow", 1 - sigma, sigma, 5.0, True)
    assert_close(both, of_an_image * sigma.square() * min_snr_weight("flow", 1 - sigma, sigma, 5.0))
