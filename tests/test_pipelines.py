import inspect
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close

from iclevr_diffusion import ICLEVR_LABELS, ConditionalDDPMPipeline, MultiLabelUNet2DModel, load_pipeline

LABELS = [["red cube", "blue sphere"], ["gray cylinder"], ["cyan cube"], ["green sphere", "gray cube", "red sphere"]]
SEEDS = [11, 12, 13, 14]
SCHEDULERS = {
    "DDPM": DDPMScheduler(clip_sample=False),
    "DDIM": DDIMScheduler(clip_sample=False),
    "DPM-Solver++": DPMSolverMultistepScheduler(),
    "UniPC": UniPCMultistepScheduler(),
    "Euler": EulerDiscreteScheduler(),
    "Heun": HeunDiscreteScheduler(),
    "EDM DPM-Solver++": EDMDPMSolverMultistepScheduler(sigma_data=1.0),
    "EDM Euler": EDMEulerScheduler(sigma_data=1.0),
    "flow-matching Euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-matching DPM-Solver++": DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


def make_pipeline(prediction_type: str = "epsilon", scheduler=None, **kwargs):
    torch.manual_seed(0)
    unet = MultiLabelUNet2DModel(
        sample_size=16,
        patch_size=2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_levels=(1,),
        attention_head_dim=8,
        null_condition=kwargs.pop("null_condition", True),
        prediction_type=prediction_type,
        **kwargs,
    ).eval()
    torch.nn.init.normal_(unet.class_embedding.weight, std=1.0)
    unet.set_data_statistics(torch.linspace(-0.3, 0.3, 3 * 16 * 16).reshape(3, 16, 16), 0.2)
    pipeline = ConditionalDDPMPipeline(unet, scheduler or SCHEDULERS["DDIM"], ICLEVR_LABELS.names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline():
    return make_pipeline()


def draw(pipeline, labels=LABELS, seeds=SEEDS, num_inference_steps=3, output_type="pt", **kwargs):
    return pipeline(
        labels, seeds=seeds, num_inference_steps=num_inference_steps, output_type=output_type, **kwargs
    ).images


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_every_scheduler_draws_the_same_image_for_the_same_seed_wherever_it_stands(name, guidance_scale):
    prediction_type = "flow" if "flow" in name else "edm" if "EDM" in name else "epsilon"
    pipeline = make_pipeline(prediction_type, SCHEDULERS[name])
    kwargs = {"guidance_scale": guidance_scale, "micro_batch_size": 3}
    images = draw(pipeline, **kwargs)
    assert images.shape == (4, 3, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    assert len({image.numpy().tobytes() for image in images}) == 4
    order = [2, 0, 3, 1]
    shuffled = draw(pipeline, [LABELS[i] for i in order], [SEEDS[i] for i in order], **kwargs)
    assert torch.equal(shuffled, images[order])
    assert torch.equal(draw(pipeline, LABELS[3:], SEEDS[3:], **kwargs)[0], images[3])


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "UniPC", "flow-matching Euler"])
def test_the_loop_equals_one_written_by_hand_on_the_scheduler(name):
    pipeline = make_pipeline("flow" if "flow" in name else "epsilon", SCHEDULERS[name])
    unet, scheduler = pipeline.unet, pipeline.scheduler
    generator = torch.Generator().manual_seed(SEEDS[1])
    class_labels = ICLEVR_LABELS.encode(LABELS[1:2])
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 3, 16, 16, generator=generator)
    accepts = "generator" in inspect.signature(scheduler.step).parameters
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional, unconditional = unet(sample, t, class_labels).sample, unet(sample, t).sample
            prediction = unconditional + 2.0 * (conditional - unconditional)
            kwargs = {"generator": generator} if accepts else {}
            sample = scheduler.step(prediction, t, sample, **kwargs).prev_sample
    by_hand = (unet.unstandardize(sample) / 2 + 0.5).clamp(0, 1)
    drawn = draw(pipeline, LABELS[1:2], SEEDS[1:2], num_inference_steps=4, guidance_scale=2.0)
    assert_close(drawn, by_hand, atol=2e-5, rtol=0)


def test_another_micro_batch_size_changes_an_image_by_rounding_alone():
    # An untrained epsilon network would blow rounding up by 1 / sqrt(alpha_bar) at the first step; v does not.
    pipeline = make_pipeline("v_prediction", DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
    images = [draw(pipeline, num_inference_steps=20, guidance_scale=2.0, micro_batch_size=n) for n in (1, 3, 4, None)]
    for other in images[1:]:
        assert (other - images[0]).abs().max() < 1e-4


def test_the_labels_and_the_guidance_change_the_image(pipeline):
    images = draw(pipeline)
    other = draw(pipeline, [["yellow cube"]] * 4)
    guided = draw(pipeline, guidance_scale=3.0)
    unconditional = pipeline(None, 4, seeds=SEEDS, num_inference_steps=3, output_type="pt").images
    for first, second in [(images, other), (images, guided), (images, unconditional), (other, unconditional)]:
        assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_guidance_of_zero_gives_the_unconditional_image(pipeline):
    unconditional = pipeline(None, 4, seeds=SEEDS, num_inference_steps=3, output_type="pt").images
    assert_close(draw(pipeline, guidance_scale=0.0), unconditional, atol=1e-5, rtol=0)


def test_guidance_acts_only_inside_its_interval(pipeline):
    plain, guided = draw(pipeline), draw(pipeline, guidance_scale=3.0)
    assert torch.equal(draw(pipeline, guidance_scale=3.0, guidance_interval=(0.5, 0.5)), plain)
    partly = draw(pipeline, guidance_scale=3.0, guidance_interval=(0.0, 0.4))
    assert not torch.equal(partly, plain)
    assert not torch.equal(partly, guided)


def test_other_steps_than_a_student_has_learned_are_warned_of_and_drawn(pipeline, tmp_path, recwarn):
    expected = draw(pipeline)
    parts = (pipeline.unet, pipeline.scheduler, ICLEVR_LABELS.names)
    student = ConditionalDDPMPipeline(*parts, default_num_inference_steps=2, student_num_inference_steps=2)
    student.save_pretrained(tmp_path)
    for opened in (student, load_pipeline(tmp_path)):
        opened.set_progress_bar_config(disable=True)
        opened(LABELS[:1], seeds=[0])
        opened(LABELS[:1], seeds=[0], num_inference_steps=2)
        assert not [warning for warning in recwarn if "student" in str(warning.message)]
        with pytest.warns(UserWarning, match="should be 2 for this student, .* got 3: with fewer") as caught:
            assert torch.equal(draw(opened), expected)
        assert caught[0].filename == __file__  # where the call is, not inside of the package
    pipeline(LABELS[:1], seeds=[0], num_inference_steps=2)
    assert not [warning for warning in recwarn if "student" in str(warning.message)]


def test_names_indices_and_matrices_ask_for_the_same_image(pipeline):
    by_name = draw(pipeline)
    by_index = draw(pipeline, [[ICLEVR_LABELS.index(name) for name in labels] for labels in LABELS])
    by_tensor = draw(pipeline, pipeline.encode_labels(LABELS))
    by_array = draw(pipeline, pipeline.encode_labels(LABELS).numpy().astype(np.uint8))
    for images in (by_index, by_tensor, by_array):
        assert torch.equal(images, by_name)
    single = draw(pipeline, torch.tensor([16, 6]), [12, 13])
    assert torch.equal(single, draw(pipeline, [["gray cylinder"], ["cyan cube"]], [12, 13]))


def test_a_generator_gives_seeds_that_draw_the_same_images_again(pipeline):
    output = pipeline(LABELS, generator=torch.Generator().manual_seed(5), num_inference_steps=3, output_type="pt")
    again = pipeline(LABELS, generator=torch.Generator().manual_seed(5), num_inference_steps=3, output_type="pt")
    assert len(set(output.seeds)) == 4
    assert torch.equal(output.images, again.images)
    assert torch.equal(draw(pipeline, seeds=output.seeds), output.images)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 1, 2)]
    listed = pipeline(LABELS, generator=generators, num_inference_steps=3).seeds
    assert listed[0] == listed[2] != listed[1] == listed[3]


def test_the_global_random_state_is_the_source_where_nothing_is_given(pipeline):
    torch.manual_seed(3)
    first = pipeline(LABELS, num_inference_steps=2, output_type="np").images
    torch.manual_seed(3)
    assert np.array_equal(first, pipeline(LABELS, num_inference_steps=2, output_type="np").images)


def test_the_output_types_hold_the_same_pixels(pipeline):
    tensor, array, pil = (draw(pipeline, output_type=kind) for kind in ("pt", "np", "pil"))
    assert array.shape == (4, 16, 16, 3)
    assert array.dtype == np.float32
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype(np.uint8))
    assert isinstance(pipeline(LABELS, return_dict=False, num_inference_steps=1), tuple)


@pytest.mark.parametrize("name", ["DDIM", "Heun"])
def test_the_states_lead_from_noise_to_the_image(name):
    pipeline = make_pipeline(scheduler=SCHEDULERS[name])
    output = pipeline(LABELS, seeds=SEEDS, num_inference_steps=10, num_states=5, micro_batch_size=3, output_type="pt")
    assert len(output.states) == 5
    assert all(state.shape == output.images.shape for state in output.states)
    distances = [(state - output.images).square().mean() for state in output.states]
    assert distances[0] > distances[-1]
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(SEEDS[0]))
    expected = (pipeline.unet.unstandardize(noise[None]) / 2 + 0.5).clamp(0, 1)[0]
    assert_close(output.states[0][0], expected, atol=1e-3, rtol=0)


def test_a_callback_sees_every_step_and_may_replace_the_sample(pipeline):
    seen = []

    def blank_out(pipe, step, timestep, tensors):
        seen.append((step, tensors["sample"].shape))
        return {"sample": torch.zeros_like(tensors["sample"])} if step == 2 else None

    images = draw(pipeline, micro_batch_size=2, callback_on_step_end=blank_out)
    assert [step for step, _ in seen] == [0, 1, 2] * 2
    expected = (pipeline.unet.data_mean / 2 + 0.5).clamp(0, 1)
    assert_close(images[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same_image(pipeline, dtype):
    full = draw(pipeline, num_inference_steps=10)
    half = draw(pipeline.to(dtype), num_inference_steps=10)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_pipeline_draws_the_same_image(pipeline, dtype, tmp_path):
    pipeline.to(dtype).save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    reloaded = ConditionalDDPMPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    reloaded.set_progress_bar_config(disable=True)
    assert reloaded.vocabulary == pipeline.vocabulary
    assert torch.equal(draw(reloaded), draw(pipeline))


def test_the_defaults_of_a_call_are_saved_with_the_pipeline(tmp_path):
    base = make_pipeline()
    pipeline = ConditionalDDPMPipeline(
        base.unet, base.scheduler, list(base.vocabulary), default_num_inference_steps=4, default_guidance_scale=2.0
    )
    pipeline.save_pretrained(tmp_path)
    reloaded = ConditionalDDPMPipeline.from_pretrained(tmp_path)
    drawn = reloaded(LABELS, seeds=SEEDS, output_type="pt").images
    assert torch.equal(drawn, draw(pipeline, num_inference_steps=4, guidance_scale=2.0))


def test_a_compiled_network_can_stand_in_its_place(pipeline, tmp_path):
    images = draw(pipeline)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert_close(draw(pipeline), images, atol=1e-5, rtol=0)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(ConditionalDDPMPipeline.from_pretrained(tmp_path)), images)


def test_the_progress_bar_counts_steps_and_can_be_switched_off(pipeline, capfd):
    pipeline.set_progress_bar_config(disable=False)
    draw(pipeline)
    assert "3/3" in capfd.readouterr().err
    pipeline.scheduler = HeunDiscreteScheduler()
    draw(pipeline)
    assert "3/3" in capfd.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": None}, "`num_images`"),
        ({"class_labels": LABELS, "num_images": 4}, "repeating"),
        ({"class_labels": [[]]}, "empty scene"),
        ({"class_labels": None, "num_images": 2, "guidance_scale": 2.0}, "no condition"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"micro_batch_size": 0}, "`micro_batch_size`"),
        ({"micro_batch_size": True}, "`micro_batch_size`"),
        ({"seeds": [1, 2]}, "`seeds` must hold 4"),
        ({"seeds": [1, 2, 3, 0.5]}, "`seeds` must hold 4"),
        ({"seeds": [1, 2, 3, -1]}, "from 0 to"),
        ({"seeds": [1, 2, 3, 2**63]}, "from 0 to"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite"),
        ({"seeds": SEEDS, "generator": torch.Generator()}, "not both"),
        ({"generator": [torch.Generator()]}, "list of 4"),
        ({"output_type": "latent"}, "`output_type`"),
        ({"guidance_interval": (0.8, 0.2)}, "`guidance_interval`"),
        ({"num_inference_steps": 2, "num_states": 3}, "`num_states`"),
    ],
)
def test_a_bad_argument_is_refused_by_name(pipeline, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": LABELS, **kwargs})


def test_a_model_without_a_null_condition_refuses_what_needs_one():
    pipeline = make_pipeline(null_condition=False)
    with pytest.raises(ValueError, match="label dropout"):
        draw(pipeline, guidance_scale=2.0)
    with pytest.raises(ValueError, match="label dropout"):
        pipeline(None, 2)
    with pytest.raises(ValueError, match="label dropout"):
        pipeline.unet(torch.zeros(1, 3, 16, 16), 1)


def test_a_model_that_saw_empty_scenes_draws_them():
    pipeline = make_pipeline(empty_condition=True)
    empty, unconditional = draw(pipeline, [[]], [1]), draw(pipeline, None, [1], num_images=1)
    assert (empty - unconditional).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("prediction_type", "scheduler", "message"),
    [
        ("epsilon", DDIMScheduler(prediction_type="v_prediction"), r"prediction_type='epsilon'"),
        ("v_prediction", DDIMScheduler(), r"prediction_type='v_prediction'"),
        ("epsilon", FlowMatchEulerDiscreteScheduler(), "'flow'"),
        ("flow", DDIMScheduler(), "FlowMatchEulerDiscreteScheduler"),
        ("flow", UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        ("epsilon", EDMEulerScheduler(), "preconditioning"),
        ("edm", EDMEulerScheduler(), "must have sigma_data=1 .* got EDMEulerScheduler with sigma_data=0.5"),
        ("edm", EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction"), "prediction_type='epsilon'"),
        ("edm", DDIMScheduler(), "use EDMDPMSolverMultistepScheduler or EDMEulerScheduler with sigma_data=1"),
        ("epsilon", DDIMScheduler(clip_sample=True), "clip_sample=False"),
        (
            "epsilon",
            DDIMScheduler(clip_sample=True, clip_sample_range=2.0),
            r"clip_sample_range=2.0.* or with .*=6\.5",
        ),
        ("epsilon", DPMSolverMultistepScheduler(thresholding=True), "thresholding=False"),
    ],
)
def test_a_scheduler_of_another_prediction_type_is_refused_with_the_way_out(prediction_type, scheduler, message):
    with pytest.raises(ValueError, match=message):
        draw(make_pipeline(prediction_type, scheduler))


def test_a_scheduler_may_clip_what_no_image_reaches():
    pipeline = make_pipeline("epsilon", DDIMScheduler(clip_sample=True, clip_sample_range=6.5))
    draw(pipeline)
    draw(pipeline.to(torch.bfloat16))  # in which the bound is rounded


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("num_steps", "warns"), [(2, True), (20, False), (600, True)])
def test_a_scheduler_that_begins_where_much_of_an_image_is_left_is_warned_of(num_steps, warns):
    pipeline = make_pipeline("epsilon", DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):  # before all steps are taken
            pipeline(LABELS[:1], seeds=[0], num_inference_steps=num_steps, callback_on_step_end=interrupt)
    files = [warning.filename for warning in caught if "of an image is left" in str(warning.message)]
    assert files == [__file__] * warns  # where the call is, not inside of the package


def test_label_names_must_fit_the_network():
    base = make_pipeline()
    with pytest.raises(ValueError, match="24 labels, got 2"):
        ConditionalDDPMPipeline(base.unet, base.scheduler, ["red", "blue"])
    with pytest.raises(ValueError, match="`label_names`"):
        ConditionalDDPMPipeline(base.unet, base.scheduler)


def test_saving_does_not_upload_the_folder(pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"pipe.push_to_hub\(repo_id\)"):
        pipeline.save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_the_pipeline_is_a_diffusers_pipeline(pipeline):
    assert isinstance(pipeline, diffusers.DiffusionPipeline)
    assert set(pipeline.components) == {"unet", "scheduler", "guide"} and pipeline.guide is None


def test_an_edm_step_of_euler_is_that_of_the_paper():
    pipeline = make_pipeline("edm", EDMEulerScheduler(sigma_data=1.0, sigma_min=0.1, sigma_max=5.0))
    unet = pipeline.unet
    class_labels = pipeline.encode_labels([["red cube"]])
    pipeline.scheduler.set_timesteps(3)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * (5.0**2 + 1) ** 0.5
    sigmas = [*((5 ** (1 / 7) + i / 2 * (0.1 ** (1 / 7) - 5 ** (1 / 7))) ** 7 for i in range(3)), 0.0]
    for s, following in zip(sigmas, sigmas[1:], strict=False):
        c_in, c_skip, c_out = 1 / (s**2 + 1) ** 0.5, 1 / (s**2 + 1), s / (s**2 + 1) ** 0.5
        with torch.no_grad():
            f = unet(c_in * x, torch.tensor(s).log() / 4, class_labels).sample
        denoised = c_skip * x + c_out * f  # eq. 7
        x = x + (following - s) * (x - denoised) / s  # algorithm 1 without its second order
    expected = (unet.unstandardize(x) / 2 + 0.5).clamp(0, 1)
    assert_close(draw(pipeline, [["red cube"]], [5]), expected, atol=1e-4, rtol=0)


def make_guide(seed=1, **kwargs):
    """A network half as wide as that of `make_pipeline`."""
    torch.manual_seed(seed)
    sizes = {"patch_size": 2, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8}
    guide = MultiLabelUNet2DModel(sample_size=16, **sizes, **{"null_condition": True, **kwargs}).eval()
    torch.nn.init.normal_(guide.class_embedding.weight, std=1.0)
    guide.set_data_statistics(torch.linspace(-0.3, 0.3, 3 * 16 * 16).reshape(3, 16, 16), 0.2)
    return guide


def with_guide(base, guide):
    pipeline = ConditionalDDPMPipeline(base.unet, base.scheduler, ICLEVR_LABELS.names, guide=guide)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_autoguidance_leads_away_from_the_guides_prediction_for_the_same_labels(pipeline):
    guided = with_guide(pipeline, make_guide())
    class_labels = guided.encode_labels([["red cube"]])
    ddim = DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(2)
    sample = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    for t in ddim.timesteps:
        with torch.no_grad():
            strong, weak = (network(sample, t, class_labels).sample for network in (guided.unet, guided.guide))
        sample = ddim.step(2.5 * strong - 1.5 * weak, t, sample).prev_sample  # w D_1 + (1 - w) D_0
    expected = (guided.unet.unstandardize(sample) / 2 + 0.5).clamp(0, 1)
    images = draw(guided, [["red cube"]], [7], num_inference_steps=2, guidance_scale=2.5)
    assert_close(images, expected, atol=1e-4, rtol=0)


def test_a_guide_has_no_say_where_guidance_is_off_and_all_of_it_at_zero(pipeline):
    guided = with_guide(pipeline, make_guide())
    assert torch.equal(draw(guided, guidance_scale=1.0), draw(pipeline, guidance_scale=1.0))
    alone = ConditionalDDPMPipeline(guided.guide, pipeline.scheduler, ICLEVR_LABELS.names)
    alone.set_progress_bar_config(disable=True)
    assert_close(draw(guided, guidance_scale=0.0), draw(alone, guidance_scale=1.0), atol=1e-5, rtol=0)


def test_a_guide_that_is_the_network_itself_changes_nothing(pipeline):
    itself = with_guide(pipeline, pipeline.unet)
    for labels in (LABELS, ["red cube AND NOT blue sphere", "gray cylinder AND red cube"]):
        seeds = SEEDS[: len(labels)]
        expected = draw(pipeline, labels, seeds, guidance_scale=1.0)
        assert_close(draw(itself, labels, seeds, guidance_scale=3.0), expected, atol=1e-4, rtol=0)


def test_a_guide_takes_the_place_of_label_dropout(pipeline):
    base = make_pipeline(null_condition=False)
    guided = with_guide(base, make_guide(null_condition=False))
    assert (draw(guided, guidance_scale=2.0) - draw(base)).abs().max() > 1e-3


def test_images_without_a_condition_are_guided_by_a_guide(pipeline):
    guided = with_guide(pipeline, make_guide())
    images = draw(guided, None, [1], num_images=1, guidance_scale=2.0)
    assert (images - draw(pipeline, None, [1], num_images=1)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 5}, "with num_classes 24, got one with 5"),
        ({"prediction_type": "v_prediction"}, "with prediction_type 'epsilon', got one with 'v_prediction'"),
        ({"null_condition": False}, "`guide` must know 'no condition'"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(pipeline, kwargs, message):
    with pytest.raises(ValueError, match=message):
        with_guide(pipeline, make_guide(**kwargs))


def test_a_guide_of_other_images_is_refused(pipeline):
    guide = make_guide()
    guide.set_data_statistics(guide.data_mean + 0.1, 0.2)
    with pytest.raises(ValueError, match="trained on the same images as `unet`, got one with another data_mean"):
        with_guide(pipeline, guide)
    guided = with_guide(pipeline, make_guide())
    guided.guide.set_data_statistics(guide.data_mean - 0.1, 0.4)
    with pytest.raises(ValueError, match="got one with another data_std"):
        draw(guided, guidance_scale=2.0)
