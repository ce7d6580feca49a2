from iclevr_diffusion.rendering.dataset import render_dataset
from iclevr_diffusion.rendering.sampling import sample_scene
from iclevr_diffusion.rendering.scene import Scene, SceneObject
from iclevr_diffusion.rendering.tracer import render_scene, render_sequence, visible_pixels

__all__ = [
    "Scene",
    "SceneObject",
    "render_dataset",
    "render_scene",
    "render_sequence",
    "sample_scene",
    "visible_pixels",
]
