"""Evaluate a trained run on its own test split, or any model on public benchmarks.

    python -m vlm_jax.evaluate --workdir workdirs/one
    python -m vlm_jax.evaluate --model llava-folder --suite quecc --data playground/data/eval --out results/llava
    python -m vlm_jax.evaluate --rescore --suite quecc --data playground/data/eval --out results/llava

The first form appends a result row to rows.jsonl, or one for each V of an elastic compressor. The second needs the
benchmarks' files in DATA, in any of LLaVA's, the publishers' or lmms-lab's layouts; it writes OUT/answers, scores.json
and rows.jsonl, goes on from the answers that it finds, and with --rescore scores them without a model.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from vlm_jax.cli import EXIT_CODES, make_parser, run_main
from vlm_jax.core.errors import UserError


def _parse(argv: list[str]) -> argparse.Namespace:
    from vlm_jax.evaluation.suites import SUITES, VALUES

    options = "; ".join(f"{name}={'|'.join(values)}" for name, values in VALUES.items())
    parser = make_parser("evaluate", __doc__, EXIT_CODES)
    run, suite = parser.add_argument_group("a run"), parser.add_argument_group("public benchmarks")
    run.add_argument("--workdir", type=Path, help="the workdir of vlm_jax.train")
    run.add_argument("--rows", type=Path, help="append the row here (default: WORKDIR/rows.jsonl)")
    if "--rescore" not in argv:  # which imports no JAX
        from vlm_jax.distributed import processes

        processes.add_flags(parser)
    add = suite.add_argument
    add("--model", type=Path, help="a Hugging Face folder, a big_vision .npz, or a run's workdir")
    add("--suite", help=f"{', '.join(SUITES)}")
    add("--benchmarks", default="", help="comma-separated, some of the suite or, without --suite, any")
    add("--data", type=Path, help="folder with a folder for each benchmark")
    add("--out", type=Path, help="where answers and scores are written")
    add("--limit", type=int, default=0, help="only the first N questions of each benchmark")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=f"options: {options}; new_tokens=N")
    add("--blind", action="store_true", help="also without images: the blind baseline")
    add("--rescore", action="store_true", help="score the answers in OUT; needs no model")
    add("--batch", type=int, default=16, help="questions a batch (default: 16)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    add("--vision", type=Path, help="folder of the vision tower, for a checkpoint of LLaVA's own code")
    add("--compressor", help="compressor of the visual tokens, instead of the model's")
    add("--tokens", type=int, help="number of visual tokens")
    add("--tokenizer", type=Path, help="tokenizer.json or *.model (default: next to the weights)")
    args = parser.parse_args(argv)
    if args.workdir is not None:
        if args.model or args.suite or args.benchmarks or args.rescore:
            raise UserError("--workdir evaluates a run on its own task: for benchmarks give it as --model instead")
        for name in ("tokens", "compressor", "vision", "limit", "set", "blind", "dtype", "tokenizer", "data", "out"):
            if getattr(args, name):
                raise UserError(
                    f"--{name} is for --model: --workdir evaluates a run as it was trained, at each of its V"
                )
        return args
    needed = ("data", "out") if args.rescore else ("model", "data", "out")
    if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise UserError(f"expected --workdir, or --model, --suite, --data and --out; missing {', '.join(missing)}")
    if str(getattr(args, "processes", 1)) != "1":
        raise UserError("--processes: benchmarks are evaluated by one process (split them with --benchmarks)")
    for name, least in (("limit", 0), ("batch", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: expected {least} or more, got {getattr(args, name)}")
    return args


def main(argv: list[str]) -> None:
    args = _parse(argv)
    if args.workdir is None:
        _evaluate_suite(args)
        return
    from vlm_jax.distributed import processes

    with processes.init_distributed(args):
        _evaluate(args.workdir, args.rows or args.workdir / "rows.jsonl")


def _evaluate(workdir: Path, rows: Path) -> None:
    from rich.progress import track

    from vlm_jax import build, job
    from vlm_jax.checkpoints.orbax import read_spec
    from vlm_jax.config.resolve import spec_from_dict
    from vlm_jax.core.specs import at_every_v, spec_hash, total_steps
    from vlm_jax.distributed import processes
    from vlm_jax.evaluation import results

    spec = spec_from_dict(read_spec(workdir))
    done = results.done(rows)
    missing = {spec_hash(at) for at in at_every_v(spec)} - done
    if processes.is_primary() and missing:  # fail before evaluating
        results.check_writable(rows)
    cache = build.default_cache()
    build.use_compilation_cache(cache)
    run = build.open_run(spec, cache)
    params = job.restore(run.network, workdir, least_step=total_steps(spec))
    for at in build.runs_at_every_v(run, cache):
        batches, tokens = range(job.evaluation_batches(at)), at.network.spec.model.compressor.tokens
        label = f"evaluating at {tokens} tokens" if spec.model.compressor.elastic else "evaluating"
        progress = iter(track(batches, description=label, transient=True, disable=not processes.is_primary()))
        row = job.evaluate(at, params, workdir.name, workdir, lambda rows, progress=progress: next(progress, None))
        if not processes.is_primary():
            continue
        if row.spec_hash not in done:
            results.append(rows, row)
        print(json.dumps(dataclasses.asdict(row), indent=1))


def _evaluate_suite(args: argparse.Namespace) -> None:
    from filelock import Timeout

    from vlm_jax.core.files import file_lock
    from vlm_jax.evaluation import suite_run, suites

    chosen = [name.strip() for name in args.benchmarks.split(",") if name.strip()]
    record = suite_run.read_record(args.out) if args.rescore else None
    stored = [f"{name}={value}" for name, value in record["options"].items()] if record else []
    suite = suites.find(args.suite, chosen, [*stored, *args.set])
    loaded = suite_run.load(suite, args.data, args.limit)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with file_lock(args.out / "lock", blocking=False):
            if not args.rescore:
                _answer_suite(args, suite, loaded)
            lines = suite_run.finish(suite, loaded, args.data, args.out, args.limit)
    except Timeout as error:
        raise UserError(
            f"{args.out}: another evaluation is writing here: wait for it, or choose another --out"
        ) from error
    except OSError as error:
        raise UserError(f"{args.out}: cannot write here ({error.strerror or error}): choose another --out") from error
    print("\n".join(lines))


def _answer_suite(args: argparse.Namespace, suite: Any, loaded: Any) -> None:
    """Generates the answers that are not in OUT yet."""
    import vlm_jax
    from vlm_jax.evaluation import benchmarks, suite_run
    from vlm_jax.inference import answering

    model = vlm_jax.load(
        args.model, dtype=args.dtype, vision=args.vision, compressor=args.compressor, tokens=args.tokens,
        tokenizer=args.tokenizer,
    )  # fmt: skip
    fields = answering.row_fields(model, args.model)
    suite_run.begin(args.out, suite, fields)
    for kind in suite_run.KINDS if args.blind else suite_run.KINDS[:1]:
        seen = kind == suite_run.KINDS[0]
        spec, costs = (fields if seen else fields["blind"])["model"], {}
        for name, one in loaded.items():
            file = suite_run.answer_file(args.out, kind, name)
            items = one.items if seen else [item._replace(images=()) for item in one.items]
            new_tokens = suite.options.new_tokens or benchmarks.find(name).new_tokens[suite.options.prompt]
            answering.answer(model, name, items, file, new_tokens, suite.options.system, args.batch)
            costs[name] = answering.costs(spec, file.matched(items).values())
        suite_run.add_costs(args.out, kind, costs)


if __name__ == "__main__":
    run_main(main)
