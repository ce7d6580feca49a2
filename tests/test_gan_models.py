import copy
import inspect
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from iclevr_diffusion.losses import gradient_penalty, r1_penalty
from iclevr_diffusion.models import acgan, cgan, dcgan, projection, sagan, wgan
from iclevr_diffusion.models.acgan import ACGANDiscriminator
from iclevr_diffusion.models.cgan import (
    CGANDiscriminator,
    CGANEmbeddingDiscriminator,
    CGANEmbeddingGenerator,
    CGANGenerator,
)
from iclevr_diffusion.models.dcgan import DCGANDiscriminator, DCGANGenerator
from iclevr_diffusion.models.projection import ProjectionDiscriminator
from iclevr_diffusion.models.sagan import SAGANDiscriminator, SAGANGenerator, SelfAttention
from iclevr_diffusion.models.wgan import WGANCritic

MODULES = (acgan, cgan, dcgan, projection, sagan, wgan)
TINY = {"num_classes": 5, "sample_size": 16, "base_channels": 8}
GENERATORS = {
    "DCGAN": lambda **sizes: DCGANGenerator(**{**TINY, "latent_dim": 6, **sizes}),
    "DCGAN with a ReLU": lambda **sizes: DCGANGenerator(
        **{**TINY, "latent_dim": 6, "label_activation": True, **sizes}
    ),
    "SAGAN": lambda **sizes: SAGANGenerator(**{**TINY, "latent_dim": 6, **sizes}),
    "CGAN": lambda **sizes: CGANGenerator(**{**TINY, "latent_dim": 6, "hidden_dim": 12, **sizes}),
    "CGAN with an embedding": lambda **sizes: CGANEmbeddingGenerator(
        **{**TINY, "out_channels": 3, "latent_dim": 6, "embedding_dim": 4, **sizes}
    ),
}
LABEL_DISCRIMINATORS = {
    "DCGAN": lambda **sizes: DCGANDiscriminator(**{**TINY, **sizes}),
    "SAGAN": lambda **sizes: SAGANDiscriminator(**{**TINY, **sizes}),
    "CGAN": lambda **sizes: CGANDiscriminator(**{**TINY, "hidden_dim": 12, **sizes}),
    "CGAN with an embedding": lambda **sizes: CGANEmbeddingDiscriminator(
        **{**TINY, "in_channels": 3, "embedding_dim": 4, **sizes}
    ),
    "WGAN": lambda **sizes: WGANCritic(**{**TINY, **sizes}),
    "WGAN with a penalty": lambda **sizes: WGANCritic(**{**TINY, "norm": "layer", **sizes}),
    "projection": lambda **sizes: ProjectionDiscriminator(**{**TINY, **sizes}),
}
DISCRIMINATORS = {"ACGAN": lambda **sizes: ACGANDiscriminator(**{**TINY, "base_channels": 2, **sizes})}
DISCRIMINATORS |= LABEL_DISCRIMINATORS
ALL = {f"{name} generator": make for name, make in GENERATORS.items()} | {
    f"{name} discriminator": make for name, make in DISCRIMINATORS.items()
}


def make_model(make, **sizes):
    """Builds a model whose gates are open: the attention of a SAGAN would pass nothing on at first."""
    torch.manual_seed(0)
    model = make(**sizes)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            nn.init.constant_(module.gamma, 0.5)
    return model


def make_inputs(model, batch: int = 4):
    """Noise or images, and labels of which each row differs from its neighbours."""
    generator, config = torch.Generator().manual_seed(1), model.config
    if "latent_dim" in config:
        first = torch.randn(batch, config.latent_dim, generator=generator)
    else:
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        first = torch.rand(shape, generator=generator) * 2 - 1
    class_labels = torch.eye(config.num_classes)[torch.arange(batch) % config.num_classes]
    class_labels[:, 0] = 1
    return first, class_labels


def output_of(model, *inputs):
    """The images of a generator; of a discriminator all its logits, side by side."""
    output = model(*inputs)
    if isinstance(output, torch.Tensor):
        return output
    return torch.cat([logits.view(len(logits), -1) for logits in output if logits is not None], dim=1)


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
@pytest.mark.parametrize(("sample_size", "out_channels"), [(16, 3), (32, 1), (64, 4)])
def test_a_generator_draws_images_of_its_size_in_its_range(make, sample_size, out_channels):
    generator = make_model(make, sample_size=sample_size, out_channels=out_channels)
    images = generator(*make_inputs(generator))
    assert images.shape == (4, out_channels, sample_size, sample_size)
    assert images.abs().max() <= 1
    assert images.std() > 0
    config = generator.config
    assert (config.latent_dim, config.num_classes, config.sample_size, config.out_channels) == (
        6,
        5,
        sample_size,
        out_channels,
    )


@pytest.mark.parametrize("make", DISCRIMINATORS.values(), ids=DISCRIMINATORS)
@pytest.mark.parametrize(("sample_size", "in_channels"), [(16, 3), (32, 1), (64, 4)])
def test_a_discriminator_gives_one_logit_an_image(make, sample_size, in_channels):
    discriminator = make_model(make, sample_size=sample_size, in_channels=in_channels)
    logits, class_logits = discriminator(*make_inputs(discriminator))
    assert logits.shape == (4,)
    if isinstance(discriminator, ACGANDiscriminator):
        assert class_logits.shape == (4, 5)
    else:
        assert class_logits is None


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_parameter_gets_a_gradient(make):
    model = make_model(make)
    output = output_of(model, *make_inputs(model))
    (output * torch.randn(output.shape)).sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not without


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_reloaded_model_gives_the_same(make, tmp_path):
    model = make_model(make)
    inputs = make_inputs(model)
    model(*inputs)  # moves the statistics of normalizations off their first values
    model.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    reloaded = type(model).from_pretrained(tmp_path)
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(reloaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    # Close, not equal: a spectral norm is a sum, which a kernel rounds by where in memory the weight lies.
    assert_close(output_of(reloaded, *inputs), output_of(model, *inputs), atol=1e-6, rtol=1e-5)
    assert {k: v for k, v in reloaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_copied_model_gives_the_same(make):
    model = make_model(make).eval()
    inputs = make_inputs(model)
    assert torch.equal(output_of(copy.deepcopy(model), *inputs), output_of(model, *inputs))


@pytest.mark.parametrize("make", [*GENERATORS.values(), *LABEL_DISCRIMINATORS.values()])
def test_the_output_depends_on_the_labels_and_on_what_is_beside_them(make):
    model = make_model(make).eval()
    first, class_labels = make_inputs(model)
    output = output_of(model, first, class_labels)
    assert not torch.allclose(output_of(model, first, class_labels.roll(1, 0)), output, atol=1e-6)
    assert not torch.allclose(output_of(model, first.roll(1, 0), class_labels), output, atol=1e-6)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_an_image_of_a_batch_does_not_depend_on_the_others_once_trained(make):
    model = make_model(make).eval()
    first, class_labels = make_inputs(model)
    alone = output_of(model, first[:1], class_labels[:1])
    assert_close(output_of(model, first, class_labels)[:1], alone, atol=1e-5, rtol=1e-4)


def test_a_critic_for_a_gradient_penalty_scores_each_image_by_itself_while_training():
    critic = make_model(LABEL_DISCRIMINATORS["WGAN with a penalty"]).train()
    images, class_labels = make_inputs(critic)
    assert_close(critic(images, class_labels)[0][:1], critic(images[:1], class_labels[:1])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", DISCRIMINATORS.values(), ids=DISCRIMINATORS)
def test_penalties_of_the_gradient_reach_the_parameters(make):
    discriminator = make_model(make)
    images, class_labels = make_inputs(discriminator)
    r1_penalty(lambda x: discriminator(x, class_labels)[0], images).backward()
    total = sum(weight.grad.square().sum() for weight in discriminator.parameters() if weight.grad is not None)
    assert torch.isfinite(total)
    assert total > 0
    gradient_penalty(lambda x: discriminator(x, class_labels)[0], images, images.flip(0)).backward()


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_a_generator_refuses_inputs_that_do_not_fit(make):
    generator = make_model(make)
    latents, class_labels = make_inputs(generator)
    with pytest.raises(ValueError, match=r"`latents` must have shape \(batch, 6\), got \(4, 5\); draw them"):
        generator(latents[:, :5], class_labels)
    with pytest.raises(ValueError, match=r"`latents` must have shape \(batch, 6\), got \(6,\)"):
        generator(latents[0], class_labels)
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(4, 5\), got \(4, 4\); .*encode_labels"):
        generator(latents, class_labels[:, :4])
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(4, 5\), got \(1, 5\)"):
        generator(latents, class_labels[:1])
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(4, 5\), got None"):
        generator(latents, None)


@pytest.mark.parametrize("make", DISCRIMINATORS.values(), ids=DISCRIMINATORS)
def test_a_discriminator_refuses_images_that_do_not_fit(make):
    discriminator = make_model(make)
    images, class_labels = make_inputs(discriminator)
    for wrong in (images[:, :1], images[..., :8], images[0]):
        with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(batch, 3, 16, 16\), got .*; resize"):
            discriminator(wrong, class_labels)


@pytest.mark.parametrize("make", LABEL_DISCRIMINATORS.values(), ids=LABEL_DISCRIMINATORS)
def test_a_discriminator_of_labels_refuses_labels_that_do_not_fit(make):
    discriminator = make_model(make)
    images, class_labels = make_inputs(discriminator)
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(4, 5\), got \(4, 4\); .*encode_labels"):
        discriminator(images, class_labels[:, :4])
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(4, 5\), got None"):
        discriminator(images, None)


def test_a_discriminator_that_reads_labels_does_not_look_at_those_it_is_given():
    discriminator = make_model(DISCRIMINATORS["ACGAN"]).eval()
    images, class_labels = make_inputs(discriminator)
    assert torch.equal(output_of(discriminator, images, class_labels), output_of(discriminator, images))
    assert torch.equal(output_of(discriminator, images, None), output_of(discriminator, images))


POWERS_OF_TWO = [make for name, make in ALL.items() if "ACGAN" not in name and "embedding" not in name]


@pytest.mark.parametrize("make", POWERS_OF_TWO)
@pytest.mark.parametrize(
    ("size", "nearest"), [(0, "16x16"), (8, "16x16"), (24, "16x16 or 32x32"), (48, "32x32 or 64x64")]
)
def test_a_size_without_stages_to_it_is_refused(make, size, nearest):
    with pytest.raises(ValueError, match=f"`sample_size` must be a power of two .* got {size}; .* to {nearest}.$"):
        make(sample_size=size)


@pytest.mark.parametrize(
    ("make", "size", "nearest"),
    [
        (ALL["ACGAN discriminator"], 20, "a multiple of 8, got 20; resize the images to 16x16 or 24x24"),
        (ALL["ACGAN discriminator"], 4, "a multiple of 8, got 4; resize the images to 8x8"),
        (ALL["CGAN with an embedding generator"], 30, "a multiple of 4, got 30; resize the images to 28x28 or 32x32"),
        (ALL["CGAN with an embedding discriminator"], 2, "a multiple of 4, got 2; resize the images to 4x4"),
    ],
)
def test_a_size_that_is_no_multiple_is_refused(make, size, nearest):
    with pytest.raises(ValueError, match=f"`sample_size` must be {nearest}"):
        make(sample_size=size)


@pytest.mark.parametrize("make", [SAGANGenerator, SAGANDiscriminator])
@pytest.mark.parametrize(("channels", "nearest"), [(12, "8 or 16"), (4, "8")])
def test_a_width_that_attention_cannot_divide_is_refused(make, channels, nearest):
    with pytest.raises(ValueError, match=f"`base_channels` must be a multiple of 8.* got {channels}; take {nearest}"):
        make(base_channels=channels)


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match='`norm` must be "batch" or "layer", got \'spectral\''):
        WGANCritic(norm="spectral")


UNLABELLED = {name: ALL[name] for name in ("CGAN generator", "CGAN discriminator", "WGAN discriminator")}


@pytest.mark.parametrize("make", UNLABELLED.values(), ids=UNLABELLED)
def test_a_model_without_classes_needs_no_labels_and_refuses_any(make):
    model = make_model(make, num_classes=0).eval()
    first, _ = make_inputs(make_model(make))
    output = output_of(model, first)
    assert torch.equal(output_of(model, first, torch.zeros(4, 0)), output)
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(4, 0\), got \(4, 5\)"):
        model(first, torch.zeros(4, 5))


@pytest.mark.parametrize("kind", [DCGANGenerator, SAGANGenerator])
def test_a_standardized_generator_draws_deviations_from_the_mean_image(kind):
    torch.manual_seed(0)
    generator = kind(**TINY, standardized=True).eval()
    latents, class_labels = make_inputs(generator)
    deviation = generator(latents, class_labels)
    mean = torch.rand(3, 16, 16)
    generator.set_data_statistics(mean, 0.25)
    torch.testing.assert_close(generator(latents, class_labels), mean + 0.25 * deviation)
    with pytest.raises(ValueError, match=r"`mean` must be finite, of shape \(3, 16, 16\), and `std` positive"):
        generator.set_data_statistics(mean[:, :1], 0.25)
    with pytest.raises(ValueError, match="`standardized` must be true"):
        kind(**TINY).set_data_statistics(mean, 0.25)


def test_labels_after_a_relu_are_not_negative():
    seen = {}
    for name in ("DCGAN", "DCGAN with a ReLU", "SAGAN"):
        generator = make_model(GENERATORS[name])
        generator.layers[0].register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        generator(*make_inputs(generator))
        assert seen[name].shape == (4, 6 + 6, 1, 1)
    assert (seen["DCGAN"][:, 6:] < 0).any()
    assert (seen["DCGAN with a ReLU"][:, 6:] >= 0).all()
    assert (seen["SAGAN"][:, 6:] >= 0).all()


@pytest.mark.parametrize("kind", [CGANEmbeddingGenerator, CGANEmbeddingDiscriminator])
def test_the_embedding_of_a_one_hot_row_is_a_row_of_a_table(kind):
    layer = kind(**TINY).label_embedding
    table = nn.Embedding.from_pretrained(layer.weight.detach().T)
    assert torch.equal(layer(torch.eye(5)), table(torch.arange(5)))
    assert_close(layer(torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])), table.weight[0] + table.weight[2])


def test_a_projection_is_the_inner_product_of_the_sum_of_label_rows_with_the_summed_features():
    discriminator = make_model(LABEL_DISCRIMINATORS["projection"]).eval()
    images, class_labels = make_inputs(discriminator)
    features = discriminator.layers(images).sum((2, 3))
    assert features.shape == (4, 16)
    rows = discriminator.label_embedding.weight.T  # (5, 16)
    for index, labels in enumerate(class_labels):
        embedding = sum(rows[label] for label in labels.nonzero().flatten())
        expected = discriminator.real_head(features[index]).squeeze() + embedding @ features[index]
        assert_close(discriminator(images, class_labels)[0][index], expected)
    unlabelled = discriminator(images, torch.zeros(4, 5))[0]
    assert_close(unlabelled, discriminator.real_head(features).flatten())


def test_self_attention_starts_as_the_identity():
    sample = torch.randn(2, 8, 4, 6)
    assert torch.equal(SelfAttention(8)(sample), sample)


def test_self_attention_follows_its_equations_cell_by_cell():
    torch.manual_seed(0)
    attention = SelfAttention(16).eval()
    nn.init.constant_(attention.gamma, 0.7)
    sample = torch.randn(1, 16, 2, 3)
    cells = sample[0].flatten(1).T  # (6, 16)
    f, g, h, v = (
        layer.weight.flatten(1) for layer in (attention.key, attention.query, attention.value, attention.output)
    )
    expected = []
    for x_j in cells:
        beta = torch.stack([(f @ x_i) @ (g @ x_j) for x_i in cells]).softmax(0)  # eq. 1
        o_j = v @ sum(weight * (h @ x_i) for weight, x_i in zip(beta, cells, strict=True))  # eq. 2
        expected.append(0.7 * o_j + x_j)  # eq. 3
    assert_close(attention(sample), torch.stack(expected).T.view(1, 16, 2, 3), atol=1e-5, rtol=1e-4)


SPECTRAL = ["SAGAN generator", "SAGAN discriminator", "ACGAN discriminator", "projection discriminator"]


@pytest.mark.parametrize("name", SPECTRAL)
def test_every_convolution_has_a_spectral_norm_of_one(name):
    model = make_model(ALL[name]).eval()
    convolutions = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
    assert convolutions
    for convolution in convolutions:
        # A transposed convolution keeps its output channels in the second dimension.
        dim = 1 if isinstance(convolution, nn.ConvTranspose2d) else 0
        matrix = convolution.weight.detach().transpose(0, dim).flatten(1)
        # The power iteration comes close from below: it never makes the norm too small.
        assert 0.999 < torch.linalg.matrix_norm(matrix, 2) < 1.1


@pytest.mark.parametrize("name", ["DCGAN generator", "DCGAN discriminator", "WGAN discriminator", "CGAN generator"])
def test_weights_are_drawn_as_the_papers_say(name):
    model = make_model(ALL[name], base_channels=32)
    for module in model.layers:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.weight.numel() > 5000:
            assert_close(module.weight.std().item(), 0.02, atol=1e-3, rtol=0)
            assert abs(module.weight.mean().item()) < 1e-3
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert_close(module.weight.mean().item(), 1.0, atol=0.02, rtol=0)
            assert 0.01 < module.weight.std() < 0.03
            assert not module.bias.any()


def test_an_acgan_discriminator_drops_whole_channels_only_while_training():
    discriminator = make_model(DISCRIMINATORS["ACGAN"], dropout=0.5)
    dropout = discriminator.layers[2]
    assert type(dropout) is nn.Dropout2d
    dropped = dropout(torch.ones(50, 8, 2, 2))
    assert ((dropped == 0).flatten(2).all(2) | (dropped == 2).flatten(2).all(2)).all()
    images, _ = make_inputs(discriminator)
    assert not torch.equal(discriminator(images)[0], discriminator(images)[0])
    discriminator.eval()
    assert torch.equal(discriminator(images)[0], discriminator(images)[0])


# Shapes at each stage, of 64x64 images at the papers' widths: what leaves each layer of each kind, in order. Channels
# of 1/8 of the width make the same network small; `scaled` multiplies them back.
STAGES = {
    "DCGAN generator": {
        "ConvTranspose2d": [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32), (24, 64, 64)],
    },
    "DCGAN discriminator": {
        "Conv2d": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (8, 1, 1)],
        "BatchNorm2d": [(128, 16, 16), (256, 8, 8), (512, 4, 4)],
    },
    "SAGAN generator": {
        "ConvTranspose2d": [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32), (24, 64, 64)],
        "SelfAttention": [(128, 16, 16), (64, 32, 32)],
        "BatchNorm2d": [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32)],
    },
    "SAGAN discriminator": {
        "SelfAttention": [(256, 8, 8), (512, 4, 4)],
        "LeakyReLU": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
    },
    "ACGAN discriminator": {
        "Conv2d": [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 16, 16), (256, 8, 8), (512, 8, 8)],
        "BatchNorm2d": [(32, 32, 32), (64, 16, 16), (128, 16, 16), (256, 8, 8), (512, 8, 8)],
        "Dropout2d": [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 16, 16), (256, 8, 8), (512, 8, 8)],
    },
    "CGAN generator": {
        "Linear": [(96,), (8 * 1024,)],
        "Unflatten": [(512, 4, 4)],
        "ConvTranspose2d": [(256, 8, 8), (128, 16, 16), (64, 32, 32), (24, 64, 64)],
    },
    "CGAN discriminator": {
        "Conv2d": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
        "BatchNorm2d": [(128, 16, 16), (256, 8, 8), (512, 4, 4)],
        "Flatten": [(8 * 1024,)],
        "Linear": [(96,), (8,)],
    },
    "WGAN with a penalty discriminator": {
        "Conv2d": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (8, 1, 1)],
        "GroupNorm": [(128, 16, 16), (256, 8, 8), (512, 4, 4)],
        "BatchNorm2d": [],
    },
    "projection discriminator": {
        "Conv2d": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
        "BatchNorm2d": [],
    },
}


def stages_of(model, scaled: int) -> dict[str, list[tuple[int, ...]]]:
    shapes = defaultdict(list)

    def note(module, inputs, output):
        channels, *cells = output.shape[1:]
        shapes[type(module).__name__.removeprefix("Parametrized")].append((channels * scaled, *cells))

    for module in model.modules():
        if module is not model and module is not getattr(model, "label_embedding", None):
            module.register_forward_hook(note)
    model(*make_inputs(model, batch=2))
    return shapes


@pytest.mark.parametrize("name", STAGES)
def test_the_shape_at_each_stage_is_the_papers(name):
    shapes = stages_of(make_model(ALL[name], sample_size=64), scaled=8)
    assert {kind: shapes[kind] for kind in STAGES[name]} == STAGES[name]


def test_the_shape_at_each_stage_of_a_cgan_with_an_embedding_is_that_of_digits():
    generator = make_model(GENERATORS["CGAN with an embedding"], sample_size=28, out_channels=1)
    shapes = stages_of(generator, scaled=8)
    assert shapes["Unflatten"] == [(128, 7, 7)]
    assert shapes["ConvTranspose2d"] == [(64, 14, 14), (8, 28, 28)]
    discriminator = make_model(DISCRIMINATORS["CGAN with an embedding"], sample_size=28, in_channels=1)
    shapes = stages_of(discriminator, scaled=8)
    assert shapes["Conv2d"] == [(64, 14, 14), (128, 7, 7)]
    assert shapes["Linear"] == [(8,)]


def norms(*widths: int) -> int:
    """Scale and shift of normalizations."""
    return 2 * sum(widths)


def attention(channels: int) -> int:
    """f, g and h to an eighth of the channels, v back, and gamma."""
    return 4 * channels * (channels // 8) + 1


DCGAN_UP = 4 * 4 * (512 * 256 + 256 * 128 + 128 * 64 + 64 * 3)
DCGAN_DOWN = 4 * 4 * (4 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1)
NUM_PARAMETERS = {
    DCGANGenerator: (24 * 100 + 100) + 4 * 4 * 200 * 512 + DCGAN_UP + norms(512, 256, 128, 64),
    DCGANDiscriminator: (24 * 64 * 64 + 64 * 64) + DCGAN_DOWN + norms(128, 256, 512),
    WGANCritic: (24 * 64 * 64 + 64 * 64) + DCGAN_DOWN + norms(128, 256, 512),
    ACGANDiscriminator: 3 * 3 * (3 * 16 + 16 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 512)
    + (16 + 32 + 64 + 128 + 256 + 512)
    + norms(32, 64, 128, 256, 512)
    + (8 * 8 * 512 + 1) * (1 + 24),
    SAGANGenerator: (24 * 100 + 100)
    + 4 * 4 * 200 * 512
    + (DCGAN_UP + 3)
    + norms(512, 256, 128, 64)
    + attention(128)
    + attention(64),
    SAGANDiscriminator: (24 * 64 * 64 + 64 * 64)
    + (DCGAN_DOWN + 64 + 128 + 256 + 512 + 1)
    + attention(256)
    + attention(512),
    ProjectionDiscriminator: 4 * 4 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512)
    + (64 + 128 + 256 + 512)
    + (512 + 1)
    + 24 * 512,
    CGANGenerator: (100 + 24) * 1024
    + 1024 * 512 * 4 * 4
    + norms(1024, 512 * 4 * 4)
    + DCGAN_UP
    + 3
    + norms(256, 128, 64),
    CGANDiscriminator: 4 * 4 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512)
    + 64
    + norms(128, 256, 512)
    + (512 * 4 * 4 + 24) * 1024
    + norms(1024)
    + (1024 + 1),
    CGANEmbeddingGenerator: 10 * 10
    + (100 + 10) * 128 * 7 * 7
    + norms(128 * 7 * 7, 64)
    + 4 * 4 * (128 * 64 + 64 * 1)
    + 1,
    CGANEmbeddingDiscriminator: 10 * 10 + 4 * 4 * ((1 + 10) * 64 + 64 * 128) + 64 + norms(128) + (128 * 7 * 7 + 1),
}


@pytest.mark.parametrize("kind", NUM_PARAMETERS, ids=lambda kind: kind.__name__)
def test_the_full_size_has_the_parameters_of_its_layers(kind):
    assert sum(weight.numel() for weight in kind().parameters()) == NUM_PARAMETERS[kind]


@pytest.mark.parametrize("name", ["_check_shape", "_count_stages"])
def test_functions_that_each_file_holds_for_itself_are_the_same(name):
    sources = {inspect.getsource(getattr(module, name)) for module in MODULES if hasattr(module, name)}
    assert len(sources) == 1
