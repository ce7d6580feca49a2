import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from iclevr_diffusion import ICLEVR_LABELS, ConditionalDDPMPipeline, MultiLabelUNet2DModel
from iclevr_diffusion.distillation import Prompts, Teacher, make_student
from iclevr_diffusion.flow_solver import make_flow_solver
from iclevr_diffusion.models.unet_small import SmallMultiLabelUNet

SIZES = {"num_classes": 24, "sample_size": 16, "block_out_channels": (8, 16), "attention_head_dim": 8}
KINDS = {
    "linear": {},
    "of tokens and images": {"label_encoding": "tokens", "network_output": "sample", "attention_levels": (1,)},
}


@pytest.fixture(params=KINDS)
def pipeline(request):
    torch.manual_seed(0)
    unet = MultiLabelUNet2DModel(**SIZES, **KINDS[request.param], prediction_type="flow", null_condition=True).eval()
    unet.set_data_statistics(torch.full((3, 1, 1), 0.1), 0.2)
    torch.nn.init.normal_(unet.null_embedding)
    return ConditionalDDPMPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=4), list(ICLEVR_LABELS.names), 20, 3.0)


def make_teacher(pipeline, **changed):
    options = {"num_steps": 6, "num_student_steps": 3, "guidance_scale": 3.0, "time_shift": 4.0}
    return Teacher(pipeline, **options | changed)


CLASS_LABELS = ICLEVR_LABELS.encode([["red cube"], ["blue sphere", "gray cube"]])


@pytest.mark.parametrize("multiple", [1, 2, 5])
def test_the_states_of_few_steps_are_among_those_of_more(multiple):
    few, more = make_flow_solver(4.0, 1), make_flow_solver(4.0, 2)
    few.set_timesteps(4)
    more.set_timesteps(4 * multiple)
    assert_close(few.sigmas, more.sigmas[::multiple], rtol=0, atol=1e-6)
    assert few.timesteps.tolist() == more.timesteps[::multiple].tolist()


def test_the_first_piece_begins_at_the_noise_of_the_seeds_and_the_others_where_the_student_has_come_to(pipeline):
    teacher, student = make_teacher(pipeline), make_student(pipeline.unet).eval()
    starts, ends = teacher.show(student, CLASS_LABELS, [7, 8])
    assert starts.shape == ends.shape == (3, 2, 3, 16, 16) and starts.dtype == torch.float32
    assert_close(starts[0, 1], torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(8)))
    drawn, states = ConditionalDDPMPipeline(student, make_flow_solver(4.0, 1), list(ICLEVR_LABELS.names), 3, 1.0), []
    drawn(CLASS_LABELS, seeds=[7, 8], callback_on_step_end=lambda *arguments: states.append(arguments[3]["sample"]))
    for start, state in zip(starts[1:], states, strict=False):
        assert_close(start, state, rtol=1e-4, atol=1e-4)
    for piece in range(3):
        assert_close(ends[piece], teacher.advance(starts[piece], CLASS_LABELS, piece))


def test_gradients_of_what_a_student_draws_reach_each_of_its_steps(pipeline):
    teacher, student = make_teacher(pipeline), make_student(pipeline.unet).eval()
    velocities = []

    def keep(module, inputs, output):
        output.sample.retain_grad()
        velocities.append(output.sample)

    hook = student.register_forward_hook(keep)
    states = teacher.walk(student, CLASS_LABELS, [7, 8])
    assert states.shape == (4, 2, 3, 16, 16)
    states[-1].sum().backward()
    hook.remove()
    assert len(velocities) == 3 and all(velocity.grad.abs().sum() > 0 for velocity in velocities)
    shown, _ = teacher.show(student, CLASS_LABELS, [7, 8])
    assert torch.equal(shown, states[:-1]) and not shown.requires_grad


def test_a_teacher_of_one_piece_draws_what_its_pipeline_does(pipeline):
    _, ends = make_teacher(pipeline, num_student_steps=1).show(pipeline.unet, CLASS_LABELS, [7, 8])
    pipeline.scheduler = make_flow_solver(4.0, 2)
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "pt"}
    drawn = pipeline(CLASS_LABELS, seeds=[7, 8], micro_batch_size=2, **options).images
    assert_close((pipeline.unet.unstandardize(ends[0]) / 2 + 0.5).clamp(0, 1), drawn)


def test_guidance_is_part_of_the_way_and_only_where_the_interval_says_so(pipeline):
    sample = torch.randn(2, 3, 16, 16)
    plain, late = (
        [make_teacher(pipeline, **changed).advance(sample, CLASS_LABELS, piece) for piece in range(3)]
        for changed in ({"guidance_scale": 1.0}, {"guidance_interval": (0.5, 1.0)})
    )
    assert_close(late[0], plain[0])
    assert not torch.allclose(late[1], plain[1], atol=1e-4) and not torch.allclose(late[2], plain[2], atol=1e-4)


def test_a_student_that_predicts_the_velocity_from_beginning_to_end_steps_there(pipeline):
    teacher = make_teacher(pipeline)
    starts, ends = teacher.show(pipeline.unet, CLASS_LABELS, [7, 8])
    velocities = (starts - ends) / (teacher.sigmas[:-1] - teacher.sigmas[1:]).view(-1, 1, 1, 1, 1)
    for piece in range(3):
        solver = make_flow_solver(4.0, 1)
        solver.set_timesteps(3)
        assert solver.timesteps.tolist() == teacher.timesteps.tolist()
        solver.set_begin_index(piece)
        stepped = solver.step(velocities[piece], solver.timesteps[piece], starts[piece]).prev_sample
        assert_close(stepped, ends[piece], rtol=1e-4, atol=1e-4)


def test_an_untrained_student_predicts_what_its_teacher_does_without_guidance(pipeline):
    student = make_student(pipeline.unet).eval()
    sample = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = pipeline.unet(sample, 900, CLASS_LABELS).sample
        assert_close(student(sample, 900, CLASS_LABELS).sample, expected)
    assert not student.config.null_condition
    assert_close(student.data_std, torch.tensor(0.2))
    drawn = ConditionalDDPMPipeline(student, make_flow_solver(4.0, 1), list(ICLEVR_LABELS.names), 4, 1.0)
    assert len(drawn(CLASS_LABELS, seeds=[0, 1]).images) == 2
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 for this model"):
        drawn(CLASS_LABELS, guidance_scale=2.0)


def test_a_teacher_with_a_guide_shows_the_way_that_its_pipeline_goes(pipeline):
    weak = MultiLabelUNet2DModel(**SIZES | {"block_out_channels": (8, 8)}, prediction_type="flow", null_condition=True)
    weak.eval().set_data_statistics(torch.full((3, 1, 1), 0.1), 0.2)
    names = list(ICLEVR_LABELS.names)
    guided = ConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, names, 20, 3.0, guide=weak)
    _, ends = make_teacher(guided, num_student_steps=1).show(pipeline.unet, CLASS_LABELS, [7, 8])
    guided.scheduler = make_flow_solver(4.0, 2)
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "pt"}
    drawn = guided(CLASS_LABELS, seeds=[7, 8], micro_batch_size=2, **options).images
    assert_close((pipeline.unet.unstandardize(ends[0]) / 2 + 0.5).clamp(0, 1), drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_steps": 7}, "`teacher_steps` must be a multiple of the 3 student's steps, got 7"),
        ({"num_steps": 1}, "`teacher_steps` must be a multiple of the 3 student's steps, got 1"),
    ],
)
def test_a_teacher_whose_steps_do_not_fit_is_refused(pipeline, changed, message):
    with pytest.raises(ValueError, match=message):
        make_teacher(pipeline, **changed)


def test_a_teacher_without_an_unconditional_prediction_is_not_guided(pipeline):
    pipeline.register_modules(unet=make_student(pipeline.unet))
    with pytest.raises(ValueError, match="`guidance_scale` must be 1 for this `teacher`, got 3.0"):
        make_teacher(pipeline)
    make_teacher(pipeline, guidance_scale=1.0)


def test_a_teacher_of_another_kind_is_refused(tiny_pipeline):
    with pytest.raises(
        ValueError, match="that predicts a flow's velocity, got a ConditionalDDPMPipeline that predicts epsilon"
    ):
        make_teacher(tiny_pipeline)
    small = SmallMultiLabelUNet(num_classes=24, sample_size=16, base_channels=8, num_levels=1, prediction_type="flow")
    pipeline = ConditionalDDPMPipeline(small, FlowMatchEulerDiscreteScheduler(), list(ICLEVR_LABELS.names))
    with pytest.raises(ValueError, match="`teacher` must have a MultiLabelUNet2DModel, got a SmallMultiLabelUNet"):
        make_teacher(pipeline)


def test_prompts_are_a_function_of_their_number_and_show_few_labels_as_often_as_many():
    names = ICLEVR_LABELS.names
    conditions = [[name] for name in names[:2]] + [[a, b] for a in names for b in names if a < b]

    def prompts(**changed):
        return Prompts(conditions, ICLEVR_LABELS, 64, **{"seed": 3} | changed)

    batch = prompts().batch(5)
    again = prompts().batch(5)
    assert torch.equal(batch["class_labels"], again["class_labels"]) and batch["seeds"] == again["seeds"]
    assert len(set(batch["seeds"])) == 64 and max(batch["seeds"]) < 2**63
    sizes = torch.cat([prompts().batch(step)["class_labels"].sum(dim=1) for step in range(20)])
    assert set(sizes.tolist()) == {1, 2}
    assert 0.45 < (sizes == 1).float().mean() < 0.55
    first, second = (prompts(num_processes=2, process_index=index).batch(5) for index in range(2))
    others = [prompts().batch(6), prompts(seed=4).batch(5), first, second]
    assert not any(other["seeds"] == batch["seeds"] for other in others)
    assert prompts().batch(10)["seeds"] == first["seeds"]  # what one process draws in turn, two draw side by side
    assert prompts().batch(11)["seeds"] == second["seeds"]
