import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from iclevr_diffusion.distribution import diversity, relative_diversity
from iclevr_diffusion.files import write_text
from iclevr_diffusion.images import make_grid, save_png
from iclevr_diffusion.judging import load_judge
from iclevr_diffusion.scores import top_k_hits
from iclevr_diffusion.training import TrainingRun
from iclevr_diffusion.training_data import TrainingData

NUM_COMPARED = 4  # conditions, and drawn images of each, whose likeness is measured
MAX_REAL = 16  # real images of each of them
ALIKE = 0.5  # a lower diversity, 1 being that of real images, raises the alarm


def open_reader(
    option: str, folder: str | Path, label_names: Sequence[str], example: Tensor | None = None
) -> nn.Module:
    """Opens a judge and has it read one image, so that one that cannot is refused before any training.

    Args:
        option: Name of the option that names the judge.
        folder: The judge, as `load_judge` takes it.
        label_names: Names that it must know, in this order.
        example: An image (1, C, H, W) in [-1, 1], to whose device the judge goes; with `None` it reads none.

    Raises:
        ValueError: If there is no such judge, or it has other labels or wants images of another shape.
    """
    try:
        judge = load_judge(folder, label_names)
        if example is not None:
            with torch.no_grad():
                judge.to(example.device)(example)
    except ValueError as error:
        raise ValueError(f"`{option}`: {error}") from None
    return judge


class Validation:
    """Looks at what a pipeline draws while it is trained: the same labels from the same seeds each time.

    Args:
        run: The run.
        pipeline: A pipeline around the averaged weights; one without labels is called with `num_images`.
        conditions: Label sets to draw, one an image; of the validation images, as the test lists are for the end.
        judge: Folder of the judge that scores the images; with `None` nothing is scored.
        num_drawn: How many of the conditions appear in a grid.
        data: The run's images, with which drawn images of one condition are compared; with `None` none are.

    Raises:
        ValueError: If `judge` does not know the pipeline's labels or cannot read the run's images, or the pipeline has
            no labels.
    """

    def __init__(
        self,
        run: TrainingRun,
        pipeline: DiffusionPipeline,
        conditions: Sequence[Sequence[str]],
        judge: str | Path | None = None,
        num_drawn: int = 16,
        *,
        data: TrainingData | None = None,
    ) -> None:
        self.run = run
        self.pipeline = pipeline
        self.conditions = [list(labels) for labels in conditions]
        self.num_drawn = num_drawn
        self.judge = None
        if judge is None:
            run.print("No `judge` is given: nothing is scored on the way, and no `best_pipeline` is kept.")
        elif pipeline.vocabulary is None:
            raise ValueError(f"`judge` must be none for a pipeline without labels, got {judge}.")
        else:
            device = run.accelerator.device
            example = None if data is None else data.example(device)
            self.judge = open_reader("judge", judge, pipeline.vocabulary.names, example).to(device)
        self.measure = {
            "judge": str(judge),
            "num_conditions": len(self.conditions),
        } | {name: value for name, value in pipeline.config.items() if name.startswith("default_")}
        self.compared: list[list[str]] = []
        if data is not None:
            self.compared, self.real_pixels, self.real_numbers = self._find_alike(data)
        pipeline.set_progress_bar_config(disable=True)

    def draw(self) -> None:
        """Writes a grid to `output_dir/samples`, on the main process, and warns if images of one condition are alike."""
        if self.run.accelerator.is_main_process:
            conditions = self.conditions[: self.num_drawn]
            seeds = list(range(len(conditions)))
            images = self._images(conditions, seeds, "pil")
            captions = None if self.pipeline.vocabulary is None else ["\n".join(labels) for labels in conditions]
            path = self.run.output_dir / "samples" / f"step-{self.run.step:08d}.png"
            facts = {"step": self.run.step, "labels": conditions if captions else None, "seeds": seeds}
            save_png(make_grid(images, captions), path, facts)
        if self.compared:
            self._measure_diversity()

    def score(self) -> None:
        """Has the judge read one image of each condition and keeps the pipeline if it is the best yet.

        The score is the course's: of all labels asked for, the share that is among the judge's k highest outputs for an
        image of k labels. The processes share the images out.
        """
        if self.judge is not None:
            self.run.keep_best(self._score(self.pipeline), self.pipeline, self.measure)

    def choose(self, pipelines: Mapping[str, DiffusionPipeline]) -> None:
        """Scores pipelines of one run that differ in their averages, as `score` does, and says which is the best.

        The scores go to `output_dir/averages.json`. Without a judge nothing is scored.

        Args:
            pipelines: The pipelines, by the folders of `output_dir` in which they are saved.
        """
        if self.judge is None:
            return
        scores = {}
        for name, pipeline in pipelines.items():
            pipeline.set_progress_bar_config(disable=True)
            scores[name] = self._score(pipeline)
        best = max(scores, key=scores.__getitem__)  # of equal ones the first
        if self.run.accelerator.is_main_process:
            record = {"step": self.run.step, "measure": self.measure, "scores": scores, "best": best}
            write_text(self.run.output_dir / "averages.json", json.dumps(record, indent=2) + "\n")
        listed = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
        self.run.print(f"Validation scores of the averages: {listed}; the best is {self.run.output_dir / best}.")

    @torch.no_grad()
    def _score(self, pipeline: DiffusionPipeline) -> float:
        accelerator = self.run.accelerator
        self.run.share_buffers(*(item for item in pipeline.components.values() if isinstance(item, nn.Module)))
        total = torch.zeros(2, device=accelerator.device)  # labels found, labels asked for
        ours = list(range(accelerator.process_index, len(self.conditions), accelerator.num_processes))
        if ours:
            conditions = [self.conditions[i] for i in ours]
            class_labels = pipeline.encode_labels(conditions).to(accelerator.device)
            images = self._images(conditions, ours, "pt", pipeline).to(accelerator.device)
            logits = self.judge(2 * images - 1).logits
            total += torch.stack([top_k_hits(logits, class_labels).sum(), (class_labels > 0).sum()])
        found, asked = accelerator.reduce(total).tolist()
        return found / asked

    def _images(
        self,
        conditions: Sequence[Sequence[str]],
        seeds: Sequence[int],
        output_type: str,
        pipeline: DiffusionPipeline | None = None,
    ) -> Any:  # noqa: ANN401 -- PIL images, or a tensor
        pipeline = pipeline or self.pipeline
        labels = {"num_images": len(seeds)} if pipeline.vocabulary is None else {"class_labels": conditions}
        with self.run.accelerator.autocast():
            return pipeline(**labels, seeds=seeds, output_type=output_type).images

    def _find_alike(self, data: TrainingData) -> tuple[list[list[str]], Tensor, Tensor]:
        """Finds the conditions of which most training images show exactly the labels, and some of these images.

        Returns:
            Up to `NUM_COMPARED` conditions with at least two images, none where these are all the same; the images'
            pixels (N, C * H * W) in [0, 1]; and the number of each one's condition (N,).
        """
        if self.pipeline.vocabulary is None:
            groups = [([], data.indices)]
        else:
            wanted = data.store.vocabulary.encode(self.conditions).numpy() > 0
            rows = data.store.class_labels[data.indices] > 0
            groups = [
                (labels, data.indices[(rows == row).all(axis=1)])
                for labels, row in zip(self.conditions, wanted, strict=True)
            ]
            groups.sort(key=lambda group: -len(group[1]))
        # From all over the data, since neighbours may show one scene.
        groups = [
            (labels, indices[:: -(-len(indices) // MAX_REAL)])
            for labels, indices in groups[:NUM_COMPARED]
            if len(indices) > 1
        ]
        if not groups:
            return [], torch.empty(0), torch.empty(0)
        shown = np.concatenate([indices for _, indices in groups])
        numbers = np.repeat(np.arange(len(groups)), [len(indices) for _, indices in groups])
        pixels = torch.from_numpy(np.array(data.store.pixel_values[shown])).flatten(1) / 255
        numbers = torch.from_numpy(numbers)
        differ = any(distance > 0 for distance in diversity(pixels, numbers).values())
        return [labels for labels, _ in groups if differ], pixels, numbers

    def _measure_diversity(self) -> None:
        """Logs how much drawn images of one condition differ, 1 being as much as real ones, and warns where little."""
        accelerator = self.run.accelerator
        value = torch.zeros((), device=accelerator.device)
        if accelerator.is_main_process:
            conditions = [labels for labels in self.compared for _ in range(NUM_COMPARED)]
            images = self._images(conditions, list(range(len(conditions))), "pt").flatten(1).cpu()
            numbers = torch.arange(len(self.compared)).repeat_interleave(NUM_COMPARED)
            value += relative_diversity(self.real_pixels, self.real_numbers, images, numbers)["value"]
        share = accelerator.reduce(value).item()
        self.run.log(diversity=share)
        if share < ALIKE:
            self.run.print(
                f"Step {self.run.step}: images of one condition are alike, whatever the seed: they differ"
                f" {share:.2f} times as much as real ones. Where this lasts, a GAN wants `diff_augment`,"
                " `r1_weight` or a lower `evaluator_weight` or `auxiliary_weight`, a diffusion model a lower"
                " `guidance_scale`."
            )
