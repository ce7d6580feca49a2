from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from iclevr_diffusion.images import make_grid, save_png
from iclevr_diffusion.judging import load_judge
from iclevr_diffusion.scores import top_k_hits
from iclevr_diffusion.training import TrainingRun


class Validation:
    """Looks at what a pipeline draws while it is trained: the same labels from the same seeds each time.

    Args:
        run: The run.
        pipeline: A pipeline around the averaged weights.
        conditions: Label sets to draw, one an image; of the validation images, as the test lists are for the end.
        judge: Folder of the judge that scores the images; with `None` nothing is scored.
        num_drawn: How many of the conditions appear in a grid.
    """

    def __init__(
        self,
        run: TrainingRun,
        pipeline: DiffusionPipeline,
        conditions: Sequence[Sequence[str]],
        judge: str | Path | None = None,
        num_drawn: int = 16,
    ) -> None:
        self.run = run
        self.pipeline = pipeline
        self.conditions = [list(labels) for labels in conditions]
        self.num_drawn = num_drawn
        self.judge = None
        if judge is None:
            run.print("No `judge` is given: nothing is scored on the way, and no `best_pipeline` is kept.")
        else:
            self.judge = load_judge(judge, pipeline.vocabulary.names).to(run.accelerator.device)
        self.measure = {
            "judge": str(judge),
            "num_conditions": len(self.conditions),
        } | {name: value for name, value in pipeline.config.items() if name.startswith("default_")}
        pipeline.set_progress_bar_config(disable=True)

    def draw(self) -> None:
        """Writes a grid to `output_dir/samples`, on the main process."""
        if not self.run.accelerator.is_main_process:
            return
        conditions = self.conditions[: self.num_drawn]
        with self.run.accelerator.autocast():
            images = self.pipeline(conditions, seeds=list(range(len(conditions)))).images
        grid = make_grid(images, ["\n".join(labels) for labels in conditions])
        path = self.run.output_dir / "samples" / f"step-{self.run.step:08d}.png"
        save_png(grid, path, {"step": self.run.step, "labels": conditions, "seeds": list(range(len(conditions)))})

    @torch.no_grad()
    def score(self) -> None:
        """Has the judge read one image of each condition and keeps the pipeline if it is the best yet.

        The score is the course's: of all labels asked for, the share that is among the judge's k highest outputs for an
        image of k labels. The processes share the images out.
        """
        if self.judge is None:
            return
        accelerator = self.run.accelerator
        total = torch.zeros(2, device=accelerator.device)  # labels found, labels asked for
        ours = list(range(accelerator.process_index, len(self.conditions), accelerator.num_processes))
        if ours:
            class_labels = self.pipeline.encode_labels([self.conditions[i] for i in ours]).to(accelerator.device)
            with accelerator.autocast():
                images = self.pipeline(class_labels, seeds=ours, output_type="pt").images
            logits = self.judge(2 * images.to(accelerator.device) - 1).logits
            total += torch.stack([top_k_hits(logits, class_labels).sum(), (class_labels > 0).sum()])
        found, asked = accelerator.reduce(total).tolist()
        self.run.keep_best(found / asked, self.pipeline, self.measure)
