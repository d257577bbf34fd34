"""Parameters, FLOPs and bytes of a model by part, computed from its spec. No device is touched.

Conventions:

1. A product of [m, k] and [k, n] is 2 m k n FLOPs. Only matrix products count: norms, activations, rotary positions,
   softmax and additions are below two percent of a model of useful width, and a test compares the sums with XLA's
   count.
2. Attention is counted densely: each of L queries against each of S keys, masked or not, for scores and for values. A
   causal or windowed mask saves nothing.
3. The vocabulary head runs once after prefill and once per decode step; in training it is counted at every position
   of a row, though the loss computes only those with a weight (`ops.cross_entropy`): the convention of published MFU.
4. An embedding lookup costs no FLOPs.
5. N of the law is `decoder_params(spec, "excluded")`: everything but the embedding table and the head.
6. A compressor's FLOPs come from its row. Its weights are left out of the bytes (counting them takes JAX): few beside
   those of a decoder, except of LLaVA-Mini, or behind the study's small decoders.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

from vlm_jax.compress import catalog
from vlm_jax.compress.contract import PROJECTORS
from vlm_jax.core.errors import unknown
from vlm_jax.core.specs import DecoderSpec, EncoderSpec, ModelSpec, RunSpec, StageSpec, at_every_v, data_of
from vlm_jax.sizing import compression

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
CHANNELS = 3  # of a pixel
Number = int | float  # token counts may be means
PARTS = ("encoder", "compressor", "question", "prefill", "decode")  # of a request; "compressor" includes the projector
Question = Literal["fresh", "cached"]  # the keys and values of a cached question are reused, so it needs no prefill


class Pass(NamedTuple):
    """FLOPs of one pass through the decoder, in disjoint parts."""

    layers: float  # projections and MLPs: linear in the tokens
    attention: float  # scores and values: quadratic
    head: float  # logits

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


class ModelFlops(NamedTuple):
    """Forward FLOPs of one question about one image, in disjoint parts."""

    encoder: float
    compressor: float
    projector: float
    question: Pass  # the question alone through the decoder, for query-dependent compressors
    prefill: Pass  # image tokens, question and the first token's logits
    decode: Pass  # all decode steps

    @property
    def total(self) -> float:
        return self.encoder + self.compressor + self.projector + sum(part.total for part in self[3:])

    @property
    def by_part(self) -> dict[str, float]:
        """FLOPs by `PARTS`."""
        passes = (self.question.total, self.prefill.total, self.decode.total)
        return dict(zip(PARTS, (self.encoder, self.compressor + self.projector, *passes), strict=True))


class ModelParams(NamedTuple):
    """Parameter counts of a model, in disjoint parts."""

    encoder: int
    compressor: int
    projector: int
    decoder: int  # N of the law
    embedding: int  # the table, and the head unless tied

    @property
    def total(self) -> int:
        return sum(self)


def encoder_params(spec: EncoderSpec) -> int:
    """Parameters of the encoder: patch kernel, position table, [class token], [pre-norm], blocks, [final norm],
    [pooling head].

    A block has two layer norms (2E each), four projections (E^2 + E) and an MLP (2EF + F + E). The pooling head has a
    probe (E), four projections, one norm and one MLP. CLIP's projection to the shared text space is not included.
    """
    width, inner = spec.width, spec.mlp_width
    norm, attention, mlp = 2 * width, 4 * (width**2 + width), 2 * width * inner + inner + width
    patch = spec.patch_size**2 * CHANNELS * width + width * spec.patch_bias
    table = (spec.patches + spec.class_token) * width
    stem = patch + table + width * spec.class_token + norm * spec.pre_norm
    pool = (width + attention + norm + mlp) * spec.pooling_head
    return stem + spec.blocks * (2 * norm + attention + mlp) + norm * (not spec.feature_layer) + pool


def _layer_kernels(spec: DecoderSpec) -> int:
    """Kernel parameters of one layer: D N C (queries), 2 D K C (keys, values), N C D (out), 3 D F (gate, up, down)."""
    return spec.width * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads) + 3 * spec.width * spec.mlp_width


def decoder_params(spec: DecoderSpec, embedding: Literal["excluded", "included"] = "included") -> int:
    """Parameters of the decoder; "excluded" leaves out the embedding table and the head, which gives N of the law.

    A layer has its kernels, two RMS norms of width D (four if sandwiched), [biases of q, k, v], [two norms of width
    C]; then one final norm. The embedding is W D, and an untied head another W D.
    """
    biases = (spec.heads + 2 * spec.kv_heads) * spec.head_dim * spec.qkv_bias
    norms = (4 if spec.sandwich_norm else 2) * spec.width + 2 * spec.head_dim * spec.qk_norm
    inner = spec.depth * (_layer_kernels(spec) + biases + norms) + spec.width
    return inner + (spec.vocab * spec.width * (1 if spec.tied_head else 2) if embedding == "included" else 0)


def _projector_kernels(kind: str, inputs: int, width: int) -> int:
    if kind not in PROJECTORS:
        raise unknown("projector", kind, PROJECTORS)
    return inputs * width + (0 if kind == "linear" else width**2)


def projector_params(kind: str, inputs: int, width: int) -> int:
    """Parameters of the projector of a compressor's tokens: inputs D + D, and where it has two layers another
    D^2 + D."""
    return _projector_kernels(kind, inputs, width) + width * (1 if kind == "linear" else 2)


def params(model: ModelSpec) -> ModelParams:
    """Parameters of every part of the model; the compressor's are counted from the shapes of its weights."""
    import jax  # for the shapes of weights alone

    from vlm_jax.core.tree import count

    compressor, inner = model.compressor, decoder_params(model.decoder, "excluded")
    key = jax.ShapeDtypeStruct((2,), "uint32")  # the shape of a key: creating one would initialise a backend
    weights = jax.eval_shape(lambda key: catalog.row(compressor.name).init_weights(key, compressor), key)
    return ModelParams(
        encoder_params(model.encoder),
        count(weights),
        projector_params(model.projector, catalog.output_width(compressor), model.decoder.width),
        inner,
        decoder_params(model.decoder) - inner,
    )


def encoder_flops(spec: EncoderSpec) -> float:
    """Forward FLOPs of one image through the blocks that run; the pooling head is not on the path to the decoder.

    With S = patches (+ 1 for a class token): patches 2 P p^2 3 E, then per block 2 S (4 E^2 + 2 E F) + 4 S^2 E. Keys of
    `attention_layer` are computed once more, 2 S E^2, and for the salience its queries, of the class token or of all:
    2 E^2 + 2 S E each.
    """
    tokens, width = spec.patches + spec.class_token, spec.width
    stem = 2 * spec.patches * spec.patch_size**2 * CHANNELS * width
    if spec.merge:
        return float(stem + _merging_blocks_flops(spec))
    block = 2 * tokens * (4 * width**2 + 2 * width * spec.mlp_width) + 4 * tokens**2 * width
    keys = 2 * tokens * width**2 if {"keys", "salience"} & set(spec.returns) else 0
    queries = (1 if spec.class_token else tokens) if "salience" in spec.returns else 0
    extra = keys + queries * (2 * width**2 + 2 * tokens * width)
    return float(stem + spec.blocks * block + extra)


def _merging_blocks_flops(spec: EncoderSpec) -> float:
    """Blocks that merge tokens: attention on S of them, the likeness of A and B at the width of a head, sums of r
    tokens (E and their sizes) into B, the MLP on S - r."""
    tokens, width, total = spec.patches + spec.class_token, spec.width, 0.0
    for pairs in spec.merge:
        total += 8 * tokens * width**2 + 4 * tokens**2 * width
        if pairs:
            odd = tokens // 2
            total += 2 * (tokens - odd) * odd * (width // spec.heads) + 2 * pairs * odd * (width + 1)
        tokens -= pairs
        total += 4 * tokens * width * spec.mlp_width
    return total


def pass_flops(spec: DecoderSpec, tokens: Number, keys: Number, logits: Number) -> Pass:
    """FLOPs of `tokens` new tokens that attend to `keys` keys each (themselves included), with logits for `logits` of
    them.

    Per layer 2 L (kernel parameters) + 4 L S N C; the head 2 D W per position with logits.
    """
    return Pass(
        float(2 * tokens * spec.depth * _layer_kernels(spec)),
        float(4 * tokens * keys * spec.depth * spec.heads * spec.head_dim),
        float(2 * logits * spec.width * spec.vocab),
    )


def decode_flops(spec: DecoderSpec, context_tokens: Number, answer_tokens: Number) -> Pass:
    """FLOPs of the A - 1 decode steps of A answer tokens (eos included): prefill's logits give the first token.

    Step t attends to context + t keys; the sum over t is in closed form.
    """
    steps = max(answer_tokens - 1, 0)
    return pass_flops(spec, steps, context_tokens + (steps + 1) / 2, steps)


def _pass_by_layers(
    decoder: DecoderSpec, parts: tuple[tuple[int, int], ...], one: Callable[[DecoderSpec, int], Pass]
) -> Pass:
    """The sum of `one(decoder of that many layers, visual tokens)`; the head counts once."""
    if len(parts) == 1:
        return one(decoder, parts[0][1])
    passes = [one(dataclasses.replace(decoder, depth=layers), tokens) for layers, tokens in parts]
    return Pass(sum(part.layers for part in passes), sum(part.attention for part in passes), passes[-1].head)


def _score_flops(model: ModelSpec, text_tokens: Number) -> Pass:
    """Of the stages that score: one query of the layer, the keys of all tokens that enter the stage, their products."""
    products, cuts = Pass(0.0, 0.0, 0.0), catalog.stages(model)
    if not cuts:
        return products
    decoder, alive = model.decoder, catalog.entering(model.compressor)
    for stage in cuts:
        if stage.score == "attention":
            keys, heads = alive + text_tokens, decoder.heads * decoder.head_dim
            projected = heads + keys * decoder.kv_heads * decoder.head_dim
            products = Pass(
                products.layers + 2.0 * decoder.width * projected, products.attention + 2.0 * keys * heads, 0.0
            )
        alive = stage.keep
    return products


def flops(model: ModelSpec, question_tokens: Number, answer_tokens: Number, question: Question = "fresh") -> ModelFlops:
    """Forward FLOPs of one question (Q tokens) and its answer, by part.

    Image tokens that depend on the question precede it, so with them a cached question saves nothing. V = 0 is the
    blind baseline: no encoder, no compressor, no projector.
    """
    decoder, compressor = model.decoder, model.compressor
    skipped = Pass(0.0, 0.0, 0.0)
    reads_question = compression.row(model).query_dependent
    new_text = 0 if question == "cached" and not reads_question else question_tokens
    prefill = _pass_by_layers(
        decoder, compression.alive(model), lambda part, v: pass_flops(part, v + new_text, question_tokens + v, 1)
    )
    decode = _pass_by_layers(
        decoder, compression.cached(model), lambda part, v: decode_flops(part, question_tokens + v, answer_tokens)
    )
    if compressor.tokens == 0:
        return ModelFlops(0.0, 0.0, 0.0, skipped, prefill, decode)
    scores, cost = _score_flops(model, question_tokens), compression.compressor_cost(compressor, question_tokens)
    kernels = _projector_kernels(model.projector, catalog.output_width(model.compressor), decoder.width)
    passes_question = "question_vector" in compression.row(model).reads
    return ModelFlops(
        encoder_flops(model.encoder),
        float(cost.image + cost.question),
        2.0 * (compressor.tokens if cost.projected is None else cost.projected) * kernels,
        pass_flops(decoder, question_tokens, question_tokens, 0) if passes_question else skipped,
        Pass(prefill.layers + scores.layers, prefill.attention + scores.attention, prefill.head),
        decode,
    )


def row_fields(parts: ModelFlops) -> dict[str, float]:
    """The FLOPs fields of a `ResultRow`."""
    return {f"{part}_flops": value for part, value in parts.by_part.items()}


def row_pass(model: ModelSpec, row_tokens: int, views: int) -> Pass:
    """FLOPs of a training row of L positions through the decoder, with logits for all of them. Each of its M views
    leaves some of its tokens behind at the model's stages, present or not."""

    def one(decoder: DecoderSpec, tokens: int) -> Pass:
        length = row_tokens - views * (catalog.entering(model.compressor) - tokens)
        return pass_flops(decoder, length, length, row_tokens)

    return _pass_by_layers(model.decoder, compression.alive(model), one)


def train_flops(
    model: ModelSpec, row_tokens: int, train: tuple[str, ...], features: Literal["pixels", "stored"],
    question_tokens: Number = 0, views: int = 1,
) -> float:  # fmt: skip
    """Model FLOPs of one training row, forward and backward: L positions, visual tokens included, and M views.

    The backward pass costs one forward for activation gradients and one for weight gradients. A trained part pays
    both; a frozen part pays the first only if a part before it is trained (a frozen decoder behind a trained
    connector). Attention multiplies activations with activations, so it pays twice wherever gradients pass. Every
    position has logits. Rematerialisation is not counted, so divide by this for MFU. `train` names parts of "encoder",
    "connector", "decoder"; the question pass has no gradient.
    """
    forward = flops(model, question_tokens, 1)
    row = row_pass(model, row_tokens, views)
    parts = {  # (products with weights, products of activations), in forward order
        "encoder": (views * forward.encoder if features == "pixels" else 0.0, 0.0),
        "connector": (views * (forward.compressor + forward.projector), 0.0),
        "decoder": (row.layers + row.head, row.attention),
    }
    if stray := set(train) - set(parts):
        raise unknown("part", min(stray), parts)
    total, gradients_pass = views * forward.question.total, False
    for name, (weighted, unweighted) in parts.items():
        gradients_pass |= name in train
        total += weighted * (1 + (name in train) + gradients_pass) + unweighted * (1 + 2 * gradients_pass)
    return total


def step_flops(spec: RunSpec, stage: StageSpec, question_tokens: float = 0.0) -> float:
    """Model FLOPs of one train step of a stage: `train_flops` times the batch.

    An elastic compressor's rows have places for its most tokens at every V; where the smaller V are a prefix, all
    tokens are computed at every step. Steps at one V each count as their mean, steps at all V as their sum.
    """
    data = data_of(spec, stage)
    features: Literal["pixels", "stored"] = "stored" if spec.data.frozen_features else "pixels"
    views = compression.views_of_row(spec, data)
    is_prefix = compression.row(spec.model).elastic == "prefix"
    models = [spec.model] if spec.elastic == "most" else [run.model for run in at_every_v(spec)]
    each = [
        train_flops(spec.model if is_prefix else model, data.row_tokens, stage.train, features, question_tokens, views)
        for model in models
    ]
    return data.batch_rows * sum(each) / (1 if spec.elastic == "all" else len(each))


def run_flops(spec: RunSpec, question_tokens: float = 0.0) -> float:
    """Model FLOPs of all steps of all stages. `question_tokens` matters to query-dependent compressors only."""
    return sum(stage.total_steps * step_flops(spec, stage, question_tokens) for stage in spec.stages)


def dtype_bytes(dtype: str) -> int:
    """Bytes per element. Raises `UserError` for an unknown dtype."""
    if dtype not in DTYPE_BYTES:
        raise unknown("dtype", dtype, DTYPE_BYTES)
    return DTYPE_BYTES[dtype]


def moved_bytes(
    model: ModelSpec, question_tokens: Number, answer_tokens: Number, batch: int = 1, dtype: str = "bfloat16",
    question: Question = "fresh",
) -> dict[str, Number]:  # fmt: skip
    """Memory traffic of a batch of requests in bytes, by `PARTS`; `flops` has the work of one of them.

    The encoder, the projector and every pass of the decoder read their weights once per batch; prefill writes the
    cache, and each of the A - 1 decode steps reads what is in it so far. The question pass has no logits and does not
    read the head.
    """
    encoder, decoder, tokens, size = model.encoder, model.decoder, model.compressor.tokens, dtype_bytes(dtype)
    layers = decoder_params(decoder, "excluded") * size
    streamed = layers + decoder.vocab * decoder.width * size  # the head, tied or not
    prefix, steps = question_tokens + compression.mean(compression.cached(model)), max(answer_tokens - 1, 0)
    step = cache_bytes(decoder, prefix + (steps + 1) / 2, dtype) + decoder_activation_bytes(decoder, 1, dtype)
    reads_question = compression.row(model).query_dependent
    text = 0 if question == "cached" and not reads_question else question_tokens
    fresh = decoder_activation_bytes(decoder, compression.mean(compression.alive(model)) + text, dtype)
    moved = {
        "prefill": streamed + batch * (fresh + cache_bytes(decoder, prefix, dtype)),
        "decode": steps * (streamed + batch * step),
    }
    if tokens == 0:
        return dict.fromkeys(PARTS, 0.0) | moved
    inputs = catalog.output_width(model.compressor)
    projected = compression.compressor_cost(model.compressor, question_tokens).projected
    through = tokens if projected is None else projected
    image = encoder.patches * encoder.width + through * (2 * inputs + decoder.width)
    projector = projector_params(model.projector, inputs, decoder.width)
    asks = layers + batch * decoder_activation_bytes(decoder, question_tokens, dtype)
    return {
        "encoder": encoder_params(encoder) * size + batch * encoder_activation_bytes(encoder, dtype),
        "compressor": (projector + batch * image) * size,
        "question": asks if "question_vector" in compression.row(model).reads else 0.0,
        **moved,
    }


def memory_bytes(
    model: ModelSpec, question_tokens: Number, answer_tokens: Number, batch: int = 1, dtype: str = "bfloat16"
) -> Number:
    """Bytes of the encoder's and decoder's weights, and of a full cache for every request of the batch."""
    weights = (decoder_params(model.decoder) + encoder_params(model.encoder)) * dtype_bytes(dtype)
    length = compression.mean(compression.cached(model)) + question_tokens + answer_tokens
    return weights + batch * cache_bytes(model.decoder, length, dtype)


def cache_bytes(spec: DecoderSpec, tokens: Number, dtype: str = "bfloat16") -> Number:
    """Bytes of the keys and values of one sequence: 2 x layers x K x C per token. As in `core.structs.Cache`, local
    layers keep all positions too."""
    return 2 * spec.depth * spec.kv_heads * spec.head_dim * tokens * dtype_bytes(dtype)


def decoder_activation_bytes(spec: DecoderSpec, tokens: Number, dtype: str = "bfloat16") -> Number:
    """Bytes of activations that a pass of `tokens` tokens moves to and from memory.

    Assumes that norms, rotary positions, activations and softmax are fused into the adjacent products, so that a
    product reads its input once and writes its output once, and that scores stay on chip. Per layer and token: the
    residual stream is read and written around each half (4 D), its normed input read (2 D), q, k, v written and read
    (2 N C + 4 K C), attention's output written and read (2 N C), gate and up written and read (4 F).
    """
    heads, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = 6 * spec.width + 4 * heads + 4 * keys + 4 * spec.mlp_width
    return spec.depth * layer * tokens * dtype_bytes(dtype)


def encoder_activation_bytes(spec: EncoderSpec, dtype: str = "bfloat16") -> Number:
    """The same for one image through the encoder: 6 E + 8 E + 2 F per token and layer (its MLP has no gate)."""
    tokens = spec.patches + spec.class_token
    return spec.blocks * (14 * spec.width + 2 * spec.mlp_width) * tokens * dtype_bytes(dtype)
