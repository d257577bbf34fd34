"""The description of a published model, for every checkpoint format."""

from typing import Any, NamedTuple

from vlm_jax.checkpoints.tensor_files import TensorFiles
from vlm_jax.checkpoints.tensor_tables import TensorTable
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec


class CheckpointInfo(NamedTuple):
    """A published model as our specs and tables. Parts that it does not have are None and missing in `tables`."""

    kind: str  # the architecture's name in the file
    encoder: EncoderSpec | None
    projector: str | None
    decoder: DecoderSpec | None
    mask: str  # "causal" or "prefix", as `ModelSpec.mask`
    image_token: int | None  # id of the image token
    tables: dict[str, TensorTable]  # of "encoder", "connector", "decoder"
    weights: TensorFiles
    config: dict[str, Any]  # config.json, {} where the format has none
    ignore: tuple[str, ...] = ()  # regexes of tensors that are not read
    compressor: CompressorSpec | None = None  # None: all patches are projected
    prepared: bool = False  # `encoder` has the image preparation of files elsewhere; else it is beside the weights
    missing: str = ""  # why there is no encoder, where config.json names one in another folder
