"""The result row: what evaluation writes and `scaling` reads. Needs no JAX."""

import dataclasses
from dataclasses import dataclass

from vlm_jax.core.specs import ModelSpec


@dataclass(frozen=True)
class ResultRow:
    """One model on one task, with its cost and its whole description.

    A task is a glyph task of a grid cell, a public benchmark, or the mean of a suite of benchmarks.

    Errors are fractions in [0, 1]; `*_stderr` is the standard error over images (the questions about an image are one
    cluster). FLOPs are per question, forward only, by part, from `sizing.cost`. None: not measured.
    """

    cell: str  # the cell's name, "llm=d48,tokens=4,..."
    spec_hash: str
    family: str  # ocr, facts, scene; or a benchmark or suite
    task: str  # dataset/config:split; of a suite, its benchmarks
    encoder: str
    llm: str
    compressor: str
    llm_params: int  # non-embedding parameters of the decoder: N of the law
    llm_params_total: int
    visual_tokens: int  # V; 0 is the blind baseline
    question_tokens: float  # Q, mean over the evaluated questions
    answer_tokens: float
    error: float  # token error of greedy decoding; of a benchmark, 1 - score
    stderr: float
    exact_error: float  # share of answers with any wrong token; of a benchmark, of those below the full score
    exact_stderr: float
    forced_error: float | None  # token error with the true answer so far as context
    forced_stderr: float | None
    forced_nll: float | None  # nats per answer token
    images: int
    questions: int
    encoder_flops: float
    compressor_flops: float
    question_flops: float  # the question's extra decoder pass, for question-dependent compressors
    prefill_flops: float
    decode_flops: float  # all answer tokens
    train_steps: int  # 0: published weights
    train_flops: float
    train_secs: float
    seed: int
    encoder_sha256: str
    params_sha256: str
    version: str
    device: str
    model: ModelSpec  # on disk as `specs.to_dict` writes it
    options: str = ""  # of a benchmark: "prompt=llava flavour=llava ..."
    limit: int = 0  # of a benchmark: only its first questions were evaluated; 0: all
    parse_failures: float | None = None  # of a benchmark: share of answers that its rules cannot read


FIELDS = tuple(f.name for f in dataclasses.fields(ResultRow))
DEFAULTS = {f.name: f.default for f in dataclasses.fields(ResultRow) if f.default is not dataclasses.MISSING}
