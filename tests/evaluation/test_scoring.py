"""Scores against a transcription in plain Python, and their standard errors against theory and a bootstrap."""

import math

import jax
import numpy as np
import pytest

from vlm_jax.evaluation import clusters, scoring

END = 1


@pytest.mark.parametrize("new", [6, 5, 3])
def test_scores_against_plain_python(new: int) -> None:
    """Token by token, the end token left out; where an answer is longer than what was generated, it is wrong."""
    rng = np.random.default_rng(1)
    lengths = [3, 0, 4, 1, 2, 4]  # 0: a row that only fills
    truth = [[*rng.integers(2, 6, length).tolist(), END] if length else [] for length in lengths]
    answer = np.array([row + [-1] * (5 - len(row)) for row in truth])
    nll, hits = rng.random((6, 5)).astype(np.float32), rng.random((6, 5)) < 0.5
    generated = rng.integers(2, 6, (6, new)).astype(np.int32)
    generated[0] = (truth[0] + [END] * 5)[:new]  # one that is right
    expected = []
    for row, tokens in enumerate(truth):
        counted = tokens[:-1]
        wrong = sum(k >= new or generated[row, k] != token for k, token in enumerate(counted))
        forced = sum(not hits[row, k] for k in range(len(counted)))
        expected.append((wrong, wrong > 0, forced, nll[row, : len(counted)].sum(), len(counted), len(counted) > 0))
    found = jax.jit(lambda *args: scoring.score(*args, END))(nll, hits, generated, answer)
    np.testing.assert_allclose(np.stack(found, axis=1), np.array(expected, float), rtol=1e-5, atol=1e-6)


def test_ratio_of_equal_clusters_has_the_textbook_standard_error() -> None:
    """With k questions an image the ratio is the mean over images, its error s / sqrt(m); fill rows do not count."""
    rng = np.random.default_rng(0)
    images, questions, tokens = 50, 4, 3
    errors = rng.integers(0, tokens + 1, (images, questions)).astype(np.float32)
    cluster = np.repeat(np.arange(images), questions)
    shuffled = rng.permutation(images * questions)
    filled = (
        np.append(errors.ravel()[shuffled], [99, 99]),
        np.append(np.full(images * questions, tokens), [7, 7]),
        np.append(cluster[shuffled], [-1, -1]),
    )
    means = errors.mean(axis=1) / tokens
    assert clusters.ratio(*filled) == pytest.approx((means.mean(), means.std(ddof=1) / math.sqrt(images)))


def test_ratio_of_unequal_clusters_against_a_bootstrap() -> None:
    """Images differ in difficulty and in tokens; resampling whole images gives the same standard error.

    A bootstrap of R replicates knows a standard deviation to 1 / sqrt(2 R), about 1 percent here; the linearisation is
    good to about 1 / m. Both lie well inside 5 percent, while ignoring the clusters misses by much more.
    """
    rng = np.random.default_rng(0)
    images = 200
    rows = rng.integers(1, 6, images)
    cluster = np.repeat(np.arange(images), rows)
    counts = rng.integers(1, 5, len(cluster))
    errors = rng.binomial(counts, np.repeat(rng.beta(0.5, 1.0, images), rows))
    value, stderr = clusters.ratio(errors, counts, cluster)
    assert value == errors.sum() / counts.sum()

    e, n = np.zeros(images), np.zeros(images)
    np.add.at(e, cluster, errors)
    np.add.at(n, cluster, counts)
    draws = rng.integers(0, images, (4000, images))
    bootstrap = (e[draws].sum(1) / n[draws].sum(1)).std(ddof=1)
    assert stderr == pytest.approx(bootstrap, rel=0.05)
    assert clusters.ratio(errors, counts, np.arange(len(cluster)))[1] < 0.85 * stderr


def test_one_cluster_has_no_standard_error() -> None:
    value, stderr = clusters.ratio(np.ones(3), np.full(3, 2), np.zeros(3, int))
    assert value == 0.5
    assert math.isnan(stderr)
