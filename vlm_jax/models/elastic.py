"""Training rows at a smaller V of an elastic compressor (nested, "Matryoshka" training: one set of weights, several V).

Rows have places for the most tokens of a view. At m of them the last m places hold the tokens 0 to m - 1, and
the places before are padding; so the token before the text, which may have a target, is always there.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.compress import catalog
from vlm_jax.core.structs import AttentionMetadata, Inputs, Params
from vlm_jax.models.vlm import Vlm
from vlm_jax.ops import masks


def forward(model: Vlm, params: Params, inputs: Inputs, tokens: int | Int[Array, ""]) -> Float[Array, "B L D"]:
    """Final hidden states at `tokens` of a view, of rows with places for `model.visual_tokens` of each.

    tokens: traced for a compressor whose elastic kind is "prefix", so that one program serves every V; else static.
    """
    if catalog.row(model.spec.compressor.name).elastic == "prefix":
        return model.forward(params, first_tokens(inputs, model.visual_tokens, tokens, model.visual_tokens))[0]
    at = model._replace(spec=catalog.at_tokens(model.spec, tokens))  # type: ignore[arg-type]
    return at.forward(params, first_tokens(inputs, model.visual_tokens, at.visual_tokens, at.visual_tokens))[0]


def first_tokens(inputs: Inputs, places: int, kept: int | Int[Array, ""], given: int) -> Inputs:
    """Rows with `places` for the tokens of a view, of which the last `kept` hold the first of the `given` ones.

    kept 1, given 2    visual   0  1  2  3 -1   ->   .  0  .  2 -1
                       segment  1  1  1  1  1        0  1  0  1  1
    """
    view, place = jnp.divmod(inputs.visual, places)
    token = place - (places - kept)
    is_text = inputs.visual < 0
    valid = is_text | (token >= 0)
    visual = jnp.where(is_text, -1, view * given + jnp.maximum(token, 0))
    metadata = AttentionMetadata(inputs.segment, inputs.position, inputs.order)
    return inputs._replace(visual=visual, **masks.drop_masked(metadata, valid)._asdict())
