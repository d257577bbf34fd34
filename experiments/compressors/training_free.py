"""Training-free compressors on the models that were trained with all patches (compressor `none` of the grid).

    python -m experiments.compressors.training_free --workdir workdirs/compressors

Writes training_free.jsonl. A method that cannot give some V gives the nearest one that it can.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from experiments.compressors.grid import TOKENS
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.compress import catalog
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import RunSpec

HERE = Path(__file__).parent
METHODS = ("none", "pool", "m3", "vision_zip", "prumerge", "prumerge_plus", "divprune", "fastv", "pyramiddrop")


def nearest(name: str, tokens: int, grid: tuple[int, int]) -> int:
    """The V of a method that is nearest to this one, the larger of two."""
    return min(catalog.row(name).tokens_out(grid), key=lambda v: (abs(v - tokens), -v))


def variants(spec: RunSpec) -> Iterator[RunSpec]:
    """The spec with each method at each V; of `none` all patches."""
    grid = spec.model.encoder.token_grid
    for name in METHODS:
        for tokens in dict.fromkeys(nearest(name, v, grid) for v in sorted(TOKENS)):
            model = spec.model
            changed = catalog.model_spec(model.encoder, name, tokens, model.decoder, model.projector, model.mask)
            data = dataclasses.replace(
                spec.data, frozen_features=False, questions_per_example=1, row_tokens=2 * spec.data.row_tokens
            )
            yield dataclasses.replace(spec, model=changed, data=data)


def evaluated(workdir: Path) -> Iterator[ResultRow]:
    """The rows of a cell's model with each method."""
    from vlm_jax import build, job
    from vlm_jax.checkpoints.orbax import read_spec
    from vlm_jax.config.resolve import spec_from_dict

    cache = build.default_cache()
    build.use_compilation_cache(cache)
    trained = spec_from_dict(read_spec(workdir))
    params = job.restore(build.open_network(trained), workdir)
    for spec in variants(trained):
        run = build.open_run(spec, cache)
        yield job.evaluate(run, {**params, "encoder": run.network.encoder}, workdir.name, workdir)


def main(argv: list[str]) -> None:
    from vlm_jax.evaluation import results

    parser = ArgumentParser(
        prog="python -m experiments.compressors.training_free", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of experiments/compressors/grid.py")
    args = parser.parse_args(argv)
    lines, out = [], HERE / "training_free.jsonl"
    cells = [path.parent for path in sorted(args.workdir.glob("cells/compressor=none,*/summary.json"))]
    if not cells:
        raise UserError(f"--workdir {args.workdir}: expected trained cells of the compressor none, got none")
    for cell in cells:
        for row in evaluated(cell):
            print(f"{row.family}, {row.compressor}, V = {row.visual_tokens}: {row.error:.3f} ± {row.stderr:.3f}")
            lines.append(results.to_line(row, out))
            write_text(out, "".join(lines))


if __name__ == "__main__":
    run_main(main)
