import hashlib
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from iclevr_diffusion.augmentation import (
    augment,
    random_blur,
    random_flip,
    random_light,
    random_noise,
    random_resample,
    random_shift,
)
from iclevr_diffusion.conversion import convert_evaluator_checkpoint
from iclevr_diffusion.data import open_store
from iclevr_diffusion.judging import calibration_error, choose_threshold, load_judge, read_images, weights_sha256
from iclevr_diffusion.labels import ICLEVR_LABELS
from iclevr_diffusion.models.classifier import LabelClassifier
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.rendering import render_dataset
from iclevr_diffusion.scores import exact_match

REFERENCE = json.loads((Path(__file__).parent / "data" / "evaluator_reference.json").read_text())


def tiny_resnet(**arguments: object) -> LabelClassifier:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "embedding_size": 8, "hidden_sizes": (8, 16), "depths": (1, 1)}
    return LabelClassifier(**{"num_classes": 24} | sizes | arguments)


def tiny_small(**arguments: object) -> SmallLabelClassifier:
    torch.manual_seed(0)
    return SmallLabelClassifier(**{"num_classes": 24, "image_size": 16, "block_out_channels": (8, 12, 16)} | arguments)


TINY_CLASSIFIERS = [
    pytest.param(tiny_resnet, id="resnet"),
    pytest.param(lambda **arguments: tiny_resnet(layer_type="bottleneck", **arguments), id="resnet-bottleneck"),
    pytest.param(lambda **arguments: tiny_resnet(input_scale=2, **arguments), id="resnet-enlarging"),
    pytest.param(tiny_small, id="small"),
]
MakeModel = Callable[..., LabelClassifier | SmallLabelClassifier]


def reference_weights() -> dict[str, torch.Tensor]:
    """The state dict whose logits the reference file holds, by the recipe that made it."""
    weights = {}
    for key, shape in REFERENCE["shapes"].items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
            continue
        n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) == 4:
            n = n * np.sqrt(2 / np.prod(shape[1:]))
        elif key == "fc.0.weight":
            n = n / np.sqrt(512)
        elif key.endswith("running_var"):
            n = 1 + 0.1 * np.abs(n)
        elif key.endswith("weight"):
            n = 1 + 0.1 * n
        else:
            n = 0.1 * n
        weights[key] = torch.from_numpy(np.asarray(n, dtype=np.float32))
    return weights


@pytest.fixture(scope="module")
def evaluator_weights() -> dict[str, torch.Tensor]:
    return reference_weights()


def test_the_converted_evaluator_gives_the_logits_of_torchvision(
    evaluator_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"model": evaluator_weights}, tmp_path / "checkpoint.pth")
    convert_evaluator_checkpoint(tmp_path / "checkpoint.pth").save_pretrained(tmp_path / "judge")
    evaluator = LabelClassifier.from_pretrained(tmp_path / "judge").eval()
    pixel_values = torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (4, 3, 64, 64)).astype(np.float32))
    with torch.no_grad():
        logits = evaluator(pixel_values).logits
    assert_close(logits, torch.tensor(REFERENCE["logits"]), atol=1e-4, rtol=0)
    assert evaluator.config.label_names == list(ICLEVR_LABELS.names)
    assert sorted(path.name for path in (tmp_path / "judge").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


class MakesAFolder:
    """Unpickled the ordinary way, this makes a folder: a stand-in for harmful code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(
    write: Callable[[object, Path], None], tmp_path: Path
) -> None:
    write({"model": MakesAFolder(tmp_path / "harm")}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="nothing in it was run"):
        convert_evaluator_checkpoint(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "harm").exists()


def test_the_code_in_that_checkpoint_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(MakesAFolder(tmp_path / "harm")))
    assert (tmp_path / "harm").exists()


def test_a_checkpoint_that_is_broken_or_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file"):
        convert_evaluator_checkpoint(tmp_path / "checkpoint.pth")
    torch.save({"model": {}}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        (tmp_path / "checkpoint.pth").write_bytes(content)
        with pytest.raises(ValueError, match="it is broken"):
            convert_evaluator_checkpoint(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: [weights], "got list"),
        (lambda weights: weights, "got the keys .*conv1.weight"),
        (
            lambda weights: {"model": {k: v for k, v in weights.items() if k != "fc.0.bias"}},
            r"1 are missing \['fc.0.b",
        ),
        (lambda weights: {"model": weights | {"fc.2.bias": torch.zeros(1)}}, r"1 are not part of it \['fc.2.bias'\]"),
        (lambda weights: {"model": weights | {"fc.0.bias": torch.zeros(10)}}, r'"fc.0.bias" .* \(24,\), got \(10,\)'),
        (lambda weights: {"model": weights | {"fc.0.bias": 3}}, r'"fc.0.bias" .* \(24,\), got int'),
    ],
)
def test_other_content_than_the_evaluator_is_refused_by_name(
    change: Callable[[dict], object], message: str, evaluator_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(change(evaluator_weights), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message):
        convert_evaluator_checkpoint(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("make_model", TINY_CLASSIFIERS)
def test_a_reloaded_classifier_gives_the_same_logits(make_model: MakeModel, tmp_path: Path) -> None:
    names = [f"object {index}" for index in range(5)]
    model = make_model(num_classes=5, label_names=names)
    pixel_values = torch.rand(3, 3, 16, 16) * 2 - 1
    model.train()(pixel_values)  # moves the running statistics of the batch normalisation
    model.eval().save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(pixel_values).logits, model(pixel_values).logits)
    assert reloaded.config.label_names == names
    assert (reloaded.config.num_classes, reloaded.config.image_size) == (5, 16)


@pytest.mark.parametrize("make_model", TINY_CLASSIFIERS)
def test_a_classifier_saved_in_half_precision_reads_almost_the_same(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model().eval()
    pixel_values = torch.rand(3, 3, 16, 16) * 2 - 1
    logits = model(pixel_values).logits
    model.half().save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    assert reloaded.dtype == torch.float32
    assert_close(reloaded(pixel_values).logits, logits, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("make_model", TINY_CLASSIFIERS)
def test_every_parameter_and_the_image_get_a_gradient(make_model: MakeModel) -> None:
    model = make_model().train()
    pixel_values = (torch.rand(4, 3, 16, 16) * 2 - 1).requires_grad_()
    model(pixel_values).logits.square().mean().backward()
    assert pixel_values.grad.abs().sum() > 0
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("make_model", TINY_CLASSIFIERS)
def test_logits_have_one_column_a_class_and_do_not_depend_on_neighbours(make_model: MakeModel) -> None:
    model = make_model(num_classes=7).eval()
    pixel_values = torch.rand(4, 3, 16, 16) * 2 - 1
    logits = model(pixel_values).logits
    assert logits.shape == (4, 7)
    assert_close(model(pixel_values[2:3], return_dict=False)[0], logits[2:3])


@pytest.mark.parametrize("make_model", TINY_CLASSIFIERS)
def test_images_of_another_shape_or_dtype_are_refused(make_model: MakeModel) -> None:
    model = make_model().eval()
    for shape in [(2, 3, 32, 32), (2, 1, 16, 16), (2, 16, 16, 3), (3, 16, 16)]:
        with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(batch, 3, 16, 16\), got"):
            model(torch.zeros(shape))
    for dtype in (torch.uint8, torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"`pixel_values` must be torch.float32 .* got {dtype}"):
            model(torch.zeros(2, 3, 16, 16, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16)).logits.shape == (2, 24)


@pytest.mark.parametrize("make_model", TINY_CLASSIFIERS)
def test_names_that_do_not_match_the_classes_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="`label_names` must hold one name for each of the 24 classes, got 2"):
        make_model(label_names=["a", "b"])


@pytest.mark.parametrize("make_model", TINY_CLASSIFIERS)
def test_the_last_layer_makes_the_logits_of_the_features(make_model: MakeModel) -> None:
    model = make_model().eval()
    pixel_values = torch.rand(3, 3, 16, 16) * 2 - 1
    features = model.extract_features(pixel_values)
    assert features.shape == (3, model.classifier.in_features)
    assert torch.equal(model.classifier(features), model(pixel_values).logits)


def test_an_enlarging_resnet_sees_what_one_for_larger_images_sees_in_enlarged_ones() -> None:
    enlarging = tiny_resnet(input_scale=2).eval()
    larger = tiny_resnet(image_size=32).eval()
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    enlarged = torch.nn.functional.interpolate(pixel_values, (32, 32), mode="bilinear")
    assert torch.equal(enlarging(pixel_values).logits, larger(enlarged).logits)


def test_resnet_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry a stage"):
        tiny_resnet(depths=(1, 1, 1))
    with pytest.raises(ValueError, match='"basic" or "bottleneck", got \'wide\''):
        tiny_resnet(layer_type="wide")
    with pytest.raises(ValueError, match="`input_scale` must be a whole number of at least 1, got 0"):
        tiny_resnet(input_scale=0)
    with pytest.raises(ValueError, match="`name` must be one of 'resnet18', 'resnet18_half', 'resnet50', got"):
        LabelClassifier.from_preset("resnet19")


def test_the_presets_have_the_sizes_of_the_papers() -> None:
    def num_parameters(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    assert num_parameters(LabelClassifier.from_preset("resnet18", num_classes=1000)) == 11_689_512
    with torch.device("meta"):
        assert num_parameters(LabelClassifier.from_preset("resnet50", num_classes=1000)) == 25_557_032
        half = LabelClassifier.from_preset("resnet18_half")
    assert (half.config.input_scale, round(num_parameters(half) / 1e6, 1)) == (2, 2.8)
    assert round(num_parameters(SmallLabelClassifier()) / 1e6, 2) == 0.57


@pytest.mark.parametrize(
    "change",
    [random_flip, random_shift, random_resample, random_blur, random_light, random_noise, augment],
    ids=lambda f: f.__name__,
)
def test_an_augmentation_keeps_the_shape_and_follows_its_generator(change: Callable[..., torch.Tensor]) -> None:
    pixel_values = torch.rand(8, 3, 12, 18) * 2 - 1
    before = pixel_values.clone()
    first = change(pixel_values, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)  # the global source must not matter
    again = change(pixel_values, generator=torch.Generator().manual_seed(1))
    other = change(pixel_values, generator=torch.Generator().manual_seed(2))
    assert first.shape == pixel_values.shape
    assert first.dtype == pixel_values.dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(pixel_values, before)


def test_augmented_images_stay_in_range_and_differ_within_the_batch() -> None:
    pixel_values = (torch.rand(1, 3, 16, 16) * 2 - 1).expand(8, -1, -1, -1)
    augmented = augment(pixel_values, torch.Generator().manual_seed(0))
    assert augmented.min() >= -1
    assert augmented.max() <= 1
    assert all(not torch.equal(augmented[0], image) for image in augmented[1:])


def test_a_shift_moves_pixels_as_a_block_and_repeats_the_border() -> None:
    pixel_values = torch.arange(36.0).reshape(1, 1, 6, 6).expand(64, 3, -1, -1)
    shifted = random_shift(pixel_values, max_shift=2, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    possible = {
        tuple((6 * (rows + down).clamp(0, 5) + (columns + right).clamp(0, 5)).flatten().tolist())
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    seen = {tuple(image[0].flatten().int().tolist()) for image in shifted}
    assert seen <= possible
    assert len(seen) > 15


def test_resampling_takes_detail_from_half_of_the_images() -> None:
    stripes = torch.tensor([-1.0, 1.0]).repeat(8).expand(400, 3, 16, 16)
    resampled = random_resample(stripes, generator=torch.Generator().manual_seed(0))
    contrast = resampled.std(dim=(1, 2, 3)) / stripes[0].std()
    assert 0.42 < (contrast == 1).float().mean() < 0.58  # left as they are
    assert 0.18 < (contrast < 0.1).float().mean() < 0.32  # of half the size, which cannot hold the stripes
    assert len(contrast.unique()) == 3


def test_blur_and_light_keep_what_they_must() -> None:
    flat = torch.full((4, 3, 8, 8), 0.3)
    assert_close(random_blur(flat, generator=torch.Generator().manual_seed(0)), flat)
    assert_close(random_resample(flat, generator=torch.Generator().manual_seed(0)), flat)
    image = torch.rand(4, 3, 8, 8)
    assert_close(random_light(image, brightness=0, contrast=0, tint=0), image)
    assert_close(random_noise(image, max_std=0), image)


@pytest.mark.slow
def test_the_train_script_trains_resumes_and_writes_a_judge(
    tiny_dataset: Path, run_script: Callable[..., object], tmp_path: Path
) -> None:
    recipe = ["--data", tiny_dataset, tiny_dataset, "--resolution", 16, "--batch_size", 4, "--warmup_steps", 1]
    recipe += ["--lr_schedule", "constant", "--output_dir", tmp_path]
    run_script("train_classifier.py", *recipe, "--max_steps", 2)
    first = SmallLabelClassifier.from_pretrained(tmp_path / "judge").classifier.weight
    run_script("train_classifier.py", *recipe, "--max_steps", 4)
    judge = load_judge(tmp_path / "judge", ICLEVR_LABELS.names)
    assert judge.config.image_size == 16
    assert not torch.equal(first, judge.classifier.weight)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert {2, 4} <= set(steps)
    assert all(line["loss"] > 0 and line["images_per_second"] > 0 for line in lines)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["max_steps"] == 4
    assert list(results["held_out"]) == [str(tiny_dataset)]


@pytest.mark.slow
def test_a_finished_training_run_again_only_scores_its_judge_again(
    run_script: Callable[..., object], tmp_path: Path
) -> None:
    data = render_dataset(tmp_path / "data", 20, size=16, seed=0, num_workers=1, progress=False)
    recipe = [
        "--data",
        data,
        "--resolution",
        16,
        "--batch_size",
        8,
        "--max_steps",
        2,
        "--output_dir",
        tmp_path / "run",
    ]
    run_script("train_classifier.py", *recipe)
    judge = load_judge(tmp_path / "run" / "judge")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    store = open_store(data, resolution=16)
    validation, held_out = (store.indices(split) for split in ("validation", "held-out"))
    assert results["num_validation_images"] == len(validation) > 0
    labels = torch.from_numpy(store.class_labels)
    threshold = choose_threshold(read_images(judge, store.pixel_values[validation]).logits, labels[validation])
    assert results["threshold"] == judge.config.threshold == threshold
    scores = results["held_out"][str(data)]
    assert scores["data_sha256"] == store.sha256
    logits = read_images(judge, store.pixel_values[held_out]).logits
    assert scores["calibration_error"] == pytest.approx(calibration_error(logits, labels[held_out]), abs=1e-6)
    assert scores["exact_match"] == exact_match(logits, labels[held_out], threshold).double().mean().item() < 1
    assert {"precision", "recall", "count_accuracy", "mean_average_precision"} <= set(scores["by_num_objects"]["2"])

    judge.register_to_config(threshold=0.0)  # as it was before thresholds were chosen
    judge.save_pretrained(tmp_path / "run" / "judge")
    for name in ("results.json", "errors.png"):
        (tmp_path / "run" / name).unlink()
    run_script("train_classifier.py", *recipe)
    again = load_judge(tmp_path / "run" / "judge")
    assert weights_sha256(again) == weights_sha256(judge)
    assert again.config.threshold == threshold
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    with Image.open(tmp_path / "run" / "errors.png") as sheet:
        assert json.loads(sheet.text["threshold"]) == threshold


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_other_channels_are_changed_and_read(channels):
    pixel_values = torch.rand(2, channels, 32, 32) * 2 - 1
    augmented = augment(pixel_values, torch.Generator().manual_seed(0))
    assert augmented.shape == pixel_values.shape and not torch.equal(augmented, pixel_values)
    for make in (SmallLabelClassifier, LabelClassifier):
        judge = make(2, 32, in_channels=channels).eval()
        assert judge(pixel_values).logits.shape == (2, 2)
        wrong = channels % 4 + 1
        with pytest.raises(ValueError, match=rf"\(batch, {channels}, 32, 32\), got \(2, {wrong}, 32, 32\)"):
            judge(torch.zeros(2, wrong, 32, 32))


def test_light_leaves_opacity_as_it_is():
    pixel_values = torch.rand(3, 4, 8, 8)
    changed = random_light(pixel_values)
    assert torch.equal(changed[:, 3], pixel_values[:, 3]) and (changed[:, :3] != pixel_values[:, :3]).any()


def test_a_judge_of_rgb_images_keeps_the_hash_that_it_had_before_it_knew_others():
    judge = SmallLabelClassifier(2, 16, block_out_channels=(8,))
    config = {key: value for key, value in judge.config.items() if not key.startswith("_") and key != "in_channels"}
    digest = hashlib.sha256(f"{json.dumps(config, sort_keys=True)}\n".encode())
    for name, tensor in sorted(judge.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert weights_sha256(judge) == digest.hexdigest()
    grey = SmallLabelClassifier(2, 16, block_out_channels=(8,), in_channels=1)
    before = weights_sha256(grey)
    grey.register_to_config(in_channels=3)
    assert weights_sha256(grey) != before
