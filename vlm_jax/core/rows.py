"""The result row: what evaluation writes and `scaling` reads. Needs no JAX."""

import dataclasses
from dataclasses import dataclass

from vlm_jax.core.specs import ModelSpec


@dataclass(frozen=True)
class ResultRow:
    """One evaluated grid cell on one task, with its cost and its whole model.

    Errors are fractions in [0, 1]; `*_stderr` is the standard error over images (the questions about an image are one
    cluster). FLOPs are per question, forward only, by part, from `sizing.cost`.
    """

    cell: str  # the cell's name, "llm=d48,tokens=4,..."
    spec_hash: str
    family: str  # ocr, facts, scene
    task: str  # dataset/config:split
    encoder: str
    llm: str
    compressor: str
    llm_params: int  # non-embedding parameters of the decoder: N of the law
    llm_params_total: int
    visual_tokens: int  # V; 0 is the blind baseline
    question_tokens: float  # Q, mean over the evaluated questions
    answer_tokens: float
    error: float  # token error of greedy decoding
    stderr: float
    exact_error: float  # share of answers with any wrong token
    exact_stderr: float
    forced_error: float  # token error with the true answer so far as context
    forced_stderr: float
    forced_nll: float  # nats per answer token
    images: int
    questions: int
    encoder_flops: float
    compressor_flops: float
    question_flops: float  # the question's extra decoder pass, for question-dependent compressors
    prefill_flops: float
    decode_flops: float  # all answer tokens
    train_steps: int
    train_flops: float
    train_secs: float
    seed: int
    encoder_sha256: str
    params_sha256: str
    version: str
    device: str
    model: ModelSpec  # on disk as `specs.to_dict` writes it


FIELDS = tuple(f.name for f in dataclasses.fields(ResultRow))
