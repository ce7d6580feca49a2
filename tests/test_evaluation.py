import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from filelock import FileLock
from PIL import Image

from iclevr_diffusion import ICLEVR_LABELS, CycleGANGenerator, CycleGANPipeline, LabelVocabulary, evaluate, evaluation
from iclevr_diffusion.drawings import Drawings, Unit
from iclevr_diffusion.evaluation import Evaluator, image_seed
from iclevr_diffusion.judging import read_images
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.protocols import MATCHED, Protocol, matched_protocol
from iclevr_diffusion.reference import Reference
from iclevr_diffusion.score_tables import format_results
from iclevr_diffusion.scores import exact_match, score_conditions, score_images, score_negation

FIRST = Protocol(
    "first", (("red cube",), ("gray cube", "blue sphere"), ("cyan sphere", "red cylinder", "green cube")), "replicates"
)
SECOND = Protocol("second", (("gray cylinder",), ("gray cube", "blue sphere")), "replicates")
NEGATED = Protocol(
    "negated",
    (("red cube",), ("red cube",), ("gray cube", "blue sphere")),
    "conditions",
    prompts=("red cube AND NOT gray cube", "red cube AND NOT cyan cube", "gray cube, blue sphere AND NOT cyan cube"),
    negated=(("gray cube",), ("cyan cube",), ("cyan cube",)),
)
UNNEGATED = dataclasses.replace(NEGATED, name="unnegated", prompts=None, seeded_as="negated")
MATCHING = Protocol(MATCHED, (("red cube",), ("red cube",), ("blue sphere", "gray cube")) * 3, "conditions")


def make_judge(names=ICLEVR_LABELS.names, image_size=16, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = SmallLabelClassifier(len(names), image_size, label_names=list(names), block_out_channels=(8, 8)).eval()
        judge.classifier.weight.data *= 100  # so that different images get different answers
        return judge


@pytest.fixture
def make_evaluator(tiny_pipeline, tmp_path):
    def make(judges=None, protocols=(FIRST, SECOND), output_dir=tmp_path / "evaluation", **arguments):
        arguments = {"num_seeds": 2, "options": {"num_inference_steps": 2}, "micro_batch_size": 4} | arguments
        return Evaluator(tiny_pipeline, judges or {"judge": make_judge()}, protocols, output_dir, **arguments)

    return make


class ColorNetwork(ModelMixin, ConfigMixin):
    """Maps a number to a colour."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 3)

    def forward(self, numbers):
        return self.linear(numbers).sigmoid()


class PlainPipeline(DiffusionPipeline):
    """Draws one colour an image, in one call, as a GAN might; without labels if `vocabulary` is taken away."""

    def __init__(self, network):
        super().__init__()
        self.register_modules(network=network)
        self.vocabulary = ICLEVR_LABELS

    def encode_labels(self, class_labels):
        return self.vocabulary.encode(class_labels)

    def __call__(self, class_labels=None, num_images=None, *, seeds, micro_batch_size=64, output_type="pil"):
        assert output_type == "np" and num_images in (None, len(seeds))
        colors = self.network(torch.tensor([[seed % 251 / 251] for seed in seeds]))
        return SimpleNamespace(images=colors[:, None, None, :].expand(-1, 16, 16, -1).detach().numpy())


@pytest.fixture
def plain_pipeline():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PlainPipeline(ColorNetwork())


def protocol_scores(results):
    return {name: part["judges"] for name, part in results["protocols"].items()}


def test_the_seed_of_an_image_is_fixed_by_protocol_condition_and_replicate():
    assert image_seed("test", ["red cube"], 1) == image_seed("test", ("red cube",), 1, 0)
    assert image_seed("test", ["red cube", "blue cube"], 1) == image_seed("test", ["blue cube", "red cube"], 1)
    seeds = {
        image_seed(name, labels, replicate, occurrence)
        for name in ("test", "new_test")
        for labels in (["a"], ["b"], ["a", "b"])
        for replicate in range(9)
        for occurrence in range(3)
    }
    assert len(seeds) == 2 * 3 * 9 * 3 and max(seeds) < 2**63


def test_seeds_of_published_evaluations_stay_what_they_were():
    assert image_seed("test", ["red cube", "blue sphere"], 3) == 2232966369859560537


def test_an_evaluation_writes_results_records_and_pictures(make_evaluator, tmp_path):
    results = make_evaluator(pipeline_name="tiny").run()
    out = tmp_path / "evaluation"
    assert json.loads((out / "results.json").read_text()) == results
    assert results["quick"] and results["schema_version"] == 2
    assert results["protocols"]["first"]["num_replicates"] == 2 and results["protocols"]["first"]["num_images"] == 6
    assert results["judges_used_in_training"] == [] and results["pipeline"]["name"] == "tiny"
    assert results["pipeline"]["label_names"] == list(ICLEVR_LABELS.names)
    pictures = {f"{protocol}_{kind}.png" for protocol in ("first", "second") for kind in ("grid", "strips")}
    assert {file.name for file in out.glob("*.png")} == pictures | {"samples.png"}
    image = Image.open(out / "images" / "first" / "0001_gray-cube_blue-sphere.png")
    assert image.size == (16, 16)
    assert image.text["labels"] == "gray cube, blue sphere"
    assert image.text["seed"] == str(image_seed("first", ["gray cube", "blue sphere"], 0))
    strip = Image.open(out / "strips" / "first" / "0001_gray-cube_blue-sphere.png")
    assert strip.size == (16 * 3, 16)  # two steps and the result
    assert (np.asarray(strip)[:, -16:] == np.asarray(image)).all()
    samples = Image.open(out / "samples.png")
    assert samples.size == (3 * 16, 16)
    assert json.loads(samples.text["labels"]) == [list(labels) for labels in FIRST.conditions]
    assert (np.asarray(samples)[:, 16:32] == np.asarray(image)).all()


def test_the_records_hold_what_the_scores_are_made_of(make_evaluator, tmp_path):
    results = make_evaluator().run()
    table = pq.read_table(tmp_path / "evaluation" / "records.parquet").to_pylist()
    assert len(table) == 10
    for row in table:
        protocol = {"first": FIRST, "second": SECOND}[row["protocol"]]
        assert tuple(row["labels"]) == protocol.conditions[row["position"]]
        assert row["seed"] == image_seed(row["protocol"], row["labels"], row["replicate"])
    rows = [row for row in table if row["protocol"] == "first"]
    logits = torch.tensor([row["logits judge"] for row in rows])
    matches = exact_match(logits, ICLEVR_LABELS.encode([row["labels"] for row in rows]))
    value = results["protocols"]["first"]["judges"]["judge"]["all"]["exact_match"]["value"]
    assert value == pytest.approx(matches.float().mean().item())


def test_drawn_images_are_judged_as_they_are_kept(make_evaluator, tmp_path):
    make_evaluator().run()
    judge = make_judge()
    records = {
        Unit(row["protocol"], row["position"], row["replicate"]): row["logits judge"]
        for row in pq.read_table(tmp_path / "evaluation" / "records.parquet").to_pylist()
    }
    for units, pixel_values, _ in Drawings(tmp_path / "evaluation" / "drawings").batches():
        with torch.no_grad():
            logits = judge(torch.from_numpy(pixel_values) / 127.5 - 1).logits
        for unit, row in zip(units, logits, strict=True):
            np.testing.assert_allclose(records[unit], row, atol=1e-4)


def test_results_are_written_before_the_pictures(make_evaluator, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "make_grid", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_evaluator(num_seeds=1).run()
    assert (tmp_path / "evaluation" / "results.json").is_file()
    assert not [*(tmp_path / "evaluation").glob("*.png")]


def test_the_environment_is_that_of_the_drawing_and_not_of_a_later_call(make_evaluator, monkeypatch):
    def on(machine, **arguments):
        monkeypatch.setattr(Evaluator, "_environment", {"machine": machine})
        return make_evaluator(**arguments).run()

    first = on("first", num_seeds=1)
    assert first["environment"] == {"machine": "first"} and "environments" not in first
    assert on("second", num_seeds=1)["environment"] == {"machine": "first"}
    both = on("third", num_seeds=2)
    assert both["environment"] == {"machine": "third"}
    assert both["environments"] == [{"machine": "first"}, {"machine": "third"}]
    assert "environments" not in on("fourth", num_seeds=1)


def test_the_environment_names_the_machine_and_the_commit(make_evaluator):
    environment = make_evaluator(num_seeds=1).run()["environment"]
    assert environment["machine"] and environment["versions"]["torch"] == torch.__version__
    assert environment["git_commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", environment["git_commit"])
    models = re.findall("model name.*: (.+)", Path("/proc/cpuinfo").read_text())
    assert not models or environment["machine"] == models[0]


def test_the_cost_stands_beside_the_quality(make_evaluator, tiny_unet):
    cost = make_evaluator(num_seeds=1, options={"num_inference_steps": 3, "guidance_scale": 2.0}).run()["cost"]
    assert cost["network_calls_per_image"] == 6  # guidance asks twice
    assert cost["num_parameters"] == sum(weight.numel() for weight in tiny_unet.parameters())
    assert (
        cost["machine"]
        and cost["images_per_second"] > 0
        and cost["seconds_for_one_image"] > 0
        and cost["batch_size"] == 4
    )


def test_a_saved_image_is_the_one_that_its_seed_draws_alone(make_evaluator, tiny_pipeline, tmp_path):
    make_evaluator().run()
    saved = Image.open(tmp_path / "evaluation" / "images" / "second" / "0000_gray-cylinder.png")
    (alone,) = tiny_pipeline(
        [["gray cylinder"]], seeds=[int(saved.text["seed"])], num_inference_steps=2, micro_batch_size=4
    ).images
    assert (np.asarray(saved) == np.asarray(alone)).all()


def test_scores_do_not_depend_on_the_other_protocols_nor_on_their_order(make_evaluator, tmp_path):
    both = make_evaluator(output_dir=tmp_path / "both").run()
    turned = make_evaluator(protocols=(SECOND, FIRST), output_dir=tmp_path / "turned").run()
    alone = make_evaluator(protocols=(SECOND,), output_dir=tmp_path / "alone").run()
    assert protocol_scores(turned) == protocol_scores(both)
    assert protocol_scores(alone)["second"] == protocol_scores(both)["second"]


def read_logits(folder):
    return pq.read_table(folder / "records.parquet", columns=["logits judge"]).to_pylist()


def test_a_stopped_evaluation_goes_on_and_ends_like_an_unbroken_one(make_evaluator, tmp_path, monkeypatch):
    expected = make_evaluator(output_dir=tmp_path / "unbroken", num_seeds=3).run()
    stopped = make_evaluator(num_seeds=3)
    draw_batch, drawn = Evaluator._draw_batch, []

    def draw_and_stop(evaluator, batch):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        draw_batch(evaluator, batch)
        drawn.append(batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Evaluator, "_draw_batch", draw_and_stop)
        stopped.run()
    resumed, redrawn = make_evaluator(num_seeds=3), []
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_draw_batch", lambda e, batch: (draw_batch(e, batch), redrawn.extend(batch)))
        results = resumed.run()
    assert len(redrawn) == 15 - sum(map(len, drawn))
    assert protocol_scores(results) == protocol_scores(expected)
    assert read_logits(tmp_path / "evaluation") == read_logits(tmp_path / "unbroken")


def test_a_finished_evaluation_is_not_drawn_again_unless_a_strip_is_gone(make_evaluator, tmp_path, monkeypatch):
    expected = make_evaluator().run()
    (tmp_path / "evaluation" / "strips" / "first" / "0000_red-cube.png").unlink()
    (tmp_path / "evaluation" / "images" / "first" / "0001_gray-cube_blue-sphere.png").unlink()
    draw_batch, redrawn = Evaluator._draw_batch, []
    monkeypatch.setattr(Evaluator, "_draw_batch", lambda e, batch: (draw_batch(e, batch), redrawn.extend(batch)))
    assert protocol_scores(make_evaluator().run()) == protocol_scores(expected)
    assert redrawn == [("first", 0, 0)]
    assert (tmp_path / "evaluation" / "images" / "first" / "0001_gray-cube_blue-sphere.png").is_file()


def test_seeds_protocols_and_judges_can_be_added_without_drawing_anything_twice(make_evaluator, tmp_path, monkeypatch):
    make_evaluator(protocols=(FIRST,), num_seeds=1).run()
    expected = make_evaluator(num_seeds=3, output_dir=tmp_path / "at once").run()
    draw_batch, redrawn = Evaluator._draw_batch, []
    monkeypatch.setattr(Evaluator, "_draw_batch", lambda e, batch: (draw_batch(e, batch), redrawn.extend(batch)))
    assert protocol_scores(make_evaluator(num_seeds=3).run()) == protocol_scores(expected)
    assert len(redrawn) == 15 - 3
    both = make_evaluator(num_seeds=3, judges={"judge": make_judge(), "other": make_judge(seed=1)}).run()
    assert len(redrawn) == 15 - 3
    assert both["protocols"]["first"]["judges"]["judge"] == expected["protocols"]["first"]["judges"]["judge"]
    assert make_evaluator(num_seeds=1).run()["protocols"]["first"]["num_images"] == 3


def test_fixed_lists_are_drawn_often_and_conditions_that_stand_for_more_seldom(make_evaluator):
    some = Protocol("some", FIRST.conditions, "conditions")
    many = Protocol("many", FIRST.conditions * 400, "conditions")
    evaluator = make_evaluator(protocols=(FIRST, some, many, MATCHING), num_seeds=None)
    assert evaluator.num_seeds == {"first": 30, "some": 5, "many": 1, "matched": 1}


def test_an_evaluation_of_ten_seeds_is_no_longer_quick(make_evaluator):
    one = Protocol("one", (("red cube",),), "replicates")
    assert not make_evaluator(protocols=(one,), num_seeds=10, micro_batch_size=10).run()["quick"]


def test_conditions_that_occur_several_times_are_different_images(make_evaluator, tmp_path):
    make_evaluator(protocols=(MATCHING,), num_seeds=5).run()
    ((units, pixel_values, _), *_) = Drawings(tmp_path / "evaluation" / "drawings").batches()
    assert {unit.replicate for unit in units} == {0}  # labels come as often as in the real images
    assert len({image.tobytes() for image in pixel_values}) == len(pixel_values)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"options": {"num_inference_steps": 2, "guidance_scale": 2.0}}, "guidance_scale is 1.0 there and 2.0 here"),
        ({"options": {"num_inference_steps": 3}}, "num_inference_steps is 2 there and 3 here"),
        ({"micro_batch_size": 3}, "micro_batch_size is 4 there and 3 here"),
        ({"options": {"num_inference_steps": 2, "guidance_interval": (0.0, 0.5)}}, "guidance_interval"),
    ],
)
def test_a_folder_of_other_settings_is_refused(make_evaluator, arguments, setting):
    make_evaluator(num_seeds=1).run()
    with pytest.raises(ValueError, match=setting):
        make_evaluator(**arguments)


def test_options_of_several_numbers_go_on_where_they_were(make_evaluator):
    options = {"num_inference_steps": 2, "guidance_interval": (0.0, 0.5)}
    make_evaluator(num_seeds=1, options=options).run()
    make_evaluator(num_seeds=2, options=options).run()


def test_a_folder_of_the_same_weights_in_another_model_is_refused(make_evaluator, tiny_pipeline):
    make_evaluator(num_seeds=1).run()
    tiny_pipeline.unet.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="weights_sha256 is"):
        make_evaluator()
    tiny_pipeline.unet.register_to_config(prediction_type="epsilon")
    tiny_pipeline.vocabulary = LabelVocabulary(ICLEVR_LABELS.names[::-1])
    with pytest.raises(ValueError, match="label_names is"):
        make_evaluator(judges={"judge": make_judge(ICLEVR_LABELS.names[::-1])})


def test_a_folder_with_another_list_of_the_same_name_is_refused(make_evaluator):
    make_evaluator(num_seeds=1).run()
    with pytest.raises(ValueError, match="protocols.first is .* there and .* here"):
        make_evaluator(protocols=(Protocol("first", SECOND.conditions, "replicates"),))


def test_settings_of_an_evaluation_that_drew_nothing_do_not_bind_the_next(make_evaluator, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Evaluator, "_draw_batch", lambda *_: (_ for _ in ()).throw(RuntimeError))
        make_evaluator(options={"guidance_scale": 2.0}).run()
    make_evaluator(num_seeds=1).run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_seeds": 0}, "`num_seeds` must be at least 1, got 0"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be at least 1, got 0"),
        ({"options": {"steps": 3}}, "`options` must be arguments of ConditionalDDPMPipeline's call, got steps"),
        ({"protocols": ()}, "at least one protocol"),
        ({"protocols": (FIRST, FIRST)}, "`protocols` must have distinct names, got 'first' more than once"),
        ({"protocols": (Protocol("mine", (("red cub",),), "replicates"),)}, "`protocols`, mine: .*'red cube'"),
        ({"judges": {"other": make_judge("ab")}}, r"`judges\['other'\]` judges other labels"),
        ({"judges": {"large": make_judge(image_size=32)}}, r"`judges\['large'\]` must judge 16-pixel images"),
        ({"judges_used_in_training": ["nobody"]}, r"must name some of the judges \['judge'\], got \['nobody'\]"),
        ({"judges_used_in_training": ["judge"]}, r"had no part in the training, got \['judge'\] alone"),
        ({"training_facts": {"judges": ["judge"]}}, r"had no part in the training, got \['judge'\] alone"),
        ({"training_facts": {"conditions": [["zebra"]]}}, "`training_facts`, conditions: .*'zebra'"),
        ({"options": {"seeds": [1]}}, "`options` must leave out what the evaluation decides itself, got seeds"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_drawn(make_evaluator, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_evaluator(**arguments)
    assert not (tmp_path / "evaluation").exists()


def test_the_judge_that_watched_the_training_is_marked_by_itself(make_evaluator):
    judges = {"judge": make_judge(), "other": make_judge(seed=1)}
    results = make_evaluator(judges=judges, num_seeds=1, training_facts={"judges": ["other"]}).run()
    assert results["judges_used_in_training"] == ["other"]


def test_judges_of_the_caller_stay_as_they_are(make_evaluator):
    judge = make_judge().double()
    make_evaluator(judges={"judge": judge}, num_seeds=1).run()
    assert judge.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: 2 * images - 1, r"must give images in \[0, 1\] for output_type 'np', got \[-"),
        (lambda images: (255 * images).astype(np.uint8), r"array of floats \(4, 16, 16, 3\) .* got uint8"),
        (lambda images: images[:, :8], r"array of floats \(4, 16, 16, 3\) .* got float32 \(4, 8, 16, 3\)"),
        (lambda images: images[..., :1], r"got float32 \(4, 16, 16, 1\)"),
        (lambda images: images[1:], r"got float32 \(3, 16, 16, 3\)"),
        (lambda images: list(images), "got list"),
    ],
)
def test_images_that_would_be_misread_are_refused_with_the_first_batch(
    plain_pipeline, tmp_path, monkeypatch, change, message
):
    call = PlainPipeline.__call__

    def changed(pipeline, class_labels, *, seeds, micro_batch_size=64, output_type="pil"):
        output = call(pipeline, class_labels, seeds=seeds, output_type=output_type)
        return SimpleNamespace(images=change(output.images))

    monkeypatch.setattr(PlainPipeline, "__call__", changed)
    evaluator = Evaluator(plain_pipeline, {"judge": make_judge()}, (FIRST,), tmp_path / "plain", micro_batch_size=4)
    with pytest.raises(ValueError, match=message):
        evaluator.run()
    assert not evaluator.drawings.units()


def test_a_folder_in_use_by_another_evaluation_is_refused(make_evaluator, tmp_path):
    (tmp_path / "evaluation").mkdir()
    with FileLock(tmp_path / "evaluation" / ".lock"), pytest.raises(ValueError, match="written by another evaluation"):
        make_evaluator().run()


def test_lost_drawings_are_noticed_before_they_are_scored(make_evaluator, monkeypatch):
    monkeypatch.setattr(Evaluator, "_draw_batch", lambda *_: None)
    with pytest.raises(ValueError, match="must hold every image that was drawn, but 10 are not there"):
        make_evaluator().run()


def test_an_evaluation_without_a_judge_is_refused(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="at least one judge"):
        Evaluator(tiny_pipeline, {}, (FIRST,), tmp_path)


def test_images_that_are_not_finite_are_refused(make_evaluator, tiny_unet):
    tiny_unet.class_embedding.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        make_evaluator().run()


def test_seen_and_unseen_conditions_are_scored_apart(make_evaluator):
    facts = {"conditions": [("blue sphere", "gray cube"), ("red cube",)]}
    results = make_evaluator(protocols=(FIRST,), training_facts=facts).run()
    scores = results["protocols"]["first"]["judges"]["judge"]["by_seen"]
    assert {name: part["num_images"] for name, part in scores.items()} == {"seen": 4, "unseen": 2}


# A pipeline that is no diffusion model


def test_a_pipeline_of_another_kind_is_scored_alike(plain_pipeline, tmp_path):
    results = Evaluator(plain_pipeline, {"judge": make_judge()}, (FIRST,), tmp_path / "plain", num_seeds=10).run()
    assert results["settings"]["options"] == {} and results["settings"]["scheduler"] is None
    assert results["cost"]["network_calls_per_image"] == 1
    assert results["protocols"]["first"]["judges"]["judge"]["all"]["num_images"] == 30
    assert not (tmp_path / "plain" / "strips").exists() and (tmp_path / "plain" / "first_grid.png").is_file()


def test_a_pipeline_without_labels_is_only_compared_with_real_images(plain_pipeline, tmp_path):
    plain_pipeline.vocabulary = None
    judges = {"judge": make_judge()}
    with pytest.raises(ValueError, match="must be 'matched' alone for a pipeline without labels, got .*'first'"):
        Evaluator(plain_pipeline, judges, (FIRST,), tmp_path / "plain")
    store = make_store(num_images=40)
    results = Evaluator(plain_pipeline, judges, (matched_protocol(store),), tmp_path / "plain").run(store)
    assert results["protocols"] == {} and "mean_of_test_and_new_test" not in results
    assert results["distribution"]["num_generated"] == 20 and "diversity" not in results["distribution"]
    assert results["distribution"]["judges"]["judge"]["generated"]["frechet_distance"] > 0


# Real images


def make_store(vocabulary=ICLEVR_LABELS, num_images=7):
    random = np.random.default_rng(0)
    class_labels = np.zeros((num_images, len(vocabulary)), dtype=np.uint8)
    for row, labels in enumerate(class_labels):
        labels[: 1 + row % 2] = 1
    held_out = np.arange(1, num_images, 2)
    parts = {"held-out": held_out, "validation": held_out - 1, "train": np.arange(num_images)}
    return SimpleNamespace(
        vocabulary=vocabulary,
        pixel_values=random.integers(0, 256, (num_images, 3, 16, 16), dtype=np.uint8),
        class_labels=class_labels,
        scenes=np.arange(num_images),
        sha256="0" * 64,
        indices=lambda split: parts[split],
    )


def test_the_judges_own_score_on_held_out_images_stands_beside_the_pipelines(make_evaluator):
    store, judge = make_store(num_images=40), make_judge()
    results = make_evaluator().run(store)
    held_out = store.indices("held-out")
    with torch.no_grad():
        logits = judge(torch.from_numpy(store.pixel_values[held_out]) / 127.5 - 1).logits
    expected = score_images(logits, torch.from_numpy(store.class_labels[held_out]).float())
    found = results["held_out_images"]
    assert found["data_sha256"] == "0" * 64 and found["num_images"] == 20
    assert found["judges"]["judge"]["top_k"] == pytest.approx(expected["top_k"])
    assert "ceiling" not in results["protocols"]["first"]["judges"]["judge"]  # no real image of 3 objects
    assert results["distribution"] == {"missing": "the protocol 'matched' was not drawn"}


def test_images_drawn_for_the_real_ones_labels_are_compared_with_them(make_evaluator, tmp_path):
    store = make_store(num_images=40)
    protocols = FIRST, matched_protocol(store)
    facts = {"data_sha256": "0" * 64, "split": "train"}
    results = make_evaluator(protocols=protocols, training_facts=facts).run(store)
    distribution = results["distribution"]
    assert distribution["num_generated"] == distribution["num_real"] == 20
    assert set(distribution["judges"]["judge"]) == {"generated", "real"}
    assert distribution["memorisation"]["trained_on_these"] is True
    assert distribution["memorisation"]["num_train"] == 40
    assert set(distribution["diversity"]) == {"pixels", "judges"}
    assert (tmp_path / "evaluation" / "nearest.png").is_file()
    assert results["pipeline"]["trained_on_held_out"] is False
    unknown = make_evaluator(protocols=protocols).run(store)
    assert unknown["distribution"]["memorisation"]["trained_on_these"] is None
    facts["data_sha256"] = "1" * 64
    others = make_evaluator(protocols=protocols, training_facts=facts).run(store)
    assert others["distribution"]["memorisation"]["trained_on_these"] is False
    assert unknown["pipeline"]["trained_on_held_out"] is None


def test_what_is_written_is_json_for_strict_readers_too(make_evaluator, tiny_pipeline, tmp_path):
    tiny_pipeline.scheduler.register_to_config(lambda_min_clipped=-math.inf)  # as DPM-Solver's is by default
    make_evaluator(protocols=(FIRST,)).run()
    text = (tmp_path / "evaluation" / "results.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert json.loads(text)["settings"]["scheduler"]["lambda_min_clipped"] == "-Infinity"


def test_copies_are_searched_for_among_all_images_that_were_trained_on(make_evaluator):
    store = make_store(num_images=40)
    parts = {name: store.indices(name) for name in ("held-out", "validation")}
    parts |= {"train": np.arange(0, 40, 2), "all": np.arange(40)}
    store.indices = lambda split: parts[split]
    store.class_labels[:] = store.class_labels[0]
    facts = {"data_sha256": "0" * 64, "split": "all"}
    protocols = (matched_protocol(store),)
    results = make_evaluator(protocols=protocols, training_facts=facts).run(store)
    assert results["pipeline"]["trained_on_held_out"] is True
    assert results["distribution"]["memorisation"]["num_train"] == 40
    results = make_evaluator(protocols=protocols, training_facts=facts | {"split": "train"}).run(store)
    assert results["distribution"]["memorisation"]["num_train"] == 20


def test_images_as_good_as_real_ones_have_the_real_ones_labels(make_evaluator):
    store = make_store(num_images=40)
    protocol = matched_protocol(store)
    reference = Reference(store, {"judge": make_judge()})
    stand_ins = reference.stand_ins
    shown = [[store.vocabulary.names[i] for i in store.class_labels[row].nonzero()[0]] for row in stand_ins]
    assert shown == [list(labels) for labels in protocol.conditions]
    assert len(set(stand_ins.tolist())) == len(stand_ins)
    real = store.pixel_values[stand_ins]
    readings = {"judge": read_images(make_judge(), real)}
    found = reference.distribution(real, readings, trained_on="train")[0]
    assert found["judges"]["judge"]["generated"] == found["judges"]["judge"]["real"]
    assert found["memorisation"]["copies"] == 1  # they are training images


def test_fid_and_kid_are_taken_by_the_extractor_that_is_given(make_evaluator):
    store = make_store(num_images=40)
    protocols = (matched_protocol(store),)

    def mean_color(pixel_values):
        return pixel_values.double().mean((2, 3))

    found = make_evaluator(protocols=protocols, inception=mean_color).run(store)["distribution"]["inception"]
    assert set(found) == {"generated", "real"} and set(found["real"]) == {"fid", "kid"}
    assert found["generated"]["fid"] > found["real"]["fid"] >= 0
    assert "inception" not in make_evaluator(protocols=protocols).run(store)["distribution"]


def test_real_images_that_judges_cannot_read_are_refused_before_anything_is_drawn(plain_pipeline, tmp_path):
    store = make_store(LabelVocabulary([f"label {index}" for index in range(24)]), num_images=40)
    plain_pipeline.vocabulary = None
    evaluator = Evaluator(plain_pipeline, {"judge": make_judge()}, (matched_protocol(store),), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"`judges\['judge'\]` judges other labels"):
        evaluator.run(store)
    store = make_store(num_images=40)
    store.pixel_values = store.pixel_values[:, :, :8, :8]
    with pytest.raises(ValueError, match=r"`store` must hold images of 16x16 pixels, .* got \(8, 8\)"):
        Evaluator(plain_pipeline, {"judge": make_judge()}, (matched_protocol(store),), tmp_path / "plain").run(store)
    assert not (tmp_path / "plain").exists()


def test_inception_without_real_images_to_compare_with_is_refused(make_evaluator, tmp_path):
    with pytest.raises(ValueError, match="`inception` needs real images and the protocol 'matched'"):
        make_evaluator(inception=torch.nn.Identity()).run()
    assert not (tmp_path / "evaluation").exists()


def test_real_images_of_another_data_set_than_the_matched_labels_are_refused(make_evaluator, tmp_path):
    with pytest.raises(ValueError, match="must be the images that the protocol 'matched' was made from"):
        make_evaluator(protocols=(MATCHING,)).run(make_store(num_images=40))
    assert not (tmp_path / "evaluation").exists()


def test_without_held_out_images_the_results_say_why(make_evaluator):
    results = make_evaluator(num_seeds=1).run(no_store_reason="none were given")
    assert results["held_out_images"] == results["distribution"] == {"missing": "none were given"}
    assert "none were given" in format_results(results)
    assert make_evaluator(num_seeds=1).run(make_store(num_images=1))["held_out_images"] == {
        "missing": "the data have no held-out scene"
    }


def test_held_out_images_of_other_labels_are_refused_before_anything_is_drawn(make_evaluator, tmp_path):
    with pytest.raises(ValueError, match="must have the labels of the pipeline"):
        make_evaluator().run(make_store(LabelVocabulary(["a", "b"])))
    assert not (tmp_path / "evaluation").exists()


# Several processes and real kills

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "ICLEVR_ROOT"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def evaluate_arguments(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.delenv("ICLEVR_ROOT", raising=False)
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    make_judge().save_pretrained(tmp_path / "judge")
    return [
        *("--pipeline", str(tmp_path / "pipeline"), "--judges", str(tmp_path / "judge"), "--protocols", "test"),
        *("--num_inference_steps", "2", "--micro_batch_size", "4", "--device", "cpu", "--seeds", "5", "--out"),
    ]


def read_scores(folder):
    return protocol_scores(json.loads((folder / "results.json").read_text()))


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(evaluate_arguments, tmp_path):
    evaluate.main([*evaluate_arguments, str(tmp_path / "one")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "iclevr_diffusion.evaluate", *evaluate_arguments, str(tmp_path / "two")]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    files = [file.name for file in (tmp_path / "two" / "drawings").glob("*.parquet")]
    assert {name[:13] for name in files} == {"process-00000", "process-00001"}
    assert read_scores(tmp_path / "two") == read_scores(tmp_path / "one")
    records = [pq.read_table(tmp_path / name / "records.parquet") for name in ("one", "two")]
    assert records[0].equals(records[1])
    for name in ("test_grid.png", "test_strips.png", "samples.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_like_an_unbroken_one(evaluate_arguments, tmp_path):
    evaluate.main([*evaluate_arguments, str(tmp_path / "unbroken")])
    command = [sys.executable, "-m", "iclevr_diffusion.evaluate", *evaluate_arguments, str(tmp_path / "killed")]
    drawings = tmp_path / "killed" / "drawings"
    process = subprocess.Popen(command, env=ENVIRONMENT)
    until = time.monotonic() + 300
    while not any(drawings.glob("*.parquet")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert any(drawings.glob("*.parquet")) and not (tmp_path / "killed" / "results.json").exists()
    evaluate.main(command[3:])
    assert read_scores(tmp_path / "killed") == read_scores(tmp_path / "unbroken")


def test_a_pipeline_that_maps_images_is_not_scored(tmp_path):
    networks = [CycleGANGenerator(16, block_out_channels=(8, 8), num_residual_blocks=1) for _ in range(2)]
    with pytest.raises(ValueError, match="got a CycleGANPipeline; one that maps images is looked at with iclevr-pic"):
        Evaluator(CycleGANPipeline(*networks), {"judge": make_judge()}, (FIRST,), tmp_path)


def test_composed_conditions_are_drawn_as_asked_and_scored_by_what_must_not_be_there(make_evaluator, tmp_path):
    results = make_evaluator(protocols=(NEGATED, UNNEGATED)).run(make_store(num_images=40))
    records = pq.read_table(tmp_path / "evaluation" / "records.parquet").to_pylist()
    seeds = [[row["seed"] for row in records if row["protocol"] == name] for name in ("negated", "unnegated")]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 6
    images = {}
    for units, pixel_values, _ in Drawings(tmp_path / "evaluation" / "drawings").batches():
        images |= {unit: image.tobytes() for unit, image in zip(units, pixel_values, strict=True)}
    for position in range(3):
        assert images[Unit("negated", position, 0)] != images[Unit("unnegated", position, 0)]
    logits = torch.tensor([row["logits judge"] for row in records if row["protocol"] == "negated"]).unflatten(
        0, (3, 2)
    )
    labels = [ICLEVR_LABELS.encode(part) for part in (NEGATED.conditions, NEGATED.negated)]
    negation = results["protocols"]["negated"]["judges"]["judge"]["negation"]
    assert negation.pop("ceiling") is None  # the held-out images show two objects each
    assert negation == score_negation(logits, *labels, resampled="conditions")
    assert results["protocols"]["unnegated"]["seeded_as"] == "negated"
    assert "unnegated: all asked for seen" in format_results(results)
    file = tmp_path / "evaluation" / "images" / "negated" / "0000_red-cube-AND-NOT-gray-cube.png"
    assert Image.open(file).text["labels"] == NEGATED.prompts[0]
    samples = Image.open(tmp_path / "evaluation" / "samples.png")
    assert json.loads(samples.text["labels"]) == [[prompt] for prompt in NEGATED.prompts]


def test_a_pipeline_of_one_call_is_not_asked_to_compose(plain_pipeline, tmp_path):
    with pytest.raises(ValueError, match="`protocols`, negated: a PlainPipeline draws in one call of its network"):
        Evaluator(plain_pipeline, {"judge": make_judge()}, (NEGATED,), tmp_path)
    Evaluator(plain_pipeline, {"judge": make_judge()}, (UNNEGATED,), tmp_path)


def test_the_images_of_highest_lift_are_scored_apart(make_evaluator, tmp_path, monkeypatch):
    plain = make_evaluator(num_seeds=4).run()
    lifts = {}

    def measure(pipeline, pixel_values, requests, **_):
        return torch.tensor([lifts.setdefault(image.tobytes(), len(lifts) * 7 % 24) for image in pixel_values]).float()

    monkeypatch.setattr(evaluation, "measure_lift", measure)
    results = make_evaluator(num_seeds=4, best_of=2).run()  # draws nothing anew
    assert results["settings"].pop("best_of") == {"num_candidates": 2, "num_draws": 8}
    assert results["settings"] == plain["settings"]
    best = results["protocols"]["first"]["judges"]["judge"].pop("best_of")
    assert results["protocols"]["first"] == plain["protocols"]["first"]
    images = {}
    for units, pixel_values, _ in Drawings(tmp_path / "evaluation" / "drawings").batches():
        images |= dict(zip(units, pixel_values, strict=True))
    logits = torch.empty(3, 2, 24)
    for position in range(3):
        for pair in range(2):
            of_pair = [images[Unit("first", position, 2 * pair + i)] for i in range(2)]
            picked = max(of_pair, key=lambda image: lifts[image.tobytes()])
            logits[position, pair] = read_images(make_judge(), picked[None]).logits[0]
    expected = score_conditions(
        logits, ICLEVR_LABELS.encode(FIRST.conditions), label_names=ICLEVR_LABELS.names, resampled="replicates"
    )
    assert best["num_candidates"] == 2 and best["all"]["num_images"] == 6
    assert best["all"]["exact_match"] == expected["all"]["exact_match"]
    assert best["all"]["mean_average_precision"]["value"] == pytest.approx(
        expected["all"]["mean_average_precision"]["value"], abs=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"best_of": 1}, "`best_of` must be at least 2, got 1"),
        ({"best_of": 2, "protocols": (MATCHING,)}, "`best_of` must be left out where 'matched' is drawn alone"),
        (
            {"best_of": 2, "num_seeds": 3},
            "`num_seeds` must be a multiple of `best_of` = 2 .* got 3 for the protocol first",
        ),
    ],
)
def test_images_are_picked_from_as_many_as_there_are(make_evaluator, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_evaluator(**arguments)


def test_only_a_model_of_both_losses_picks_images(make_evaluator, tiny_pipeline, plain_pipeline, tmp_path):
    tiny_pipeline.unet.register_to_config(null_condition=False)
    with pytest.raises(ValueError, match="needs a diffusion model that was trained with label dropout"):
        make_evaluator(best_of=2)
    with pytest.raises(ValueError, match="needs a diffusion model that was trained with label dropout"):
        Evaluator(plain_pipeline, {"judge": make_judge()}, (FIRST,), tmp_path, best_of=2)
