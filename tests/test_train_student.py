import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from iclevr_diffusion import ICLEVR_LABELS, ConditionalDDPMPipeline, MultiLabelUNet2DModel, load_pipeline
from iclevr_diffusion.hub import export_pipeline
from iclevr_diffusion.losses import evaluator_loss
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.provenance import training_facts

SCRIPTS = Path(__file__).resolve().parents[1] / "train_scripts"
SPEC = importlib.util.spec_from_file_location("train_student", SCRIPTS / "train_student.py")
train_student = sys.modules["train_student"] = importlib.util.module_from_spec(SPEC)  # where dataclasses look for it
SPEC.loader.exec_module(train_student)

CONDITIONS = [["red cube"], ["blue sphere"], ["red cube", "gray sphere"]]


OF_TOKENS_AND_IMAGES = {"label_encoding": "tokens", "network_output": "sample", "attention_levels": (0, 1)}


@pytest.fixture
def teacher(request, tmp_path):
    """The folder of a run that trained a small teacher, as far as a student looks at it; a test may ask for a kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = MultiLabelUNet2DModel(
            num_classes=24,
            sample_size=16,
            block_out_channels=(8, 16),
            attention_head_dim=8,
            prediction_type="flow",
            null_condition=True,
            **getattr(request, "param", {}),
        ).eval()
        torch.nn.init.normal_(unet.null_embedding, std=3.0)  # so that guidance makes a difference
    scheduler = FlowMatchEulerDiscreteScheduler(shift=4)
    pipeline = ConditionalDDPMPipeline(unet, scheduler, list(ICLEVR_LABELS.names), 20, 2.0)
    folder = tmp_path / "teacher"
    pipeline.save_pretrained(folder / "pipeline")
    (folder / "config.yaml").write_text("judge: some-judge\n")
    (folder / "data.json").write_text(json.dumps({"data": "0" * 64, "split": "train"}))
    (folder / "conditions.json").write_text(json.dumps(CONDITIONS))
    return folder


@pytest.fixture
def train(teacher, tmp_path, monkeypatch):
    """Runs train_student.py in this process and returns the folder of its outputs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name="run", **arguments):
        config = {"batch_size": 2, "teacher_steps": 4, "num_student_steps": 2, "log_every": 1, "warmup_steps": 0}
        config |= {"teacher": str(teacher / "pipeline"), "max_steps": 2, "sample_every": 2, "score_every": 2}
        train_student.main(train_student.StudentConfig(output_dir=str(tmp_path / name), **config | arguments))
        return tmp_path / name

    return run


def weights(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("teacher", [{}, OF_TOKENS_AND_IMAGES], ids=["linear", "of tokens and images"], indirect=True)
def test_a_student_trains_is_opened_and_draws_in_its_few_steps(train):
    folder = train()
    pipeline = load_pipeline(folder / "pipeline")
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    image = pipeline([["red cube"]], seeds=[0], output_type="pt").images
    assert image.shape == (1, 3, 16, 16) and torch.isfinite(image).all()
    assert len(calls) == 2
    assert (folder / "samples" / "step-00000002.png").exists()
    metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["loss"] == pytest.approx((metrics["loss_step_0"] + metrics["loss_step_1"]) / 2)


@pytest.mark.parametrize("teacher", [{}, OF_TOKENS_AND_IMAGES], ids=["linear", "of tokens and images"], indirect=True)
def test_a_student_learns_from_its_teacher_alone(train):
    history = losses(train(batch_size=8, max_steps=60, learning_rate=1e-3, guidance_scale=6.0, sample_every=0))
    assert sum(history[-10:]) < 0.95 * sum(history[:10])


def test_a_student_knows_what_its_teacher_was_trained_on_and_which_judges_chose_it(train, tmp_path):
    folder = train()
    facts = training_facts(folder / "pipeline")
    assert facts["conditions"] == [tuple(labels) for labels in CONDITIONS]
    assert facts["data_sha256"] == "0" * 64 and facts["split"] == "train"
    assert facts["judges"] == ["some-judge"]
    export_pipeline(load_pipeline(folder / "pipeline"), tmp_path / "published", training=folder)
    assert training_facts(tmp_path / "published") == facts


def test_a_student_stopped_and_resumed_ends_bit_equal_to_an_unbroken_one(train):
    unbroken = weights(train("unbroken", max_steps=4, lr_schedule="constant"))
    train("stopped", max_steps=2, lr_schedule="constant")
    stopped = weights(train("stopped", max_steps=4, lr_schedule="constant"))
    assert all(torch.equal(stopped[name], value) for name, value in unbroken.items())


def test_an_evaluator_teaches_the_student_and_is_known_to_have_done_so(train, tmp_path):
    torch.manual_seed(0)
    names = list(ICLEVR_LABELS.names)
    evaluator = SmallLabelClassifier(24, 16, label_names=names, block_out_channels=(8, 8)).eval()
    with torch.no_grad():
        evaluator.classifier.weight.mul_(30)  # so that it has strong views without having learnt any
    evaluator.save_pretrained(tmp_path / "some-reader")

    @torch.no_grad()
    def read(folder):
        pipeline = load_pipeline(folder / "pipeline")
        images = pipeline(CONDITIONS, seeds=[100, 101, 102], output_type="pt").images
        return evaluator_loss(evaluator(2 * images - 1).logits, pipeline.encode_labels(CONDITIONS)).item()

    options = {"batch_size": 4, "max_steps": 20, "learning_rate": 3e-3, "sample_every": 0, "score_every": 0}
    alone = train("alone", **options)
    taught = train("taught", evaluator=str(tmp_path / "some-reader"), evaluator_weight=10.0, **options)
    assert read(taught) < read(alone) - 0.01
    assert training_facts(taught / "pipeline")["judges"] == ["some-judge", "some-reader"]
    assert training_facts(alone / "pipeline")["judges"] == ["some-judge"]


def test_a_student_of_fewer_steps_starts_from_one_of_more(train):
    first = train(max_steps=3, learning_rate=1e-2)
    second = train("fewer", num_student_steps=1, init_from=str(first / "pipeline"), max_steps=1, learning_rate=1e-9)
    before, after = weights(first), weights(second)
    assert all(torch.allclose(before[name], value, atol=1e-6) for name, value in after.items())


def test_a_student_keeps_its_teachers_statistics_whatever_weights_it_begins_with(train, teacher):
    first = train(max_steps=1)
    pipeline = load_pipeline(first / "pipeline")
    pipeline.unet.set_data_statistics(pipeline.unet.data_mean + 0.3, 0.5)
    pipeline.save_pretrained(first / "pipeline")
    second = weights(train("second", init_from=str(first / "pipeline"), max_steps=1))
    expected = load_pipeline(teacher / "pipeline").unet
    assert torch.equal(second["data_mean"], expected.data_mean) and torch.equal(second["data_std"], expected.data_std)


def test_another_teacher_is_refused_when_a_run_goes_on(train, teacher):
    train(lr_schedule="constant")
    unet = load_pipeline(teacher / "pipeline").unet
    with torch.no_grad():
        unet.null_embedding.add_(1)
    unet.save_pretrained(teacher / "pipeline" / "unet")
    with pytest.raises(ValueError, match="`teacher` must be "):
        train(max_steps=3, lr_schedule="constant")


def test_another_guide_of_the_teacher_is_refused_when_a_run_goes_on(train, teacher):
    pipeline, guide = (load_pipeline(teacher / "pipeline") for _ in range(2))
    guided = ConditionalDDPMPipeline(
        *(pipeline.unet, pipeline.scheduler, list(ICLEVR_LABELS.names), 20, 2.0), guide=guide.unet
    )
    guided.save_pretrained(teacher / "pipeline")
    train(lr_schedule="constant")
    with torch.no_grad():
        guide.unet.class_embedding.weight.add_(1)
    guide.unet.save_pretrained(teacher / "pipeline" / "guide")
    with pytest.raises(ValueError, match="`teacher` must be "):
        train(max_steps=3, lr_schedule="constant")


def test_a_teacher_that_was_moved_is_known_again_when_a_run_goes_on(train, teacher):
    train(lr_schedule="constant")
    moved = teacher.rename(teacher.parent / "moved")
    folder = train(lr_schedule="constant", max_steps=3, teacher=str(moved / "pipeline"))
    assert len(losses(folder)) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher_steps": 5}, "`teacher_steps` must be a multiple of the 2 student's steps, got 5"),
        ({"ema_decay": 1.0}, r"`ema_decay` must lie in \[0, 1\), got 1.0"),
        ({"num_student_steps": 0}, "`num_student_steps` must be at least 1, got 0"),
        ({"time_shift": 0.0}, "`time_shift` must be positive and finite, got 0.0"),
        ({"guidance_start": 0.9, "guidance_stop": 0.1}, "`guidance_start` and `guidance_stop` must be"),
        (
            {"teacher": "dcgan-evaluator-cured-real"},
            "`teacher` must be a ConditionalDDPMPipeline .* ConditionalGANPipeline",
        ),
        ({"evaluator": "nowhere"}, "`evaluator`: .*nowhere"),
        ({"evaluator_weight": 0.5}, "`evaluator_weight` must be 0.1, its default, without `evaluator`, got 0.5"),
        ({"evaluator": "judge-small", "evaluator_weight": -1.0}, "`evaluator_weight` must be finite and at least 0"),
        ({"teacher": "nowhere"}, "`teacher`: .*nowhere"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_training(train, changed, message):
    with pytest.raises(ValueError, match=message):
        train(**changed)


def test_a_teacher_that_does_not_say_its_label_sets_is_refused(train, teacher):
    (teacher / "conditions.json").unlink()
    with pytest.raises(ValueError, match="`teacher` must say which label sets it was trained on"):
        train()
