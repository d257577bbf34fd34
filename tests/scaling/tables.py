"""Synthetic tables that several tests fit."""

import csv
from pathlib import Path

import numpy as np

from vlm_jax.scaling.scores import Measurement, Scores

SIZES = (0.5, 1.8, 4.0, 7.0)
TOKENS = (1, 4, 16, 36, 64, 144, 576)
PUBLISHED = Path(__file__).parents[2] / "experiments" / "published_law" / "published_scores.csv"


def grid():
    """N [28] and V [28]."""
    return np.repeat(SIZES, len(TOKENS)), np.tile(np.array(TOKENS, float), len(SIZES))


def of(errors, params=None, tokens=None, seeds=None, family="made", stderr=None):
    """A table of these errors over the grid, or over the given N and V."""
    n, v = grid() if params is None else (params, tokens)
    seeds = [None] * len(n) if seeds is None else seeds
    cells = [
        Measurement(family, float(n_), int(v_), float(e), stderr, s, f"made:{i}", {})
        for i, (n_, v_, e, s) in enumerate(zip(n, v, errors, seeds, strict=True))
    ]
    return Scores(tuple(cells), "nominal")


def published(family):
    """N, V and error of the published scores, read without the project's reader."""
    with PUBLISHED.open() as file:
        rows = [row for row in csv.DictReader(file) if row["family"] == family]
    columns = ("llm_params_billion", "visual_tokens", "mean_score")
    n, v, score = (np.array([float(row[name]) for row in rows]) for name in columns)
    return n, v, 1 - score
