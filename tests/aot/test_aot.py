"""Ahead-of-time compilation for TPU topologies; tests that need libtpu are skipped without it."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import pytest

from vlm_jax import aot
from vlm_jax.aot import __main__ as cli
from vlm_jax.aot import programs, report, variants
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core import axes
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import RunSpec
from vlm_jax.distributed import partitioning
from vlm_jax.inference import programs as inference
from vlm_jax.inference import sampling
from vlm_jax.sizing import chips, cost

with_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="XLA:TPU (libtpu) is not installed"
)
FLAGS = ["--config", "configs/vlm.py:smoke,llm=d24,tokens=4", "--topology", "v5e:2x2"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the command's environment and restores it after each test."""
    for name, value in aot.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    spec = resolve(load_config("configs/vlm.py:smoke,llm=d24,tokens=4"))
    return dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, strategy="fsdp", mesh=(1, 2, 2)))


def test_without_libtpu_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'libtpu==[\d.*]+'"):
        programs.devices("v5e:2x2")


def test_unknown_stages_and_invalid_meshes_raise() -> None:
    with pytest.raises(UserError, match=r"unknown stage 'bth': did you mean 'both'\?"):
        cli.main([*FLAGS, "--stage", "bth"])
    with pytest.raises(UserError, match=r"--mesh 4,4: expected three integers"):
        cli.main([*FLAGS, "--mesh", "4,4"])


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_the_compiled_program_is_the_one_that_generate_runs(spec: RunSpec, mode: str) -> None:
    """`generate` takes its programs from `inference.programs`, one for each model, plan and size: so does this."""
    compute = dataclasses.replace(spec.compute, strategy="replicated", mesh=(1, 1, 1))
    spec = dataclasses.replace(spec, compute=compute)
    plan = partitioning.make_plan(compute, jax.devices()[:1])
    key = (spec.model, sampling.compute_for_decoding(compute), plan)
    room = spec.evaluation.max_new_tokens
    cached = inference.prefill_program if mode == "prefill" else inference.decode_program
    cached.cache_clear()
    program = programs.compile_mode(spec, plan, mode)
    assert program.text.startswith("HloModule")
    assert cached.cache_info().currsize == 1
    cached(*key, room) if mode == "prefill" else cached(*key, (0,), "greedy")
    assert cached.cache_info().hits == 1


@with_compiler
def test_unknown_topologies_and_modes_raise_with_a_suggestion(spec: RunSpec) -> None:
    with pytest.raises(UserError, match=r"unknown topology 'v5e:16x1': did you mean 'v5e:16x16'\?"):
        programs.devices("v5e:16x1")
    with pytest.raises(UserError, match=r"unknown mode 'training': did you mean 'train'\?"):
        variants.compile_row(spec, spec.stages[0], "v5e:2x2", "training")


@with_compiler
def test_a_train_step_for_four_chips(spec: RunSpec) -> None:
    """Trained parameters are sharded four ways except vectors and a table; gradients are reduced, kernels gathered."""
    row, text = variants.compile_row(spec, spec.stages[0], "v5e:2x2", "train")
    assert text.startswith("HloModule")
    assert row["fits"]
    assert row["chips"] == 4
    sizes = cost.params(spec.model)
    learned = 4 * (sizes.total - sizes.encoder)  # the encoder is not part of the step
    assert learned / 4 <= row["params_bytes"] < 0.6 * learned
    assert 2 * learned / 4 <= row["optimiser_bytes"] < 1.1 * learned
    assert row["peak_bytes"] == pytest.approx(
        row["params_bytes"] + row["optimiser_bytes"] + row["inputs_bytes"] + row["temporaries_bytes"]
    )
    assert row["model_flops"] == cost.step_flops(spec, spec.stages[0])
    assert {"all-gather", "all-reduce"} <= {each["kind"] for each in row["collectives"]}
    assert json.loads(json.dumps(row)) == row
    assert "fits" in "\n".join(report.lines(row))


@with_compiler
@pytest.mark.parametrize(("topology", "gathers"), [("v5e:16x16", 1), ("v5p:4x4x8", 2)])
def test_kernels_are_gathered_over_one_axis_in_2d_and_two_in_3d(topology: str, gathers: int) -> None:
    compute = resolve(load_config("configs/llava.py")).compute
    plan = partitioning.make_plan(compute, programs.devices(topology))
    assert plan.mesh.size == programs.mesh_axes(plan)["fsdp"] * 16
    assert len(plan.compute_shardings((axes.EMBED, axes.MLP), (4096, 11008))) == 1 + gathers
    chip = chips.device(report.chip_of(topology).name)
    assert report.link_share(plan, chip, ("fsdp", "tensor")) == 1
    assert report.link_share(plan, chip, ("fsdp",)) == pytest.approx({1: 1 / 2, 2: 1 / 3}[gathers])


@with_compiler
def test_a_program_that_does_not_fit_exits_3_with_advice(spec: RunSpec, tmp_path: Path) -> None:
    """A batch of pixels larger than any chip; the row is written."""
    overrides = ["data.batch_rows=262144", "data.frozen_features=False", "evaluation.batch_examples=262144"]
    flags = [*FLAGS, *(f"--config.{field}" for field in overrides), "--json", str(tmp_path / "rows.json")]
    assert cli.main(flags) == 3
    row = json.loads((tmp_path / "rows.json").read_text())
    assert not row["fits"]
    assert row["peak_bytes"] > row["usable_bytes"]
    assert row["temporaries_bytes"] / 2 > row["usable_bytes"]
    assert report.advice(row).startswith("by estimate it would fit with: compute.microbatches=4; or data.batch_rows=")


@with_compiler
def test_a_chip_may_have_two_devices(spec: RunSpec) -> None:
    spec = dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, mesh=(1, -1, 2)))
    row, _ = variants.compile_row(spec, spec.stages[0], "tpu7x:2x2x1", "decode")
    assert (row["devices"], row["chips"]) == (8, 4)
    text = "\n".join(report.lines(row))
    assert "over 4 chips of 2 devices each" in text
    assert "per device, GiB" in text
    assert "remat" not in text


@with_compiler
def test_decode_holds_the_parameters_and_the_cache(spec: RunSpec) -> None:
    """Parameters in the dtype of the activations, and keys and values of every row."""
    row, _ = variants.compile_row(spec, spec.stages[0], "v5e:2x2", "decode")
    slots = spec.data.row_tokens + spec.evaluation.max_new_tokens
    rows = spec.evaluation.batch_examples / 4
    cache = rows * cost.cache_bytes(spec.model.decoder, slots, spec.compute.dtype)
    assert row["optimiser_bytes"] == 0
    assert cache < row["inputs_bytes"] < 1.2 * cache


def _row(**given: object) -> dict:
    """The fields that `advice` reads: 16 GiB usable on four chips."""
    gib = 2.0**30
    row = {
        "mode": "decode", "strategy": "replicated", "topology": "v5e:2x2", "slices": 1, "devices": 4, "mesh": [4, 1, 1],
        "microbatches": 1, "moments": "float32", "remat": "none", "batch_examples": 8192, "params_bytes": gib / 2,
        "optimiser_bytes": 0.0, "inputs_bytes": 128 * gib, "temporaries_bytes": 128 * gib, "usable_bytes": 16 * gib,
    }  # fmt: skip
    row |= {key: value * gib if key.endswith("_bytes") else value for key, value in given.items()}
    row["peak_bytes"] = sum(row[f"{name}_bytes"] for name in ("params", "optimiser", "inputs", "temporaries"))
    return row


def test_advice_lists_only_sufficient_changes() -> None:
    """By hand: of 256 GiB for 8192 rows, 15.5 hold 496. Splitting half a GiB of parameters is no help there."""
    assert report.advice(_row()) == "by estimate it would fit with: evaluation.batch_examples=496"
    state = _row(params_bytes=17, inputs_bytes=1, temporaries_bytes=1)
    assert report.advice(state) == "by estimate it would fit with: strategy=fsdp"
    # 40 GiB of parameters a chip that are split already: sixteen chips hold ten each, and the rest.
    split = _row(strategy="fsdp", mesh=[1, 4, 1], params_bytes=40, inputs_bytes=4, temporaries_bytes=4)
    assert report.advice(split) == "by estimate it would fit with: --topology v5e:4x4"
    far = _row(strategy="fsdp", mesh=[1, 4, 1], params_bytes=1e6, inputs_bytes=4, temporaries_bytes=4)
    assert report.advice(far).startswith("no single change is enough; may help: ")
    moments = _row(mode="train", params_bytes=5, optimiser_bytes=10, inputs_bytes=0, temporaries_bytes=2.5)
    assert "compute.moments=bfloat16" in report.advice(moments)
    assert "moments" not in report.advice(moments | {"moments": "bfloat16"})


def test_invalid_output_paths_raise_before_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "compile_row", lambda *_: pytest.fail("compiled"))
    for flag in ("--json", "--hlo"):
        for path in (tmp_path / "none" / "x", tmp_path):
            with pytest.raises(UserError, match=rf"{flag} {path}: expected a file in an existing folder"):
                cli.main([*FLAGS, flag, str(path)])


def test_refused_variants_are_listed_and_the_others_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: meshes that begin with a minus sign are parsed."""

    def compiled(spec: RunSpec, stage: object, topology: str, mode: str) -> tuple[dict, str]:
        if spec.compute.mesh == (4, 1, 1):
            raise UserError("the batch does not divide")
        row = {"topology": topology, "strategy": spec.compute.strategy, "mesh": spec.compute.mesh, "fits": True}
        return row | {"peak_bytes": 1.0, "chips": 4, "step_secs": 1.0, "mfu": 0.5}, f"HloModule {spec.compute.mesh}"

    monkeypatch.setattr(variants, "compile_row", compiled)
    monkeypatch.setattr(report, "lines", lambda row: [])
    written = ["--json", str(tmp_path / "rows.json"), "--hlo", str(tmp_path / "x.txt")]
    meshes = ["--strategy", "fsdp", "--mesh", "-1,1,1", "4,1,1", "1,-1,2"]
    assert cli.main([*FLAGS, *meshes, *written]) == 0
    text = capsys.readouterr().out
    assert "refused: v5e:2x2 fsdp 4,1,1: the batch does not divide" in text
    assert [row["mesh"] for row in json.loads((tmp_path / "rows.json").read_text())] == [[-1, 1, 1], [1, -1, 2]]
    names = sorted(path.name for path in tmp_path.glob("x*"))
    assert names == ["x.v5e-2x2.fsdp.-1,1,1.txt", "x.v5e-2x2.fsdp.1,-1,2.txt"]
    with pytest.raises(UserError, match="does not divide"):
        cli.main([*FLAGS, "--mesh", "4,1,1"])


def test_ranking_is_by_chip_seconds_with_misfits_last() -> None:
    base = {"strategy": "fsdp", "mesh": [1, 4, 4], "peak_bytes": 2.0**30, "mfu": 0.5}
    rows = [
        {**base, "topology": "v5e:16x16", "chips": 256, "step_secs": 1.0, "fits": True},
        {**base, "topology": "v5e:4x4", "chips": 16, "step_secs": 14.0, "fits": True},
        {**base, "topology": "v5e:2x2", "chips": 4, "fits": False},
    ]
    lines = variants.ranking(rows).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["v5e:4x4", "v5e:16x16", "v5e:2x2"]
    assert lines[4] == "cheapest that fits: v5e:4x4, fsdp, mesh (1, 4, 4)"


def test_batches_are_ranked_by_chip_seconds_per_row() -> None:
    base = {"topology": "v5e:2x2", "chips": 4, "strategy": "fsdp", "mesh": [1, 4, 1], "peak_bytes": 2.0**30}
    base |= {"mfu": 0.5, "fits": True}
    rows = [
        {**base, "step_secs": 1.0, "batch_examples": 256, "remat": "none"},
        {**base, "step_secs": 1.6, "batch_examples": 512, "remat": "dots"},
    ]
    lines = variants.ranking(rows).splitlines()
    assert lines[1].endswith("0.0125   512 rows, remat dots")
    assert lines[3] == "cheapest that fits: v5e:2x2, fsdp, mesh (1, 4, 1), 512 rows, remat dots"


def test_the_llava_config_lays_out_on_256_chips() -> None:
    """Without libtpu too."""
    from jax.sharding import AbstractMesh

    from vlm_jax import build

    spec = resolve(load_config("configs/llava.py:llm=qwen1.5-14b,tokens=576,devices=256"))
    assert spec.data.row_tokens == 2048
    table = tuple(partitioning.TABLES[spec.compute.strategy].items())
    plan = partitioning.Plan(AbstractMesh((1, 1, 16, 16), partitioning.MESH_AXES), table)
    assert [stage.train for stage in build.lay_out(spec, plan).spec.stages] == [
        ("connector",),
        ("connector", "decoder"),
    ]
