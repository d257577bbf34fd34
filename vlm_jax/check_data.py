"""Read all data of a run once, before it is trained: `python -m vlm_jax.check_data --config
configs/llava.py:data=train.json,images=DIR,tokenizer=FOLDER --json report.json`.

Every item is tokenized and every image decoded. Prints what is kept, skipped (with the reason and the first ids), cut
and dropped, lengths, image formats, and how full the rows are. Exits with code 2 beyond `data.max_bad_share`.
"""

from pathlib import Path

from vlm_jax.cli import EXIT_CODES, make_parser, run_main


def main(argv: list[str]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vlm_jax import build
    from vlm_jax.config.arguments import load_config, split_overrides
    from vlm_jax.config.resolve import resolve
    from vlm_jax.core.errors import UserError
    from vlm_jax.core.files import write_json
    from vlm_jax.core.text import printable
    from vlm_jax.data import checking

    parser = make_parser("check_data", __doc__, EXIT_CODES)
    parser.add_argument("--config", required=True, help="FILE.py:name=value,...; fields: --config.data.row_tokens=2048")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report, with all skipped ids")
    argv, overrides = split_overrides(argv)
    args = parser.parse_args(argv)
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: expected a file in a folder that exists")
    spec = resolve(load_config(args.config, overrides))
    cache = build.default_cache()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    reports, console = [], Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, data, sources in build.data_sets(spec):
            layout = build.spec_layout(spec, data)
            with build.cache_errors(cache):
                mixture = build.open_mixture(data, sources, cache, blind=not layout.visual_tokens)
            bar = progress.add_task(f"images of {name}", total=None)
            on_image = lambda done, total, bar=bar: progress.update(bar, completed=done, total=total)  # noqa: E731
            reports.append(checking.check(name, mixture, data, layout, spec.seed, on_image))
    if args.json:
        write_json(args.json, checking.as_json(reports))
    for report in reports:
        print(printable(checking.text(report)))  # ids and names of other people
    if bad := [report for report in reports if report.bad_share > spec.data.max_bad_share]:
        raise UserError(
            f"{bad[0].name}: expected at most data.max_bad_share={spec.data.max_bad_share:g} of unusable items, got "
            f"{bad[0].bad_share:.3g} ({bad[0].skipped_count} of {bad[0].items}): mend them or raise the share"
        )


if __name__ == "__main__":
    run_main(main)
