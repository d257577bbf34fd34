"""The result row: the one thing that the model half of the project hands to the law half. Needs no JAX."""

import dataclasses
from dataclasses import dataclass

from vlm_jax.core.specs import ModelSpec


@dataclass(frozen=True)
class ResultRow:
    """One evaluated cell of a grid on one task. A row without its cost or its model does not exist.

    Errors are fractions in [0, 1]; `*_stderr` is the standard error over images (questions on one image are one
    cluster). FLOPs are per question, forward only, by part, and are analytic (`sizing.cost`).
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
    question_flops: float  # the extra pass of the question, for compressors that read it
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
    model: ModelSpec  # what was measured, whole; on disk as `specs.to_dict` writes it


FIELDS = tuple(f.name for f in dataclasses.fields(ResultRow))
