"""The rows of the highest predicted MFU, with a compiler whose memory is known."""

import dataclasses

import jax
import pytest

from vlm_jax.aot import __main__ as cli
from vlm_jax.aot import batch, programs, report, variants
from vlm_jax.aot.batch import Estimate
from vlm_jax.build import fitting
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import RunSpec, StageSpec, data_of

FLAGS = ["--config", "configs/vlm.py:smoke,llm=d24,tokens=4", "--topology", "v5e:2x2"]
GIB = 2.0**30
OWN_ROWS = 16
# Of the fake compiler: bytes of a row by policy, beside a GiB of state and programs.
ROW_BYTES = {"none": 4 * GIB, "dots": GIB / 2, "mlp": GIB / 4, "block": GIB / 16}


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """A run on one device of 15.75 GiB, whose steps each send for a millisecond."""
    fields = {"compute.remat": "auto", "data.batch_rows": str(OWN_ROWS), "compute.strategy": "replicated"}
    found = resolve(load_config("configs/vlm.py:smoke,llm=d24,tokens=4", fields))
    found = dataclasses.replace(found, compute=dataclasses.replace(found.compute, mesh=(1, 1, 1)))
    usable = 15.75 * GIB * (1 - fitting.MARGIN)

    def compile_row(spec: RunSpec, stage: StageSpec, topology: str, mode: str) -> tuple[dict, str]:
        rows, policy = data_of(spec, stage).batch_rows, spec.compute.remat
        peaks = {name: 2 * GIB + rows * size for name, size in ROW_BYTES.items()}
        if policy == "auto":
            policy = next((name for name, peak in peaks.items() if peak <= usable), "block")
        compiled.append((rows, policy))
        row = {
            "batch_examples": rows, "remat": policy, "peak_bytes": peaks[policy], "params_bytes": GIB / 2,
            "optimiser_bytes": GIB / 2, "temporaries_bytes": peaks[policy] - GIB, "collectives": [],
            "mfu": rows / (rows + 20),
        }  # fmt: skip
        return row, "HloModule" if peaks[policy] <= 15.75 * GIB else ""

    compiled: list[tuple[int, str]] = []
    monkeypatch.setattr(variants, "compile_row", compile_row)
    monkeypatch.setattr(programs, "devices", lambda topology, slices: jax.devices()[:1])
    return found


def test_the_best_batch_fits_and_stands_beside_the_config(spec: RunSpec) -> None:
    own, *better = (row for row, _ in batch.best(spec, spec.stages[-1], "v5e:2x2"))
    assert (own["batch_examples"], own["remat"]) == (OWN_ROWS, "dots")
    for row in better:
        assert row["mfu"] > own["mfu"]
        assert row["peak_bytes"] <= 15.75 * GIB
    given = batch.with_policy(spec, "block")
    assert {row["remat"] for row, _ in batch.best(given, spec.stages[-1], "v5e:2x2")} == {"block"}


def test_the_smallest_of_the_batches_that_are_about_as_good() -> None:
    found = [
        Estimate(256, "dots", 1 * GIB, 0.40), Estimate(512, "dots", 2 * GIB, 0.499), Estimate(512, "none", GIB, 0.50),
        Estimate(1024, "dots", 3 * GIB, 0.501), Estimate(2048, "dots", 9 * GIB, 0.55),
    ]  # fmt: skip
    assert batch.choose(found, 4 * GIB) == found[2]
    assert batch.choose(found, 16 * GIB) == found[4]
    assert batch.choose(found, GIB / 2) is None


def test_the_rows_of_a_stage_with_its_own_are_changed_there() -> None:
    spec = resolve(load_config("configs/llava.py:llm=qwen1.5-0.5b,tokens=16"))
    align, tune = spec.stages
    assert (align.data is not None, tune.data) == (True, None)
    changed, stage = batch.with_rows(spec, align, 4096)
    assert data_of(changed, stage).batch_rows == data_of(changed, changed.stages[0]).batch_rows == 4096
    assert data_of(changed, tune).batch_rows == spec.data.batch_rows
    changed, stage = batch.with_rows(spec, tune, 4096)
    assert (changed.data.batch_rows, stage) == (4096, tune)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "512"], r"--batch 512: expected auto \(other sizes: --config.data.batch_rows=N\)"),
        (["--batch", "auto", "--mode", "decode"], "--batch auto: expected --mode train, got decode"),
    ],
)
def test_invalid_batches_raise(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.main([*FLAGS, *flags])


def test_shares_of_the_peak_by_hand() -> None:
    """60 % of the peak, of which 3/4 are products computed once, and a fifth of the step is network."""
    row = {"mode": "train", "model_flops": 3.0, "flops": 4.0, "step_secs": 1.0, "exposed_secs": 0.16, "mfu": 0.36,
           "binds": "compute"}  # fmt: skip
    expected = "60.0% is assumed of products, 45.0% with those computed again, 36.0% with the exposed network"
    assert report.shares(row) == expected
