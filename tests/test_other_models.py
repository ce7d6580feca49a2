import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, ModelMixin
from torch import Tensor, nn
from torch.testing import assert_close

from iclevr_diffusion import ConditionalDDPMPipeline, MultiLabelUNet2DModel
from iclevr_diffusion.checkpoint import load_checkpoint, save_checkpoint
from iclevr_diffusion.models.cyclegan import CycleGANDiscriminator, CycleGANGenerator, ImagePool
from iclevr_diffusion.models.unet_small import ResidualBlock, SmallMultiLabelUNet
from iclevr_diffusion.models.vae_multilabel import MultiLabelVAE, logits_to_images


def make_unet(**kwargs) -> SmallMultiLabelUNet:
    torch.manual_seed(0)
    return SmallMultiLabelUNet(**{"num_classes": 5, "sample_size": 16, "base_channels": 8, **kwargs})


def make_vae(**kwargs) -> MultiLabelVAE:
    torch.manual_seed(0)
    sizes = {"latent_dim": 4, "num_classes": 5, "sample_size": 16, "in_channels": 1, "hidden_widths": (8, 12)}
    return MultiLabelVAE(**{**sizes, **kwargs})


def make_generator(**kwargs) -> CycleGANGenerator:
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "block_out_channels": (4, 6, 8), "num_residual_blocks": 2}
    return CycleGANGenerator(**{**sizes, **kwargs})


def make_discriminator(**kwargs) -> CycleGANDiscriminator:
    torch.manual_seed(0)
    return CycleGANDiscriminator(**{"sample_size": 16, "block_out_channels": (4, 6, 8), **kwargs})


MODELS: dict[str, Callable[[], ModelMixin]] = {
    "U-Net": make_unet,
    "U-Net without time": lambda: make_unet(use_time_embedding=False),
    "U-Net without labels": lambda: make_unet(use_label_embedding=False),
    "U-Net with early labels": lambda: make_unet(label_injection="early"),
    "deep U-Net": lambda: make_unet(num_levels=4),
    "U-Net of 28x28 digits": lambda: make_unet(in_channels=1, sample_size=28, null_condition=True),
    "VAE of layers": lambda: make_vae(architecture="mlp"),
    "VAE of convolutions": make_vae,
    "VAE of layers without labels": lambda: make_vae(architecture="mlp", num_classes=0, sample_size=28),
    "VAE of convolutions without labels": lambda: make_vae(num_classes=0, in_channels=3, sample_size=20),
    "CycleGAN generator": make_generator,
    "CycleGAN generator from gray": lambda: make_generator(in_channels=1, sample_size=20),
    "CycleGAN discriminator": make_discriminator,
    "CycleGAN discriminator of gray": lambda: make_discriminator(in_channels=1, sample_size=28),
}


@pytest.fixture(params=MODELS)
def model(request) -> ModelMixin:
    return MODELS[request.param]()


def images_for(model: ModelMixin) -> Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, config.in_channels, config.sample_size, config.sample_size, generator=generator) * 2 - 1


def labels_for(model: ModelMixin) -> Tensor | None:
    num_classes = model.config.get("num_classes", 0)
    return torch.eye(num_classes)[:2] if num_classes else None


def outputs_of(model: ModelMixin, labels: Tensor | None = None) -> list[Tensor]:
    """Everything that a model makes of two images and, where it takes them, labels."""
    images, labels = images_for(model), labels_for(model) if labels is None else labels
    if isinstance(model, SmallMultiLabelUNet):
        return [model(images, torch.tensor([3.0, 700.0]), labels).sample]
    torch.manual_seed(2)
    if isinstance(model, MultiLabelVAE):
        return list(model(images, labels))
    return [model(images)]


def stages_of(model: nn.Module, call: Callable[[], object], names: list[str]) -> list[tuple[int, ...]]:
    """The shapes (without the batch) that modules put out, in the order of `names`."""
    shapes = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, args, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    call()
    return [shapes[name] for name in names]


def test_the_outputs_have_their_shapes(model):
    config, shapes = model.config, [tuple(output.shape) for output in outputs_of(model)]
    image = (2, config.in_channels, config.sample_size, config.sample_size)
    if isinstance(model, SmallMultiLabelUNet):
        assert shapes == [image]
    elif isinstance(model, MultiLabelVAE):
        assert shapes == [image, (2, config.latent_dim), (2, config.latent_dim)]
    elif isinstance(model, CycleGANGenerator):
        assert shapes == [(2, config.out_channels, config.sample_size, config.sample_size)]
    else:
        side = config.sample_size // 4 - 2
        assert shapes == [(2, 1, side, side)]


def test_every_parameter_gets_a_gradient(model):
    sum(output.square().mean() for output in outputs_of(model)).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not without


def test_a_reloaded_model_puts_out_the_same(model, tmp_path):
    model.train()
    outputs_of(model)  # moves the running statistics away from where they start
    model.eval().save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    for ours, theirs in zip(outputs_of(model), outputs_of(reloaded), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in MODELS if "VAE" not in name])  # it draws noise for a whole batch
def test_what_a_model_makes_of_an_image_does_not_depend_on_its_neighbours(name):
    model = MODELS[name]().eval()
    (both,) = outputs_of(model)
    if isinstance(model, SmallMultiLabelUNet):
        alone = model(images_for(model)[1:], 700.0, labels_for(model)[1:]).sample
    else:
        alone = model(images_for(model)[1:])
    assert_close(alone[0], both[1])


@pytest.mark.parametrize("name", [name for name in MODELS if "without labels" not in name and "CycleGAN" not in name])
def test_the_outputs_depend_on_the_labels(name):
    model = MODELS[name]().eval()
    for plain, flipped in zip(outputs_of(model), outputs_of(model, labels_for(model).flip(0)), strict=True):
        assert not torch.allclose(plain, flipped)


# The small U-Net


def test_the_small_unet_has_the_reports_shapes_at_each_stage():
    with torch.device("meta"):
        unet = SmallMultiLabelUNet()
        names = ["stem", "down_blocks.0", "down_blocks.1", "pool", "expand", "up_blocks.1", "up_blocks.0", "head"]
        names += ["label_embeddings.1", "time_embeddings.1", "label_embeddings.0", "time_embeddings.0"]
        shapes = stages_of(unet, lambda: unet(torch.zeros(1, 3, 64, 64), 5, torch.zeros(1, 24)), names)
    assert shapes[:4] == [(256, 64, 64), (256, 32, 32), (512, 16, 16), (512, 2, 2)]
    assert shapes[4:8] == [(512, 16, 16), (256, 32, 32), (256, 64, 64), (3, 64, 64)]
    assert shapes[8:] == [(512,), (512,), (256,), (256,)]


def test_the_deeper_small_unet_pools_four_pixels_to_one():
    with torch.device("meta"):
        unet = SmallMultiLabelUNet(num_levels=4)
        names = ["down_blocks.1", "down_blocks.2", "down_blocks.3", "pool", "expand", "up_blocks.3", "up_blocks.0"]
        shapes = stages_of(unet, lambda: unet(torch.zeros(1, 3, 64, 64), 5, torch.zeros(1, 24)), names)
    assert shapes[:5] == [(512, 16, 16), (1024, 8, 8), (2048, 4, 4), (2048, 1, 1), (2048, 4, 4)]
    assert shapes[5:] == [(1024, 8, 8), (256, 64, 64)]
    assert unet.pool[0].kernel_size == 4 and unet.expand[0].kernel_size == unet.expand[0].stride == (4, 4)


def double_conv(before: int, after: int) -> int:
    return 9 * before * after + 2 * after + 9 * after * after + 2 * after


def embedding(before: int, width: int) -> int:
    return before * width + width + width * width + width


def up_block(before: int, after: int) -> int:
    return 4 * before * after + after + 2 * double_conv(after, after)


def head(width: int) -> int:
    return 9 * 2 * width * width + width + 2 * width + 9 * width * 3 + 3


def test_the_small_unet_has_as_many_parameters_as_the_reports_layers():
    trunk = double_conv(3, 256) + double_conv(256, 256) + double_conv(256, 512)
    trunk += 8 * 8 * 512 * 512 + 512 + 2 * 512
    trunk += up_block(512 + 512, 256) + up_block(256 + 256, 256) + head(256)
    labels, time = embedding(24, 512) + embedding(24, 256), embedding(1, 512) + embedding(1, 256)
    with torch.device("meta"):
        assert SmallMultiLabelUNet().num_parameters() == trunk + labels + time
        assert SmallMultiLabelUNet(use_time_embedding=False).num_parameters() == trunk + labels
        assert SmallMultiLabelUNet(use_label_embedding=False).num_parameters() == trunk + time
        early = SmallMultiLabelUNet(label_injection="early")
    assert early.num_parameters() == trunk + 2 * embedding(24, 256) + 2 * embedding(1, 256)


def test_the_deeper_and_the_narrower_small_unet_have_as_many_parameters_as_their_layers():
    deeper = double_conv(3, 256) + double_conv(256, 256)
    deeper += double_conv(256, 512) + double_conv(512, 1024) + double_conv(1024, 2048)
    deeper += 4 * 4 * 2048 * 2048 + 2048 + 2 * 2048
    deeper += up_block(4096, 1024) + up_block(2048, 512) + up_block(1024, 256) + up_block(512, 256) + head(256)
    deeper += sum(embedding(24, width) + embedding(1, width) for width in (256, 512, 1024, 2048))
    narrower = double_conv(3, 128) + double_conv(128, 128) + double_conv(128, 256)
    narrower += 8 * 8 * 256 * 256 + 256 + 2 * 256 + up_block(512, 128) + up_block(256, 128) + head(128)
    narrower += sum(embedding(65, width) + embedding(1, width) for width in (128, 256))
    with torch.device("meta"):
        assert SmallMultiLabelUNet(num_levels=4).num_parameters() == deeper
        assert SmallMultiLabelUNet(num_classes=65, base_channels=128).num_parameters() == narrower


@pytest.mark.parametrize(("before", "after"), [(3, 4), (4, 4)])
def test_a_residual_block_adds_its_input_or_its_first_half_and_keeps_the_variance(before, after):
    torch.manual_seed(0)
    block, x = ResidualBlock(before, after).eval(), torch.randn(2, before, 5, 5)
    for half in (block.first, block.second):
        nn.init.uniform_(half[1].running_mean)
        nn.init.uniform_(half[1].running_var, 0.5, 2)

    def half(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        normal = (F.conv2d(x, conv.weight, padding=1) - norm.running_mean[:, None, None]) / (
            norm.running_var[:, None, None] + norm.eps
        ).sqrt()
        return 0.5 * normal * (1 + torch.erf(normal / math.sqrt(2)))

    first = half(x, *block.first[:2])
    second = half(first, *block.second[:2])
    assert_close(block(x), ((x if before == after else first) + second) / 2**0.5)


def inputs_and_outputs(unet, *arguments) -> dict[str, tuple[Tensor, Tensor]]:
    seen = {}
    for name, module in unet.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    unet(*arguments)
    return seen


def test_labels_scale_and_times_shift_what_goes_up():
    unet = make_unet().eval()
    class_labels = torch.eye(5)[:2]
    seen = inputs_and_outputs(unet, images_for(unet), torch.tensor([0, 250]), class_labels)
    for level, below in ((1, "expand"), (0, "up_blocks.1")):
        label = unet.label_embeddings[level](class_labels)[:, :, None, None]
        time = unet.time_embeddings[level](torch.tensor([[0.0], [0.25]]))[:, :, None, None]
        skip = seen[f"down_blocks.{level}"][1]
        assert_close(seen[f"up_blocks.{level}"][0], torch.cat([label * seen[below][1] + time, skip], dim=1))
    assert_close(seen["down_blocks.0"][0], seen["stem"][1])
    assert_close(seen["head"][0], torch.cat([seen["up_blocks.0"][1], seen["stem"][1]], dim=1))


def test_early_labels_and_times_are_added_to_what_goes_down():
    unet = make_unet(label_injection="early").eval()
    class_labels = torch.eye(5)[:2]
    seen = inputs_and_outputs(unet, images_for(unet), torch.tensor([0, 250]), class_labels)
    for level, above in ((0, "stem"), (1, "down_blocks.0")):
        label = unet.label_embeddings[level](class_labels)[:, :, None, None]
        time = unet.time_embeddings[level](torch.tensor([[0.0], [0.25]]))[:, :, None, None]
        assert_close(seen[f"down_blocks.{level}"][0], seen[above][1] + label + time)
    assert_close(seen["up_blocks.1"][0], torch.cat([seen["expand"][1], seen["down_blocks.1"][1]], dim=1))


def test_each_embedding_that_is_switched_off_is_not_looked_at():
    for switch in ("use_time_embedding", "use_label_embedding"):
        unet = make_unet(**{switch: False}).eval()
        images, class_labels = images_for(unet), torch.eye(5)[:2]
        plain = unet(images, 3, class_labels).sample
        other_time, other_labels = unet(images, 900, class_labels).sample, unet(images, 3, class_labels.flip(0)).sample
        assert torch.equal(plain, other_time) == (switch == "use_time_embedding")
        assert torch.equal(plain, other_labels) == (switch == "use_label_embedding")


def test_the_null_mask_sets_the_labels_to_zeros():
    unet = make_unet(null_condition=True).eval()
    images, class_labels = images_for(unet), torch.eye(5)[:2]
    masked = unet(images, 3, class_labels, torch.tensor([True, False])).sample
    unconditioned, conditioned = unet(images, 3).sample, unet(images, 3, class_labels).sample
    assert_close(masked, torch.stack([unconditioned[0], conditioned[1]]))
    assert_close(unet(images, 3, torch.zeros(2, 5)).sample, unconditioned)
    assert not torch.allclose(unconditioned, conditioned)


def test_the_time_is_a_fraction_of_the_schedule():
    short, long = make_unet(num_train_timesteps=400).eval(), make_unet().eval()
    images, class_labels = images_for(short), torch.eye(5)[:2]
    assert_close(short(images, 100, class_labels).sample, long(images, 250, class_labels).sample)
    both = short(images, torch.tensor([100, 100]), class_labels, return_dict=False)[0]
    assert torch.equal(both, short(images, torch.tensor(100), class_labels).sample)


@pytest.mark.parametrize("name", ["set_data_statistics", "standardize", "unstandardize"])
def test_both_unets_standardize_by_the_same_words(name):
    assert inspect.getsource(getattr(SmallMultiLabelUNet, name)) == inspect.getsource(
        getattr(MultiLabelUNet2DModel, name)
    )


def test_the_mean_image_is_saved(tmp_path):
    unet = make_unet()
    unet.set_data_statistics(torch.rand(3, 16, 16), 0.3)
    unet.save_pretrained(tmp_path)
    reloaded = SmallMultiLabelUNet.from_pretrained(tmp_path)
    assert torch.equal(reloaded.data_mean, unet.data_mean) and reloaded.data_std == unet.data_std


def make_pipeline(**kwargs) -> ConditionalDDPMPipeline:
    unet = make_unet(**kwargs).eval()
    unet.set_data_statistics(torch.tensor(0.1), 0.5)
    scheduler = DDPMScheduler(clip_sample=False, beta_schedule="linear")
    pipeline = ConditionalDDPMPipeline(unet, scheduler, [f"label {i}" for i in range(unet.config.num_classes)], 3)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_pipeline_draws_by_the_small_unet():
    pipeline = make_pipeline()
    images = pipeline(torch.tensor([1, 3]), seeds=[5, 6], output_type="pt").images  # integer labels, one an image
    assert images.shape == (2, 3, 16, 16) and images.std() > 0
    alone = pipeline([["label 3"]], seeds=6, output_type="pt").images
    assert_close(alone[0], images[1])
    assert not torch.allclose(pipeline([["label 2"]], seeds=6, output_type="pt").images, alone)


def test_the_pipeline_guides_the_small_unet_away_from_masked_labels():
    pipeline = make_pipeline(null_condition=True)
    call = {"seeds": [5, 6], "num_inference_steps": 1, "output_type": "pt"}
    states: dict[float, Tensor] = {}

    def keep(pipeline, step, timestep, values):
        states[len(states)] = values["sample"]

    for guidance_scale in (1.0, 3.0):
        pipeline([["label 1"], ["label 3"]], guidance_scale=guidance_scale, callback_on_step_end=keep, **call)
    pipeline(None, 2, callback_on_step_end=keep, **call)
    conditional, guided, unconditional = states.values()
    assert not torch.allclose(conditional, unconditional)
    assert_close(guided, unconditional + 3 * (conditional - unconditional))  # one step is linear in the prediction


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sample_size": 30}, "multiple of 2 .* = 4 .* got 30; resize the images to 28 or 32"),
        ({"sample_size": 60}, "got 60; resize the images to 56 or 64"),
        ({"sample_size": 2}, "got 2; resize the images to 4, or use fewer levels"),
        ({"num_levels": 4, "sample_size": 40}, "= 16 .* got 40; resize the images to 32 or 48"),
        ({"num_levels": 0}, "`num_levels` must be at least 1, got 0"),
        ({"base_channels": 12}, "`base_channels` must be a multiple of 8, got 12"),
        ({"label_injection": "late"}, "`label_injection` must be `film` or `early`, got 'late'"),
        ({"prediction_type": "noise"}, "`prediction_type`"),
        ({"use_label_embedding": False, "null_condition": True}, "`null_condition` must be False"),
        ({"empty_condition": True, "null_condition": True}, "`null_condition` and `empty_condition` must not both"),
    ],
)
def test_options_of_the_small_unet_that_do_not_fit_are_refused_with_the_way_out(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_unet(**kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 3, 32, 32)}, r"`sample` must have shape \(batch, 3, 16, 16\)"),
        ({"sample": torch.zeros(2, 1, 16, 16)}, "`sample` must have shape"),
        ({"sample": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "dtype torch.float32, got torch.uint8"),
        ({"class_labels": torch.zeros(2, 4)}, r"`class_labels` must have shape \(2, 5\)"),
        ({"class_labels": torch.zeros(1, 5)}, r"`class_labels` must have shape \(2, 5\)"),
        ({"null_mask": torch.zeros(2)}, "`null_mask` must be booleans"),
        ({"null_mask": torch.zeros(1, dtype=torch.bool)}, r"`null_mask` must be booleans of shape \(2,\)"),
    ],
)
def test_inputs_of_the_small_unet_that_do_not_fit_are_refused(change, message):
    inputs = {"sample": torch.zeros(2, 3, 16, 16), "timestep": 3, "class_labels": torch.eye(5)[:2]} | change
    with pytest.raises(ValueError, match=message):
        make_unet(null_condition=True)(**inputs)


def test_a_small_unet_without_label_dropout_refuses_to_leave_the_labels_out():
    unet = make_unet()
    for arguments in ((None,), (torch.eye(5)[:2], torch.zeros(2, dtype=torch.bool))):
        with pytest.raises(ValueError, match="label dropout"):
            unet(torch.zeros(2, 3, 16, 16), 3, *arguments)


def test_the_small_unet_runs_in_half_precision():
    unet = make_unet().eval()
    images, class_labels = images_for(unet), torch.eye(5)[:2]
    with torch.autocast("cpu", torch.bfloat16):
        assert unet(images, 3, class_labels).sample.dtype == torch.bfloat16
    half = unet.to(torch.bfloat16)
    assert half(images.bfloat16(), 3, class_labels).sample.dtype == torch.bfloat16


# The variational auto-encoder


def test_the_vae_of_digits_has_as_many_parameters_as_the_reports_layers():
    counted = 784 * 400 + 400 + 2 * (400 * 20 + 20) + 20 * 400 + 400 + 400 * 784 + 784
    digits = {"num_classes": 0, "sample_size": 28, "in_channels": 1, "architecture": "mlp"}
    with torch.device("meta"):
        assert MultiLabelVAE(latent_dim=20, **digits).num_parameters() == counted == 652_824
        wider = MultiLabelVAE(latent_dim=60, **digits)
        labelled = MultiLabelVAE(latent_dim=20, **{**digits, "num_classes": 10})
    assert wider.num_parameters() == counted + 40 * (2 * 401 + 400)
    assert labelled.num_parameters() == counted + 2 * 10 * 400


def test_the_vae_of_convolutions_has_the_shapes_and_as_many_parameters_as_its_layers():
    with torch.device("meta"):
        vae = MultiLabelVAE(latent_dim=60, num_classes=24, sample_size=64)
        names = [f"encoder.{i}" for i in (2, 5, 8, 11, 13)] + [f"decoder.{i}" for i in (1, 5, 8, 11, 12)]
        shapes = stages_of(vae, lambda: vae(torch.zeros(1, 3, 64, 64), torch.zeros(1, 24)), names)
    assert shapes[:5] == [(32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (120,)]
    assert shapes[5:] == [(256, 4, 4), (128, 8, 8), (64, 16, 16), (32, 32, 32), (3, 64, 64)]
    encoder = 16 * (27 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 2 * (32 + 64 + 128 + 256) + 4096 * 120 + 120
    decoder = 84 * 4096 + 4096 + 16 * (256 * 128 + 128 * 64 + 64 * 32 + 32 * 3) + 2 * (128 + 64 + 32) + 3
    assert vae.num_parameters() == encoder + decoder


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_the_vae_decodes_latents_drawn_by_mean_and_variance(architecture):
    vae = make_vae(architecture=architecture).eval()
    images, class_labels = images_for(vae), torch.eye(5)[:2]
    torch.manual_seed(3)
    logits, mean, log_variance = vae(images, class_labels)
    torch.manual_seed(3)
    noise = torch.randn(2, 4)
    assert_close((mean, log_variance), vae.encode(images, class_labels))
    decoded = vae.decode(mean + log_variance.exp().sqrt() * noise, class_labels)
    assert_close(2 * logits.sigmoid() - 1, decoded)
    assert_close(logits_to_images(logits), decoded)


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_the_vaes_encoder_sees_standardized_images(architecture):
    vae = make_vae(architecture=architecture).eval()
    images, class_labels = images_for(vae), torch.eye(5)[:2]
    expected = vae.encode(images, class_labels)
    vae.set_data_statistics(torch.full((1, 16, 16), 0.5).numpy(), 0.25)
    assert_close(vae.encode(images * 0.25 + 0.5, class_labels), expected)
    for mean, std in ((torch.zeros(1), 1.0), (torch.zeros(1, 16, 16), 0.0)):
        with pytest.raises(ValueError, match=r"`mean` must have shape \(1, 16, 16\) and `std` be positive"):
            vae.set_data_statistics(mean, std)


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_the_vae_draws_in_the_range_of_images(architecture):
    vae = make_vae(architecture=architecture)
    last = [layer for layer in vae.decoder if hasattr(layer, "bias")][-1]
    nn.init.constant_(last.bias, 10.0)
    pixels = vae.decode(torch.zeros(2, 4), torch.eye(5)[:2])
    assert 0.99 < pixels.mean() <= 1 and pixels.max() <= 1


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_both_halves_of_the_vae_look_at_the_labels(architecture):
    vae = make_vae(architecture=architecture).eval()
    images, class_labels, latents = images_for(vae), torch.eye(5)[:2], torch.ones(2, 4)
    mean, _ = vae.encode(images, class_labels)
    assert not torch.allclose(vae.encode(images, class_labels.flip(0))[0], mean)
    assert not torch.allclose(vae.decode(latents, class_labels)[0], vae.decode(latents, class_labels)[1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sample_size": 18}, r"multiple of 2 \*\* len\(hidden_widths\) = 4, got 18; resize the images to 16 or 20"),
        ({"sample_size": 2}, "got 2; resize the images to 4, or give fewer"),
        ({"sample_size": 28, "hidden_widths": None}, "= 16, got 28; resize the images to 16 or 32"),
        ({"hidden_widths": ()}, "`hidden_widths` must hold at least one width"),
        ({"architecture": "resnet"}, "`architecture` must be `mlp` or `conv`, got 'resnet'"),
        ({"latent_dim": 0}, "`latent_dim` must be at least 1, got 0"),
        ({"num_classes": -1}, "`num_classes` must be at least 0, got -1"),
    ],
)
def test_sizes_of_the_vae_that_do_not_fit_are_refused_with_the_way_out(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_vae(**kwargs)


def test_inputs_of_the_vae_that_do_not_fit_are_refused():
    vae, images = make_vae(), torch.zeros(2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(batch, 1, 16, 16\), got \(2, 3, 16, 16\)"):
        vae.encode(torch.zeros(2, 3, 16, 16), torch.eye(5)[:2])
    with pytest.raises(ValueError, match=r"`latents` must have shape \(batch, 4\), got \(2, 5\)"):
        vae.decode(torch.zeros(2, 5), torch.eye(5)[:2])
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(2, 5\), got \(2, 4\)"):
        vae(images, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(2, 5\), got None"):
        vae.decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`class_labels` must be left out"):
        make_vae(num_classes=0)(images, torch.eye(5)[:2])


# CycleGAN


def test_the_cyclegan_generator_has_the_papers_shapes_and_parameters():
    with torch.device("meta"):
        generator = CycleGANGenerator(num_residual_blocks=9)
        names = ["stem", "down_blocks.0", "down_blocks.1", "residual_blocks.8", "up_blocks.0", "up_blocks.1", "head"]
        shapes = stages_of(generator, lambda: generator(torch.zeros(1, 3, 64, 64)), names)
        smaller = CycleGANGenerator()
    assert shapes[:4] == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (256, 16, 16)]
    assert shapes[4:] == [(128, 32, 32), (64, 64, 64), (3, 64, 64)]
    block = 2 * 9 * 256 * 256
    ends = 49 * 3 * 64 + 2 * 9 * (64 * 128 + 128 * 256) + 49 * 64 * 3 + 3
    assert generator.num_parameters() == ends + 9 * block
    assert smaller.num_parameters() == ends + 6 * block


def test_the_cyclegan_discriminator_has_the_papers_shapes_parameters_and_patches():
    with torch.device("meta"):
        discriminator = CycleGANDiscriminator()
        names = [f"layers.{i}" for i in (1, 4, 7, 10, 11)]
        shapes = stages_of(discriminator, lambda: discriminator(torch.zeros(1, 3, 64, 64)), names)
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 7, 7), (1, 6, 6)]
    convs = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert discriminator.num_parameters() == convs + 64 + 1
    assert all(layer.negative_slope == 0.2 for layer in discriminator.layers if isinstance(layer, nn.LeakyReLU))
    patch = 1
    for layer in reversed([layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]):
        patch = (patch - 1) * layer.stride[0] + layer.kernel_size[0]
    assert patch == 70


def test_the_cyclegan_generator_reflects_the_borders_where_the_resolution_stays():
    generator, image = make_generator(), torch.rand(1, 3, 16, 16)
    conv = generator.stem[0]
    assert_close(conv(image), F.conv2d(F.pad(image, [3] * 4, mode="reflect"), conv.weight))
    first, norm, _ = generator.residual_blocks[0].layers[0]
    second = generator.residual_blocks[0].layers[1]
    x = torch.randn(1, 8, 4, 4)
    hidden = norm(F.conv2d(F.pad(x, [1] * 4, mode="reflect"), first.weight)).relu()
    hidden = norm(F.conv2d(F.pad(hidden, [1] * 4, mode="reflect"), second.weight))
    assert_close(generator.residual_blocks[0](x), x + hidden)


def test_cyclegans_weights_start_as_the_paper_says():
    for network in (make_generator(block_out_channels=(32, 64)), make_discriminator(block_out_channels=(32, 64))):
        weights = torch.cat([value.flatten() for name, value in network.named_parameters() if "weight" in name])
        assert_close(weights.std(), torch.tensor(0.02), rtol=0.05, atol=0)
        assert all((value == 0).all() for name, value in network.named_parameters() if "bias" in name)


def test_the_cyclegan_generator_draws_in_the_range_of_images():
    generator = make_generator()
    nn.init.constant_(generator.head[0].bias, 5.0)
    pixels = generator(images_for(generator))
    assert 0.99 < pixels.mean() <= 1 and pixels.max() <= 1


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (make_generator, {"sample_size": 18}, "= 4 and at least 8, got 18; resize the images to 16 or 20"),
        (make_generator, {"sample_size": 4}, "at least 8, got 4; resize the images to 8, or give fewer"),
        (make_generator, {"block_out_channels": ()}, "`block_out_channels` must hold at least one"),
        (make_generator, {"num_residual_blocks": -1}, "`num_residual_blocks` must not be negative, got -1"),
        (make_discriminator, {"sample_size": 8}, "= 4 and at least 12, got 8; resize the images to 12"),
        (make_discriminator, {"sample_size": 17}, "got 17; resize the images to 16 or 20"),
    ],
)
def test_sizes_of_cyclegan_that_do_not_fit_are_refused_with_the_way_out(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize("make", [make_generator, make_discriminator])
def test_images_that_do_not_fit_cyclegan_are_refused(make):
    for shape in ((2, 1, 16, 16), (2, 3, 20, 20), (3, 16, 16)):
        with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(batch, 3, 16, 16\), got"):
            make()(torch.zeros(shape))


@pytest.mark.parametrize(("make", "least"), [(make_generator, 8), (make_discriminator, 12)])
def test_the_smallest_size_that_is_not_refused_works(make, least):
    network = make(sample_size=least)
    assert torch.isfinite(network(images_for(network))).all()


def numbered(*numbers: int) -> Tensor:
    """Images (B, 1, 1, 1) that are their numbers."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None, None]


def test_a_pool_that_is_not_full_shows_what_is_new():
    pool = ImagePool(capacity=3)
    assert torch.equal(pool.exchange(numbered(1, 2)), numbered(1, 2))
    assert torch.equal(torch.stack(pool.images), numbered(1, 2))


def test_a_full_pool_shows_an_old_image_half_of_the_time_and_keeps_the_new_one_in_its_place():
    pool, generator = ImagePool(capacity=3), torch.Generator().manual_seed(0)
    pool.exchange(numbered(1, 2, 3), generator)
    num_old = 0
    for number in range(4, 404):
        before = [int(image) for image in pool.images]
        shown = int(pool.exchange(numbered(number), generator))
        after = [int(image) for image in pool.images]
        if shown == number:
            assert after == before
        else:
            num_old += 1
            assert after == [number if old == shown else old for old in before] and shown in before
    assert 160 < num_old < 240  # 200 expected, with a deviation of 10


def test_a_pool_draws_from_the_generator_alone():
    shown = []
    for _ in range(2):
        pool, generator = ImagePool(capacity=2), torch.Generator().manual_seed(7)
        shown.append(torch.cat([pool.exchange(numbered(i, i + 1), generator) for i in range(0, 40, 2)]))
    assert torch.equal(*shown)


def test_gradients_and_later_changes_of_an_image_do_not_reach_the_pool():
    pool, images = ImagePool(capacity=2), numbered(1, 2).requires_grad_()
    assert not pool.exchange(images).requires_grad
    images.data.fill_(9.0)
    assert torch.equal(torch.stack(pool.images), numbered(1, 2))
    while all(image < 3 for image in pool.images):
        images = numbered(3)
        pool.exchange(images)
        images.fill_(9.0)
    assert not any(image == 9 or image.requires_grad for image in pool.images)


@pytest.mark.parametrize("num_before", [0, 1, 20])
def test_a_resumed_pool_goes_on_as_if_it_had_not_stopped(num_before, tmp_path):
    pool = ImagePool(capacity=4)
    for number in range(num_before):
        torch.manual_seed(number)
        pool.exchange(numbered(number))
    folder = save_checkpoint(tmp_path, num_before, {"pool": pool}, {})
    resumed = ImagePool(capacity=4)
    load_checkpoint(folder, {"pool": resumed})
    for number in range(num_before, num_before + 20):
        shown = []
        for each in (pool, resumed):
            torch.manual_seed(number)
            shown.append(each.exchange(numbered(number)))
        assert torch.equal(*shown)


def test_pools_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`capacity` must be at least 1, got 0"):
        ImagePool(0)
    pool = ImagePool(2)
    pool.exchange(numbered(1, 2))
    with pytest.raises(ValueError, match="at most this pool's 1 images, got 2"):
        ImagePool(1).load_state_dict(pool.state_dict())
