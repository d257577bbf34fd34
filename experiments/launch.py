"""Run a grid: every cell once, finished cells skipped, a failing cell reported and survived.

    python -m experiments.launch --grid configs/grids/size_by_tokens.py --workdir workdirs/study --dry-run
    python -m experiments.launch --grid configs/grids/size_by_tokens.py --workdir workdirs/study --workers 4
    python -m experiments.launch --grid configs/grids/size_by_tokens.py --workdir workdirs/study --status

Run it again to do what is missing; run it twice at once and the two share the cells. Rows go to WORKDIR/rows.jsonl.
On a cluster add --backend slurm --partition gpu --gpus 1; on TPU slices use experiments/pod.sh.
experiments/launching/README.md shows each.
"""

from vlm_jax.cli import run_main


def main(argv: list[str]) -> int:
    from experiments.launching import command

    return command.main(argv, __doc__)


if __name__ == "__main__":
    run_main(main)
