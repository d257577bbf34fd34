"""What a reader of published weights says of them, whichever format they came in."""

from typing import Any, NamedTuple

from vlm_jax.checkpoints.tensor_tables import TensorFiles, TensorTable
from vlm_jax.core.specs import DecoderSpec, EncoderSpec


class CheckpointInfo(NamedTuple):
    """A published model in our words. `tables` holds the parts that it has."""

    kind: str  # the architecture, as the file calls it
    encoder: EncoderSpec | None
    projector: str | None
    decoder: DecoderSpec | None
    mask: str  # "causal" or "prefix", as `ModelSpec.mask`
    image_token: int | None  # the id that stands for an image in a prompt
    tables: dict[str, TensorTable]  # of "encoder", "connector", "decoder"
    weights: TensorFiles
    config: dict[str, Any]  # config.json, or what stands for it
    ignore: tuple[str, ...] = ()  # regexes of tensors that may be there without being wanted
