"""Choices, as frozen dataclasses: what is decided before anything runs, and can be written down, compared and hashed.

`config.resolve` is the only place that makes a `RunSpec` from a `ConfigDict`. A spec holds no machine path and no
array.
"""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EncoderSpec:
    """A vision transformer. SigLIP by default; the CLIP differences are fields."""

    name: str
    image_size: int  # H, pixels a side
    patch_size: int
    width: int  # E
    depth: int
    heads: int
    mlp_width: int
    activation: str = "gelu_tanh"  # or "quick_gelu" (CLIP), "gelu"
    class_token: bool = False  # CLIP
    patch_bias: bool = True
    pre_norm: bool = False  # a norm before the first block (CLIP)
    pooling_head: bool = True  # SigLIP's attention pool
    norm_eps: float = 1e-6
    taps: tuple[int, ...] = ()  # blocks whose output is kept, counted from 1
    feature_layer: int = 0  # the tokens are this block's output, without the last norm (LLaVA); 0: behind the norm

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class CompressorSpec:
    """P patches of width E in, V tokens of width E out. Carries the sizes on both of its sides."""

    name: str  # a row of compress.catalog
    tokens: int  # V
    grid: tuple[int, int]  # the patch grid, rows x columns
    encoder_width: int  # E
    taps: int  # A, tapped layers that arrive with the tokens
    text_width: int  # D, width of the question vector
    width: int  # inner width
    heads: int
    depth: int  # layers, where the method has several
    mlp_width: int


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only language model. One module; the families differ in these fields."""

    name: str
    width: int  # D
    depth: int
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # C
    mlp_width: int  # F
    vocab: int  # W
    tied_head: bool = True
    qkv_bias: bool = False  # Qwen 1.5, 2
    qk_norm: bool = False  # Qwen 3, Gemma 3
    sandwich_norm: bool = False  # norms after attention and MLP too (Gemma 2, 3)
    norm_plus_one: bool = False  # weights act as (1 + w) (Gemma)
    norm_eps: float = 1e-6
    activation: str = "silu"  # or "gelu_tanh" (Gemma)
    scale_embedding: bool = False  # embeddings times sqrt(D) (Gemma)
    query_scale: float | None = None  # None: C ** -0.5
    attention_softcap: float | None = None  # Gemma 2
    logit_softcap: float | None = None  # Gemma 2
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0  # linear position scaling of the global layers (Gemma 3)
    window: int | None = None  # keys that a local layer sees; None: every layer is global
    window_pattern: int = 0  # with a window, every n-th layer is global; 0: none is (Mistral)
    local_rope_theta: float | None = None  # base of the local layers (Gemma 3)
    context: int = 0  # positions that it was trained for; 0: not known


@dataclass(frozen=True)
class ModelSpec:
    """Encoder -> compressor -> projector -> decoder."""

    encoder: EncoderSpec
    compressor: CompressorSpec
    projector: str  # "linear", or "mlp" (LLaVA's two layers with GELU)
    decoder: DecoderSpec
    mask: str  # "causal", or "prefix": image and question see each other both ways


@dataclass(frozen=True)
class ComputeSpec:
    """How the same mathematics is executed."""

    dtype: str  # of activations: float32 or bfloat16; parameters and optimiser state are float32
    remat: str  # "none", "dots" or "block"
    attention: str  # "xla" or "cudnn"
    microbatches: int  # gradient accumulation: equal parts of a batch
    strategy: str  # a table of partitioning.TABLES
    mesh: tuple[int, int, int]  # (data, fsdp, tensor); one -1 takes the devices that are left


@dataclass(frozen=True)
class DataSpec:
    """A data set of this project and how it is read."""

    dataset: str  # "glyph_ocr"
    config: str  # a builder config
    train_split: str
    test_split: str
    batch_examples: int
    questions_per_example: int  # questions packed behind one image in training
    text_tokens: int  # T, static; a packed row that is longer is an error
    frozen_features: bool  # read stored encoder features instead of pixels


@dataclass(frozen=True)
class StageSpec:
    """One stage of training: which parts move, for how long, how fast."""

    name: str
    total_steps: int
    train: tuple[str, ...]  # of "encoder", "connector", "decoder"
    peak_lr: float
    warmup_steps: int


@dataclass(frozen=True)
class OptimSpec:
    """AdamW with clipping; linear warm-up, then cosine to `final_lr_share` of the peak."""

    weight_decay: float
    clip_norm: float
    b1: float
    b2: float
    final_lr_share: float
    lr_scale: tuple[tuple[str, float], ...]  # (regex on the parameter's path, factor); the first match counts


@dataclass(frozen=True)
class EvaluationSpec:
    examples: int  # test images; 0 takes all
    questions_per_example: int
    batch_examples: int
    max_new_tokens: int


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a result. Two runs with the same `spec_hash` are the same experiment."""

    model: ModelSpec
    encoder_checkpoint: str  # .npz in big_vision's format; "" starts from random weights
    data: DataSpec
    stages: tuple[StageSpec, ...]
    optim: OptimSpec
    compute: ComputeSpec
    evaluation: EvaluationSpec
    seed: int
    log_every_steps: int
    save_every_steps: int  # 0: only at the end
    keep_checkpoints: int


# How often a run logs or saves does not change what it computes, so it is not part of the experiment's identity.
NOT_IDENTITY = ("log_every_steps", "save_every_steps", "keep_checkpoints")
# A run that goes on elsewhere may also be laid out anew.
MAY_CHANGE = (*NOT_IDENTITY, "compute.mesh", "compute.strategy")


# Fields that came after rows had been committed, with the value that says what was done before: at that value they are
# no part of the identity, so that a new field leaves the names of old experiments as they are.
_ADDED = {"model.encoder.feature_layer": 0, "model.decoder.context": 0}


def to_dict(spec: Any) -> dict[str, Any]:
    """A spec as nested plain dicts and lists, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def spec_hash(spec: RunSpec) -> str:
    """Twelve hex digits that name the experiment."""
    identity = {k: v for k, v in to_dict(spec).items() if k not in NOT_IDENTITY}
    for field, before in _ADDED.items():
        *groups, name = field.split(".")
        group = functools.reduce(dict.__getitem__, groups, identity)
        if group[name] == before:
            del group[name]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def total_steps(spec: RunSpec) -> int:
    return sum(stage.total_steps for stage in spec.stages)
