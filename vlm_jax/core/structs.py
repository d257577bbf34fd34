"""Data that flows, as NamedTuples (pytrees): what one room hands to the next.

Shapes use the letters of `core.axes`. A field that may be absent is `None`, which JAX treats as an empty subtree.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

Params = Any  # nested dicts of arrays


class Visual(NamedTuple):
    """Visual tokens on their way from pixels to the decoder."""

    tokens: Float[Array, "B P E"]
    taps: Float[Array, "B A P E"] | None = None  # outputs of the layers the encoder's spec names
    mask: Bool[Array, "B P"] | None = None  # True where a token is real; None means all are


class Views(NamedTuple):
    """The images of a batch of rows, M views each. A view is an image as one question sees it: compressors that do not
    read the question have one for each image, the others one for each (image, question). In a row with fewer than M the
    others hold anything: no placeholder names their tokens.

    Exactly one of `pixels` and `features` is given: pixels for a live encoder, stored features for a frozen one.
    """

    pixels: Any = None  # uint8[B, M, H, H, 3], or float: normalised as the encoder was trained
    features: Visual | None = None  # leading axes [B, M]
    question: Int[Array, "B M Q"] | None = None  # bare text behind the tokenizer's begin token; -1 is padding


class Inputs(NamedTuple):
    """The one row layout: training, evaluation, `forward`, `generate` and the ahead-of-time compiler read it.

    A row holds one or several conversations (segments 1, 2, ...) which do not see each other, then padding (segment 0).
    Where a visual token stands there is a placeholder, whose id means nothing, and `visual` says which of the row's
    M V visual tokens it is (view * V + v). Two questions about one image of two tokens:

        tokens    bos user  I  I  read row two  4  7 end | bos user  I  I  who is it  Ada end | pad
        segment     1    1  1  1    1   1   1   1  1   1 |   2    2  2  2   2  2  2    2   2  |   0
        position    0    1  2  3    4   5   6   7  8   9 |   0    1  2  3   4  5  6    7   8  |   0
        visual     -1   -1  0  1   -1  -1  -1  -1 -1  -1 |  -1   -1  0  1  -1 -1 -1   -1  -1  |  -1
        weight      0    0  0  0    0   0   1   1  1   0 |   0    0  0  0   0  0  1    1   0  |   0

    Causal conversations about one image may share its tokens instead, in a segment in front that all of them see
    (`ops.masks.SHARED`): the same numbers, and a shorter row. Padding may stand on either side of a row that holds one
    conversation.
    """

    tokens: Int[Array, "B L"]
    segment: Int[Array, "B L"]
    position: Int[Array, "B L"]  # counts from 0 in each segment, behind what it shares
    order: Int[Array, "B L"]  # a token sees those of no higher order: the position where causal, 0 in a two-way prefix
    visual: Int[Array, "B L"]  # -1 for text
    views: Views | None = None  # None: text alone
    weight: Float[Array, "B L"] | None = None  # training: 1 where the next token is learned


class AttentionMetadata(NamedTuple):
    """Where each token of a row stands; `ops.masks` turns two of these into an attention mask."""

    segment: Int[Array, "B L"]  # tokens see those of their own segment and of -1; 0 is padding, seen by none
    position: Int[Array, "B L"]  # for rotary angles and sliding windows
    order: Int[Array, "B L"]  # a token sees those of no higher order


class Cache(NamedTuple):
    """Keys and values of S positions, one array for each layer; the decoder's layers are unrolled where it is used.

    What is not yet written has segment 0, so no query sees it.
    """

    key: tuple[Float[Array, "B S K C"], ...]
    value: tuple[Float[Array, "B S K C"], ...]
    metadata: AttentionMetadata  # [B, S]
    length: Int[Array, ""]  # positions written so far, padding included; the same for all rows


class LossSums(NamedTuple):
    """Sums over target tokens; ratios are formed outside jit so that padding, microbatches and hosts cannot bias
    them.
    """

    nll: Float[Array, ""]
    hits: Float[Array, ""]
    count: Float[Array, ""]


class TrainState(NamedTuple):
    """Everything a step changes. `opt_state` covers only the parts that the current stage trains."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
