"""The whole model as pure functions of (parameters, arrays, spec). Parameters are {"encoder", "connector", "decoder"};
the encoder's are absent where its features come from the store.

    pixels --encode--> Visual[B,P,E] --visual_prefix--> [B,V,D] --hidden--> [B,T,D] --logits--> [B,T,W]

Training reads a `Batch`: the image first, packed questions behind it. Answering reads a `Prompt`: the image wherever
its placeholders stand, through `read` and `say`, on a decoder whose layers are apart (`models.layerwise`).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.compress import catalog
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.core.structs import Batch, Cache, Visual
from vlm_jax.models import connector, layerwise
from vlm_jax.models.decoder import Decoder, Head, empty_cache, head
from vlm_jax.models.vision import Encoder
from vlm_jax.ops import masks, pixels

Params = Any
TEXT, IMAGE, ANSWER = 1, 2, 3  # kinds of tokens of a `Prompt`


class Prompt(NamedTuple):
    """Rows of tokens as a reference's processor writes them: V placeholders stand where the image's tokens go.

        tokens   pad pad bos user  I I I  what is this  a cat pad
        kind      0   0   1   1    2 2 2    1   1   1   3  3   0

    Under a prefix mask text and image see each other both ways, and the answer is causal; under a causal mask the two
    are alike. Padding may stand on either side.
    """

    tokens: Int[Array, "B T"]
    kind: Int[Array, "B T"]  # 0 padding, TEXT, IMAGE, ANSWER
    image: Any = None  # [B, H, H, 3], as `Vlm.encode` takes it


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
        """Pixels -> tokens and taps: uint8[B,H,H,3] as `data.images.fit` leaves them, or float[B,H,H,3], normalised."""
        if image.dtype == jnp.uint8:
            image = pixels.normalise(image, self.spec.encoder)
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

    def states(self, params: Params, batch: Batch) -> Float[Array, "B T D"]:
        """Image and text -> the last states of every text position: what `logits` and the loss read."""
        return self.hidden(params, self.visual_prefix(params, batch), batch)[0]

    def forward(self, params: Params, batch: Batch) -> Float[Array, "B T W"]:
        """Image and text -> the logits of every text position."""
        return self.logits(params, self.states(params, batch))

    def head(self, params: Params) -> Head:
        """The table behind `logits`, for a loss that reads it in blocks."""
        return head(params["decoder"], self.spec.decoder)

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

    def read(self, params: Params, prompt: Prompt, slots: int = 0) -> tuple[Float[Array, "B T D"], Cache | None]:
        """A prompt through the model -> states of all its tokens, and the cache where it is to have any `slots`: at
        least T and the tokens to come. The decoder's parameters are those of `layerwise.split`.
        """
        spec, decoder = self.spec.decoder, params["decoder"]
        x, cache = self._embed(decoder, prompt.tokens), None
        if prompt.image is not None:
            x = placed(self._image_tokens(params, prompt), x, prompt.kind)
        if slots:
            batch, length = prompt.tokens.shape
            cache = layerwise.empty_cache(spec, self.compute, batch, length)
        x, cache = layerwise.hidden(spec, self.compute, decoder, x, prompt_slots(prompt, self.spec.mask), cache)
        return x, None if cache is None else layerwise.grown(cache, self.compute, slots)

    def say(
        self, params: Params, token: Int[Array, " B"], position: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B W"], Cache]:
        """`extend` behind `read`: one more token a row, at that position of the row -> logits of the next."""
        place = masks.Slots(position[:, None], position[:, None], jnp.ones_like(position)[:, None])
        x = self._embed(params["decoder"], token[:, None])
        x, cache = layerwise.hidden(self.spec.decoder, self.compute, params["decoder"], x, place, cache)
        return self.logits(params, x)[:, 0], cache

    def prompt_vector(self, params: Params, prompt: Prompt) -> Float[Array, "B D"]:
        """`question_vector` of a prompt: its text alone, without the image."""
        text = prompt._replace(kind=jnp.where(prompt.kind == TEXT, TEXT, masks.PADDING), image=None)
        states = Vlm(dataclasses.replace(self.spec, mask="causal"), self.compute).read(params, text)[0]
        return jnp.take_along_axis(states, last_token(text)[:, None, None], axis=1)[:, 0]

    def _embed(self, decoder: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # A placeholder may lie outside the table: what stands there is replaced.
        known = jnp.where(tokens < self.spec.decoder.vocab, tokens, 0)
        return self.decoder.apply({"params": decoder}, known, method="embed")

    def _image_tokens(self, params: Params, prompt: Prompt) -> Float[Array, "B V D"]:
        asks = catalog.row(self.spec.compressor.name).query_dependent
        vector = self.prompt_vector(params, prompt) if asks else None
        return connector.compress(params["connector"], self.encode(params, prompt.image), vector, self.spec)


def placed(image: Float[Array, "B V D"], text: Float[Array, "B T D"], kind: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The embeddings with each row's image tokens, in order, where its placeholders stand."""
    if not image.shape[1]:
        return text
    here = kind == IMAGE
    nth = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, image.shape[1] - 1)
    return jnp.where(here[..., None], jnp.take_along_axis(image.astype(text.dtype), nth[..., None], axis=1), text)


def prompt_slots(prompt: Prompt, mask: str) -> masks.Slots:
    """Where each token of a prompt stands: padding counts for nothing, on either side."""
    real = (prompt.kind != 0).astype(jnp.int32)
    position = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    order = jnp.where(prompt.kind == ANSWER, position, 0) if mask == "prefix" else position
    return masks.Slots(position, order, real)  # padding is segment 0


def last_token(prompt: Prompt) -> Int[Array, " B"]:
    """Index of each row's last token that is no padding."""
    return prompt.kind.shape[1] - 1 - jnp.argmax(prompt.kind[:, ::-1] != 0, axis=1)


def last_question(batch: Batch) -> Int[Array, " B"]:
    """Index in `text` of each row's last question token."""
    return batch.question.shape[1] - 1 - jnp.argmax(batch.question[:, ::-1], axis=1)
