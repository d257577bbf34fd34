"""What is measured: the models and shapes of a GPU, and tiny ones that a CPU runs in seconds."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from vlm_jax.core.specs import DecoderSpec, EncoderSpec
from vlm_jax.sizing import zoo


class AttentionShape(NamedTuple):
    """Sizes of a comparison of attention implementations, and the rows' segments: a pattern of `correctness.metadata`,
    or "none" for no mask."""

    pattern: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int


class StepChoice(NamedTuple):
    """How a train step is run."""

    batch_rows: int
    remat: str


@dataclass(frozen=True)
class Sizes:
    """Every size of the four parts."""

    encoder: EncoderSpec
    decoders: tuple[DecoderSpec, ...]
    tokens: tuple[int, ...]  # V
    goldens: int  # models compared with their reference; 0: all
    attention: tuple[AttentionShape, ...]
    resume_steps: int
    row_tokens: int
    choices: tuple[StepChoice, ...]  # the most promising first
    steps: int  # timed train steps
    question_tokens: int
    answer_tokens: int
    batches: tuple[int, ...]  # requests at a time
    repeats: int  # timed calls of an inference program


GPU = Sizes(
    encoder=zoo.encoder("siglip-so400m14-384"),
    decoders=(zoo.decoder("qwen1.5-0.5b"), zoo.decoder("qwen1.5-1.8b")),
    tokens=(16, 144),
    goldens=0,
    attention=(
        AttentionShape("causal", 2, 2048, 16, 16, 64),
        AttentionShape("causal", 2, 2048, 16, 16, 128),
        AttentionShape("causal", 2, 2048, 16, 2, 128),
        AttentionShape("packed", 2, 2048, 16, 16, 64),
        AttentionShape("packed", 2, 2048, 16, 2, 128),
        AttentionShape("padded right", 4, 1000, 16, 4, 64),
        AttentionShape("padded left", 4, 1000, 16, 4, 64),
        AttentionShape("prefix", 4, 512, 8, 1, 256),
        AttentionShape("none", 2, 729, 16, 16, 72),
    ),
    resume_steps=8,
    row_tokens=2048,
    choices=(StepChoice(8, "dots"), StepChoice(16, "block"), StepChoice(4, "none")),
    steps=10,
    question_tokens=50,
    answer_tokens=32,
    batches=(1, 8),
    repeats=5,
)
TOY = Sizes(
    encoder=dataclasses.replace(GPU.encoder, image_size=56, width=16, depth=2, heads=2, mlp_width=32),
    decoders=(dataclasses.replace(
        GPU.decoders[0], width=32, depth=2, heads=4, kv_heads=4, head_dim=8, mlp_width=64, vocab=128,
    ),),
    tokens=(4,),
    goldens=1,
    attention=(AttentionShape("packed", 2, 48, 4, 2, 16), AttentionShape("padded left", 2, 48, 4, 2, 16)),
    resume_steps=2,
    row_tokens=256,
    choices=(StepChoice(1, "dots"),),
    steps=2,
    question_tokens=10,
    answer_tokens=4,
    batches=(1, 2),
    repeats=2,
)  # fmt: skip
TOY_CHIP = "h100"  # whose peaks a CPU's seconds are divided by: only the arithmetic is tried
