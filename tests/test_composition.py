from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from iclevr_diffusion import (
    ICLEVR_LABELS,
    ConditionalDDPMPipeline,
    ConditionalGANPipeline,
    DCGANGenerator,
    MultiLabelUNet2DModel,
)
from iclevr_diffusion.pipelines.composition import Condition, parse_prompt

PROMPT = "red cube AND NOT blue sphere:0.5"
CONDITIONS = [Condition(["red cube"]), Condition(["blue sphere"], -0.5)]


def make_pipeline(prediction_type="flow", scheduler=None, null_condition=True):
    torch.manual_seed(0)
    unet = MultiLabelUNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=8,
        null_condition=null_condition,
        prediction_type=prediction_type,
    ).eval()
    torch.nn.init.normal_(unet.class_embedding.weight, std=1.0)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipeline = ConditionalDDPMPipeline(unet, scheduler, ICLEVR_LABELS.names, 3, 2.5 if null_condition else 1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture
def rows_of_calls(pipeline):
    """Collects how many rows each call of the network has."""
    rows = []
    pipeline.unet.register_forward_pre_hook(lambda network, inputs: rows.append(len(inputs[0])))
    return rows


def draw(pipeline, requests, seeds, **kwargs):
    return pipeline(requests, seeds=seeds, output_type="pt", **kwargs).images


@pytest.mark.parametrize(
    ("prompt", "conditions"),
    [
        ("red cube", [Condition(["red cube"])]),
        (" red cube ,blue sphere ", [Condition(["red cube", "blue sphere"])]),
        ("red cube AND blue sphere", [Condition(["red cube"]), Condition(["blue sphere"])]),
        ("red cube, a:b AND NOT c", [Condition(["red cube", "a:b"]), Condition(["c"], -1.0)]),
        ("NOT a", [Condition(["a"], -1.0)]),
        ("a:1.5 AND NOT b, c : 2", [Condition(["a"], 1.5), Condition(["b", "c"], -2.0)]),
        ("ANDORRA AND\nNOTHING", [Condition(["ANDORRA"]), Condition(["NOTHING"])]),
        ("a and not b", [Condition(["a and not b"])]),
        ("", [Condition([])]),
    ],
)
def test_text_is_read_as_the_conditions_that_one_would_write(prompt, conditions):
    assert parse_prompt(prompt) == conditions


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("red cube AND", "`AND` and `NOT` must have labels beside them, got 'red cube AND'"),
        ("AND red cube", "must have labels beside"),
        ("a AND AND b", "must have labels beside"),
        ("a AND NOT", "must have labels beside"),
        ("a AND :2", "must have labels beside"),
        ("red cube NOT blue sphere", '`NOT` must stand once at the start .* "red cube AND NOT blue sphere"'),
        ("NOT NOT a", "`NOT` must stand once"),
        ("a:0", "positive finite number, got 'a:0'"),
        ("NOT a:-1", "`NOT` before the condition makes it negative"),
        ("a:nan", "positive finite number"),
        ("a:inf", "positive finite number"),
    ],
)
def test_text_of_another_form_is_refused_with_the_right_one(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt)


@pytest.mark.parametrize("weight", [0, 0.0, float("nan"), float("inf"), "1", None, True])
def test_a_weight_is_a_finite_number_other_than_zero(weight):
    with pytest.raises(ValueError, match="`weight` must be a finite number other than 0"):
        Condition(["red cube"], weight)


def test_the_labels_of_a_condition_are_a_list():
    assert Condition(["red cube"]) == Condition(("red cube",), 1)
    with pytest.raises(ValueError, match=r"got 'red cube'; write for example Condition\(\[\"red cube\"\]\)"):
        Condition("red cube")


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("request_", ["red cube, blue sphere", [[Condition(["red cube", "blue sphere"])]]])
def test_one_condition_of_weight_one_is_the_present_image_to_the_bit(pipeline, scale, interval, request_):
    kwargs = {"guidance_scale": scale, "guidance_interval": interval}
    plain = draw(pipeline, [["red cube", "blue sphere"]], [7], **kwargs)
    assert torch.equal(draw(pipeline, request_, [7], **kwargs), plain)


def test_labels_are_guided_to_the_bit_as_two_halves_of_one_call(pipeline):
    unet, scheduler = pipeline.unet, pipeline.scheduler
    scheduler.set_timesteps(3)
    sample = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    class_labels = ICLEVR_LABELS.encode([["red cube"], ["blue sphere", "gray cube"]])
    null_mask = torch.tensor([False, False, True, True])
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = unet(torch.cat([sample, sample]), t, torch.cat([class_labels, class_labels]), null_mask).sample
            conditional, unconditional = both.chunk(2)
            sample = scheduler.step(torch.lerp(unconditional, conditional, 2.5), t, sample).prev_sample
    by_hand = (unet.unstandardize(sample) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(draw(pipeline, [["red cube"], ["blue sphere", "gray cube"]], [7, 8]), by_hand)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    ("prediction_type", "scheduler"),
    [
        ("flow", FlowMatchEulerDiscreteScheduler(shift=2.0)),
        ("epsilon", DDPMScheduler(clip_sample=False)),
        ("v_prediction", DDIMScheduler(prediction_type="v_prediction", clip_sample=False)),
    ],
)
def test_a_step_follows_the_formula_written_by_hand(prediction_type, scheduler, scale):
    pipeline = make_pipeline(prediction_type, scheduler)
    unet, generator = pipeline.unet, torch.Generator().manual_seed(7)
    scheduler.set_timesteps(3)
    sample = torch.randn(1, 3, 16, 16, generator=generator)
    kwargs = {} if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else {"generator": generator}
    with torch.no_grad():
        for t in scheduler.timesteps:
            u = unet(sample, t).sample
            towards = unet(sample, t, ICLEVR_LABELS.encode([["red cube"]])).sample - u
            away = unet(sample, t, ICLEVR_LABELS.encode([["blue sphere"]])).sample - u
            sample = scheduler.step(u + scale * (towards - 0.5 * away), t, sample, **kwargs).prev_sample
    by_hand = (unet.unstandardize(sample) / 2 + 0.5).clamp(0, 1)
    for request_ in (PROMPT, [PROMPT], [CONDITIONS], [[Condition([1]), Condition([10], -0.5)]]):
        assert_close(draw(pipeline, request_, [7], guidance_scale=scale), by_hand, atol=1e-4, rtol=0)


def test_outside_of_its_interval_guidance_leaves_the_composition(pipeline):
    unguided = draw(pipeline, PROMPT, [7], guidance_scale=1.0)
    assert torch.equal(draw(pipeline, PROMPT, [7], guidance_scale=3.0, guidance_interval=(0.5, 0.5)), unguided)
    assert not torch.equal(unguided, draw(pipeline, "red cube", [7], guidance_scale=1.0))


def test_an_image_is_the_same_wherever_it_stands_among_others_of_more_and_fewer_conditions(pipeline):
    requests = [["red cube"], PROMPT, "red cube AND gray cube AND cyan cube", CONDITIONS, "NOT red cube", PROMPT]
    seeds = [1, 2, 3, 4, 5, 6]
    together = draw(pipeline, requests, seeds, micro_batch_size=2)
    for request_, seed, image in zip(requests, seeds, together, strict=True):
        assert torch.equal(draw(pipeline, [request_], [seed], micro_batch_size=2)[0], image)
    assert torch.equal(draw(pipeline, requests[::-1], seeds[::-1], micro_batch_size=2), together.flip(0))
    assert len({image.numpy().tobytes() for image in together}) == 6


def test_states_and_seeds_come_back_in_the_order_of_the_requests(pipeline):
    requests = [PROMPT, ["red cube"], PROMPT]
    output = pipeline(requests, generator=torch.Generator().manual_seed(5), num_states=1, output_type="pt")
    for seed, image, noise in zip(output.seeds, output.images, output.states[0], strict=True):
        drawn = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))
        assert_close(noise, (pipeline.unet.unstandardize(drawn[None])[0] / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
        assert image.shape == noise.shape


@pytest.mark.parametrize(
    ("request_", "scale", "rows"),
    [
        ([["red cube"]], 1.0, 1),
        ([["red cube"]], 2.0, 2),
        ("red cube AND blue sphere", 1.0, 3),
        ("red cube AND blue sphere", 2.0, 3),
        ("red cube:0.5 AND blue sphere:0.5", 1.0, 2),  # a mean needs no unconditional prediction
        ("red cube:0.5 AND blue sphere:0.5", 2.0, 3),
        ("red cube AND NOT blue sphere", 1.0, 3),
    ],
)
def test_a_step_is_one_call_with_the_rows_that_it_needs(pipeline, rows_of_calls, request_, scale, rows):
    draw(pipeline, request_, [1], guidance_scale=scale)
    assert rows_of_calls == [rows] * 3


def test_an_image_without_a_condition_is_one_row(pipeline, rows_of_calls):
    draw(pipeline, None, [1, 2], num_images=2)
    assert rows_of_calls == [2] * 3


def test_a_model_without_a_null_condition_says_why_it_cannot_compose():
    pipeline = make_pipeline(null_condition=False)
    message = r"`class_labels\[1\]` must be one condition, or several whose weights sum to 1, got weights of .*: this model was trained wi"
    with pytest.raises(ValueError, match=message):
        draw(pipeline, [["red cube"], "red cube AND NOT blue sphere"], [1, 2])
    text = draw(pipeline, ["red cube", "red cube:0.5 AND blue sphere:0.5"], [1, 2])
    assert torch.equal(text[:1], draw(pipeline, [["red cube"]], [1]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (["red cube", "red cub"], r"`class_labels\[1\]`: Unknown label 'red cub'; did you mean 'red cube'"),
        (["red cube", "blue cube, blue cube"], r"`class_labels\[1\]` must name a label once"),
        ([["red cube"], ""], r"`class_labels\[1\]` asks for an empty scene"),
        (["red cube AND"], r"`class_labels\[0\]`: `AND` and `NOT` must have labels beside them"),
        (CONDITIONS, r"for one image write \[\[Condition"),
        (Condition(["red cube"]), r"for one image write \[\[Condition"),
        ([[Condition(["red cube"]), "blue sphere"]], r"labels must not stand beside conditions, got 'blue sphere'"),
        ([["red cube AND blue sphere"]], "given as text or as a list of `Condition` an image"),
        ([["red cube"], "red cube", 3], r"`class_labels\[2\]`: an image must be text"),
    ],
)
def test_what_is_no_composition_is_refused_by_its_place(pipeline, request_, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline, request_, None)


def test_labels_whose_names_hold_such_words_are_given_as_lists(pipeline):
    names = ["rock AND roll", "NOT red", *ICLEVR_LABELS.names[2:]]
    named = ConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, names, 3, 2.5)
    labels = ["NOT red", "rock AND roll"]
    plain = draw(pipeline, [[0, 1]], [7])
    assert torch.equal(draw(named, [labels], [7]), plain)
    assert torch.equal(draw(named, [[Condition(labels)]], [7]), plain)
    with pytest.raises(ValueError, match="for one image write"):  # not that conditions are summed elsewhere
        named.encode_labels("NOT red")


def test_the_number_of_images_does_not_go_with_text(pipeline):
    with pytest.raises(ValueError, match="`num_images` goes with `class_labels=None` only"):
        pipeline("red cube", 2)


@pytest.mark.parametrize("request_", [PROMPT, [PROMPT], [CONDITIONS], [[PROMPT]], CONDITIONS])
def test_a_pipeline_of_one_call_refuses_compositions_clearly(request_):
    generator = DCGANGenerator(num_classes=24, sample_size=16, latent_dim=4, base_channels=4)
    refused = [partial(ConditionalGANPipeline(generator, ICLEVR_LABELS.names), request_)]
    refused.append(partial(make_pipeline().encode_labels, request_))
    for call in refused:
        with pytest.raises(ValueError, match="only the call of a diffusion pipeline sums conditions"):
            call()
