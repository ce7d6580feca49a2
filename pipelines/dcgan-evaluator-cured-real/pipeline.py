from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .label_vocabulary import LabelVocabulary
from .labelled_pipeline import LabelledPipeline
from .latent_pipeline import LatentPipeline


class ConditionalGANPipeline(LatentPipeline, LabelledPipeline, DiffusionPipeline):
    """Draws images that show given labels by one call of a generator, the one of a GAN.

    *Generative Adversarial Networks* (Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661), with labels as in
    *Conditional Generative Adversarial Nets* (Mirza and Osindero, 2014, https://arxiv.org/abs/1411.1784). A generator
    with no labels (`num_classes` of 0) is called with `num_images` in the place of labels.

    An image depends on the weights, its labels and its seed, not on its place or its neighbours: its latents come from
    a random stream of its own, drawn on the CPU in float32. Kernels round by batch shape, so equality to the bit needs
    one `micro_batch_size` on one machine; other sizes differ by rounding alone.

    Args:
        generator: The network: `generator(latents (B, latent_dim), class_labels (B, num_classes))` gives images
            (B, C, H, W) in [-1, 1].
        label_names: Names of the labels by index, as a list or as the mapping {"0": name, ...} that is saved.
    """

    # Named here too, like `LabelledPipeline` above, as diffusers fetches only the files that this one imports itself.
    vocabulary: LabelVocabulary | None

    def __init__(self, generator: nn.Module, label_names: Sequence[str] | Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.register_modules(generator=generator)
        self._register_label_names(label_names, generator.config.num_classes)

    @property
    def _network(self) -> nn.Module:
        return self.generator

    def _decode(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        return self.generator(latents, class_labels)
