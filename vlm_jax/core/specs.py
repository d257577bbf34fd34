"""Specs: frozen dataclasses of every choice of a run, serialisable and hashable; no arrays.

`config.resolve` alone makes a `RunSpec` from a `ConfigDict`.
"""

import dataclasses
import functools
import hashlib
import json
import random
from dataclasses import dataclass
from typing import Any

from vlm_jax.core.typed import from_dict as from_dict
from vlm_jax.core.typed import to_dict as to_dict

# CLIP's pixel statistics, RGB.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Fields of `EncoderSpec` about image preparation; they come with a checkpoint, but no weight depends on them.
PREPARATION = ("pixel_mean", "pixel_std", "pixel_rescale", "resize", "interpolation", "shortest_edge")


# What an encoder may return beside tokens and taps. Salience is the attention that the class token pays to each patch,
# or without a class token the mean attention that a patch receives.
RETURNS = ("keys", "salience", "class_token")


@dataclass(frozen=True)
class EncoderSpec:
    """A vision transformer: SigLIP by default, CLIP through its fields."""

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
    taps: tuple[int, ...] = ()  # blocks whose outputs are returned, counted from 1
    feature_layer: int = 0  # tokens are the output of this block, without the final norm (LLaVA); 0: after that norm
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # RGB, of pixels in [0, 1]
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_rescale: float = 1 / 255  # of uint8 pixels, before mean and std
    resize: str = "squash"  # or "crop", "pad": how an image becomes H x H (`data.images.fit`)
    interpolation: str = "bilinear"  # a Pillow filter, antialiased
    shortest_edge: int = 0  # pixels of the shorter edge before a crop; 0: H
    returns: tuple[str, ...] = ()  # of RETURNS: what is returned beside tokens and taps
    attention_layer: int = 0  # block whose keys and salience are returned
    merge: tuple[int, ...] = ()  # tokens that each block merges into others (ToMe); (): none
    salience: str = "heads"  # one softmax for each head, then their mean; or "width": one over the whole width

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image_size // self.patch_size,) * 2

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def token_grid(self) -> tuple[int, int]:
        """The grid of the tokens that come out: merged ones lie in one row, without places."""
        return (1, self.patches - sum(self.merge)) if self.merge else self.grid

    @property
    def blocks(self) -> int:
        """Number of blocks that run: up to the last one whose output is used."""
        return max(self.feature_layer or self.depth, *self.taps, self.attention_layer)


@dataclass(frozen=True)
class CompressorSpec:
    """A compressor: P patches of width E in, V tokens of width E out."""

    name: str  # a row of compress.catalog
    tokens: int  # V
    grid: tuple[int, int]  # the patch grid, rows x columns
    encoder_width: int  # E
    taps: int  # A, tapped encoder layers that it reads
    text_width: int  # D, width of the question vector
    width: int  # inner width
    heads: int
    depth: int  # layers, where the method has several
    mlp_width: int
    key_width: int = 0  # channels of a head of the encoder's keys that it reads; 0: none
    queries: int = 0  # learned queries, where V are chosen from more; 0: V
    elastic: tuple[int, ...] = ()  # every V that the weights serve, ascending; (): V alone
    fusion_heads: int = 0  # heads of layers of the decoder's width that the method has of its own; 0: none


@dataclass(frozen=True)
class DropStage:
    """Visual tokens of each view that leave the decoder between two layers: `keep` of them stay."""

    layer: int  # layers that see all tokens that entered this stage
    keep: int
    score: str  # "attention": the highest scores stay, "last": the last tokens of the view stay
    scored_by: int = 0  # layer, from 0, whose queries and keys score the tokens at its input
    positions: str = "kept"  # or "recounted": positions count what is left


RAMPS = ("turns", "channels", "whole channels")


@dataclass(frozen=True)
class RopeBands:
    """Restricts `rope_factor` to the rotary frequencies of long wavelength (Llama 3.1, section 3.4.2 of arXiv
    2407.21783; YaRN, arXiv 2309.00071)."""

    low: float  # wavelengths above original_context / low are scaled by the whole factor
    high: float  # those below original_context / high are unchanged; between the two the scaling is interpolated
    original_context: int  # positions of pre-training
    ramp: str = RAMPS[0]  # interpolation variable: turns in that context (Llama 3.1), or channels (YaRN)


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only language model; families differ in these fields."""

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
    rope_factor: float = 1.0  # position scaling of the global layers (Gemma 3, Llama 3.1)
    rope_bands: RopeBands | None = None  # the frequencies that are scaled (Llama 3.1); None: all
    window: int | None = None  # keys that a local layer sees; None: every layer is global
    window_pattern: int = 0  # with a window, every n-th layer is global; 0: none is (Mistral)
    local_rope_theta: float | None = None  # base of the local layers (Gemma 3)
    context: int = 0  # maximum positions; 0: unknown


@dataclass(frozen=True)
class ModelSpec:
    """Encoder -> compressor -> projector -> decoder."""

    encoder: EncoderSpec | None  # None: text only, and then no compressor and no projector
    compressor: CompressorSpec | None
    projector: str | None  # "linear", or "mlp" (LLaVA's two layers with GELU)
    decoder: DecoderSpec | None  # None: an image tower alone, for export
    mask: str  # "causal", or "prefix": bidirectional attention over image and question


@dataclass(frozen=True)
class ComputeSpec:
    """How a model is executed; results agree up to rounding."""

    dtype: str  # of activations: float32 or bfloat16; parameters and optimiser state are float32
    remat: str  # of `sizing.remat.POLICIES`; "auto": the first that fits (`build.fitting`)
    attention: str  # "xla", "cudnn" or "splash"
    microbatches: int  # gradient accumulation: equal parts of a batch
    strategy: str  # a table of partitioning.TABLES, or "auto": by the kind of device
    mesh: tuple[int, int, int]  # (data, fsdp, tensor); -1 on one axis takes the remaining devices
    slices: int = 1  # TPU slices joined by the data-centre network; the mesh is that of one slice
    moments: str = "float32"  # of Adam's first moment: float32 or bfloat16
    scan_layers: bool = True  # scan over the decoder's stacked layers; False: unrolled, required with a cache


@dataclass(frozen=True)
class SourceSpec:
    """Where examples come from: a reader of `vlm_jax.data.readers`, or a class of the user's."""

    source: str  # tfds, llava, parquet, jsonl, a class "package.module:Class", or an entry point
    path: str = ""  # file or folder
    images: str = ""  # image folder that the paths in the file are relative to
    name: str = ""  # in logs and result rows; "": derived from the path
    config: str = ""  # TFDS builder config
    split: str = ""  # TFDS split
    fields: tuple[tuple[str, str], ...] = ()  # our field -> column of the data set
    take: str = "all"  # first:N, end:N, random:N, random:N%
    weight: float = 1.0  # passes over this source in an epoch of the mixture
    share: float = 0.0  # or its share of an epoch's examples; 0: as the weight says
    separate: bool = False  # each question with its answer is a conversation of its own
    options: tuple[tuple[str, Any], ...] = ()  # arguments of a user's class


@dataclass(frozen=True)
class DataSpec:
    """Training and test data, and how their conversations become rows."""

    train: tuple[SourceSpec, ...]
    test: tuple[SourceSpec, ...]  # (): no evaluation
    format: str  # "template" (the tokenizer's own), or a name of `data.chat_formats`
    pack: str  # "none": one example a row; "fit": as many conversations as fit
    batch_rows: int
    row_tokens: int  # L: positions of a row, visual tokens included
    row_images: int  # of a row, at most
    questions_per_example: int  # of examples with separate questions, drawn anew in each epoch; 0: all
    frozen_features: bool  # read stored encoder features instead of pixels
    tokenizer: str = ""  # folder of the language model's tokenizer; "": the words of the glyph suite
    long: str = "cut"  # conversations beyond a row: "cut" after the last turn that fits, or "drop"
    max_bad_share: float = 0.0  # of unusable items; beyond it the run stops
    question_tokens: int = 128  # of a question that a compressor reads; the rest is cut
    resize: str = ""  # image preparation, "crop" or "pad"; "": as the encoder's checkpoint says

    @property
    def shares_image(self) -> bool:
        """Whether all conversations of a row begin with its image, and so may share it."""
        return self.pack == "none" and self.format == "prefix"


@dataclass(frozen=True)
class StageDataSpec:
    """What a stage changes in `DataSpec`: fields that are empty keep its values."""

    train: tuple[SourceSpec, ...] = ()
    format: str = ""
    batch_rows: int = 0
    row_images: int = 0
    resize: str = ""


@dataclass(frozen=True)
class StageSpec:
    """One training stage: trainable parts, length and learning rate."""

    name: str
    total_steps: int  # 0: as `epochs` or `examples` say
    train: tuple[str, ...]  # of "encoder", "connector", "decoder"
    peak_lr: float
    warmup_steps: int  # 0: as `warmup_share` says
    epochs: float = 0.0  # passes over the training data
    examples: int = 0
    warmup_share: float = 0.0  # of the stage's steps
    data: StageDataSpec | None = None  # None: as the run


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
    subset_examples: int = 256  # test images of the evaluations during training: the first ones


@dataclass(frozen=True)
class BadStepSpec:
    """What happens when a step's loss or gradient is not finite, or its loss is a spike."""

    policy: str = "stop"  # or "skip_update": parameters and optimiser state stay unchanged
    spike_factor: float = 0.0  # a loss above this multiple of its running mean is a bad step; 0: off
    skip_limit: int = 10  # the run stops beyond this many skipped updates in a stage


# The V of a training step of an elastic compressor: one of them, drawn from seed and step; all of them; or the most
# alone, as without `elastic`.
ELASTIC_STEPS = ("drawn", "all", "most")


@dataclass(frozen=True)
class RunSpec:
    """All settings of a run. Runs with equal `spec_hash` are the same experiment."""

    model: ModelSpec
    encoder_checkpoint: str  # big_vision's .npz, or a Hugging Face folder; "" starts from random weights
    data: DataSpec
    stages: tuple[StageSpec, ...]
    optim: OptimSpec
    compute: ComputeSpec
    evaluation: EvaluationSpec
    seed: int
    log_every_steps: int
    save_every_steps: int  # 0: only at the end
    keep_checkpoints: int
    keep_every_steps: int = 0  # checkpoints at multiples of this are never deleted; 0: none
    bad_step: BadStepSpec = BadStepSpec()
    decoder_checkpoint: str = ""  # a Hugging Face folder; "" starts from random weights
    evaluate_every_steps: int = 0  # during training, on a fixed subset; 0: only at the end
    connector_checkpoint: str = ""  # a published model whose connector starts the run; "": random weights
    elastic: str = ELASTIC_STEPS[0]  # of a compressor with several V


# Fields without influence on results, left out of `spec_hash`.
NOT_IDENTITY = (
    "log_every_steps", "save_every_steps", "keep_checkpoints", "keep_every_steps", "evaluate_every_steps",
    "evaluation.subset_examples",
)  # fmt: skip
# Fields that may differ when a run resumes.
MAY_CHANGE = (*NOT_IDENTITY, "compute.mesh", "compute.strategy")
# Fields added after rows were committed, with the former behaviour as value: at that value they are left out of
# `spec_hash`, so that old hashes stay valid.
_ADDED = {
    "model.encoder.feature_layer": 0,
    "model.encoder.pixel_mean": [0.5, 0.5, 0.5],
    "model.encoder.pixel_std": [0.5, 0.5, 0.5],
    "model.encoder.pixel_rescale": 1 / 255,
    "model.encoder.resize": "squash",
    "model.encoder.interpolation": "bilinear",
    "model.encoder.shortest_edge": 0,
    "model.encoder.returns": [],
    "model.encoder.attention_layer": 0,
    "model.encoder.salience": "heads",
    "model.encoder.merge": [],
    "model.compressor.key_width": 0,
    "model.compressor.queries": 0,
    "model.compressor.elastic": [],
    "model.compressor.fusion_heads": 0,
    "model.decoder.context": 0,
    "model.decoder.rope_bands.ramp": "turns",  # before its group
    "model.decoder.rope_bands": None,
    "bad_step": dataclasses.asdict(BadStepSpec()),
    "decoder_checkpoint": "",
    "connector_checkpoint": "",
    "elastic": "drawn",
    "compute.slices": 1,
    "compute.moments": "float32",
    "evaluate_every_steps": 0,
    "evaluation.subset_examples": 256,
    "compute.scan_layers": True,
}


def spec_hash(spec: RunSpec) -> str:
    """Twelve hex digits that identify the experiment."""
    identity = to_dict(spec)
    for field in dict.fromkeys((*NOT_IDENTITY, *_ADDED)):
        *groups, name = field.split(".")
        group = functools.reduce(lambda part, key: part and part[key], groups, identity)
        if group and (field in NOT_IDENTITY or group[name] == _ADDED[field]):
            del group[name]
    for stage in identity["stages"]:  # steps that follow from the data
        stage["total_steps"] *= not (stage["epochs"] or stage["examples"])
        stage["warmup_steps"] *= not stage["warmup_share"]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """A stored `to_dict(spec)` with the fields added since at their former behaviour."""
    values = json.loads(json.dumps(values))
    for field, before in _ADDED.items():
        *groups, name = field.split(".")
        group: Any = values
        for key in groups:
            group = group.get(key, {}) if isinstance(group, dict) else {}
        if isinstance(group, dict):
            group.setdefault(name, before)
    return values


def data_of(spec: RunSpec, stage: StageSpec) -> DataSpec:
    """The data of a stage: those of the run with the stage's changes."""
    changes = {} if stage.data is None else {name: v for name, v in vars(stage.data).items() if v}
    return dataclasses.replace(spec.data, **changes)


def views_of_row(spec: DataSpec, reads_question: bool) -> int:
    """M: the views of a training row."""
    copies = max(spec.questions_per_example, 1) if spec.pack == "none" and reads_question else 1
    return spec.row_images * copies


def at_every_v(spec: RunSpec) -> tuple[RunSpec, ...]:
    """The specs that one training of `spec` serves: one for each V of an elastic compressor."""
    compressor = spec.model.compressor
    each = [dataclasses.replace(compressor, tokens=v) for v in compressor.elastic or (compressor.tokens,)]
    return tuple(dataclasses.replace(spec, model=dataclasses.replace(spec.model, compressor=c)) for c in each)


def drawn_tokens(spec: RunSpec, step: int) -> int:
    """The V of a step of a run whose compressor has several: a function of seed and step."""
    return random.Random(f"{spec.seed} {step}").choice(spec.model.compressor.elastic)


def total_steps(spec: RunSpec) -> int:
    return sum(stage.total_steps for stage in spec.stages)
