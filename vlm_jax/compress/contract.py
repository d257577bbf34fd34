"""The contract of a compressor: one row of pure functions and default sizes.

    apply(weights, Evidence, spec) -> Prefix            [B, P, E] -> [B, V, output_width]

* `reads` names fields of `Evidence`; nothing else is computed or given but the masks. A row that reads `project` calls
  the projector itself and gives tokens of the decoder's width; the connector projects the tokens of all other rows.
* `apply` keeps the dtype of the tokens. A masked patch does not influence any valid output token, and the output has a
  mask if the input has one.
* With `stages`, some of the tokens that enter the decoder leave it between two of its layers.
* Where the row is elastic, the shapes of its weights are the same for every V of `spec.elastic`.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_jax.core.specs import RETURNS, CompressorSpec, DecoderSpec, DropStage, EncoderSpec

if TYPE_CHECKING:
    import jax

    from vlm_jax.core.structs import Evidence, Prefix

Weights = dict[str, Any]  # nested, arrays at the leaves
Count = int | float  # a count of tokens may be a mean
TOKENS = frozenset({"tokens"})
OF_QUESTION = frozenset({"question_vector", "question_tokens"})  # fields of Evidence that depend on the question
OF_ATTENTION = frozenset({"keys", "salience"})  # fields of the block that `attention` names
OF_PLACES = OF_ATTENTION | {"taps", "class_token"}  # fields that an encoder that merges tokens does not return
READABLE = TOKENS | OF_QUESTION | OF_PLACES | {"project"}
ELASTIC = ("no", "prefix", "ladder")
SALIENCE = ("heads", "width")  # of `EncoderSpec.salience`
PROJECTORS = ("linear", "mlp", "mlp_silu")  # "mlp" has a GELU between two layers (LLaVA), "mlp_silu" a SiLU (Honeybee)


def function_at(path: str) -> Callable[..., Any]:
    """The function at "module.name" of this package, or at "package.module:name" of another, which the first call
    imports: modules with functions of arrays import jax, and a model is sized and priced without it."""
    module, _, name = path.partition(":") if ":" in path else f"vlm_jax.compress.{path}".rpartition(".")

    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    return lambda *args: function()(*args)


class Cost(NamedTuple):
    """Forward FLOPs of the compressor; a multiply-add is two. The projector is counted apart."""

    image: float  # for an image, whatever is asked about it
    question: float = 0.0  # for each question about it
    projected: int | None = None  # tokens that the row sends through the projector; None: V


def no_taps(encoder: EncoderSpec) -> tuple[int, ...]:
    return ()


def no_attention(encoder: EncoderSpec) -> tuple[int, str]:
    return 0, "heads"


def encoder_width(spec: CompressorSpec) -> int:
    return spec.encoder_width


def decoder_width(spec: CompressorSpec) -> int:
    return spec.text_width


def inner_width(spec: CompressorSpec) -> int:
    return spec.width


def same_tokens(spec: CompressorSpec) -> int:
    return spec.tokens


def all_patches(spec: CompressorSpec) -> int:
    return spec.grid[0] * spec.grid[1]


def same_spec(spec: CompressorSpec, decoder: DecoderSpec) -> CompressorSpec:
    return spec


def no_problem(spec: CompressorSpec) -> str:
    return ""


def without_mlp(spec: CompressorSpec) -> str:
    """The problem of a method whose layers have an MLP."""
    return f"mlp_width={spec.mlp_width} must be at least 1" if spec.mlp_width < 1 else ""


def no_segments(spec: CompressorSpec) -> tuple[int, ...]:
    return ()


def no_stages(spec: CompressorSpec, depth: int) -> tuple[DropStage, ...]:
    return ()


class Compressor(NamedTuple):
    """One method. Every function of a `CompressorSpec` may assume that `catalog.check` accepts it."""

    init_weights: "Callable[[jax.Array, CompressorSpec], Weights]"  # boxed arrays, or {}
    apply: "Callable[[Weights, Evidence, CompressorSpec], Prefix]"  # unboxed weights
    tokens_out: Callable[[tuple[int, int]], tuple[int, ...]]  # supported V on a patch grid, ascending
    cost: Callable[[CompressorSpec, Count], Cost]  # with a question of that many tokens
    defaults: Callable[[EncoderSpec, DecoderSpec, int], CompressorSpec]  # default sizes at V tokens
    reads: frozenset[str] = TOKENS  # of READABLE
    taps: Callable[[EncoderSpec], tuple[int, ...]] = no_taps  # encoder blocks that it reads
    attention: Callable[[EncoderSpec], tuple[int, str]] = no_attention  # attention_layer, salience of the encoder
    output_width: Callable[[CompressorSpec], int] = encoder_width  # of its tokens
    projector: str = "mlp"  # of PROJECTORS: the published one
    entering: Callable[[CompressorSpec], int] = same_tokens  # tokens that enter the decoder
    stages: Callable[[CompressorSpec, int], tuple[DropStage, ...]] = no_stages  # in a decoder of that depth
    segments: Callable[[CompressorSpec], tuple[int, ...]] = no_segments  # of the entering tokens; (): as the row has it
    scores_tokens: bool = False  # its stages keep what the question attends to
    for_decoder: Callable[[CompressorSpec, DecoderSpec], CompressorSpec] = same_spec  # sizes that follow the decoder
    problem: Callable[[CompressorSpec], str] = no_problem  # of sizes that only this method has; "": none
    reads_places: bool = True  # needs the patch grid; False: a set of tokens will do
    elastic: str = "no"  # of ELASTIC: "prefix": tokens 0..m-1 of V are those of m; "ladder": weights serve every V
    class_token_optional: bool = False  # reads `class_token` only where the encoder has one

    @property
    def query_dependent(self) -> bool:
        """Whether its tokens depend on the question, so that each question needs a view of its own."""
        return bool(self.reads & OF_QUESTION) or self.scores_tokens

    @property
    def projects(self) -> bool:
        """Whether it gives tokens of the decoder's width."""
        return "project" in self.reads


def most_tokens(spec: CompressorSpec) -> int:
    """The largest V that the weights serve."""
    return spec.elastic[-1] if spec.elastic else spec.tokens


def encoder_for(method: Compressor, encoder: EncoderSpec) -> EncoderSpec:
    """The spec of an encoder that returns what the method reads, of which a class token only where there is one."""
    returns = tuple(name for name in RETURNS if name in method.reads)
    if not encoder.class_token:
        returns = tuple(name for name in returns if name != "class_token")
    layer, salience = method.attention(encoder)
    return dataclasses.replace(
        encoder, taps=method.taps(encoder), returns=returns, attention_layer=layer, salience=salience
    )


def key_width(encoder: EncoderSpec) -> int:
    """Channels of a head of the keys that the encoder returns; 0: it returns none."""
    return encoder.width // encoder.heads if "keys" in encoder.returns else 0
