import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from iclevr_diffusion import ICLEVR_LABELS, ConditionalDDPMPipeline
from iclevr_diffusion.lift import choose_best, measure_lift

REQUESTS = [["red cube"], "red cube AND NOT blue sphere", ["gray cube", "blue sphere"]]


@pytest.fixture
def pixel_values():
    return np.random.default_rng(0).integers(256, size=(3, 3, 16, 16), dtype=np.uint8)


def make_pipeline(unet, prediction_type):
    unet.register_to_config(prediction_type=prediction_type)
    torch.nn.init.normal_(unet.class_embedding.weight, std=1.0, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler()
    if prediction_type != "flow":
        scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    return ConditionalDDPMPipeline(unet, scheduler, ICLEVR_LABELS.names)


@pytest.mark.parametrize("prediction_type", ["flow", "epsilon"])
def test_the_lift_is_the_difference_of_losses_written_by_hand(tiny_unet, pixel_values, prediction_type):
    pipeline = make_pipeline(tiny_unet, prediction_type)
    lifts = measure_lift(pipeline, pixel_values, REQUESTS, num_draws=2)
    x_0 = torch.from_numpy(pixel_values) / 127.5 - 1
    noises = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    single = torch.zeros(3, 3)  # of each image under the red cube, the blue sphere, and gray cube with blue sphere
    class_labels = ICLEVR_LABELS.encode([["red cube"], ["blue sphere"], ["gray cube", "blue sphere"]])
    with torch.no_grad():
        for time, noise in zip((0.25, 0.75), noises, strict=True):
            timestep = 1000 * time
            x_t, target = (1 - time) * x_0 + time * noise, noise - x_0
            if prediction_type == "epsilon":
                alpha_bar = pipeline.scheduler.alphas_cumprod[int(timestep)]
                x_t, target = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise, noise.expand_as(x_0)
            without = (tiny_unet(x_t, timestep).sample - target).square().mean(dim=(1, 2, 3))
            for column, labels in enumerate(class_labels):
                prediction = tiny_unet(x_t, timestep, labels.expand(3, -1)).sample
                single[:, column] += (without - (prediction - target).square().mean(dim=(1, 2, 3))) / 2
    expected = torch.stack([single[0, 0], torch.minimum(single[1, 0], -single[1, 1]), single[2, 2]])
    assert expected.abs().min() > 1e-5
    assert_close(lifts, expected, atol=1e-6, rtol=1e-3)


def test_the_lift_of_an_image_does_not_depend_on_its_neighbours(tiny_unet, pixel_values):
    pipeline = make_pipeline(tiny_unet, "flow")
    lifts = measure_lift(pipeline, pixel_values, REQUESTS, num_draws=2)
    turned = measure_lift(pipeline, pixel_values[::-1].copy(), REQUESTS[::-1], num_draws=2, batch_size=1)
    assert_close(turned.flip(0), lifts, atol=1e-6, rtol=0)


def test_the_best_of_each_few_in_succession_is_picked():
    lifts = torch.tensor([[1.0, 3.0, 2.0, 0.0, 5.0, 4.0], [0.0, -1.0, -2.0, 9.0, 9.5, 8.0]])
    assert choose_best(lifts, 3).tolist() == [[1, 4], [0, 4]]
    assert choose_best(lifts, 2).tolist() == [[1, 2, 4], [0, 3, 4]]
