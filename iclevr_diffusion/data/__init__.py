from iclevr_diffusion.data.batches import BatchLoader, normalize
from iclevr_diffusion.data.builder import IclevrBuilder, export_parquet
from iclevr_diffusion.data.digits import DigitImages, load_digits, load_mnist
from iclevr_diffusion.data.folder import IclevrFolder
from iclevr_diffusion.data.source import ImageSource
from iclevr_diffusion.data.split import SPLITS, scene_of_file, split_of_scene
from iclevr_diffusion.data.store import ImageStore, open_store

__all__ = [
    "SPLITS",
    "BatchLoader",
    "DigitImages",
    "IclevrBuilder",
    "IclevrFolder",
    "ImageSource",
    "ImageStore",
    "export_parquet",
    "load_digits",
    "load_mnist",
    "normalize",
    "open_store",
    "scene_of_file",
    "split_of_scene",
]
