import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch.testing import assert_close

from iclevr_diffusion.denoiser import DenoiserConfig, choose_attention, make_denoiser, make_scheduler
from iclevr_diffusion.models.unet_multilabel import PRESETS, MultiLabelUNet2DModel
from iclevr_diffusion.models.unet_small import SmallMultiLabelUNet


def make(null_condition: bool = False, **fields) -> MultiLabelUNet2DModel | SmallMultiLabelUNet:
    config = DenoiserConfig(resolution=16, **fields)
    return make_denoiser(config, 5, 1, null_condition=null_condition, empty_condition=False)


def test_options_that_are_not_given_are_the_presets():
    unet = make(block_out_channels=(8, 16), attention_levels=(), attention_head_dim=8, gradient_checkpointing=True)
    assert unet.config.block_out_channels == (8, 16) and unet.config.attention_levels == ()
    assert unet.config.patch_size == PRESETS["tiny"]["patch_size"] == 4
    assert unet.config.num_classes == 5 and unet.config.in_channels == 1 and unet.config.prediction_type == "flow"
    assert unet.is_gradient_checkpointing and not unet.config.null_condition


def test_the_small_network_counts_time_as_its_schedule_does():
    fields = {"prediction_type": "epsilon", "num_train_timesteps": 400, "base_channels": 8}
    unet = make(network="small", null_condition=True, **fields)
    assert unet.config.num_train_timesteps == 400 and unet.config.null_condition
    assert unet.config.num_levels == 2 and unet.config.label_injection == "film"  # its own defaults


def test_the_small_network_without_an_embedding_lacks_its_weights():
    unet = make(network="small", base_channels=8, use_label_embedding=False, use_time_embedding=True)
    assert unet.label_embeddings is None and unet.time_embeddings is not None


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_linear_noise_rises_evenly_over_the_steps_that_are_asked_for(sampler):
    config = DenoiserConfig(
        prediction_type="epsilon", beta_schedule="linear", num_train_timesteps=400, sampler=sampler
    )
    scheduler = make_scheduler(config)
    betas = [1e-4 + (0.02 - 1e-4) * i / 399 for i in range(400)]
    assert_close(scheduler.alphas_cumprod[-1].item(), math.prod(1 - beta for beta in betas), rtol=1e-4, atol=0)
    scheduler.set_timesteps(400)
    assert scheduler.timesteps.tolist() == list(range(399, -1, -1))
    scheduler.set_timesteps(4)  # begins where there is most noise
    assert scheduler.timesteps.tolist() == [399, 299, 199, 99]


@pytest.mark.parametrize(("sampler", "num_steps"), [("ddim", 20), ("ddim", 1000), ("ddpm", 20), ("ddpm", 1000)])
def test_noise_predicted_with_errors_on_the_cosine_schedule_still_leads_to_the_image(sampler, num_steps):
    scheduler = make_scheduler(DenoiserConfig(prediction_type="epsilon", sampler=sampler), bound=3.0)
    draws = torch.Generator().manual_seed(0)
    image, sample = torch.randn(1, 1, 32, 32, generator=draws).clamp(-3, 3), torch.randn(1, 1, 32, 32, generator=draws)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        noise = (sample - alpha * image) / sigma + 0.01 * torch.randn(image.shape, generator=draws)
        noise = noise.clamp(-4, 4)  # a network has seen no other
        sample = scheduler.step(noise, t, sample, generator=draws).prev_sample
    assert (sample - image).square().mean() < 0.01


def test_a_flows_sampling_steps_move_towards_noise_by_its_shift():
    scheduler = make_scheduler(DenoiserConfig(time_shift=3.0))
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert_close(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.0]))


@pytest.mark.parametrize(("mixed_precision", "is_plain"), [("bf16", True), ("no", False)])
def test_attention_is_plain_in_training_with_bfloat16_on_a_cpu_and_gives_the_same(mixed_precision, is_plain):
    unet = make(attention_levels=(0, 1)).eval()
    sample, class_labels = torch.randn(2, 1, 16, 16), torch.eye(5)[:2]
    with torch.no_grad():
        expected = unet(sample, 500, class_labels).sample
        choose_attention(unet, torch.device("cpu"), mixed_precision)
        kinds = {type(module.processor) for module in unet.modules() if isinstance(module, Attention)}
        assert kinds == {AttnProcessor if is_plain else AttnProcessor2_0}
        assert_close(unet(sample, 500, class_labels).sample, expected, rtol=1e-4, atol=1e-5)


def test_edm_is_drawn_by_its_own_scheduler_at_the_papers_noise():
    scheduler = make_scheduler(DenoiserConfig(prediction_type="edm"))
    scheduler.set_timesteps(18)
    # Eq. 5 of the paper for 18 steps, from 80 to .002 at a sigma_data of .5; twice that at 1.
    expected = [(160 ** (1 / 7) + i / 17 * (0.004 ** (1 / 7) - 160 ** (1 / 7))) ** 7 for i in range(18)]
    assert_close(scheduler.sigmas.double(), torch.tensor([*expected, 0.0], dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert scheduler.config.sigma_data == 1 and scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_type": "edm", "network": "small"}, "`prediction_type` must not be edm for the network small"),
        ({"prediction_type": "edm", "num_train_timesteps": 500}, "`num_train_timesteps` must be 1000 where .* edm"),
        ({"label_encoding": "tokens", "network": "small"}, "`label_encoding` must be left out for the network small"),
        ({"network_output": "sample", "network": "small"}, "`network_output` must be left out for the network small"),
        ({"network_output": "sample", "prediction_type": "edm"}, "must be `prediction` unless"),
        ({"preset": "tokens", "prediction_type": "edm"}, "`network_output`, which the preset `tokens` sets too"),
        ({"sampler": "ddpm"}, "`sampler` must be left out where `prediction_type` is flow"),
        ({"beta_schedule": "linear", "prediction_type": "edm"}, "`beta_schedule` must be left out .* is edm"),
        (
            {"beta_schedule": "linear", "prediction_type": "epsilon", "num_train_timesteps": 100},
            "`num_train_timesteps` must be enough for `beta_schedule` linear .* got 100, at whose end 60% of an image",
        ),
    ],
)
def test_options_that_a_network_lacks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(**fields)


def test_times_move_towards_noise_only_where_nothing_else_places_them():
    shifts = {
        kind: DenoiserConfig(prediction_type=kind).time_shift for kind in ("flow", "edm", "epsilon", "v_prediction")
    }
    assert shifts == {"flow": 4.0, "edm": 4.0, "epsilon": 1.0, "v_prediction": 1.0}
    assert DenoiserConfig(prediction_type="epsilon", time_shift=3.0).time_shift == 3.0
    assert DenoiserConfig().time_sampling == "logit-normal"
    assert DenoiserConfig(prediction_type="epsilon").time_sampling == "uniform"


def test_labels_become_tokens_where_they_are_asked_for():
    fields = {"block_out_channels": (8, 16), "attention_levels": (1,), "attention_head_dim": 8}
    assert make(**fields).config.label_encoding == "linear"
    assert make(**fields, label_encoding="tokens").config.label_encoding == "tokens"


@pytest.mark.parametrize("fields", [{"preset": "tokens"}, {"network_output": "sample"}])
def test_networks_that_put_out_images_are_never_asked_next_to_the_clean_one(fields):
    config = DenoiserConfig(time_shift=5.0, **fields)
    assert config.puts_out_images
    scheduler = make_scheduler(config)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.min() == 208  # 5 / 20 / (1 + 4 / 20) of 1000, in whole numbers
    assert not DenoiserConfig(preset="tokens", network_output="prediction").puts_out_images
    assert not DenoiserConfig(network="small").puts_out_images
