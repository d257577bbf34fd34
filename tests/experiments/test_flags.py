"""Bad input to the commands of experiments/ is one line and exit code 2."""

import importlib
import re
import sys

import pytest

from vlm_jax.cli import run_main

OF_1 = "expected a whole number of at least 1, got"
CASES = {
    "bench": {"los": "did you mean 'loss'"},
    "compressors.pictures": {
        "--workdir {here}": "expected cells of the family ocr, got none", "--workdir {here} --tokens 0": OF_1,
    },
    "compressors.report": {"--workdir {here}/none": "rows.jsonl"},
    "compressors.staged_decoder": {"--layers -1": "at least 0", "--pairs 0": OF_1, "--llm qwen": "unknown llm"},
    "compressors.training_free": {"--workdir {here}": "expected trained cells of the compressor none, got none"},
    "data_speed.images": {"--images 0": OF_1, "--pairs x": OF_1},
    "data_speed.packing": {"--batch-rows 0": OF_1, "--repeats -1": "at least 0", "--conversations 99": "at least 100"},
    "data_speed.sources": {"--rows 0": OF_1, "--reads 0": OF_1, "--folder {here}/none": "none"},
    "data_speed.waiting": {"--steps 0": OF_1},
    "demo": {"--workdir {here} --workers 0": "expected at least 1, got 0"},
    "easy_vqa.report": {"--workdir {here}": "rows.jsonl"},
    "easy_vqa.suite": {"--workdir {here}": "expected trained cells, got none", "--limit 0": OF_1},
    "glyph_encoder.train": {"--steps 0": OF_1, "--lr nan": "from 0 to 1, got 'nan'", "--seed -1": "from 0 to 4"},
    "gpu.run": {"--minutes nan": "at least 0.01|from 0.01", "--out {here}": "got a folder"},
    "inference_speed.beside_big_vision": {"--prompt-tokens 256": "at least 257", "--models x": "invalid choice"},
    "inference_speed.beside_transformers": {
        "--threads 0": OF_1, "--threads 9999": "--threads: expected 1 to", "--new-tokens 1": "at least 2",
        "--batches 1 0": OF_1,
    },
    "inference_speed.evaluation": {"--layers 1 0": OF_1, "--layers 1": "expected 2 arguments", "--batches": "expected"},
    "inference_speed.serial_share": {
        "--tokens 3": "at least 4", "--positions 16 64 --tokens 9": "at most half of --positions 16, got 9",
        "--models smollm": "unknown llm", "--batches 0": OF_1,
    },
    "launch": {"--grid g.py --workdir {here} --backend slurm --minutes 0": OF_1},
    "lmms_eval.run": {"--model {here}": "no spec.json", "--model {here} --examples 0": OF_1},
    "loading.benchmark": {"--repeats 0": OF_1, "--llm qwen": "unknown llm", "--folder {here}/none": "none"},
    "paper_grid.cost": {"--topology v5e": "expected a name such as v5e:4x4", "--topology v5e:0x4": "such as v5e:4x4"},
    "pod_fit.sweep": dict.fromkeys(("--part x", "--part 5/2", "--part -1/2", "--part 0/0"), "--part.*expected"),
    "published_law.benchmark": {"--repeats x": OF_1, "--repeats 0": OF_1},
    "published_law.commands": {"--repeats 0": OF_1},
    "published_law.refit": {"--seed x": "from 0 to 4294967295"},
    "report": {"--workdir {here}": "rows.jsonl"},
    "serving_load.load": {"--clients 0": OF_1, "--image-share 2": "from 0 to 1, got '2'"},
    "smollm2.report": {"--workdir {here}": "no spec.json"},
    "training_speed.beside_big_vision": {"--words 0": OF_1, "--threads 9999": "--threads: expected 1 to"},
    "training_speed.cells": {"--steps 0": OF_1},
    "training_speed.loss": {"--positions 2": "at least 4", "--positions 6": "a multiple of 4", "--shares 2": "to 1"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "flags", "told"), [(name, flags, told) for name, cases in CASES.items() for flags, told in cases.items()]
)
def test_bad_input_is_one_line_and_exit_code_2(
    module: str, flags: str, told: str, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"experiments.{module}").main
    monkeypatch.setattr(sys, "argv", [module, *flags.format(here=tmp_path).split()])
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line.startswith("error: ")
    assert re.search(told, line), line
    assert list(tmp_path.iterdir()) == []
