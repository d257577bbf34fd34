"""Pytrees of arrays that the model, training and inference exchange. Shapes use the letters of `core.axes`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

Params = Any  # nested dicts of arrays


class Visual(NamedTuple):
    """What the encoder returns of an image; the optional fields are those that its spec names."""

    tokens: Float[Array, "B P E"]
    taps: Float[Array, "B A P E"] | None = None  # outputs of the tapped layers
    mask: Bool[Array, "B P"] | None = None  # True where a token is valid; None: all
    keys: Float[Array, "B P N C"] | None = None  # of the block `EncoderSpec.attention_layer`
    salience: Float[Array, "B P"] | None = None  # attention to each patch there, see `EncoderSpec.salience`
    class_token: Float[Array, "B E"] | None = None  # of the layer of the tokens; None without one


class Evidence(NamedTuple):
    """What a compressor may read: the fields that its row names in `reads`, and the mask; the others are None."""

    tokens: Float[Array, "B P E"]
    mask: Bool[Array, "B P"] | None = None
    taps: Float[Array, "B A P E"] | None = None
    keys: Float[Array, "B P N C"] | None = None
    salience: Float[Array, "B P"] | None = None
    class_token: Float[Array, "B E"] | None = None
    question_vector: Float[Array, "B D"] | None = None  # the decoder's state of the question's last token, frozen
    question_tokens: Float[Array, "B Q D"] | None = None  # the decoder's embeddings of the question, frozen
    question_mask: Bool[Array, "B Q"] | None = None  # False where the question is padding
    project: Callable[[Float[Array, "B *rows width"]], Float[Array, "B *rows D"]] | None = None  # the projector


class Prefix(NamedTuple):
    """What a compressor gives the decoder: V tokens of its row's `output_width`."""

    tokens: Float[Array, "B V width"]
    mask: Bool[Array, "B V"] | None = None  # False: the decoder does not attend to this token, nor count it
    question: Float[Array, "B Q D"] | None = None  # replaces the embeddings of the question; None: as they are


class Views(NamedTuple):
    """The images of a batch of rows, M views each; unused views hold arbitrary values.

    A view is one image, or with a question-dependent compressor one (image, question) pair. Exactly one of `pixels` and
    `features` (of a frozen encoder) is given.
    """

    pixels: Any = None  # uint8[B, M, H, H, 3], or normalised float
    features: Visual | None = None  # leading axes [B, M]
    question: Int[Array, "B M Q"] | None = None  # begin token and bare text; -1 is padding


class Inputs(NamedTuple):
    """A batch of rows: the input of the model in training, evaluation and inference.

    A row holds one or several conversations (segments 1, 2, ...) that do not attend to each other, then padding
    (segment 0). A visual token has a placeholder in `tokens`; `visual` is its index among the row's M V visual tokens
    (view * V + v). Two questions about one image of two tokens:

        tokens    bos user  I  I  read row two  4  7 end | bos user  I  I  who is it  Ada end | pad
        segment     1    1  1  1    1   1   1   1  1   1 |   2    2  2  2   2  2  2    2   2  |   0
        position    0    1  2  3    4   5   6   7  8   9 |   0    1  2  3   4  5  6    7   8  |   0
        visual     -1   -1  0  1   -1  -1  -1  -1 -1  -1 |  -1   -1  0  1  -1 -1 -1   -1  -1  |  -1
        weight      0    0  0  0    0   0   1   1  1   0 |   0    0  0  0   0  0  1    1   0  |   0

    Causal conversations about one image may share its tokens in a first segment that all attend to
    (`ops.masks.SHARED`). A row with one conversation may have padding on either side.
    """

    tokens: Int[Array, "B L"]
    segment: Int[Array, "B L"]
    position: Int[Array, "B L"]  # counts from 0 in each segment, after its shared tokens
    order: Int[Array, "B L"]  # tokens attend to lower or equal order: the position where causal, 0 in a prefix
    visual: Int[Array, "B L"]  # -1 for text
    views: Views | None = None  # None: text only
    weight: Float[Array, "B L"] | None = None  # loss mask of the next token
    part: Int[Array, "B L"] | None = None  # of a mixture, its source; None: only one


class AttentionMetadata(NamedTuple):
    """Per-token inputs of rotary angles and attention masks (`ops.masks`)."""

    segment: Int[Array, "B L"]  # tokens attend to their own segment and to -1; 0 is padding
    position: Int[Array, "B L"]  # for rotary angles and sliding windows
    order: Int[Array, "B L"]  # tokens attend to lower or equal order


class Cache(NamedTuple):
    """Keys and values of S positions, one array a layer. Unwritten positions have segment 0, so they are masked."""

    key: tuple[Float[Array, "*rows S C"], ...]  # rows: B and K, each left out where it is 1 (`ops.attention.by_head`)
    value: tuple[Float[Array, "*rows S C"], ...]
    metadata: AttentionMetadata  # [B, S]
    length: Int[Array, ""]  # positions written so far, padding included; the same for all rows
    later: tuple["Cache", ...] = ()  # of the layers behind each stage at which tokens leave the decoder


class LossSums(NamedTuple):
    """Sums over target tokens. Ratios are formed outside jit: padding, microbatches and hosts cannot bias them."""

    nll: Float[Array, ""]
    count: Float[Array, ""]  # type: ignore[assignment]  # tuple.count
    hits: Float[Array, ""]  # without end tokens, as evaluation counts
    answers: Float[Array, ""]  # target tokens without end tokens
    part_nll: Float[Array, " S"] | None = None  # by source of a mixture
    part_count: Float[Array, " S"] | None = None


class TrainState(NamedTuple):
    """What a step updates; `opt_state` covers the parts that the current stage trains."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
