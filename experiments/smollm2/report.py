"""Accuracy of a tuned SmolLM2 on easy-VQA: `python -m experiments.smollm2.report --workdir workdirs/smollm2`.

Renews table.json, metrics.jsonl and the tables of README.md.
"""

import json
from pathlib import Path

from experiments.easy_vqa import scores
from experiments.readme import write_block
from experiments.report import markdown_table
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core.files import write_json

HERE = Path(__file__).parent
COMMAND = "experiments.smollm2.report"


def curve(lines: list[dict[str, float]], stages: list[tuple[str, int, int]]) -> str:
    """Loss and accuracy at the begin, the middle and the end of each stage."""
    shown = [["stage", "step", "loss, nats a token", "accuracy of tokens"]]
    for name, first, last in stages:
        mine = [line for line in lines if first < line["step"] <= last]
        for line in (mine[0], mine[len(mine) // 2], mine[-1]):
            shown.append([name, str(line["step"]), f"{line['loss']:.2f}", f"{line['accuracy']:.2f}"])
    return markdown_table(shown)


def main(argv: list[str]) -> None:
    from vlm_jax import job, logbook
    from vlm_jax.checkpoints.orbax import read_spec
    from vlm_jax.config.resolve import spec_from_dict

    parser = ArgumentParser(prog=f"python -m {COMMAND}", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("workdirs/smollm2"))
    args = parser.parse_args(argv)
    spec = spec_from_dict(read_spec(args.workdir))
    summary = logbook.read_summary(args.workdir / "summary.json")
    asked, accuracy = scores.trained(args.workdir)
    found = {**scores.baselines(asked), f"SmolLM2-135M, V = {spec.model.compressor.tokens}": accuracy}
    metrics = (args.workdir / "metrics.jsonl").read_text()
    stages = [(stage.name, first, last) for stage, first, last in job.stages(spec)]
    (HERE / "metrics.jsonl").write_text(metrics)
    write_json(HERE / "table.json", {"secs": summary["secs"], "train_flops": summary["train_flops"], "accuracy": found})
    steps = " and ".join(f"{last - first} steps of {name}" for name, first, last in stages)
    rows = f"{spec.data.batch_rows} rows of {spec.data.row_tokens} positions a step"
    text = (
        f"{steps}, {rows}: {summary['train_flops']:.1e} FLOPs, {summary['secs'] / 60:.0f} minutes on a busy CPU. "
        f"Accuracy in per cent on {len(asked):,} test questions, ± one standard error clustered by image:\n\n"
        f"{scores.table(found)}\n\n{curve([json.loads(line) for line in metrics.splitlines()], stages)}"
    )
    write_block(HERE / "README.md", "table", text, COMMAND)
    print(text)


if __name__ == "__main__":
    run_main(main)
