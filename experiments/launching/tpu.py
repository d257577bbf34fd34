"""Cells on TPU slices, as managed jobs of SkyPilot: spot machines, recreated when they are taken away.

A job is one slice; it works through its share of the cells, one cell at a time on all its hosts. The workdir of the
machines is in a bucket; `fetch` copies all but the checkpoints to the local workdir, where rows are gathered and the
status is read. `experiments/pod.sh` does the same for one slice with gcloud alone.
"""

import copy
import hashlib
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from experiments.launching.cells import Cell
from experiments.launching.follow import follow
from vlm_jax import partitioning
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.sizing import chips

ROOT = Path(__file__).parents[2]  # is sent to the machines
_MOUNT = "/bucket"
_LOOK_EVERY_SECS = 30.0
_INSTALL = "pip install 'vlm_jax[tpu-launch]', in an environment of its own: it is large"

# Name in Google's accelerator types -> chip, how many of the type's count make one chip, image.
_KINDS = {
    "v4": ("v4", 2, "tpu-ubuntu2204-base"),
    "v5litepod": ("v5e", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}


class Wishes(NamedTuple):
    """Where the cells run."""

    accelerator: str  # "v6e-16", as Google names it
    bucket: str  # gs://NAME/PATH
    zone: str | None  # None: where there is room
    spot: str  # "spot", or "on-demand"
    slices: int


def parts(accelerator: str) -> tuple[chips.Chip, int, str]:
    """`"v5p-16"` -> its chip, 8 of them, the image of its hosts. Raises `UserError` for another name."""
    kind, _, count = accelerator.removeprefix("tpu-").partition("-")
    if kind not in _KINDS:
        raise unknown("accelerator", accelerator, [f"{name}-16" for name in _KINDS])
    chip, cores, image = _KINDS[kind]
    if not count.isdecimal() or int(count) < cores:
        raise UserError(f"--accelerator {accelerator}: its size is missing, as in {kind}-16")
    return chips.chip(chip), int(count) // cores, image


def check_batches(left: list[Cell], accelerator: str) -> None:
    """Raises `UserError` for a cell that training would refuse on that slice, before the slice is paid for."""
    _, devices, _ = parts(accelerator)  # the two cores of a v4 or v5p are one device to a program that runs
    for cell in left:
        compute, data = cell.spec.compute, cell.spec.data
        try:
            plan = partitioning.outline(compute, "tpu", devices)
            partitioning.check_batch(plan, "data.batch_examples", data.batch_examples, compute.microbatches)
            partitioning.check_batch(plan, "evaluation.batch_examples", cell.spec.evaluation.batch_examples)
        except UserError as error:
            raise UserError(f"--accelerator {accelerator} ({devices} chips), cell {cell.name}: {error}") from error


def shares(left: list[Cell], slices: int) -> list[list[Cell]]:
    """The cells dealt out to the slices, the dearest first, each to the slice that has least to do."""
    dealt: list[list[Cell]] = [[] for _ in range(min(slices, len(left)))]
    for cell in sorted(left, key=lambda cell: -cell.flops):
        min(dealt, key=lambda share: sum(c.flops for c in share)).append(cell)
    return dealt


def task(share: list[Cell], number: int, grid: str, wishes: Wishes) -> dict[str, Any]:
    """The SkyPilot task of one slice, as its YAML says it. Raises `UserError` for a bucket or grid that cannot be."""
    name, _, folder = wishes.bucket.removeprefix("gs://").rstrip("/").partition("/")
    if not wishes.bucket.startswith("gs://") or not name or not folder:
        raise UserError(f"--bucket {wishes.bucket!r}: where the rows and checkpoints go, as in gs://NAME/study")
    path, colon, argument = grid.partition(":")
    if not Path(path).resolve().is_relative_to(ROOT):
        raise UserError(f"--grid {path}: has to lie in {ROOT}, which is what is sent to the machines")
    there = f"{Path(path).resolve().relative_to(ROOT)}{colon}{argument}"
    indices = ",".join(str(cell.index) for cell in share)
    words = ["--grid", there, "--workdir", f"{_MOUNT}/{folder}", "--index", indices, "--processes", "auto"]
    resources: dict[str, Any] = {
        "infra": f"gcp/*/{wishes.zone}" if wishes.zone else "gcp",
        "accelerators": f"tpu-{wishes.accelerator.removeprefix('tpu-')}",
        "accelerator_args": {"runtime_version": parts(wishes.accelerator)[2]},
        "use_spot": wishes.spot == "spot",
        "job_recovery": {"strategy": "EAGER_NEXT_REGION"},
    }
    return {
        "name": f"{prefix(wishes)}-{number}",
        "workdir": str(ROOT),
        "resources": resources,
        "file_mounts": {_MOUNT: {"source": f"gs://{name}", "mode": "MOUNT"}},
        # SkyPilot runs both on every host of a slice.
        "setup": "bash experiments/launching/host_setup.sh",
        "run": f".venv/bin/python -m experiments.launch {shlex.join(words)}",
    }


def prefix(wishes: Wishes) -> str:
    """What the jobs of a bucket's folder are called, so that a second launcher knows them."""
    return f"vlm-{hashlib.sha256(wishes.bucket.rstrip('/').encode()).hexdigest()[:8]}"


def show(tasks: list[dict[str, Any]], console: Console) -> None:
    """The tasks as YAML, and whether SkyPilot's own parser takes them."""
    for config in tasks:
        console.print(
            "---\n" + yaml.safe_dump(config, sort_keys=False, width=200), markup=False, highlight=False, soft_wrap=True
        )
    try:
        sky = load_sky()
    except UserError as error:
        console.print(f"not checked by SkyPilot: {error}", soft_wrap=True, markup=False, highlight=False)
        return
    parsed = [_parsed(sky, config) for config in tasks]
    console.print(f"SkyPilot {sky.__version__} takes {len(parsed)} tasks: {parsed[0].resources}", soft_wrap=True)


def tasks_of(left: list[Cell], grid: str, wishes: Wishes) -> list[dict[str, Any]]:
    """One task a slice. Raises `UserError` as `task` does, and for batches that a slice does not divide."""
    check_batches(left, wishes.accelerator)
    return [task(share, number, grid, wishes) for number, share in enumerate(shares(left, wishes.slices))]


def run(
    left: list[Cell], tasks: list[dict[str, Any]], workdir: Path, wishes: Wishes, sky: Any, console: Console
) -> None:
    """Starts the tasks as managed jobs and follows them. Ctrl-C leaves them.

    Raises `UserError` where jobs of this bucket's folder are under way, and without gcloud.
    """
    if live := _live(sky, wishes):
        raise UserError(f"{', '.join(live)} are at work on {wishes.bucket}: --status, or sky jobs cancel --name NAME")
    for config in tasks:
        try:
            sky.stream_and_get(sky.jobs.launch(_parsed(sky, config), name=config["name"]))
        except Exception as error:  # SkyPilot has a hundred kinds: no login, no bucket, no quota
            raise UserError(f"SkyPilot does not start {config['name']}: {error}; sky check gcp says more") from error
        console.print(f"started {config['name']}: sky jobs logs --name {config['name']}")
    console.print("Ctrl-C leaves them running; --status shows the grid\n")

    def going() -> bool:
        more = bool(_live(sky, wishes))
        fetch(wishes.bucket, workdir)
        return more

    follow(left, workdir, going, console, _LOOK_EVERY_SECS)


def fetch(bucket: str, workdir: Path) -> None:
    """Copies the cells' small files from the bucket. Raises `UserError` where gcloud is missing or says no."""
    if not shutil.which("gcloud"):
        raise UserError(f"{bucket}: reading a bucket needs gcloud (cloud.google.com/sdk)")
    (workdir / "cells").mkdir(parents=True, exist_ok=True)
    source = f"{bucket.rstrip('/')}/cells"
    skip = r".*/(checkpoints|tensorboard)/.*|.*\.tmp$|.*/lock$"
    words = ["gcloud", "storage", "rsync", "--recursive", f"--exclude={skip}", source, str(workdir / "cells")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    nothing_yet = "did not match" in done.stderr or "matched no" in done.stderr
    if done.returncode and not nothing_yet:
        raise UserError(f"{source}: {(done.stderr.strip().splitlines() or ['gcloud failed'])[-1]}")


def load_sky() -> Any:
    """The package `sky`. Raises `UserError` where it is not installed."""
    try:
        import sky
    except ImportError:
        raise UserError(f"--backend tpu goes through SkyPilot: {_INSTALL}; or use experiments/pod.sh") from None
    return sky


def _parsed(sky: Any, config: dict[str, Any]) -> Any:
    """The task as SkyPilot's own parser reads it, which takes what it is given apart."""
    return sky.Task.from_yaml_config(copy.deepcopy(config))


def _live(sky: Any, wishes: Wishes) -> list[str]:
    """The jobs of this bucket's folder that have not ended."""
    try:
        answer = sky.get(sky.jobs.queue_v2(refresh=False, skip_finished=True))
    except sky.exceptions.ClusterNotUpError:  # no job was ever started
        return []
    jobs = answer[0] if isinstance(answer, tuple) else answer
    names = [job["job_name"] if isinstance(job, dict) else job.job_name for job in jobs]
    return sorted(name for name in names if name.startswith(prefix(wishes)))
