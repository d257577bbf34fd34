"""The vision-language model as pure functions of parameters {"encoder", "connector", "decoder"} and `Inputs`; the
encoder's are absent with stored features.

    views  --encode-->  Visual[B M, P, E]  --compress-->  Prefix[B, M V, D]  --merge_image_embeddings-->  [B, L, D]
           --decoder-->  hidden [B, L, D]  --logits-->  [B, L, W]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.compress import catalog
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.core.structs import AttentionMetadata, Cache, Evidence, Inputs, Params, Prefix, Views, Visual
from vlm_jax.models import connector, stages
from vlm_jax.models.cache import init_cache, take_cache
from vlm_jax.models.decoder import Decoder, Head, head
from vlm_jax.models.questions import merge_questions, question_index
from vlm_jax.models.vision import Encoder
from vlm_jax.ops import masks, pixels

_ALWAYS = ("tokens", "mask")  # given to every compressor


class Vlm(NamedTuple):
    """A model: its specs and the functions that they determine."""

    spec: ModelSpec
    compute: ComputeSpec

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.spec.encoder, self.compute)

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.spec.decoder, self.compute, catalog.stages(self.spec))

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a view in the row: V, or more where some leave inside the decoder; 0 for text only."""
        return 0 if self.spec.compressor is None else catalog.entering(self.spec.compressor)

    @property
    def reads_question(self) -> bool:
        """Whether visual tokens depend on the question, so that each question needs its own view."""
        return self.spec.compressor is not None and catalog.row(self.spec.compressor.name).query_dependent

    def init_encoder(self, key: Array) -> Params:
        """Boxed random weights of the encoder."""
        side = self.spec.encoder.image_size
        return self.encoder.init(key, jnp.zeros((1, side, side, 3)))["params"]

    def init(self, key: Array) -> Params:
        """Boxed random weights of connector and decoder."""
        connector_key, decoder_key = jax.random.split(key)
        tokens = jnp.zeros((1, 2), jnp.int32)
        return {
            "connector": connector.init_weights(connector_key, self.spec),
            "decoder": self.decoder.init(decoder_key, tokens, AttentionMetadata(tokens + 1, tokens, tokens))["params"],
        }

    def encode(self, params: Params, image: Array) -> Visual:
        """Pixels -> tokens and taps: uint8[B,H,H,3] of `data.images.fit`, or normalised float[B,H,H,3]."""
        if image.dtype == jnp.uint8:
            image = pixels.normalise(image, self.spec.encoder)
        return self.encoder.apply({"params": params["encoder"]}, image, method="encode")

    def features(self, params: Params, image: Array) -> Visual:
        """Of `encode`, what the compressor reads: what is stored of an image where the encoder is frozen."""
        visual, reads = self.encode(params, image), catalog.row(self.spec.compressor.name).reads
        return visual._replace(**dict.fromkeys(set(Visual._fields) - {*reads, *_ALWAYS}))

    def forward(
        self, params: Params, inputs: Inputs, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Final hidden states of all tokens. With a cache, the L tokens are appended to it and attend to it."""
        x = self.decoder.apply({"params": params["decoder"]}, inputs.tokens, method="embed")
        metadata, places = AttentionMetadata(inputs.segment, inputs.position, inputs.order), None
        if inputs.views is not None and self.visual_tokens:
            image = self.embed_views(params, inputs.views)
            x = merge_image_embeddings(image.tokens, x, inputs.visual)
            if image.question is not None:
                ids = inputs.views.question
                index = question_index(inputs.tokens, inputs.visual, inputs.segment, ids, self.visual_tokens)
                x = merge_questions(x, image.question.reshape(*ids.shape, -1), index)
            if image.mask is not None:
                valid = jnp.take_along_axis(image.mask, jnp.maximum(inputs.visual, 0), axis=1)
                metadata = masks.drop_masked(metadata, (inputs.visual < 0) | valid)
            if segments := catalog.row(self.spec.compressor.name).segments(self.spec.compressor):
                metadata = metadata._replace(segment=summary_segments(metadata, inputs.visual, segments))
            if catalog.stages(self.spec):
                views = image.tokens.shape[1] // self.visual_tokens
                places = stages.visual_places(inputs.visual, metadata, inputs.weight, views, self.visual_tokens)
        return self.decoder.apply({"params": params["decoder"]}, x, metadata, cache, places, method="hidden")

    def init_cache(self, batch: int, length: int, views: int) -> Cache:
        """An empty cache for prompts of `length` tokens with that many views each."""
        cuts = catalog.stages(self.spec)
        later = stages.lengths(cuts, length, views, self.visual_tokens)[1:]
        starts = (stage.layer for stage in cuts)
        return init_cache(self.spec.decoder, self.compute, batch, length, tuple(zip(starts, later, strict=True)))

    def evict(self, cache: Cache, views: int) -> Cache:
        """A prompt's cache without what no later token attends to: the hidden tokens of each view."""
        compressor = self.spec.compressor
        hidden = 0 if compressor is None else catalog.row(compressor.name).segments(compressor).count(masks.HIDDEN)
        if not hidden or not views:
            return cache
        segment = cache.metadata.segment
        order = jnp.where(segment == masks.HIDDEN, 2, segment == 0)
        kept = jnp.argsort(order, axis=1, stable=True)[:, : segment.shape[1] - views * hidden]
        return take_cache(cache, jnp.sort(kept, axis=1))

    def embed_views(self, params: Params, views: Views) -> Prefix:
        """Encodes (unless features are given), compresses and projects -> tokens[B, M V, D] and their mask."""
        has_features = views.pixels is None
        batch, count = (views.features.tokens if has_features else views.pixels).shape[:2]

        def flat(leaf: Array) -> Array:
            return leaf.reshape(batch * count, *leaf.shape[2:])

        if has_features:
            visual = _as_encoded(jax.tree.map(flat, views.features), self.compute.dtype)
        else:
            visual = self.encode(params, flat(views.pixels))
        question = None if views.question is None else flat(views.question)
        out = connector.compress(params["connector"], self.evidence(params, visual, question), self.spec)
        return jax.tree.map(lambda leaf: leaf.reshape(batch, -1, *leaf.shape[2:]), out)

    def evidence(self, params: Params, visual: Visual, question: Int[Array, "N Q"] | None) -> Evidence:
        """What the compressor reads of images and of their questions (begin token and bare text, padded with -1)."""
        reads = catalog.row(self.spec.compressor.name).reads
        evidence = Evidence(**{name: getattr(visual, name) for name in Visual._fields if name in {*reads, *_ALWAYS}})
        if "question_vector" in reads:
            evidence = evidence._replace(question_vector=self.question_vector(params, question))
        if "question_tokens" in reads:
            embedded = self.decoder.apply(_frozen(params), question, method="embed")
            evidence = evidence._replace(question_tokens=embedded, question_mask=question >= 0)
        return evidence

    def question_vector(self, params: Params, question: Int[Array, "N Q"]) -> Float[Array, "N D"]:
        """The decoder's final hidden state of the last token of each question (padded with -1), without gradient
        (QueCC, arXiv 2411.03312, section 4)."""
        frozen = _frozen(params)
        segment = (question >= 0).astype(jnp.int32)
        position = jnp.maximum(jnp.cumsum(segment, axis=1) - 1, 0)
        x = self.decoder.apply(frozen, question, method="embed")
        x, _ = self.decoder.apply(frozen, x, AttentionMetadata(segment, position, position), None, method="hidden")
        return jnp.take_along_axis(x, last_token(segment)[:, None, None], axis=1)[:, 0]

    def logits(self, params: Params, hidden: Float[Array, "B L D"]) -> Float[Array, "B L W"]:
        """Hidden states -> float32 logits."""
        return self.decoder.apply({"params": params["decoder"]}, hidden, method="logits")

    def head(self, params: Params) -> Head:
        """The output embedding, for losses over blocks of the vocabulary."""
        return head(params["decoder"], self.spec.decoder)


def _frozen(params: Params) -> Params:
    return {"params": jax.lax.stop_gradient(params["decoder"])}


def _as_encoded(features: Visual, dtype: str) -> Visual:
    """Stored features in the dtypes of the encoder: that of activations, but float32 for salience."""

    def cast(leaf: Array | None) -> Array | None:
        return leaf.astype(dtype) if leaf is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return Visual(*map(cast, features))._replace(salience=features.salience)


def merge_image_embeddings(
    image: Float[Array, "B N D"], text: Float[Array, "B L D"], visual: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Text embeddings, with image embedding `visual` where that is not -1."""
    chosen = jnp.take_along_axis(image.astype(text.dtype), jnp.maximum(visual, 0)[..., None], axis=1)
    return jnp.where(visual[..., None] >= 0, chosen, text)


def summary_segments(
    metadata: AttentionMetadata, visual: Int[Array, "B L"], segments: tuple[int, ...]
) -> Int[Array, "B L"]:
    """Segments of rows in which text attends to some tokens of a view only: `segments` of its tokens, and HIDDEN for
    what precedes the last shared one. A row has one conversation, or one image that all of them share.

    row         bos  I  I  V  what end                I image, V summary
    segment       1  1  1  1     1   1   ->   -2 -2 -2 -1  1  1
    """
    alive = metadata.segment != 0
    own = jnp.where(visual >= 0, jnp.array(segments)[jnp.maximum(visual, 0) % len(segments)], 0)
    order = jnp.where((own == masks.SHARED) & alive, metadata.order, -1)
    before = metadata.order < order.max(axis=1, keepdims=True)
    own = jnp.where((visual < 0) & before, masks.HIDDEN, own)
    return jnp.where(alive & (own != 0), own, metadata.segment)


def last_token(segment: Int[Array, "B L"]) -> Int[Array, " B"]:
    """Index of each row's last token that is not padding."""
    return segment.shape[1] - 1 - jnp.argmax(segment[:, ::-1] != 0, axis=1)
