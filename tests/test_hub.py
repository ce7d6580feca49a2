import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from loopback_hub import TOKEN, LoopbackHub
from safetensors.torch import load_file

import iclevr_diffusion
from iclevr_diffusion import ConditionalDDPMPipeline, MultiLabelUNet2DModel
from iclevr_diffusion.card import describe_training, render_card, render_index
from iclevr_diffusion.evaluation import Evaluator
from iclevr_diffusion.hub import export_judge, export_pipeline, published_files, push_to_hub, write_card
from iclevr_diffusion.judging import load_judge, weights_sha256
from iclevr_diffusion.loading import load_pipeline, shipped_folder
from iclevr_diffusion.models import unet_multilabel
from iclevr_diffusion.models.classifier_small import SmallLabelClassifier
from iclevr_diffusion.pipelines import composition, label_vocabulary, labelled_pipeline, pipeline_conditional_ddpm
from iclevr_diffusion.protocols import Protocol
from iclevr_diffusion.provenance import first_weights_facts, training_facts

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ["red cube", "blue sphere", "gray cylinder"]
FACTS = {"title": "A model of a test", "limits": "It draws noise.", "license": "apache-2.0", "tags": ["noise"]}


def make_pipeline(seed: int = 0) -> ConditionalDDPMPipeline:
    torch.manual_seed(seed)
    unet = MultiLabelUNet2DModel(
        num_classes=3,
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=8,
        null_condition=True,
    )
    unet.set_data_statistics(torch.rand(3, 16, 16) - 0.5, 0.07)
    torch.nn.init.normal_(unet.null_embedding)
    return ConditionalDDPMPipeline(unet.eval(), DDPMScheduler(clip_sample=False), label_names=NAMES)


def make_judge() -> SmallLabelClassifier:
    torch.manual_seed(0)
    return SmallLabelClassifier(3, 16, label_names=NAMES, block_out_channels=(4, 8)).eval()


def draw(pipeline: ConditionalDDPMPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    labels = [["red cube", "gray cylinder"], ["blue sphere"]]
    return pipeline(labels, seeds=[3, 4], num_inference_steps=2, output_type="np").images


def in_half_precision(pipeline: ConditionalDDPMPipeline) -> ConditionalDDPMPipeline:
    unet = copy.deepcopy(pipeline.unet).half().float()
    return ConditionalDDPMPipeline(unet, pipeline.scheduler, label_names=NAMES)


@pytest.fixture
def pipeline() -> ConditionalDDPMPipeline:
    return make_pipeline()


@pytest.fixture
def exported(pipeline: ConditionalDDPMPipeline, tmp_path: Path) -> Path:
    return export_pipeline(pipeline, tmp_path / "exported", facts=FACTS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub on this machine, which the client of this process takes for the real one."""
    with LoopbackHub() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_published_folder_holds_weights_code_and_card_and_nothing_else(exported: Path) -> None:
    present = sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file())
    assert present == published_files(exported)
    assert present == [
        "README.md",
        "composition.py",
        "label_vocabulary.py",
        "labelled_pipeline.py",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/unet_multilabel.py",
    ]
    for published, module in {
        "pipeline.py": pipeline_conditional_ddpm,
        "composition.py": composition,
        "label_vocabulary.py": label_vocabulary,
        "labelled_pipeline.py": labelled_pipeline,
        "unet/unet_multilabel.py": unet_multilabel,
    }.items():
        assert (exported / published).read_bytes() == Path(inspect.getfile(module)).read_bytes()
    weights = load_file(exported / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_an_exported_pipeline_draws_what_the_rounded_weights_draw(
    pipeline: ConditionalDDPMPipeline, exported: Path
) -> None:
    before = draw(pipeline)
    loaded = load_pipeline(exported)
    assert type(loaded) is ConditionalDDPMPipeline and loaded.unet.dtype == torch.float32
    np.testing.assert_array_equal(draw(loaded), draw(in_half_precision(pipeline)))
    assert pipeline.unet.dtype == torch.float32
    np.testing.assert_array_equal(draw(pipeline), before)


def test_a_training_folder_opens_exactly_as_it_was_saved(pipeline: ConditionalDDPMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "pipeline")
    np.testing.assert_array_equal(draw(load_pipeline(tmp_path / "pipeline")), draw(pipeline))


def test_dtype_and_scheduler_are_those_asked_for_and_saved(pipeline: ConditionalDDPMPipeline, tmp_path: Path) -> None:
    pipeline.scheduler = DDIMScheduler(num_train_timesteps=500, clip_sample=False)
    loaded = load_pipeline(export_pipeline(pipeline, tmp_path / "exported"), dtype=torch.bfloat16, device="cpu")
    assert loaded.unet.dtype == torch.bfloat16
    assert type(loaded.scheduler) is DDIMScheduler and loaded.scheduler.config.num_train_timesteps == 500


def test_split_weights_stay_below_the_size_and_give_the_same_image(
    pipeline: ConditionalDDPMPipeline, exported: Path, tmp_path: Path
) -> None:
    split = export_pipeline(pipeline, tmp_path / "split", max_shard_size="20KB")
    shards = [file for file in published_files(split) if file.endswith(".safetensors")]
    assert len(shards) > 1 and "unet/diffusion_pytorch_model.safetensors.index.json" in published_files(split)
    np.testing.assert_array_equal(draw(load_pipeline(split)), draw(load_pipeline(exported)))


def test_a_compiled_network_is_exported_as_the_network_it_wraps(
    pipeline: ConditionalDDPMPipeline, exported: Path, tmp_path: Path
) -> None:
    pipeline.unet = torch.compile(pipeline.unet)
    compiled = export_pipeline(pipeline, tmp_path / "compiled", facts=FACTS)
    for file in published_files(exported):
        if file != "README.md":
            assert (compiled / file).read_bytes() == (exported / file).read_bytes(), file


def test_loading_never_runs_the_code_of_the_folder(exported: Path) -> None:
    for path in exported.rglob("*.py"):
        path.write_text("raise SystemExit('this code was run')")
    draw(load_pipeline(exported))


def test_a_published_folder_does_not_say_where_it_was_made(exported: Path, tmp_path: Path) -> None:
    again = export_pipeline(load_pipeline(exported), tmp_path / "again")
    for path in again.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "model_index.json").unlink(),
            r"must be a pipeline's folder with a model_index.json",
        ),
        (lambda folder: (folder / "model_index.json").write_text("{"), r"model_index.json must be JSON"),
        (
            lambda folder: edit_json(folder / "model_index.json", _class_name="EvilPipeline"),
            r"asks for the class 'EvilPipeline'; this package builds ConditionalDDPMPipeline or ",
        ),
        (
            lambda folder: edit_json(folder / "model_index.json", unet=["os", "system"]),
            r"asks for the class 'system'; this package builds MultiLabelUNet2DModel or .* or a scheduler of diffusers",
        ),
        (
            lambda folder: edit_json(folder / "model_index.json", scheduler=["evil", "EvilScheduler"]),
            r"asks for the class 'EvilScheduler'",
        ),
        (
            lambda folder: edit_json(folder / "model_index.json", safety_checker=["a", "B"]),
            r"got safety_checker besides",
        ),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
            r"diffusion_pytorch_model.safetensors is missing\.",
        ),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
                folder / "unet" / "diffusion_pytorch_model.bin"
            ),
            r"pickled weights can run code and are not read: diffusion_pytorch_model.bin",
        ),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../evil.bin"}}'
            ),
            r"must name safetensors files beside it, got \.\./evil\.bin",
        ),
        (
            lambda folder: edit_json(folder / "unet" / "config.json", null_condition=False),
            r"1 tensors are missing or too many: null_embedding",
        ),
    ],
)
def test_a_folder_that_is_not_right_is_refused_with_the_reason(
    exported: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(exported)
    with pytest.raises(ValueError, match=message):
        load_pipeline(exported)


def test_what_is_neither_folder_nor_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        load_pipeline(tmp_path / "nothing")
    with pytest.raises(ValueError, match="No model named 'nothing' comes with this package"):
        load_pipeline("nothing")
    with pytest.raises(ValueError, match="the hub does not give a model of this name"):
        load_pipeline("nobody/nothing")
    with pytest.raises(ValueError, match="`revision` must be left out"):
        load_pipeline(tmp_path, revision="main")


def test_a_model_inside_or_beside_what_was_given_is_named(
    pipeline: ConditionalDDPMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("iclevr_diffusion.loading.snapshot_download", lambda *_, **__: pytest.fail("a hub was asked"))
    for name in ("pipeline", "best_pipeline"):
        pipeline.save_pretrained(f"model/{name}")
    SmallLabelClassifier(24, 16, block_out_channels=(8, 8)).save_pretrained("run/judge")
    for open_it in (load_pipeline, training_facts):
        with pytest.raises(ValueError, match=r"and there is none; model/pipeline and model/best_pipeline are\."):
            open_it("model")
    with pytest.raises(ValueError, match=r"config\.json, and there is none; run/judge is one\."):
        load_judge("run")
    with pytest.raises(ValueError, match=r"config\.json, and there is none\.$"):
        load_judge("model/pipeline")  # its network is no judge
    with pytest.raises(ValueError, match="there is no folder model/pipline; did you mean model/pipeline?"):
        load_pipeline("model/pipline")
    with pytest.raises(ValueError, match="did you mean .*model/pipeline?"):
        load_pipeline(tmp_path / "model" / "pipline")


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    pipeline: ConditionalDDPMPipeline, exported: Path, tmp_path: Path
) -> None:
    export_pipeline(pipeline, exported, max_shard_size="20KB")
    assert not (exported / "unet" / "diffusion_pytorch_model.safetensors").exists()
    (exported / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="also holds notes.txt"):
        export_pipeline(pipeline, exported)
    pipeline.save_pretrained(tmp_path / "training")
    with pytest.raises(ValueError, match="must be empty or an earlier export.*training folder"):
        export_pipeline(pipeline, tmp_path / "training")
    assert draw(pipeline.from_pretrained(tmp_path / "training")) is not None


def test_an_export_that_fails_leaves_the_earlier_one_and_no_rest(
    pipeline: ConditionalDDPMPipeline, exported: Path
) -> None:
    before = {file: (exported / file).read_bytes() for file in published_files(exported)}
    with torch.no_grad():
        pipeline.unet.class_embedding.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"class_embedding\.bias.*export with dtype=torch\.bfloat16 or float32"):
        export_pipeline(pipeline, exported)
    assert {file: (exported / file).read_bytes() for file in published_files(exported)} == before
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]
    export_pipeline(pipeline, exported, dtype=torch.bfloat16)


def test_only_classes_of_this_package_are_exported(pipeline: ConditionalDDPMPipeline, tmp_path: Path) -> None:
    folder = export_pipeline(pipeline, tmp_path / "exported")
    remote = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    np.testing.assert_array_equal(draw(remote), draw(load_pipeline(folder)))
    with pytest.raises(
        ValueError, match=r"got diffusers_modules\.local\.pipeline\.ConditionalDDPMPipeline; open the folder"
    ):
        export_pipeline(remote, tmp_path / "remote")
    pipeline.unet = remote.unet
    with pytest.raises(
        ValueError, match=r"`pipeline\.unet` must be a MultiLabelUNet2DModel or .* of .* got diffusers_modules"
    ):
        export_pipeline(pipeline, tmp_path / "stranger")
    with pytest.raises(ValueError, match="`dtype` must be one of torch.float16"):
        export_pipeline(make_pipeline(), tmp_path / "integers", dtype=torch.int8)
    assert list(tmp_path.iterdir()) == [folder]


STRANGER = """
import json, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "iclevr_diffusion":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
try:
    import iclevr_diffusion
    sys.exit("the package is here")
except ModuleNotFoundError:
    pass

import numpy, torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline

*sources, out = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(sources[0])
    sys.exit("code was run without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
pipelines = [DiffusionPipeline.from_pretrained(source, trust_remote_code=True) for source in sources]
images = []
for pipeline in pipelines:
    assert type(pipeline).__module__.startswith("diffusers_modules."), type(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    labels = [["red cube", "gray cylinder"], ["blue sphere"]]
    images.append(pipeline(labels, seeds=[3, 4], num_inference_steps=2, output_type="np").images)
numpy.save(out, numpy.stack(images))
"""


@pytest.mark.slow
def test_people_without_the_package_draw_the_same_images_from_folders_and_a_hub(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    first = export_pipeline(make_pipeline(0), tmp_path / "first")
    second = export_pipeline(make_pipeline(1), tmp_path / "second", max_shard_size="20KB")
    third = export_pipeline(make_pipeline(2), tmp_path / "third")
    push_to_hub(third, "me/third")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    finished = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(first), str(second), "me/third", str(tmp_path / "images.npy")],
        env=environment | {"HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    images = np.load(tmp_path / "images.npy")
    for folder, theirs in zip((first, second, third), images, strict=True):
        np.testing.assert_array_equal(theirs, draw(load_pipeline(folder)))
    assert not np.array_equal(images[0], images[1])


def test_a_push_uploads_the_published_files_alone_and_loading_gives_the_image_back(
    hub: LoopbackHub, exported: Path
) -> None:
    (exported / "checkpoint.pt").write_bytes(b"pickle")
    (exported / "unet" / "optimizer.safetensors").write_bytes(b"not a model")
    (exported / ".env").write_text("SECRET=1")
    commit = push_to_hub(exported, "me/model", commit_message="First words")
    repository = hub.repositories["me/model"]
    assert repository.private and repository.messages == ["initial commit", "First words"]
    assert commit.oid == repository.branches["main"]
    files = repository.files()
    assert sorted(files) == [".gitattributes", *published_files(exported)]
    assert all(files[file] == (exported / file).read_bytes() for file in published_files(exported))
    assert len(hub.large_files) == 1 and hub.verified == set(hub.large_files)

    hub.requests.clear()
    np.testing.assert_array_equal(draw(load_pipeline("me/model")), draw(load_pipeline(exported)))
    fetched = {path for _, path in hub.requests if "/resolve/" in path}
    assert fetched and all(path.endswith((".json", ".safetensors")) for path in fetched)


def test_a_pipeline_or_judge_is_pushed_as_it_would_be_exported(
    hub: LoopbackHub, pipeline: ConditionalDDPMPipeline, tmp_path: Path
) -> None:
    push_to_hub(pipeline, "me/model", private=False)
    repository = hub.repositories["me/model"]
    assert not repository.private
    folder = export_pipeline(pipeline, tmp_path / "model")
    assert {
        file: (folder / file).read_bytes() for file in published_files(folder)
    }.items() <= repository.files().items()
    push_to_hub(make_judge(), "me/judge")
    assert weights_sha256(load_judge("me/judge", NAMES)) == weights_sha256(make_judge().half().float())
    assert {"README.md", "config.json"} < set(hub.repositories["me/judge"].files())


def test_the_pipelines_own_method_pushes_the_same_files(
    hub: LoopbackHub, pipeline: ConditionalDDPMPipeline, exported: Path
) -> None:
    sizes = pipeline.push_to_hub("me/model", dry_run=True)
    assert list(sizes) == published_files(exported) and hub.requests == []
    pipeline.push_to_hub("me/model")
    assert hub.repositories["me/model"].private
    assert sorted(hub.repositories["me/model"].files()) == [".gitattributes", *published_files(exported)]


def test_a_later_push_removes_weights_that_the_model_no_longer_has_and_leaves_other_files(
    hub: LoopbackHub, pipeline: ConditionalDDPMPipeline, exported: Path, tmp_path: Path
) -> None:
    push_to_hub(export_pipeline(pipeline, tmp_path / "split", max_shard_size="20KB"), "me/model")
    repository = hub.repositories["me/model"]
    repository.files()["samples/grid.png"] = b"a picture of the owner's"
    push_to_hub(exported, "me/model")
    assert sorted(repository.files()) == sorted([".gitattributes", "samples/grid.png", *published_files(exported)])


def test_a_push_to_a_branch_is_opened_by_its_revision(
    hub: LoopbackHub, pipeline: ConditionalDDPMPipeline, exported: Path, tmp_path: Path
) -> None:
    commit = push_to_hub(exported, "me/model")
    push_to_hub(export_pipeline(make_pipeline(1), tmp_path / "other"), "me/model", revision="other")
    np.testing.assert_array_equal(
        draw(load_pipeline("me/model", revision="other")), draw(load_pipeline(tmp_path / "other"))
    )
    np.testing.assert_array_equal(draw(load_pipeline("me/model", revision=commit.oid)), draw(load_pipeline(exported)))
    with pytest.raises(ValueError, match="at revision missing"):
        load_pipeline("me/model", revision="missing")


def test_a_dry_run_lists_files_and_sizes_without_a_connection(
    hub: LoopbackHub, pipeline: ConditionalDDPMPipeline, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = push_to_hub(exported, "me/model", dry_run=True)
    assert sizes == {file: (exported / file).stat().st_size for file in published_files(exported)}
    assert list(push_to_hub(pipeline, "me/model", dry_run=True)) == list(sizes)
    assert "unet/diffusion_pytorch_model.safetensors" in capsys.readouterr().out
    assert hub.requests == []


def test_a_training_folder_is_not_pushed(pipeline: ConditionalDDPMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="got a training folder; open it with `load_pipeline` and export"):
        push_to_hub(tmp_path / "pipeline", "me/model")
    with pytest.raises(ValueError, match="must be a folder that `export_pipeline` or `export_judge` wrote"):
        push_to_hub(tmp_path, "me/model")


def test_a_folder_that_lacks_a_file_or_has_a_link_in_its_place_is_not_pushed(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (exported / "README.md").unlink()
    (exported / "README.md").symlink_to(tmp_path / "secret")
    (exported / "unet" / "unet_multilabel.py").unlink()
    with pytest.raises(ValueError, match=r"lacks unet/unet_multilabel\.py, README\.md"):
        push_to_hub(exported, "me/model", dry_run=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": ["../../private", "Private"]},
        {"../private": ["diffusers", "DDPMScheduler"]},
        {"scheduler": ["diffusers", "DDPMScheduler"], "/tmp": ["diffusers", "DDPMScheduler"]},
    ],
)
def test_a_configuration_that_names_files_elsewhere_publishes_nothing(
    exported: Path, tmp_path: Path, changes: dict[str, list[str]]
) -> None:
    (tmp_path / "private").mkdir()
    for file in (tmp_path / "private.py", tmp_path / "private" / "scheduler_config.json"):
        file.write_text("{}")
    shutil.copyfile(
        exported / "unet" / "diffusion_pytorch_model.safetensors",
        exported / "scheduler" / "diffusion_pytorch_model.safetensors",
    )
    edit_json(exported / "model_index.json", **changes)
    with pytest.raises(ValueError, match="must hold its files itself, but .* leads out of it"):
        published_files(exported)


def test_a_folder_that_is_a_link_to_elsewhere_publishes_nothing(exported: Path, tmp_path: Path) -> None:
    (exported / "unet").rename(tmp_path / "private")
    (exported / "unet").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=r"must hold its files itself, but unet/.* leads out of it"):
        push_to_hub(exported, "me/model", dry_run=True)


def test_a_public_repository_takes_files_only_if_that_is_asked_for(hub: LoopbackHub, exported: Path) -> None:
    push_to_hub(exported, "me/model", private=False)
    (exported / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="me/model, which exists and is public, got True; give private=False"):
        push_to_hub(exported, "me/model", revision="other")
    repository = hub.repositories["me/model"]
    assert len(repository.messages) == 2 and list(repository.branches) == ["main"]
    push_to_hub(exported, "me/model", private=False)
    assert "results.json" in repository.files()


def test_an_exported_judge_reads_images_as_its_rounded_weights_do(tmp_path: Path) -> None:
    judge = make_judge()
    folder = export_judge(judge, tmp_path / "judge", facts=FACTS)
    assert published_files(folder) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = copy.deepcopy(judge).half().float()(pixel_values).logits
    torch.testing.assert_close(load_judge(folder)(pixel_values).logits, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="a judge is opened by `load_judge`"):
        load_pipeline(folder)
    with pytest.raises(ValueError, match="`judge` must be a LabelClassifier or SmallLabelClassifier"):
        export_judge(torch.nn.Linear(1, 1), tmp_path / "linear")


def test_a_card_carries_the_measured_numbers_of_exactly_these_weights(exported: Path, tmp_path: Path) -> None:
    protocol = Protocol("some", (("red cube",), ("blue sphere", "gray cylinder")), "replicates")
    evaluator = Evaluator(
        load_pipeline(exported),
        {"small": make_judge()},
        [protocol],
        tmp_path / "evaluation",
        num_seeds=2,
        options={"num_inference_steps": 2},
        pipeline_name=str(exported),
    )
    evaluator.pipeline.set_progress_bar_config(disable=True)
    results = evaluator.run()
    results_file = tmp_path / "evaluation" / "results.json"

    assert "Not measured yet." in (exported / "README.md").read_text()
    card = huggingface_hub.ModelCard(write_card(exported, FACTS, results=results_file).read_text())
    score = results["protocols"]["some"]["judges"]["small"]["all"]
    assert f"| some | small | 4 | {score['top_k']['value']:.3f} |" in card.text
    assert card.data.eval_results[0].metric_value == round(score["top_k"]["value"], 4)
    assert card.data.license == "apache-2.0" and "noise" in card.data.tags
    assert f"| {score['top_k']['value']:.3f} |" in render_index(tmp_path)
    assert "results.json" in published_files(exported)
    assert str(tmp_path) not in (exported / "results.json").read_text()

    assert "Negation" not in card.text and "§" not in card.text
    estimates = {name: {"value": 0.5, "low": 0.4, "high": 0.625} for name in ("present", "absent", "both", "top_k")}
    results["protocols"]["some"]["judges"]["small"] |= {
        "negation": {"num_images": 4, **estimates, "ceiling": 0.875},
        "best_of": {"num_candidates": 4, "all": {"num_images": 300, **estimates, "exact_match": {"value": 0.25}}},
    }
    text = render_card(exported, FACTS, records={"results.json": results})
    assert "| some | small | 4 | 0.500 | 0.500 | 0.500 | 0.400 to 0.625 | 0.875 |" in text
    assert "picked from § |" in text and "| some | small | 4 | 300 | 0.500 | 0.400 to 0.625 | 0.250 |" in text
    assert huggingface_hub.ModelCard(text).data.eval_results == card.data.eval_results  # neither is on a hub's list

    other = export_pipeline(make_pipeline(1), tmp_path / "other")
    with pytest.raises(ValueError, match="got scores of others; run `iclevr-evaluate` with this folder"):
        write_card(other, results=results_file)
    with pytest.raises(ValueError, match="must be a file that `iclevr-evaluate` wrote, got none of its form"):
        write_card(other, results=exported / "model_index.json")
    assert not (other / "results.json").exists()


def test_a_judges_card_carries_its_own_scores_on_each_data_set(tmp_path: Path) -> None:
    folder = export_judge(make_judge(), tmp_path / "judge")
    score = {"num_images": 4, "top_k": 0.75, "exact_match": 0.5}
    empty = {"num_images": 1, "top_k": None, "exact_match": 1.0}
    scores = {**score, "by_num_objects": {"0": empty, "1": score}}
    measured = {
        "judges": {
            "other": {"weights_sha256": "0" * 64, "threshold": 9.0},
            "mine": {"weights_sha256": weights_sha256(load_judge(folder)), "threshold": 0.25},
        },
        "data": {"rendered": {"data_sha256": "1" * 64, "judges": {"mine": scores, "other": {}}}},
        "environment": {"machine": "a machine"},
    }
    (tmp_path / "judges.json").write_text(json.dumps(measured))
    card = write_card(folder, FACTS, results=tmp_path / "judges.json").read_text()
    assert "| rendered, held out | 4 | 0.750 | 0.500 |" in card
    assert "| rendered, held out, 0 labels | 1 | - | 1.000 |" in card and "threshold (0.25" in card
    assert json.loads((folder / "results.json").read_text())["judge"]["threshold"] == 0.25
    del measured["judges"]["mine"]
    (tmp_path / "judges.json").write_text(json.dumps(measured))
    with pytest.raises(ValueError, match="got scores of others; run `benchmarks/judges.py` with this folder"):
        write_card(folder, results=tmp_path / "judges.json")


def test_a_card_tells_recipe_machine_and_duration_of_the_run_but_no_path(
    pipeline: ConditionalDDPMPipeline, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = {"batch_size": 8, "gradient_accumulation_steps": 2, "data": ["/mnt/me/scenes"], "learning_rate": 1e-3}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    launch = {
        "command": ["/mnt/me/python"],
        "device": "cpu",
        "num_processes": 2,
        "cpu_count": 4,
        "torch_threads": 1,
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
        "git_commit": "abc",
    }
    (run / "environment.json").write_text(json.dumps([launch]))
    lines = [{"step": 100, "images_per_second": 32.0}, {"step": 150, "images_per_second": 16.0}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    summary = describe_training(run)
    assert (summary["num_steps"], summary["num_images"], summary["seconds"]) == (150, 4800, 200.0)

    folder = export_pipeline(pipeline, tmp_path / "exported", training=run)
    card = (folder / "README.md").read_text()
    assert "150 steps, 4,800 images seen, 3 minutes" in card and "learning_rate: 0.001" in card
    assert "2 processes with 1 thread of 4 CPU cores, torch 2.13.0, diffusers 0.42.1, commit `abc`." in card
    assert "training.json" in published_files(folder)
    assert not any(b"/mnt/me" in (folder / file).read_bytes() for file in published_files(folder))
    card_before = (folder / "README.md").read_text()
    (folder / "training.json").unlink()
    with pytest.raises(ValueError, match="got titel"):
        write_card(folder, {"titel": "A"}, training=run)
    assert not (folder / "training.json").exists() and (folder / "README.md").read_text() == card_before
    write_card(folder, training=run)
    assert (folder / "README.md").read_text() == card_before == render_card(folder, None)
    with pytest.raises(
        ValueError, match="must be the output folder of a training run, but .* lacks config.yaml and metrics.jsonl"
    ):
        write_card(folder, training=tmp_path)


SEEN = [["red cube"], ["red cube", "blue sphere"]]
UNKNOWN = {"conditions": None, "data_sha256": None, "split": None, "judges": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a training run of one step leaves, without its weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("batch_size: 8\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 8.0}\n')
    (folder / "data.json").write_text(json.dumps({"root": "/mnt/me", "data": "a" * 64, "split": "train"}))
    (folder / "conditions.json").write_text(json.dumps(SEEN))
    return folder


def test_a_published_folder_tells_what_its_weights_have_seen(
    pipeline: ConditionalDDPMPipeline, exported: Path, run: Path, tmp_path: Path
) -> None:
    assert training_facts(exported) == UNKNOWN
    folder = export_pipeline(pipeline, tmp_path / "trained", training=run)
    assert {"conditions.json", "training.json"} < set(published_files(folder))
    facts = training_facts(folder)
    assert facts == UNKNOWN | {
        "conditions": [("red cube",), ("red cube", "blue sphere")],
        "data_sha256": "a" * 64,
        "split": "train",
    }
    assert json.loads((folder / "training.json").read_text())["split"] == "train"
    assert not any(b"/mnt/me" in (folder / file).read_bytes() for file in published_files(folder))

    write_card(exported, training=run)
    assert training_facts(exported) == facts
    write_card(exported)
    assert training_facts(exported) == facts
    (run / "conditions.json").unlink()
    write_card(exported, training=run)
    assert training_facts(exported) == facts | {"conditions": None}
    assert "conditions.json" not in published_files(exported)


def test_a_runs_pipeline_has_seen_what_lies_beside_it(
    pipeline: ConditionalDDPMPipeline, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save_pretrained(run / "best_pipeline")
    facts = training_facts(run / "best_pipeline")
    assert facts["conditions"] == list(map(tuple, SEEN)) and facts["data_sha256"] == "a" * 64
    assert facts["judges"] is None
    (run / "config.yaml").write_text("batch_size: 8\njudge: outputs/my_judge\nevaluator: a_teacher\n")
    facts = training_facts(run / "best_pipeline")
    assert facts["judges"] == ["a_teacher", "my_judge"]
    monkeypatch.chdir(run / "best_pipeline")
    assert training_facts(".") == facts
    (run / "judges.json").write_text('["an_earlier_one"]')  # a run may go on with another judge
    assert training_facts(".")["judges"] == ["a_teacher", "an_earlier_one", "my_judge"]
    (run / "config.yaml").write_text("batch_size: 8\nstreaming: true\n")
    assert training_facts(".")["data_sha256"] is None  # that of a streamed set is of files, not of images
    (run / "config.yaml").unlink()  # then it is the folder of no run
    assert training_facts(run / "best_pipeline") == UNKNOWN


def test_what_the_first_weights_have_seen_stays_known_in_a_run_and_in_what_is_exported(
    pipeline: ConditionalDDPMPipeline, run: Path, tmp_path: Path
) -> None:
    pipeline.save_pretrained(run / "pipeline")
    (run / "config.yaml").write_text("batch_size: 8\nevaluator: a_teacher\n")
    (run / "data.json").write_text(json.dumps({"data": "a" * 64, "split": "all"}))
    (run / "conditions.json").write_text(json.dumps([["blue sphere"], ["red cube"], ["a label of theirs alone"]]))
    first = first_weights_facts(run / "pipeline")
    assert first == first_weights_facts(run / "pipeline" / "unet") == training_facts(run / "pipeline")
    assert first["judges"] == ["a_teacher"] and len(first["conditions"]) == 3

    later = tmp_path / "later"
    later.mkdir()
    (later / "config.yaml").write_text("batch_size: 8\ninit_from: run/pipeline\njudge: outputs/mine/judge\n")
    (later / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 8.0}\n')
    (later / "data.json").write_text(json.dumps({"data": "b" * 64, "split": "train"}))
    (later / "conditions.json").write_text(json.dumps([["red cube"], ["gray cylinder"]]))
    (later / "first_weights.json").write_text(json.dumps(first))
    pipeline.save_pretrained(later / "pipeline")
    facts = training_facts(later / "pipeline")
    assert facts == {
        "conditions": [("red cube",), ("gray cylinder",), ("blue sphere",)],
        "data_sha256": "b" * 64,
        "split": "all",  # so no image was held out from these weights
        "judges": ["a_teacher", "mine"],
    }
    published = export_pipeline(pipeline, tmp_path / "published", training=later)
    assert training_facts(published) == facts
    assert first_weights_facts(published / "unet") == facts
    assert json.loads((published / "training.json").read_text())["config"]["judge"] == "mine"

    (later / "config.yaml").write_text("batch_size: 8\n")  # so the file is that of an earlier try
    assert training_facts(later / "pipeline")["judges"] is None
    assert first_weights_facts(export_judge(make_judge(), tmp_path / "judge")) == UNKNOWN


def test_what_weights_have_seen_is_uploaded_read_from_the_hub_and_removed_with_them(
    hub: LoopbackHub, pipeline: ConditionalDDPMPipeline, exported: Path, run: Path, tmp_path: Path
) -> None:
    push_to_hub(export_pipeline(pipeline, tmp_path / "trained", training=run), "me/model")
    known = {"conditions": list(map(tuple, SEEN)), "data_sha256": "a" * 64, "split": "train"}
    assert training_facts("me/model") == UNKNOWN | known
    push_to_hub(exported, "me/model", revision="other")
    assert "conditions.json" not in hub.repositories["me/model"].files("other")
    assert training_facts("me/model", revision="other") == UNKNOWN
    assert training_facts("me/model")["conditions"] is not None


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("conditions.json", "{", "conditions.json must be JSON: "),
        ("conditions.json", "[" * 100_000, "conditions.json must be JSON: "),
        ("conditions.json", "{}", "conditions.json must hold a list of lists of distinct labels, .*, got dict"),
        (
            "conditions.json",
            '["red cube"]',
            "conditions.json must hold a list of lists .*, got 'red cube' in number 0",
        ),
        ("conditions.json", '[["red cube"], [1]]', r"conditions.json must hold .*, got \[1\] in number 1"),
        ("conditions.json", '[["a", "a"]]', r"conditions.json must hold .*, got \['a', 'a'\] in number 0"),
        ("training.json", "[]", "training.json must hold a JSON object, got list"),
        (
            "training.json",
            '{"data_sha256": "../a"}',
            r"training.json must name the images by a SHA-256 .*, got '\.\./a'",
        ),
        ("training.json", '{"data_sha256": [1]}', r"training.json must name the images by a SHA-256 .*, got \[1\]"),
    ],
)
def test_facts_of_training_that_are_not_right_are_refused(exported: Path, file: str, text: str, message: str) -> None:
    (exported / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        training_facts(exported)


def test_an_export_does_not_publish_conditions_that_are_none(
    pipeline: ConditionalDDPMPipeline, run: Path, tmp_path: Path
) -> None:
    (run / "conditions.json").write_text('{"images": ["me.png"]}')
    with pytest.raises(ValueError, match="run/conditions.json must hold a list of lists of distinct labels"):
        export_pipeline(pipeline, tmp_path / "trained", training=run)
    assert not (tmp_path / "trained").exists()


def test_only_a_pipeline_has_facts_of_training(tmp_path: Path) -> None:
    judge = export_judge(make_judge(), tmp_path / "judge")
    with pytest.raises(ValueError, match="must be a pipeline's folder with a model_index.json, and there is none"):
        training_facts(judge)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"titel": "A"}, "must map some of title, summary,.* to words, got titel"),
        ({"title": ""}, "`title` must be text"),
        ({"tags": "noise"}, "`tags` must be a list, got 'noise'"),
        ({"papers": [{"title": "A"}]}, "each of `papers` must have title, authors, year and url"),
        ("nothing.yaml", "`facts` must be a readable YAML file, got nothing.yaml"),
    ],
)
def test_facts_of_another_form_are_refused(exported: Path, facts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_card(exported, facts)


@pytest.mark.parametrize(
    "facts", sorted((REPOSITORY / "model_cards" / "facts").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_facts_of_every_shipped_model_make_a_card_without_a_gap(exported: Path, facts: Path) -> None:
    card = render_card(exported, facts, name=facts.stem)
    assert "The author does not" not in card and "{{" not in card and "None" not in card


@pytest.mark.parametrize("name", [path.stem for path in sorted((REPOSITORY / "model_cards" / "facts").glob("*.yaml"))])
def test_a_shipped_model_is_what_an_export_of_this_source_would_be(name: str) -> None:
    try:
        folder = shipped_folder(name)
    except ValueError:
        pytest.skip(f"{name} has not been trained yet")
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert present == published_files(folder)
    assert all((folder / file).stat().st_size <= 16 * 2**20 for file in present)
    package = REPOSITORY / "iclevr_diffusion"
    sources = {}
    if "model_index.json" in present:
        _, class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
        sources["pipeline.py"] = Path(inspect.getfile(getattr(iclevr_diffusion, class_name)))
    for file in (file for file in present if file.endswith(".py")):
        source = sources.get(file) or package / ("models" if "/" in file else "pipelines") / Path(file).name
        assert (folder / file).read_bytes() == source.read_bytes(), file
    card = render_card(folder, REPOSITORY / "model_cards" / "facts" / f"{name}.yaml", name=name)
    assert (folder / "README.md").read_text() == card
    assert "Not measured yet." not in card


def test_without_an_argument_the_shipped_pipeline_opens() -> None:
    pipeline = load_pipeline()
    assert pipeline.name_or_path == "conditional-ddpm-tokens-rendered-4-steps"
    assert pipeline([["red cube"]], seeds=[0]).images[0].size == (64, 64)


def make_guided() -> ConditionalDDPMPipeline:
    """A pipeline with a guide, that guides by default."""
    strong, weak = make_pipeline(0), make_pipeline(1)
    weak.unet.set_data_statistics(strong.unet.data_mean, strong.unet.data_std)
    return ConditionalDDPMPipeline(strong.unet, strong.scheduler, NAMES, 2, 3.0, guide=weak.unet)


def test_a_guide_is_saved_published_and_opened_by_us_and_by_strangers(tmp_path):
    guided = make_guided()
    expected = draw(guided)
    assert not np.array_equal(draw(ConditionalDDPMPipeline(guided.unet, guided.scheduler, NAMES, 2, 3.0)), expected)
    guided.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(draw(load_pipeline(tmp_path / "saved")), expected)
    folder = export_pipeline(guided, tmp_path / "exported", dtype=torch.float32)
    assert {"guide/config.json", "guide/unet_multilabel.py", "unet/unet_multilabel.py"} < set(published_files(folder))
    np.testing.assert_array_equal(draw(load_pipeline(folder)), expected)
    stranger = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    np.testing.assert_array_equal(draw(stranger), expected)
    card = (folder / "README.md").read_text()
    num_values = sum(
        value.numel() for network in (guided.unet, guided.guide) for value in network.state_dict().values()
    )
    assert "leads away from a second network, `guide`" in card and f"{num_values:,} numbers" in card


def test_without_a_guide_a_published_folder_names_none(exported):
    assert "guide" not in json.loads((exported / "model_index.json").read_text())
    assert load_pipeline(exported).guide is None
    assert DiffusionPipeline.from_pretrained(exported, trust_remote_code=True).guide is None


def test_another_model_becomes_the_guide(pipeline, tmp_path):
    guided = make_guided()
    for name, unet in (("strong", guided.unet), ("weak", guided.guide)):
        ConditionalDDPMPipeline(unet, guided.scheduler, NAMES, 2, 3.0).save_pretrained(tmp_path / name)
    opened = load_pipeline(tmp_path / "strong", guide=tmp_path / "weak")
    np.testing.assert_array_equal(draw(opened), draw(guided))
    others = ConditionalDDPMPipeline(guided.guide, guided.scheduler, NAMES[::-1])
    others.save_pretrained(tmp_path / "others")
    with pytest.raises(
        ValueError, match="`guide` must be a ConditionalDDPMPipeline of the same labels in the same order"
    ):
        load_pipeline(tmp_path / "strong", guide=tmp_path / "others")
    with pytest.raises(ValueError, match="`guide`: .*there is no folder"):
        load_pipeline(tmp_path / "strong", guide=tmp_path / "missing")


def test_a_network_of_tokens_is_published_and_opened_by_strangers(tmp_path):
    base = make_pipeline()
    torch.manual_seed(0)
    unet = MultiLabelUNet2DModel.from_config({**base.unet.config, "label_encoding": "tokens"}).eval()
    pipeline = ConditionalDDPMPipeline(unet, base.scheduler, NAMES)
    folder = export_pipeline(pipeline, tmp_path / "exported", dtype=torch.float32)
    expected = draw(pipeline)
    np.testing.assert_array_equal(draw(load_pipeline(folder)), expected)
    np.testing.assert_array_equal(draw(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)), expected)


def test_what_a_guide_has_seen_counts_as_seen_and_is_published_with_it(run, tmp_path):
    guided, weak_run = make_guided(), tmp_path / "weak"
    ConditionalDDPMPipeline(guided.unet, guided.scheduler, NAMES, 2, 3.0).save_pretrained(run / "pipeline")
    ConditionalDDPMPipeline(guided.guide, guided.scheduler, NAMES, 2, 3.0).save_pretrained(weak_run / "pipeline")
    (weak_run / "config.yaml").write_text("judge: /mnt/me/checkpoint.pth\n")
    (weak_run / "data.json").write_text(json.dumps({"data": "a" * 64, "split": "all"}))
    (weak_run / "conditions.json").write_text(json.dumps([["blue sphere", "red cube"], ["gray cylinder"]]))
    facts = training_facts(run / "pipeline", guide=weak_run / "pipeline")
    assert facts == {
        "conditions": [("red cube",), ("red cube", "blue sphere"), ("gray cylinder",)],
        "data_sha256": "a" * 64,
        "split": "all",
        "judges": ["checkpoint"],  # as `iclevr-evaluate` calls it
    }
    opened = load_pipeline(run / "pipeline", guide=weak_run / "pipeline")
    published = export_pipeline(opened, tmp_path / "published", training=run)
    assert training_facts(published) == facts and "guide.json" in published_files(published)
    assert not any(b"/mnt/me" in (published / file).read_bytes() for file in published_files(published))
    write_card(published, training=run)
    assert training_facts(published) == facts
    again = export_pipeline(load_pipeline(published), tmp_path / "again", training=run)
    assert training_facts(again) == facts

    (again / "guide.json").write_text('{"conditions": [1]}')
    with pytest.raises(ValueError, match="guide.json must hold a list of lists of distinct labels"):
        training_facts(again)
    opened = load_pipeline(run / "pipeline", guide=weak_run / "pipeline")
    weak_run.rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="What the guide was trained on is not published with it"):
        export_pipeline(opened, tmp_path / "third", training=run)


@pytest.mark.parametrize("training", ['{"teacher_judges": 3}', '{"first_weights": {"judges": "abc"}}'])
def test_what_is_no_list_of_judges_names_none(exported, training):
    (exported / "training.json").write_text(training)
    assert training_facts(exported)["judges"] is None


def test_a_folder_that_names_no_class_of_its_guide_has_none(exported):
    index = json.loads((exported / "model_index.json").read_text())
    (exported / "model_index.json").write_text(json.dumps(index | {"guide": []}))
    assert load_pipeline(exported).guide is None
