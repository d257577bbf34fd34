"""A suite end to end, as a user runs it: a tiny published model, resumed, limited, scored again, fitted."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_files
import numpy as np
import pytest
from result_rows import row
from safetensors.numpy import save_file

import vlm_jax
from tests.golden import peers_answers, peers_text
from tests.golden.drawn import weights
from vlm_jax import evaluate
from vlm_jax.cli import run_main
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Inputs
from vlm_jax.evaluation import results, suite_run
from vlm_jax.evaluation.answers import AnswerFile
from vlm_jax.inference import answering, api
from vlm_jax.scaling import scores

SUITE = ("--suite", "ocr", "--set", "ocr_tokens=given")
NAMES = ("docvqa", "infovqa", "textvqa", "ocrbench", "chartqa")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA folder and the data of all benchmarks."""
    home, case = tmp_path_factory.mktemp("suite"), peers_answers.read()["llava"]
    folder = peers_text.write(case["files"], home / "llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 160
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(case["shapes"]), folder / "model.safetensors")
    benchmark_files.write(home / "data")
    return home


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(home / "llava"), "--data", str(home / "data"), "--out", str(out), *more]


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Instead of generating, answers with the prompt's last token; records (rows, images a row)."""
    calls: list[tuple[int, int | None]] = []

    def decode(model: Any, inputs: Inputs, max_new_tokens: int) -> np.ndarray:
        calls.append((len(inputs.tokens), None if inputs.views is None else inputs.views.pixels.shape[1]))
        last = (inputs.segment != 0).sum(axis=1, keepdims=True) - 1
        out = np.full((len(inputs.tokens), max_new_tokens), model.eos_ids[0])
        out[:, :1] = np.take_along_axis(inputs.tokens, last, axis=1)
        return out

    monkeypatch.setattr(answering, "decode", decode)
    return calls


def test_a_model_is_evaluated_and_its_rows_are_fitted(home: Path, tmp_path: Path, capsys: Any) -> None:
    """Two questions of one benchmark, really generated: what is written is what `generate` says."""
    out = tmp_path / "out"
    evaluate.main(arguments(home, out, "--benchmarks", "gqa", "--limit", "2", "--blind"))
    model = vlm_jax.load(home / "llava")
    pictures = [str(home / f"data/gqa/data/images/n{n}.jpg") for n in range(2)]
    prompts = [f"{text}\nAnswer the question using a single word or phrase." for text in ("Is it red?", "What is it?")]
    for kind, images in (("answers", pictures), ("answers_blind", None)):
        lines = [json.loads(line) for line in (out / kind / "gqa.jsonl").read_text().splitlines()]
        by_prompt = {line["prompt"]: line["text"] for line in lines}
        texts = vlm_jax.generate(model, images, prompts, 16)
        assert [by_prompt[p] for p in prompts] == [t.strip() for t in texts]
        counts = {line["prompt"]: line["tokens"][1] for line in lines}
        tokens = api.decode(model, api.inputs_of_rows(model, api.prompt_rows(model, images, prompts)), 16)
        assert [counts[p] for p in prompts] == [[*row, *model.eos_ids].index(model.eos_ids[0]) for row in tokens]
    rows = results.read(out / "rows.jsonl")
    assert [(r.family, r.visual_tokens, r.compressor, r.limit, r.questions) for r in rows] == [
        ("gqa", 9, "none", 2, 2),
        ("gqa", 0, "blind", 2, 2),
    ]
    assert rows[0].forced_nll is None
    assert rows[0].encoder_flops > 0 == rows[1].encoder_flops
    assert len({r.spec_hash for r in rows}) == 2
    assert scores.read(out / "rows.jsonl").families() == ["gqa"]
    assert "a part" in capsys.readouterr().out


def test_a_suite_has_a_row_a_benchmark_and_one_of_its_mean(home: Path, tmp_path: Path, parrot: Any) -> None:
    out = tmp_path / "out"
    evaluate.main(arguments(home, out, *SUITE))
    rows = results.read(out / "rows.jsonl")
    assert [r.family for r in rows] == [*NAMES, "ocr"]
    mean = sum(r.error for r in rows[:-1]) / 5
    assert rows[-1].error == pytest.approx(mean)
    assert rows[-1].stderr == pytest.approx(sum(r.stderr**2 for r in rows[:-1]) ** 0.5 / 5)
    assert rows[-1].questions == sum(r.questions for r in rows[:-1])
    report = json.loads((out / "scores.json").read_text())
    assert report["options"]["ocr_tokens"] == "given"
    assert report["answers"]["mean"] == pytest.approx(1 - mean)
    assert {calls for calls, _ in parrot} <= {1, 2, 4}


def test_an_interrupted_evaluation_goes_on(home: Path, tmp_path: Path, parrot: Any) -> None:
    out = tmp_path / "out"
    evaluate.main(arguments(home, out, *SUITE, "--limit", "1"))
    path = out / "answers" / "textvqa.jsonl"
    first = path.read_text()
    path.write_text(first + '{"question_id": "half')
    parrot.clear()
    evaluate.main(arguments(home, out, *SUITE))
    assert path.read_text().startswith(first)
    assert sum(count for count, _ in parrot) == 1 + 1 + 2 + 1 + 4  # what was missing; three chart questions fill four
    parrot.clear()
    evaluate.main(arguments(home, out, *SUITE))
    assert parrot == []


def test_other_options_or_weights_are_refused(home: Path, tmp_path: Path, parrot: Any) -> None:
    out = tmp_path / "out"
    evaluate.main(arguments(home, out, *SUITE, "--limit", "1"))
    with pytest.raises(UserError, match=r"option ocr_tokens: expected 'given', got 'none'.*another --out"):
        evaluate.main(arguments(home, out, "--suite", "ocr"))
    with pytest.raises(UserError, match="suite: expected 'ocr', got 'paper_reasoning'"):
        evaluate.main(arguments(home, out, "--suite", "paper_reasoning"))
    with pytest.raises(UserError, match="expected the weights and spec of 'llava'"):
        evaluate.main(arguments(home, out, *SUITE, "--compressor", "pool", "--tokens", "1"))
    evaluate.main(arguments(home, out, *SUITE, "--limit", "1", "--set", "flavour=official"))  # scoring alone may change


def test_rescoring_needs_no_model_and_no_jax(home: Path, tmp_path: Path, parrot: Any) -> None:
    out = tmp_path / "out"
    evaluate.main(arguments(home, out, "--suite", "paper_reasoning", "--benchmarks", "pope,mme"))
    before = json.loads((out / "scores.json").read_text())["answers"]["benchmarks"]
    flags = ["--rescore", "--suite", "paper_reasoning", "--benchmarks", "pope,mme", "--set", "pope=accuracy"]
    folders = ["--data", str(home / "data"), "--out", str(out)]
    code = "import sys; from vlm_jax import evaluate; evaluate.main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    root, words = Path(vlm_jax.__file__).parents[1], [sys.executable, "-c", code, *flags, *folders]
    assert subprocess.run(words, cwd=root, check=False).returncode == 0
    after = json.loads((out / "scores.json").read_text())["answers"]["benchmarks"]
    assert after["mme"] == before["mme"]
    assert after["pope"]["baselines"] == {"chance": 0.5, "always_yes": 0.5}
    assert [r.options.split()[4] for r in results.read(out / "rows.jsonl")] == ["pope=accuracy"] * 2
    (out / "run.json").unlink()  # answers of another program: scores without rows
    (out / "rows.jsonl").unlink()
    evaluate.main([*flags, *folders])
    assert not (out / "rows.jsonl").exists()
    with pytest.raises(UserError, match="gqa: 3 of 3 questions have no answer"):
        evaluate.main(["--rescore", "--benchmarks", "gqa", *folders])


def test_a_prompt_beyond_the_context_is_counted(home: Path, tmp_path: Path, parrot: Any) -> None:
    """With LLaVA's system prompt the questions do not fit into 160 tokens."""
    out = tmp_path / "out"
    evaluate.main(arguments(home, out, "--benchmarks", "gqa", "--set", "system=vicuna_v1"))
    report = json.loads((out / "scores.json").read_text())["answers"]["benchmarks"]["gqa"]
    assert (report["unanswered"], report["score"], parrot) == (3, 0.0, [])
    (answer, *_) = AnswerFile(out / "answers" / "gqa.jsonl").matched(suite_items(home)).values()
    assert answer.note == "the prompt is longer than the context of 160 tokens"


def suite_items(home: Path) -> list[Any]:
    from vlm_jax.evaluation import suites

    return suite_run.load(suites.find(None, ["gqa"], []), home / "data", 0)["gqa"].items


def test_items_with_several_images_are_asked_together(home: Path, tmp_path: Path, parrot: Any) -> None:
    evaluate.main(arguments(home, tmp_path / "out", "--benchmarks", "mmmu"))
    assert sorted(parrot) == [(1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--suite ocr", "missing --model, --data, --out"),
        ("--workdir w --suite ocr", "--workdir evaluates a run on its own task: for benchmarks give it as --model"),
        ("--model m --data {data} --out {out}", "expected --suite .one of .* or --benchmarks"),
        ("--model m --suite quec --data {data} --out {out}", "unknown suite 'quec': did you mean 'quecc'"),
        ("--model m --suite ocr --data {data}/none --out {out}", "none: expected a folder of benchmarks"),
        ("--model m --suite ocr --data {out} --out {out}", "docvqa: expected the files.*chartqa: expected the files"),
        ("--model m --suite ocr --data {data} --out {out} --processes 2", "benchmarks are evaluated by one process"),
        ("--model m --suite ocr --data {data} --out {out} --limit -1", "--limit: expected 0 or more, got -1"),
        ("--model {out}/none --suite ocr --data {data} --out {out}", "none"),
    ],
)
def test_bad_flags_exit_2_with_one_line(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags.format(data=home / "data", out=tmp_path).split()])
    with pytest.raises(SystemExit) as stop:
        run_main(evaluate.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_old_rows_are_read_and_new_fields_are_written_where_they_are_set(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results.append(path, row())
    assert not {"options", "limit", "parse_failures"} & set(json.loads(path.read_text()))
    results.append(path, row(limit=3, forced_nll=None, parse_failures=0.5))
    one, other = results.read(path)
    assert (one.limit, one.parse_failures) == (0, None)
    assert (other.limit, other.forced_nll, other.parse_failures) == (3, None, 0.5)
