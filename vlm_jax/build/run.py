"""A run: a network, and the data of its stages."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vlm_jax.build.data import open_data
from vlm_jax.build.network import Network, cache_errors, open_network
from vlm_jax.compress import catalog
from vlm_jax.core import specs
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, RunSpec, StageSpec
from vlm_jax.data import chat_formats
from vlm_jax.data.pipeline import Batches, evaluation_pairs
from vlm_jax.data.views import Data


class Run(NamedTuple):
    """A network and its data."""

    network: Network  # the stages of its spec have their numbers of steps
    train: tuple[Batches, ...]  # of each stage
    test: Data | None


def open_run(spec: RunSpec, cache_dir: Path) -> Run:
    """The network with its data and features, which are made under `cache_dir` if missing. Raises `UserError`."""
    network = open_network(spec)
    with cache_errors(cache_dir):
        return _open_run(spec, network, cache_dir)


def _open_run(spec: RunSpec, network: Network, cache_dir: Path) -> Run:
    train, stages = [], []
    for stage in spec.stages:
        data_spec = specs.data_of(spec, stage)
        data = open_data(network, data_spec, data_spec.train, cache_dir)
        batches = Batches(data, spec.seed, network.plan.rows(data_spec.batch_rows))
        stages.append(_with_steps(stage, data_spec, batches))
        train.append(batches)
    network = network._replace(spec=dataclasses.replace(spec, stages=tuple(stages)))
    return Run(network, tuple(train), _open_test(network, cache_dir) if spec.data.test else None)


def runs_at_every_v(run: Run, cache_dir: Path) -> Iterator[Run]:
    """The runs that one training serves, with their test data: one for each V of an elastic compressor."""
    for spec in specs.at_every_v(run.network.spec):
        if spec == run.network.spec:
            yield run
            continue
        network = run.network
        model = catalog.at_tokens(network.model.spec, spec.model.compressor.tokens)
        network = network._replace(spec=spec, model=network.model._replace(spec=model))
        with cache_errors(cache_dir):
            yield Run(network, (), _open_test(network, cache_dir) if spec.data.test else None)


def _open_test(network: Network, cache_dir: Path) -> Data:
    """The test data; what cannot be evaluated raises before anything is trained."""
    data = network.spec.data
    data = dataclasses.replace(data, format=chat_formats.for_evaluation(data.format))
    test = open_data(network, data, data.test, cache_dir)
    evaluation_pairs(test, network.spec.evaluation)
    return test


def _with_steps(stage: StageSpec, data: DataSpec, batches: Batches) -> StageSpec:
    """The stage with its number of steps, where it is given in epochs or examples, and of warm-up steps."""
    steps = stage.total_steps
    if not steps:
        rows = batches.epoch(0)
        epochs = stage.epochs or stage.examples / rows.examples
        steps = max(1, math.ceil(round(epochs * len(rows) / data.batch_rows, 6)))
    warmup = stage.warmup_steps or min(round(stage.warmup_share * steps), steps - 1)
    if warmup >= steps:
        raise UserError(f"stage {stage.name}: expected warmup_steps below its {steps} steps, got {warmup}")
    return dataclasses.replace(stage, total_steps=steps, warmup_steps=warmup)
