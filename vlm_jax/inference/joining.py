"""The spec of a model of one checkpoint, or of an encoder and a language model from two, with a compressor between."""

from vlm_jax.checkpoints import inspection
from vlm_jax.checkpoints.inspection import CheckpointInfo
from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DecoderSpec, ModelSpec


def joined_spec(
    vision_info: CheckpointInfo, llm_info: CheckpointInfo, name: str | None, tokens: int | None
) -> ModelSpec:
    """The spec of encoder, compressor `name` and decoder. Raises `UserError` for invalid combinations."""
    encoder, decoder = vision_info.encoder, llm_info.decoder
    if encoder is None:
        if name or tokens is not None:
            raise UserError("a text-only model has no visual tokens: leave compressor and tokens out")
        return ModelSpec(None, None, None, decoder, llm_info.mask)
    if not has_connector(vision_info, llm_info):
        _check_tokens(tokens, name, encoder.patches)
        return catalog.model_spec(encoder, name or "none", tokens, decoder)
    own, compressor = inspection.model_spec(vision_info._replace(decoder=decoder)), vision_info.compressor
    if name in (None, own.compressor.name) and tokens in (None, own.compressor.tokens):
        if compressor is not None and compressor.grid != encoder.grid:
            raise UserError(
                f"image_size={encoder.image_size}: compressor {compressor.name!r} of {vision_info.weights.path} was "
                f"trained with {compressor.grid[0]} x {compressor.grid[1]} patches: leave image_size out"
            )
        _check_width(vision_info, decoder)
        return own
    _check_tokens(tokens, name, own.compressor.tokens)
    return catalog.model_spec(encoder, name or "none", tokens, decoder, own.projector, own.mask)


def has_connector(vision_info: CheckpointInfo, llm_info: CheckpointInfo) -> bool:
    """Whether the connector of the vision side's checkpoint is that of the joined model: the checkpoint has no other
    language model."""
    same = vision_info.decoder is None or vision_info.decoder is llm_info.decoder
    return "connector" in vision_info.tables and same


def _check_tokens(tokens: int | None, name: str | None, own: int) -> None:
    if name is None and tokens is not None and tokens != own:
        raise UserError(f"tokens={tokens}: expected {own}; for another number name the compressor")


def _check_width(vision_info: CheckpointInfo, decoder: DecoderSpec) -> None:
    """Raises `UserError` for a connector that was trained for a language model of another width."""
    width = vision_info.tables["connector"]["projector/bias"].shape[0]
    if width != decoder.width:
        raise UserError(
            f"{vision_info.weights.path}: its connector expects a language model of width {width}, got {decoder.name} "
            f"of width {decoder.width}"
        )
