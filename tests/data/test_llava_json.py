"""A json of LLaVA's layout with every trap, through configs/llava.py: tokens, report and training.

The golden file holds what LLaVA's own code trains on (tests/golden/peers_llava_json.py).
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.data import traps
from tests.golden import peers_conversations, peers_llava_json, peers_text
from vlm_jax import build, check_data, job
from vlm_jax.cli import run_main
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.specs import RunSpec
from vlm_jax.data.tokenized import Mixture

GOLDEN = peers_llava_json.read()
# The recipe at the size of a test.
OVERRIDES = {
    "data.batch_rows": "8",
    "data.row_tokens": "1024",
    "compute.dtype": "float32",
    "compute.attention": "xla",
    "compute.remat": "none",
    "compute.strategy": "replicated",
    "compute.mesh": "(-1,1,1)",
    "data.max_bad_share": "0.25",
    "log_every_steps": "1",
}


class Files(NamedTuple):
    traps: traps.Traps
    tokenizer: Path
    cache: Path

    @property
    def config(self) -> str:
        paths = f"data={self.traps.json},images={self.traps.images},tokenizer={self.tokenizer}"
        return f"configs/llava.py:stage=2,{paths},encoder=glyph-64,llm=d24,tokens=4"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = peers_text.write(peers_conversations.read()["pieces"]["files"], folder / "tokenizer")
    return Files(traps.build(folder), tokenizer, folder / "cache")


def spec_of(files: Files, arguments: str = "format=v1", **overrides: str) -> RunSpec:
    vocab = str(build.load_tokenizer(str(files.tokenizer)).size)
    return resolve(load_config(f"{files.config},{arguments}", {**OVERRIDES, "model.vocab": vocab, **overrides}))


def opened(files: Files, arguments: str) -> Mixture:
    spec = spec_of(files, arguments)
    return build.open_mixture(spec.data, spec.data.train, files.cache)


@pytest.mark.parametrize(("kind", "least"), [("v1", 44), ("plain", 30)])
def test_ids_and_losses_are_llavas(files: Files, kind: str, least: int) -> None:
    (part,) = opened(files, f"format={kind}").parts
    compared = learned = 0
    for number, item in enumerate(part.item.tolist()):
        expected, row = GOLDEN[kind][item], files.traps.rows[item]
        if expected is None or (kind == "plain" and np.size(row.get("image", [])) != 1):  # LLaVA always writes one
            continue
        ids, target = part.conversation(number)
        assert ids.tolist() == expected["ids"], row
        compared += 1
        if any(expected["target"]):
            learned += 1
            assert target.tolist() == expected["target"], row
    assert compared >= least
    assert learned >= least - 2


def test_every_bad_item_is_counted_under_its_reason(files: Files) -> None:
    (part,) = opened(files, "format=v1").parts
    ids = {number: str(row["id"]) for number, row in enumerate(files.traps.rows)}
    expected: dict[str, list[str]] = {}
    for number, reason in files.traps.bad.items():
        expected.setdefault(reason, []).append(ids[number])
    assert part.skipped == expected
    assert part.items == 60 - len(files.traps.bad)


def checked(files: Files, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int | None:
    """The exit code of `python -m vlm_jax.check_data`."""
    vocab = f"--config.model.vocab={build.load_tokenizer(str(files.tokenizer)).size}"
    overrides = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    monkeypatch.setenv("VLM_JAX_CACHE", str(files.cache))
    monkeypatch.setattr(sys, "argv", ["", "--config", f"{files.config},format=v1", *overrides, vocab, *flags])
    with pytest.raises(SystemExit) as stop:
        run_main(check_data.main)
    return stop.value.code


def test_check_data_reports_what_is_kept(files: Files, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    assert checked(files, monkeypatch, "--json", str(tmp_path / "report.json")) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    reasons = Counter(files.traps.bad.values()) + Counter({"unreadable image": len(files.traps.undecodable)})
    assert {reason: len(ids) for reason, ids in report["skipped"].items()} == reasons
    broken = [files.traps.rows[number]["id"] for number in files.traps.undecodable]
    assert report["skipped"]["unreadable image"] == broken
    assert (report["items"], report["kept"]) == (60, 60 - sum(reasons.values()))
    (part,) = opened(files, "format=v1").parts
    visual = 3 * int(part.images.sum())  # four tokens for each placeholder
    assert (report["cut"], report["dropped"], report["tokens"]) == (0, 0, len(part.ids) + visual)
    (one,) = report["sets"]
    assert report["fill"] == pytest.approx(report["tokens"] / (one["rows"] * 1024))
    assert one["images"] == part.image_count
    printed = capsys.readouterr().out
    assert f"{report['kept']} of 60 items kept" in printed
    assert "unreadable image: 3 (broken truncated.jpg, broken empty.jpg, broken page.jpg)" in printed


def test_check_data_fails_beyond_the_share_of_bad_items(
    files: Files, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    """With the report, which says what to mend."""
    flags = ("--json", str(tmp_path / "report.json"), "--config.data.max_bad_share=0.2")
    assert checked(files, monkeypatch, *flags) == 2
    assert (tmp_path / "report.json").exists()
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: tune: expected at most data.max_bad_share=0.2 of unusable items, got 0.217 (13 of")
    assert "\n" not in line


def test_it_trains_in_packed_rows(files: Files, tmp_path: Path) -> None:
    spec = spec_of(files, **{"stages.0.total_steps": "2", "stages.0.epochs": "0.0"})
    run = build.open_run(spec, files.cache)
    (batches,) = run.train
    inputs = batches[0]
    assert inputs.segment.max() > 3  # several conversations a row
    assert (inputs.segment > 0).mean() > 0.8
    job.train(run, tmp_path, lambda log, values: None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1 for line in lines)
    report = json.loads((tmp_path / "data.json").read_text())["tune"]
    assert Counter({reason: len(ids) for reason, ids in report["skipped"].items()}) == Counter(files.traps.bad.values())
