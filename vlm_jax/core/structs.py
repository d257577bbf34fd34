"""Data that flows, as NamedTuples (pytrees): what one room hands to the next.

Shapes use the letters of `core.axes`. A field that may be absent is `None`, which JAX treats as an empty subtree.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Visual(NamedTuple):
    """Visual tokens on their way from pixels to the decoder."""

    tokens: Float[Array, "B P E"]
    taps: Float[Array, "B A P E"] | None = None  # outputs of the layers the encoder's spec names
    mask: Bool[Array, "B P"] | None = None  # True where a token is real; None means all are


class Batch(NamedTuple):
    """One batch of visual questions, several of them packed behind one image.

    A row of `text` holds segments 1, 2, ... each a question and its answer, then padding (segment 0):

        text      read row two 4 7 1 9 end | read row one 3 3 8 0 end | pad pad
        target    row two 4 7 1 9 end pad  | row one 3 3 8 0 end pad  | pad pad
        weight    0   0   1 1 1 1 1  0     | 0   0   1 1 1 1 1   0    | 0   0
        segment   1   1   1 1 1 1 1  1     | 2   2   2 2 2 2 2   2    | 0   0
        position  0   1   2 3 4 5 6  7     | 0   1   2 ...            | 0   0
        question  1   1   1 0 0 0 0  0     | 1   1   1 0 ...          | 0   0

    Exactly one of `image` and `features` is given: pixels for a live encoder, stored features for a frozen one.
    """

    text: Int[Array, "B T"]
    target: Int[Array, "B T"]  # the next token of the same segment
    weight: Float[Array, "B T"]  # 1 where `target` is part of an answer
    segment: Int[Array, "B T"]  # 0 is padding
    position: Int[Array, "B T"]  # counts from 0 in each segment
    question: Bool[Array, "B T"]  # True on question tokens
    example: Int[Array, " B"]  # index of the example in its split, -1 where the row only fills the batch
    image: Any = None  # uint8[B, H, H, 3]
    features: Visual | None = None


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


class Slots(NamedTuple):
    """Where each token of a sequence stands; `ops.masks` turns two of these into an attention mask."""

    position: Int[Array, "B L"]  # for rotary angles and sliding windows
    order: Int[Array, "B L"]  # a token sees those of no higher order: the position where causal, 0 in a two-way prefix
    segment: Int[Array, "B L"]  # -1 image, seen by every segment; 0 padding, seen by none; 1, 2, ... packed questions


class Cache(NamedTuple):
    """A static key-value cache of S slots. Slots not yet written have segment 0, so no query sees them."""

    key: Float[Array, "layers B S K C"]
    value: Float[Array, "layers B S K C"]
    slots: Slots
    used: Int[Array, ""]  # slots written so far, the same for all rows
