from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch.testing import assert_close

from iclevr_diffusion import MultiLabelUNet2DModel
from iclevr_diffusion.judging import weights_sha256
from iclevr_diffusion.models.unet_multilabel import PRESETS

TINY = {
    "num_classes": 5,
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_levels": (1,),
    "attention_head_dim": 8,
}


def make_unet(**kwargs) -> MultiLabelUNet2DModel:
    torch.manual_seed(0)
    return MultiLabelUNet2DModel(**{**TINY, **kwargs})


def make_inputs(in_channels: int = 3, sample_size: int = 16):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, in_channels, sample_size, sample_size, generator=generator)
    return sample, torch.tensor([3.0, 700.0]), torch.eye(5)[:2]


MODELS: dict[str, Callable[[], MultiLabelUNet2DModel]] = {
    "plain": make_unet,
    "folded": lambda: make_unet(patch_size=4, norm_num_groups=4),
    "with a null row": lambda: make_unet(null_condition=True, patch_size=2),
    "gray": lambda: make_unet(in_channels=1),
    "of tokens": lambda: make_unet(label_encoding="tokens"),
    "of tokens with a null row": lambda: make_unet(label_encoding="tokens", null_condition=True, patch_size=2),
    "of images": lambda: make_unet(prediction_type="flow", network_output="sample", patch_size=2),
    "preconditioned": lambda: make_unet(prediction_type="edm"),
    "with transparency": lambda: make_unet(in_channels=4, sample_size=24),
}


@pytest.fixture(params=MODELS)
def unet(request) -> MultiLabelUNet2DModel:
    return MODELS[request.param]()


def inputs_of(unet):
    return make_inputs(unet.config.in_channels, unet.config.sample_size)


def test_the_prediction_has_the_shape_of_the_sample(unet):
    sample, timestep, class_labels = inputs_of(unet)
    assert unet(sample, timestep, class_labels).sample.shape == sample.shape
    assert torch.equal(
        unet(sample, timestep, class_labels, return_dict=False)[0], unet(sample, timestep, class_labels).sample
    )


def test_every_parameter_gets_a_gradient(unet):
    sample, timestep, class_labels = inputs_of(unet)
    null_mask = torch.tensor([True, False]) if unet.config.null_condition else None
    unet(sample, timestep, class_labels, null_mask).sample.square().mean().backward()
    without = [name for name, parameter in unet.named_parameters() if parameter.grad is None]
    assert not without


def test_a_reloaded_model_predicts_the_same_noise(unet, tmp_path):
    unet.set_data_statistics(torch.rand_like(unet.data_mean), 0.3)
    unet.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    reloaded = MultiLabelUNet2DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(*inputs_of(unet)).sample, unet(*inputs_of(unet)).sample)
    assert torch.equal(reloaded.data_mean, unet.data_mean)
    assert reloaded.data_std == unet.data_std
    for name, value in unet.config.items():
        if not name.startswith("_"):  # tuples come back from JSON as lists
            assert reloaded.config[name] == (list(value) if isinstance(value, tuple) else value)


def test_the_prediction_depends_on_time_and_labels(unet):
    sample, timestep, class_labels = inputs_of(unet)
    prediction = unet(sample, timestep, class_labels).sample
    assert not torch.equal(unet(sample, timestep + 100, class_labels).sample, prediction)
    assert not torch.equal(unet(sample, timestep, class_labels.flip(0)).sample, prediction)


def test_the_embedding_of_several_labels_is_the_sum_of_theirs():
    unet = make_unet()
    embed = lambda row: unet.class_embedding(torch.tensor(row)) - unet.class_embedding.bias  # noqa: E731
    both = embed([1.0, 0.0, 1.0, 0.0, 0.0])
    assert_close(both, embed([1.0, 0.0, 0.0, 0.0, 0.0]) + embed([0.0, 0.0, 1.0, 0.0, 0.0]))


def test_the_null_mask_takes_the_null_row_in_place_of_the_labels():
    unet = make_unet(null_condition=True).eval()
    torch.nn.init.normal_(unet.null_embedding)
    sample, timestep, class_labels = make_inputs()
    masked = unet(sample, timestep, class_labels, torch.tensor([True, False])).sample
    assert_close(masked[0], unet(sample, timestep).sample[0])
    assert_close(masked[1], unet(sample, timestep, class_labels).sample[1])
    empty = unet(sample, timestep, torch.zeros_like(class_labels)).sample
    assert not torch.allclose(empty[0], masked[0])


def make_token_unet(**kwargs):
    unet = make_unet(label_encoding="tokens", null_condition=True, **kwargs).eval()
    for embedding in (unet.null_embedding, unet.set_embedding):
        torch.nn.init.normal_(embedding)
    return unet


def test_the_image_attends_to_the_tokens_of_its_labels_alone():
    unet = make_token_unet()
    sample, timestep, _ = make_inputs()
    class_labels = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    before = unet(sample, timestep, class_labels).sample
    unet.class_embedding.weight.data[:, [1, 3, 4]] += 5
    assert torch.equal(unet(sample, timestep, class_labels).sample, before)
    unet.class_embedding.weight.data[:, 2] += 5
    after = unet(sample, timestep, class_labels).sample
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_the_order_of_tokens_has_no_effect():
    unet, other = make_token_unet(), make_token_unet()
    order = [3, 0, 4, 1, 2]
    other.class_embedding.weight.data = unet.class_embedding.weight.data[:, order]
    sample, timestep, _ = make_inputs()
    class_labels = torch.tensor([[1.0, 0, 1, 0, 1], [0, 1, 0, 1, 0]])
    expected = unet(sample, timestep, class_labels).sample
    assert_close(other(sample, timestep, class_labels[:, order]).sample, expected, rtol=1e-4, atol=1e-5)


def test_no_condition_is_a_token_of_its_own():
    unet = make_token_unet()
    sample, timestep, class_labels = make_inputs()
    masked = unet(sample, timestep, class_labels, torch.tensor([True, False])).sample
    assert_close(masked[0], unet(sample, timestep).sample[0])
    assert_close(masked[1], unet(sample, timestep, class_labels).sample[1])
    empty = unet(sample, timestep, torch.zeros_like(class_labels)).sample
    unet.class_embedding.weight.data += 5
    assert_close(unet(sample, timestep, class_labels, torch.tensor([True, True])).sample[0], masked[0])
    assert not torch.allclose(empty[0], masked[0])


def test_heads_of_tokens_have_the_width_that_is_asked_for():
    unet = make_unet(label_encoding="tokens", attention_levels=(0, 1))
    widths = {module.inner_dim // module.heads for module in unet.modules() if isinstance(module, Attention)}
    assert widths == {8}


def test_times_of_a_preconditioned_network_are_spread_before_they_are_embedded():
    edm, other = make_unet(prediction_type="edm").eval(), make_unet(prediction_type="v_prediction").eval()
    sample, _, class_labels = make_inputs()
    c_noise = torch.tensor([-0.3, 0.7])
    assert torch.equal(edm(sample, c_noise, class_labels).sample, other(sample, 1000 * c_noise, class_labels).sample)
    assert torch.equal(
        edm(sample[:1], 0.7, class_labels[:1]).sample, edm(sample[:1], c_noise[1], class_labels[:1]).sample
    )


def test_a_velocity_follows_from_the_image_that_a_network_puts_out():
    of_images = make_unet(prediction_type="flow", network_output="sample").eval()
    plain = make_unet(prediction_type="flow").eval()
    sample, _, class_labels = make_inputs()
    timestep = torch.tensor([200.0, 900.0])
    x_0 = plain(sample, timestep, class_labels).sample
    velocity = of_images(sample, timestep, class_labels).sample
    assert_close(sample - timestep.view(-1, 1, 1, 1) / 1000 * velocity, x_0)
    noise = (sample - (1 - 0.9) * x_0) / 0.9
    assert_close(velocity[1], (noise - x_0)[1])
    for one in (900.0, 900, torch.tensor(900.0)):  # of all images
        assert_close(of_images(sample, one, class_labels).sample[1], velocity[1])


def test_next_to_the_clean_image_a_velocity_stays_finite():
    unet, plain = (make_unet(prediction_type="flow", network_output=kind).eval() for kind in ("sample", "prediction"))
    sample, _, class_labels = make_inputs()
    velocity = unet(sample, 0, class_labels).sample
    assert_close(velocity, (sample - plain(sample, 0, class_labels).sample) / 0.001)
    timestep = torch.tensor([20.0, 40.0])
    x_0 = plain(sample, timestep, class_labels).sample
    stepped = sample - timestep.view(-1, 1, 1, 1) / 1000 * unet(sample, timestep, class_labels).sample
    assert_close(stepped, x_0, rtol=1e-4, atol=1e-5)  # the last step ends at the image


def test_a_velocity_of_half_precision_is_that_of_single_precision_rounded():
    unet = make_unet(prediction_type="flow", network_output="sample").eval().to(torch.bfloat16)
    plain = make_unet(prediction_type="flow").eval().to(torch.bfloat16)
    sample, _, class_labels = make_inputs()
    sample = sample.to(torch.bfloat16)
    x_0 = plain(sample, 437.0, class_labels).sample
    expected = ((sample.float() - x_0.float()) / 0.437).to(torch.bfloat16)
    assert torch.equal(unet(sample, 437.0, class_labels).sample, expected)


def test_the_preset_of_tokens_never_changes():
    assert PRESETS["tokens"] == {
        "patch_size": 8,
        "block_out_channels": (96, 128),
        "layers_per_block": 1,
        "attention_levels": (0, 1),
        "attention_head_dim": 32,
        "norm_num_groups": 8,
        "prediction_type": "flow",
        "label_encoding": "tokens",
        "network_output": "sample",
    }


@pytest.mark.parametrize(
    ("name", "older", "other"),
    [("label_encoding", "linear", "tokens"), ("network_output", "prediction", "sample")],
)
def test_later_arguments_leave_an_older_weights_hash_alone(name, older, other):
    unet = make_unet()
    assert unet.config[name] == older
    before = weights_sha256(unet)
    unet.register_to_config(**{name: other})
    assert weights_sha256(unet) != before
    unet._internal_dict = type(unet.config)({key: unet.config[key] for key in unet.config if key != name})
    assert weights_sha256(unet) == before


def test_folding_keeps_every_pixel_where_the_network_is_the_identity():
    unet = make_unet(patch_size=2, block_out_channels=(16, 16))

    class Identity(torch.nn.Module):
        def forward(self, sample, timestep, class_labels):
            assert sample.shape == (2, 12, 8, 8)
            return type("Output", (), {"sample": sample})

    unet.unet = Identity()
    sample, timestep, class_labels = make_inputs()
    assert torch.equal(unet(sample, timestep, class_labels).sample, sample)


def test_standardized_images_have_unit_deviation_and_come_back():
    unet = make_unet()
    pixels = torch.randn(8, 3, 16, 16) * 0.2 + torch.linspace(-0.5, 0.5, 16)
    mean = pixels.mean(0)
    unet.set_data_statistics(mean, (pixels - mean).std())
    assert_close(unet.standardize(pixels).std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert_close(unet.unstandardize(unet.standardize(pixels)), pixels)
    unet.set_data_statistics(torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([2.0]))
    assert_close(unet.standardize(torch.zeros(1, 3, 16, 16))[0, :, 0, 0], torch.tensor([-0.05, -0.1, -0.15]))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(3, 8, 8), 1.0, r"\(3, 16, 16\).*got \(3, 8, 8\)"),
        (torch.zeros(3, 16, 16), 0.0, "`std`"),
        (torch.zeros(3, 16, 16), torch.ones(3), "`std`"),
        (torch.zeros(3, 16, 16), float("nan"), "`std`"),
        (torch.full((3, 16, 16), float("inf")), 1.0, "`mean`"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        make_unet().set_data_statistics(mean, std)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        # 113,673,219 of diffusers' UNet2DModel, and 24 * 512 + 512 of the label embedding
        ("reported", 113_673_219 + 24 * 512 + 512),
        ("base", 13_521_644),
        ("tiny", 5_964_816),
        ("tokens", 6_117_312),
    ],
)
def test_a_preset_keeps_its_size(name, num_parameters):
    with torch.device("meta"):
        unet = MultiLabelUNet2DModel.from_preset(name)
    assert unet.num_parameters() == num_parameters


def test_the_reported_preset_is_the_reports_network():
    with torch.device("meta"):
        unet = MultiLabelUNet2DModel.from_preset("reported").unet
        expected = UNet2DModel(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
            class_embed_type="identity",
        )
    shapes = {name: parameter.shape for name, parameter in unet.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in expected.named_parameters()}
    ours, theirs = dict(unet.config), dict(expected.config)
    assert {key: ours[key] for key in theirs if key != "_use_default_values"} == {
        key: theirs[key] for key in theirs if key != "_use_default_values"
    }


def test_a_preset_takes_other_arguments_and_other_names_are_refused():
    unet = MultiLabelUNet2DModel.from_preset("tiny", num_classes=3, sample_size=32)
    assert unet(torch.zeros(1, 3, 32, 32), 5, torch.ones(1, 3)).sample.shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match=", ".join(PRESETS)):
        MultiLabelUNet2DModel.from_preset("large")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sample_size": 15}, "multiple of .* = 2, got 15; resize the images to 14 or 16"),
        ({"sample_size": 20, "patch_size": 4}, "multiple of .* = 8, got 20; resize the images to 16 or 24"),
        ({"sample_size": 1}, "resize the images to 2"),
        ({"attention_levels": (2,)}, "`attention_levels`"),
        ({"norm_num_groups": 5}, "`block_out_channels` must be multiples of norm_num_groups"),
        ({"attention_head_dim": 24}, "attention_head_dim = 24, got 32"),
        ({"prediction_type": "noise"}, "`prediction_type`"),
        ({"label_encoding": "text"}, "`label_encoding` must be `linear` or `tokens`, got 'text'"),
        ({"network_output": "image"}, "`network_output` must be `prediction` or `sample`, got 'image'"),
        ({"network_output": "sample"}, "`network_output`, .* must be .* is `flow`, .* got 'sample' and 'epsilon'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_way_out(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_unet(**kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 3, 32, 32)}, r"`sample` must have shape \(batch, 3, 16, 16\)"),
        ({"sample": torch.zeros(2, 1, 16, 16)}, "`sample` must have shape"),
        ({"sample": torch.zeros(3, 16, 16)}, "`sample` must have shape"),
        ({"sample": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "dtype torch.float32, got torch.uint8"),
        ({"sample": torch.zeros(2, 3, 16, 16, dtype=torch.float64)}, "dtype torch.float32, got torch.float64"),
        ({"class_labels": torch.zeros(2, 4)}, r"`class_labels` must have shape \(2, 5\)"),
        ({"class_labels": torch.zeros(1, 5)}, r"`class_labels` must have shape \(2, 5\)"),
        ({"null_mask": torch.zeros(2)}, "`null_mask` must be booleans"),
        ({"null_mask": torch.zeros(1, dtype=torch.bool)}, r"`null_mask` must be booleans of shape \(2,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    sample, timestep, class_labels = make_inputs()
    inputs = {"sample": sample, "timestep": timestep, "class_labels": class_labels} | change
    with pytest.raises(ValueError, match=message):
        make_unet(null_condition=True)(**inputs)


def test_a_model_without_a_null_row_refuses_to_leave_the_labels_out():
    sample, timestep, class_labels = make_inputs()
    unet = make_unet()
    with pytest.raises(ValueError, match="label dropout"):
        unet(sample, timestep)
    with pytest.raises(ValueError, match="label dropout"):
        unet(sample, timestep, class_labels, torch.zeros(2, dtype=torch.bool))


def test_autocast_runs_the_float32_weights_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert make_unet()(*make_inputs()).sample.dtype == torch.bfloat16


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = make_unet(), make_unet()
    checkpointed.enable_gradient_checkpointing()
    for unet in (plain, checkpointed):
        unet.train()(*make_inputs()).sample.square().mean().backward()
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())
    for first, second in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert_close(first.grad, second.grad)
