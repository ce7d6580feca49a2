import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from iclevr_diffusion.data.folder import IclevrFolder
from iclevr_diffusion.data.split import SPLITS, split_of_scene
from iclevr_diffusion.labels import LabelVocabulary


class IclevrBuilder(datasets.GeneratorBasedBuilder):
    """Typed `datasets` view of a folder in the course's layout.

    ```py
    builder = IclevrBuilder("path/to/folder")
    builder.download_and_prepare()
    train = builder.as_dataset("train")  # image, labels, scene, file_name
    ```
    The class is used directly, because `datasets` runs no loading scripts since version 4. The splits are those of
    `split_of_scene`, spelt `train`, `validation` and `held_out` (`datasets` allows no hyphen); one that has no image is
    left out. Changed images or labels are noticed and written anew.

    Args:
        root: Folder in the course's layout, see `IclevrFolder`. `None` takes the environment variable ICLEVR_ROOT.
        resolution: Height and width of the images; others are resized directly to it.
        cache_dir: Where the Arrow files lie, by default where `datasets` keeps all of them.
        vocabulary: Object names and their indices, by default those of `objects.json`.
    """

    VERSION = datasets.Version("1.0.0")

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        resolution: int = 64,
        cache_dir: str | Path | None = None,
        vocabulary: LabelVocabulary | None = None,
    ) -> None:
        self.folder = IclevrFolder(root, vocabulary)
        self.resolution = resolution
        super().__init__(
            cache_dir=None if cache_dir is None else str(cache_dir),
            dataset_name="iclevr",
            hash=self.folder.fingerprint(resolution),
        )

    def download_and_prepare(self, *args: object, **kwargs: object) -> None:
        """Writes the Arrow files, with the arguments of `datasets`; a refused image is raised as what it is."""
        try:
            super().download_and_prepare(*args, **kwargs)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, (ValueError, FileNotFoundError)):
                raise error.__cause__ from None
            raise

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Images of coloured shapes and the names of the shapes in them.",
            features=datasets.Features(
                {
                    "image": datasets.Image(),
                    "labels": datasets.List(datasets.ClassLabel(names=list(self.folder.vocabulary.names))),
                    "scene": datasets.Value("int64"),
                    "file_name": datasets.Value("string"),
                }
            ),
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        rows: dict[str, list[int]] = {split: [] for split in SPLITS}
        for i, scene in enumerate(self.folder.scenes.tolist()):
            rows[split_of_scene(scene)].append(i)
        return [
            datasets.SplitGenerator(name=split.replace("-", "_"), gen_kwargs={"rows": rows[split]})
            for split in SPLITS
            if rows[split]
        ]

    def _generate_examples(
        self, rows: list[int]
    ) -> Iterator[tuple[int, dict[str, Image.Image | list[str] | int | str]]]:
        for i in rows:
            file_name = self.folder.file_names[i]
            yield (
                i,
                {
                    "image": self.folder.read_image(file_name, self.resolution),
                    "labels": self.folder.labels[i],
                    "scene": self.folder.scenes[i],
                    "file_name": file_name,
                },
            )


def export_parquet(
    root: str | Path | None,
    folder: str | Path,
    *,
    resolution: int = 64,
    vocabulary: LabelVocabulary | None = None,
) -> dict[str, str]:
    """Writes a folder in the course's layout as one Parquet file a split, with the images inside.

    `load_dataset("parquet", data_files=export_parquet(root, folder))` reads them back, on any machine and without this
    package, with labels of type `List(ClassLabel)`. Publish only images that you have the right to.

    Args:
        root: Folder in the course's layout, see `IclevrFolder`. `None` takes the environment variable ICLEVR_ROOT.
        folder: New or empty folder for the files, which is there whole or not at all.
        resolution: Height and width of the images; others are resized directly to it.
        vocabulary: Object names and their indices, by default those of `objects.json`.

    Returns:
        The path of each split's file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got `{folder}`; give another name or delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        builder = IclevrBuilder(
            root, resolution=resolution, cache_dir=os.path.join(temporary, "arrow"), vocabulary=vocabulary
        )
        builder.download_and_prepare()
        parquet = Path(temporary) / "parquet"
        parquet.mkdir()
        splits = builder.as_dataset()
        for split, dataset in splits.items():
            dataset.to_parquet(parquet / f"{split}.parquet")
        os.replace(parquet, folder)
    return {split: str(folder / f"{split}.parquet") for split in splits}
