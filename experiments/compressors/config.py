"""A cell of the comparison of compressors: equal rows, questions and steps for all of them.

python -m vlm_jax.train --config experiments/compressors/config.py:compressor=mqt,tokens=4,family=ocr --workdir DIR

A row has one image and four questions, for every family and compressor; where visual tokens depend on the question,
each question has a view of its own.
"""

from ml_collections import ConfigDict

from configs import vlm
from vlm_jax.compress import catalog
from vlm_jax.config.arguments import parse_arg
from vlm_jax.config.resolve import resolve

QUESTIONS = 4
TEXT_TOKENS = 10  # of the longest question with its answer, in all families; so that they share programs


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg, compressor="resampler", tokens=4, elastic="", elastic_steps="drawn", family="ocr", llm="d48", steps=400,
        data="", seed=0,
    )  # fmt: skip
    passed = ("compressor", "tokens", "elastic", "elastic_steps", "family", "llm", "steps", "data", "seed")
    c = vlm.get_config(",".join(f"{name}={getattr(arg, name)}" for name in passed) + ",recipe=demo")
    c.data.questions_per_example, c.data.row_tokens = QUESTIONS, 1024
    spec = resolve(c)
    copies = QUESTIONS if catalog.has_own_views(spec.model, spec.compute, spec.data) else 1
    c.data.row_tokens = copies * catalog.entering(spec.model.compressor) + QUESTIONS * TEXT_TOKENS
    c.evaluation.max_new_tokens = 8
    return c
