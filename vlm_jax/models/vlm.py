"""The whole model as pure functions of (parameters, arrays, spec). Parameters are {"encoder", "connector", "decoder"};
the encoder's are absent where its features come from the store.

    pixels --encode--> Visual[B,P,E] --visual_prefix--> [B,V,D] --hidden--> [B,T,D] --logits--> [B,T,W]
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.compress import catalog
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.core.structs import Batch, Cache, Visual
from vlm_jax.models import connector
from vlm_jax.models.decoder import Decoder, empty_cache
from vlm_jax.models.vision import Encoder
from vlm_jax.ops import masks

Params = Any


class Vlm(NamedTuple):
    """A model's two specs, and the functions that they determine."""

    spec: ModelSpec
    compute: ComputeSpec

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.spec.encoder, self.compute)

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.spec.decoder, self.compute)

    def init_encoder(self, key: Array) -> Params:
        """Boxed random weights of the encoder."""
        side = self.spec.encoder.image_size
        return self.encoder.init(key, jnp.zeros((1, side, side, 3)))["params"]

    def init(self, key: Array) -> Params:
        """Boxed random weights of connector and decoder."""
        connector_key, decoder_key = jax.random.split(key)
        text = jnp.zeros((1, 2), jnp.int32)
        slots = masks.image_and_text(0, text + 1, text, text == 0, "causal")
        return {
            "connector": connector.init_weights(connector_key, self.spec),
            "decoder": self.decoder.init(decoder_key, text, slots)["params"],
        }

    def encode(self, params: Params, image: Array) -> Visual:
        """uint8[B,H,H,3] or float in [-1, 1] -> tokens and taps."""
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 127.5 - 1
        return self.encoder.apply({"params": params["encoder"]}, image, method="encode")

    def question_vector(self, params: Params, batch: Batch) -> Float[Array, "B D"]:
        """The question alone through the decoder: last-layer state of its last token, without gradient (QueCC).

        Needs one question per row: with several packed, one set of visual tokens could not follow them all.
        """
        frozen = jax.lax.stop_gradient(params["decoder"])
        segment = jnp.where(batch.question, batch.segment, masks.PADDING)
        slots = masks.image_and_text(0, segment, batch.position, batch.question, "causal")
        x = self.decoder.apply({"params": frozen}, batch.text, method="embed")
        x, _ = self.decoder.apply({"params": frozen}, x, slots, method="hidden")
        return jnp.take_along_axis(x, last_question(batch)[:, None, None], axis=1)[:, 0]

    def visual_prefix(self, params: Params, batch: Batch) -> Float[Array, "B V D"]:
        """Encode (unless features were given), compress and project."""
        if batch.features is None:
            visual = self.encode(params, batch.image)
        else:
            visual = jax.tree.map(lambda leaf: leaf.astype(self.compute.dtype), batch.features)
        vector = self.question_vector(params, batch) if catalog.row(self.spec.compressor.name).query_dependent else None
        return connector.compress(params["connector"], visual, vector, self.spec)

    def hidden(
        self, params: Params, prefix: Float[Array, "B V D"], batch: Batch, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Image and text through the decoder -> states of the text tokens; fills the cache when one is given
        (prefill).
        """
        decoder, variables = self.decoder, {"params": params["decoder"]}
        visual_tokens = prefix.shape[1]
        slots = masks.image_and_text(visual_tokens, batch.segment, batch.position, batch.question, self.spec.mask)
        text = decoder.apply(variables, batch.text, method="embed")
        x = jnp.concatenate([prefix.astype(text.dtype), text], axis=1)
        x, cache = decoder.apply(variables, x, slots, cache, method="hidden")
        return x[:, visual_tokens:], cache

    def logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """States -> float32 logits."""
        return self.decoder.apply({"params": params["decoder"]}, hidden, method="logits")

    def forward(self, params: Params, batch: Batch) -> Float[Array, "B T W"]:
        """Image and text -> the logits of every text position."""
        return self.logits(params, self.hidden(params, self.visual_prefix(params, batch), batch)[0])

    def prefill(self, params: Params, batch: Batch, slots: int) -> tuple[Float[Array, "B W"], Cache]:
        """Image and questions (one a row, right-padded) -> logits behind each row's last question token, and the cache.

        `slots` is the cache's size: at least V + T and the tokens to come.
        """
        cache = empty_cache(self.spec.decoder, batch.text.shape[0], slots, self.compute.dtype)
        hidden, cache = self.hidden(params, self.visual_prefix(params, batch), batch, cache)
        last = jnp.take_along_axis(hidden, last_question(batch)[:, None, None], axis=1)
        return self.logits(params, last)[:, 0], cache

    def extend(
        self, params: Params, token: Int[Array, " B"], position: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B W"], Cache]:
        """One more token a row, at that position of the sequence (image included) -> logits of the next."""
        decoder, variables = self.decoder, {"params": params["decoder"]}
        place = masks.Slots(position[:, None], position[:, None], jnp.ones_like(position)[:, None])
        x = decoder.apply(variables, token[:, None], method="embed")
        x, cache = decoder.apply(variables, x, place, cache, method="hidden")
        return self.logits(params, x)[:, 0], cache


def last_question(batch: Batch) -> Int[Array, " B"]:
    """Index in `text` of each row's last question token."""
    return batch.question.shape[1] - 1 - jnp.argmax(batch.question[:, ::-1], axis=1)
