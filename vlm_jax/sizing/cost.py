"""What a model costs, from the fields of its spec alone: parameters, FLOPs and bytes by part. No device is touched.

Conventions, the same everywhere:

1. A product of [m, k] and [k, n] is 2 m k n FLOPs. Only matrix products count: norms, activations, rotary positions,
   softmax and additions are below two percent of a model of useful width, and a test holds the sums to XLA's own
   count.
2. Attention is counted as it is computed, densely: each of L queries against each of S keys, masked or not, for
   scores and for values. A causal or windowed mask saves nothing here.
3. The vocabulary head runs where a token is drawn: once after prefill, once per decoded token. In training, on every
   text position.
4. Looking up an embedding is free in FLOPs.
5. N of the law is `decoder_params(spec, embedding="excluded")`: everything but the embedding table and the head.

The compressor's FLOPs come from its own row of `compress.catalog`; its weights are left out of the bytes, they are
small beside the language model's.
"""

import functools
from typing import Literal, NamedTuple

from vlm_jax.core.errors import unknown
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec, ModelSpec, RunSpec, StageSpec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
CHANNELS = 3  # of a pixel
Number = int | float  # a count of tokens may be a mean
PARTS = ("encoder", "compressor", "question", "prefill", "decode")  # of a request; the projector with the compressor
Question = Literal["fresh", "cached"]  # a cached question costs no prefill: its keys and values are kept


class Pass(NamedTuple):
    """FLOPs of some tokens through the decoder, in parts that do not overlap."""

    layers: float  # the projections and MLPs: linear in the tokens
    attention: float  # scores and values: the quadratic term
    head: float  # the vocabulary

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


class ModelFlops(NamedTuple):
    """Forward FLOPs of one question about one image, in parts that do not overlap."""

    encoder: float
    compressor: float
    projector: float
    question: Pass  # the question alone through the decoder, for compressors that read it
    prefill: Pass  # image tokens and question, and the first token's logits
    decode: Pass  # all answer tokens after the first

    @property
    def total(self) -> float:
        return self.encoder + self.compressor + self.projector + sum(part.total for part in self[3:])

    @property
    def by_part(self) -> dict[str, float]:
        """By `PARTS`."""
        passes = (self.question.total, self.prefill.total, self.decode.total)
        return dict(zip(PARTS, (self.encoder, self.compressor + self.projector, *passes), strict=True))

    @property
    def attention(self) -> float:
        """The decoder's quadratic term over all passes; part of `total`, not beside it."""
        return sum(part.attention for part in self[3:])

    @property
    def head(self) -> float:
        """The vocabulary head over all passes; part of `total`, not beside it."""
        return sum(part.head for part in self[3:])


def encoder_params(spec: EncoderSpec) -> int:
    """Scalars of the encoder: patch kernel, position table, [class token], [pre-norm], blocks, [final norm],
    [pooling head].

    A block has two layer norms (2E each), four projections (E^2 + E) and an MLP (2EF + F + E). The pooling head has a
    probe (E), four projections, one norm and one MLP. CLIP's projection to the shared text space is not part of it.
    """
    width, inner = spec.width, spec.mlp_width
    norm, attention, mlp = 2 * width, 4 * (width**2 + width), 2 * width * inner + inner + width
    patch = spec.patch_size**2 * CHANNELS * width + width * spec.patch_bias
    table = (spec.patches + spec.class_token) * width
    stem = patch + table + width * spec.class_token + norm * spec.pre_norm
    pool = (width + attention + norm + mlp) * spec.pooling_head
    return stem + spec.blocks * (2 * norm + attention + mlp) + norm * (not spec.feature_layer) + pool


def _projection_params(spec: DecoderSpec) -> int:
    """One block's kernels: D N C (queries), 2 D K C (keys, values), N C D (out), 3 D F (gate, up, down)."""
    return spec.width * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads) + 3 * spec.width * spec.mlp_width


def decoder_params(spec: DecoderSpec, embedding: Literal["excluded", "included"] = "included") -> int:
    """Scalars of the decoder; "excluded" leaves out the embedding table and the head and is N of the law.

    A block has its kernels, two RMS norms of width D (four if sandwiched), [biases of q, k, v], [two norms of width
    C]; then one final norm. The embedding is W D, and an untied head another W D.
    """
    biases = (spec.heads + 2 * spec.kv_heads) * spec.head_dim * spec.qkv_bias
    norms = (4 if spec.sandwich_norm else 2) * spec.width + 2 * spec.head_dim * spec.qk_norm
    inner = spec.depth * (_projection_params(spec) + biases + norms) + spec.width
    return inner + (spec.vocab * spec.width * (1 if spec.tied_head else 2) if embedding == "included" else 0)


def projector_params(kind: str, encoder_width: int, width: int) -> int:
    """Scalars of the projector: E D + D, and for "mlp" another D^2 + D."""
    if kind not in ("linear", "mlp"):
        raise unknown("projector", kind, ("linear", "mlp"))
    return encoder_width * width + width + (width**2 + width if kind == "mlp" else 0)


def encoder_flops(spec: EncoderSpec) -> float:
    """Forward FLOPs of one image up to the final tokens, with the blocks that run; the pooling head is not on the
    way to the decoder.

    With S = patches (+ 1 for a class token): patches 2 P p^2 3 E, then per block 2 S (4 E^2 + 2 E F) + 4 S^2 E.
    """
    tokens, width = spec.patches + spec.class_token, spec.width
    block = 2 * tokens * (4 * width**2 + 2 * width * spec.mlp_width) + 4 * tokens**2 * width
    return float(2 * spec.patches * spec.patch_size**2 * CHANNELS * width + spec.blocks * block)


def pass_flops(spec: DecoderSpec, tokens: Number, keys: Number, logits: Number) -> Pass:
    """FLOPs of `tokens` new tokens that attend to `keys` keys each (themselves included), with `logits` of them read
    out.

    Per layer 2 L (kernel parameters) + 4 L S N C; the head 2 D W a token read out.
    """
    return Pass(
        float(2 * tokens * spec.depth * _projection_params(spec)),
        float(4 * tokens * keys * spec.depth * spec.heads * spec.head_dim),
        float(2 * logits * spec.width * spec.vocab),
    )


def decode_flops(spec: DecoderSpec, context_tokens: Number, answer_tokens: Number) -> Pass:
    """FLOPs of a whole answer behind `context_tokens` of image and question.

    Prefill's logits already give the first answer token, so A tokens (the end mark is one) take A - 1 passes; pass t
    attends to context + t keys, and the sum over t is in closed form.
    """
    steps = max(answer_tokens - 1, 0)
    mean_keys = context_tokens + (steps + 1) / 2
    return pass_flops(spec, steps, mean_keys, steps)


def projector_flops(kind: str, encoder_width: int, width: int, tokens: int) -> float:
    """FLOPs of V tokens through the projector."""
    if kind not in ("linear", "mlp"):
        raise unknown("projector", kind, ("linear", "mlp"))
    return 2.0 * tokens * (encoder_width * width + (width**2 if kind == "mlp" else 0))


@functools.lru_cache(maxsize=100_000)
def compressor_flops(spec: CompressorSpec) -> float:
    """Forward FLOPs of one image through the compressor, as its catalog row counts them; the question pass is not
    part of it."""
    from vlm_jax.compress import catalog  # brings jax along, which most callers of this module do not need

    return float(catalog.row(spec.name).flops(spec))


def compressor_params(spec: CompressorSpec) -> int:
    """Scalars of the compressor's weights, from their shapes alone."""
    import jax

    from vlm_jax.compress import catalog
    from vlm_jax.core.tree import count

    key = jax.ShapeDtypeStruct((2,), "uint32")  # a key's shape: asking for a real one would wake a device
    return count(jax.eval_shape(lambda key: catalog.row(spec.name).init_weights(key, spec), key))


class ModelParams(NamedTuple):
    """Scalars of a model, in parts that do not overlap."""

    encoder: int
    compressor: int
    projector: int
    decoder: int  # N of the law
    embedding: int  # the table, and the head where it is not tied

    @property
    def total(self) -> int:
        return sum(self)


def params(model: ModelSpec) -> ModelParams:
    """Scalars of every part of the model."""
    inner = decoder_params(model.decoder, "excluded")
    return ModelParams(
        encoder_params(model.encoder),
        compressor_params(model.compressor),
        projector_params(model.projector, model.encoder.width, model.decoder.width),
        inner,
        decoder_params(model.decoder) - inner,
    )


def _reads_question(spec: CompressorSpec) -> bool:
    from vlm_jax.compress import catalog

    return bool(catalog.row(spec.name).query_dependent)


def _fresh_tokens(model: ModelSpec, question_tokens: Number, question: Question) -> Number:
    """Tokens that prefill runs: V, and the question unless it is cached, which behind tokens that follow it it cannot
    be."""
    cached = question == "cached" and not _reads_question(model.compressor)
    return model.compressor.tokens + (0 if cached else question_tokens)


def flops(model: ModelSpec, question_tokens: Number, answer_tokens: Number, question: Question = "fresh") -> ModelFlops:
    """Forward FLOPs of one question (Q tokens) and its answer, by part. Token counts may be means, hence floats.

    V = 0 is the blind baseline: no encoder, no compressor, no projector.
    """
    decoder, tokens = model.decoder, model.compressor.tokens
    nothing = Pass(0.0, 0.0, 0.0)
    prefix = question_tokens + tokens
    prefill = pass_flops(decoder, _fresh_tokens(model, question_tokens, question), prefix, 1)
    decode = decode_flops(decoder, prefix, answer_tokens)
    if tokens == 0:
        return ModelFlops(0.0, 0.0, 0.0, nothing, prefill, decode)
    reads = _reads_question(model.compressor)
    return ModelFlops(
        encoder_flops(model.encoder),
        compressor_flops(model.compressor),
        projector_flops(model.projector, model.encoder.width, decoder.width, tokens),
        pass_flops(decoder, question_tokens, question_tokens, 0) if reads else nothing,
        prefill,
        decode,
    )


def row_fields(parts: ModelFlops) -> dict[str, float]:
    """The cost fields of a `ResultRow`; the projector is booked with the compressor."""
    return {f"{part}_flops": value for part, value in parts.by_part.items()}


def train_flops(
    model: ModelSpec,
    text_tokens: int,
    train: tuple[str, ...],
    features: Literal["pixels", "stored"],
    question_tokens: Number = 0,
    copies: int = 1,
) -> float:
    """FLOPs of one row of training, forward and backward: T text tokens of some questions about an image, and so many
    copies of the image's V tokens; times the batch gives a step's.

    A backward pass costs one forward for the gradients of activations and one for those of weights. A part that
    learns pays both; a frozen part pays the first only if something before it learns (a frozen decoder behind a
    connector that learns), else nothing. Attention multiplies activations with activations, so it pays twice whenever
    gradients pass it. Every position is read out. Rematerialisation is repeated work, not progress, and is not
    counted: divide by this for MFU. `train` names parts of "encoder", "connector", "decoder"; the question pass, if
    the compressor has one, has no gradient.
    """
    decoder, tokens = model.decoder, model.compressor.tokens
    forward = flops(model, question_tokens, 1)
    views = copies if _reads_question(model.compressor) else 1
    length = copies * tokens + text_tokens
    row = pass_flops(decoder, length, length, length)
    parts = {  # (products with weights, products of activations), in the order of the data's flow
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
    """Model FLOPs of one step of a stage: `train_flops` of every row of the batch."""
    features = "stored" if spec.data.frozen_features else "pixels"
    row = train_flops(spec.model, spec.data.text_tokens, stage.train, features, question_tokens, image_copies(spec))
    return spec.data.batch_examples * row


def image_copies(spec: RunSpec) -> int:
    """How often the image's V tokens stand in a row of training: once, or once for each question."""
    from vlm_jax.compress import catalog

    return 1 if catalog.shares_image(spec.model, spec.compute) else spec.data.questions_per_example


def run_flops(spec: RunSpec, question_tokens: float = 0.0) -> float:
    """Model FLOPs of all steps of all stages. `question_tokens` matters to compressors that read the question."""
    return sum(stage.total_steps * step_flops(spec, stage, question_tokens) for stage in spec.stages)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one scalar."""
    if dtype not in DTYPE_BYTES:
        raise unknown("dtype", dtype, DTYPE_BYTES)
    return DTYPE_BYTES[dtype]


def moved_bytes(
    model: ModelSpec,
    question_tokens: Number,
    answer_tokens: Number,
    batch: int = 1,
    dtype: str = "bfloat16",
    question: Question = "fresh",
) -> dict[str, Number]:
    """Bytes that a batch of requests moves to and from memory, by `PARTS`: `flops` has the work of one of them.

    The encoder, the projector and every pass of the decoder read their weights once for the batch; prefill writes the
    cache, and each of the A - 1 steps of decoding reads it as far as it has come. The pass of the question reads out no
    token, so the head stays where it is.
    """
    encoder, decoder, tokens = model.encoder, model.decoder, model.compressor.tokens
    inner = decoder_params(decoder, "excluded")
    streamed = weight_bytes(inner + decoder.vocab * decoder.width, dtype)  # the head, tied or not
    fresh, prefix = _fresh_tokens(model, question_tokens, question), question_tokens + tokens
    steps = max(answer_tokens - 1, 0)
    step = cache_bytes(decoder, prefix + (steps + 1) / 2, dtype) + decoder_activation_bytes(decoder, 1, dtype)
    prefill = decoder_activation_bytes(decoder, fresh, dtype) + cache_bytes(decoder, prefix, dtype)
    moved = {"prefill": streamed + batch * prefill, "decode": steps * (streamed + batch * step)}
    if tokens == 0:
        return dict.fromkeys(PARTS, 0.0) | moved
    image = (encoder.patches + 2 * tokens) * encoder.width + tokens * decoder.width
    projector = projector_params(model.projector, encoder.width, decoder.width)
    asks = weight_bytes(inner, dtype) + batch * decoder_activation_bytes(decoder, question_tokens, dtype)
    return {
        "encoder": weight_bytes(encoder_params(encoder), dtype) + batch * encoder_activation_bytes(encoder, dtype),
        "compressor": weight_bytes(projector + batch * image, dtype),
        "question": asks if _reads_question(model.compressor) else 0.0,
        **moved,
    }


def request_cache_bytes(
    model: ModelSpec, question_tokens: Number, answer_tokens: Number, dtype: str = "bfloat16"
) -> Number:
    """Keys and values of one request at the end of its answer."""
    return cache_bytes(model.decoder, model.compressor.tokens + question_tokens + answer_tokens, dtype)


def memory_bytes(
    model: ModelSpec, question_tokens: Number, answer_tokens: Number, batch: int = 1, dtype: str = "bfloat16"
) -> Number:
    """What must fit: the weights of encoder and decoder, and a cache for every request of the batch."""
    weights = weight_bytes(decoder_params(model.decoder) + encoder_params(model.encoder), dtype)
    return weights + batch * request_cache_bytes(model, question_tokens, answer_tokens, dtype)


def weight_bytes(params: int, dtype: str = "bfloat16") -> int:
    """Bytes of that many scalars."""
    return params * dtype_bytes(dtype)


def cache_bytes(spec: DecoderSpec, tokens: Number, dtype: str = "bfloat16") -> Number:
    """Bytes of keys and values of one sequence: 2 x layers x K x C a token. Local layers keep all positions too, as
    `core.structs.Cache`."""
    return 2 * spec.depth * spec.kv_heads * spec.head_dim * tokens * dtype_bytes(dtype)


def decoder_activation_bytes(spec: DecoderSpec, tokens: Number, dtype: str = "bfloat16") -> Number:
    """Bytes that activations move to and from memory in a pass of `tokens` tokens.

    Assumes that norms, rotary positions, activations and softmax are fused into the products beside them, so that a
    product reads its input once and writes its output once, and that scores never leave the chip. Per layer and
    token: the residual stream is read and written round each half (4 D), its normed input read (2 D), q, k, v written
    and read (2 N C + 4 K C), attention's output written and read (2 N C), gate and up written and read (4 F).
    """
    heads, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = 6 * spec.width + 4 * heads + 4 * keys + 4 * spec.mlp_width
    return spec.depth * layer * tokens * dtype_bytes(dtype)


def encoder_activation_bytes(spec: EncoderSpec, dtype: str = "bfloat16") -> Number:
    """The same for one image through the encoder: 6 E + 8 E + 2 F a token and layer (its MLP has no gate)."""
    tokens = spec.patches + spec.class_token
    return spec.blocks * (14 * spec.width + 2 * spec.mlp_width) * tokens * dtype_bytes(dtype)
