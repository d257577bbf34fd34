"""What the cost of a model needs to know about its compressor, from its catalog row."""

import functools

from vlm_jax.compress import catalog
from vlm_jax.compress.contract import Compressor, Cost
from vlm_jax.compress.plugins import PluginError
from vlm_jax.core import specs
from vlm_jax.core.errors import UserError
from vlm_jax.core.segments import HIDDEN
from vlm_jax.core.specs import CompressorSpec, DataSpec, ModelSpec, RunSpec

LayerTokens = tuple[
    tuple[int, int], ...
]  # (layers, visual tokens of an image there), from the decoder's first layer on


def row(model: ModelSpec) -> Compressor:
    """The compressor's row."""
    return catalog.row(model.compressor.name)


@functools.lru_cache(maxsize=100_000)
def compressor_cost(spec: CompressorSpec, question_tokens: int | float = 0) -> Cost:
    """Forward FLOPs of one image and one question through the compressor, without question pass and projector."""
    return catalog.row(spec.name).cost(spec, question_tokens)


def check_stages(model: ModelSpec, where: str) -> None:
    """Raises `UserError`, behind the prefix `where`, for a model from a file whose encoder lacks what its compressor
    reads, or whose decoder has no place for its stages. A compressor whose package is absent or broken is an error of
    what uses it (`catalog.check_installed`), not of the file.
    """
    if model.encoder is None or model.compressor is None or model.decoder is None:
        return
    if model.compressor.name in catalog.names():
        try:
            catalog.check_encoder(model.compressor.name, model.encoder)
            catalog.check_decoder(model)
        except PluginError:
            return
        except UserError as error:
            raise UserError(f"{where}{error}") from error


def alive(model: ModelSpec) -> LayerTokens:
    """The visual tokens that layers process. Raises `UserError` for stages beyond the decoder's depth."""
    start, tokens, parts = 0, row(model).entering(model.compressor), []
    for stage in catalog.stages(model):
        parts.append((stage.layer - start, tokens))
        start, tokens = stage.layer, stage.keep
    parts.append((model.decoder.depth - start, tokens))
    if min(layers for layers, _ in parts) < 1:
        catalog.check_decoder(model)
    return tuple(parts)


def cached(model: ModelSpec) -> LayerTokens:
    """The visual tokens that layers keep for decoding."""
    segments = row(model).segments(model.compressor)
    return tuple((layers, tokens - segments.count(HIDDEN)) for layers, tokens in alive(model))


def views_of_row(spec: RunSpec, data: DataSpec) -> int:
    """M: the views of a training row."""
    return specs.views_of_row(data, catalog.has_own_views(spec.model, spec.compute, data))


def mean(parts: LayerTokens) -> int | float:
    """Tokens in a layer, the mean over all layers."""
    if len(parts) == 1:
        return parts[0][1]
    return sum(layers * tokens for layers, tokens in parts) / sum(layers for layers, _ in parts)
