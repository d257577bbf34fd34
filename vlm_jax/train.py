"""Train one run: `python -m vlm_jax.train --config configs/vlm.py:llm=d48,tokens=4,family=ocr --workdir
workdirs/one`.
"""

from pathlib import Path
from typing import Any

from vlm_jax.cli import EXIT_CODES, make_parser, run_main


def main(argv: list[str]) -> None:
    from vlm_jax.config.arguments import load_config, split_overrides
    from vlm_jax.config.resolve import resolve
    from vlm_jax.distributed import processes
    from vlm_jax.distributed.ownership import own_workdir

    parser = make_parser("train", __doc__, EXIT_CODES)
    parser.add_argument("--config", required=True, help="FILE.py:name=value,...; fields: --config.optim.clip_norm=0.5")
    parser.add_argument("--workdir", required=True, type=Path, help="for checkpoints and metrics; resumes from it")
    processes.add_flags(parser)
    argv, overrides = split_overrides(argv)
    args = parser.parse_args(argv)
    spec = resolve(load_config(args.config, overrides))
    with processes.init_distributed(args), own_workdir(args.workdir):
        _train(spec, args.workdir)


def _train(spec: Any, workdir: Path) -> None:
    import contextlib

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from vlm_jax import build, job
    from vlm_jax.core.specs import total_steps
    from vlm_jax.distributed import processes

    cache = build.default_cache()
    build.use_compilation_cache(cache)
    run = build.open_run(spec, cache)
    text = TextColumn("step {task.completed}/{task.total}  {task.fields[note]}")
    columns = (BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, disable=not processes.is_primary())
    bar = progress.add_task("", total=total_steps(spec), note="compiling")
    with contextlib.ExitStack() as stack:

        def on_log(log: object, values: dict[str, float]) -> None:
            speed = f", {values['rows_per_sec']:.0f} rows/s" if "rows_per_sec" in values else ""
            mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
            note = f"loss {values['loss']:.3f}, token error {values['token_error']:.3f}{speed}{mfu}"
            progress.update(bar, completed=log.step, note=note)

        stop = processes.watch_sigterm()
        job.train(run, workdir, on_log, stop, on_start=lambda: stack.enter_context(progress))
    if processes.is_primary():
        print(f"{workdir / 'summary.json'}")


if __name__ == "__main__":
    run_main(main)
