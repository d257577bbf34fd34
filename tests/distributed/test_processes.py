"""Two processes with four devices each are one run: the losses of one process with eight, and one set of files."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from filelock import FileLock

from tests.training.test_resume import tiny_spec
from vlm_jax import build, job
from vlm_jax.checkpoints import big_vision
from vlm_jax.cli import ArgumentParser, run_main
from vlm_jax.core import tree
from vlm_jax.core.errors import LOST, STOPPED, UserError
from vlm_jax.core.specs import RunSpec
from vlm_jax.distributed import processes
from vlm_jax.distributed.ownership import own_workdir

pytestmark = pytest.mark.xdist_group("processes")  # of one training
ROOT = Path(__file__).parents[2]
# The same rows in the same order, but sums over devices are added in another order: some roundings of float32 (6e-8)
# in each of four steps.
ROUNDING = 5e-6


def spec(cache: Path) -> RunSpec:
    """One stage of four steps, with parameters split over all devices."""
    whole = tiny_spec()
    compute = dataclasses.replace(whole.compute, strategy="fsdp", mesh=(1, -1, 1))
    return dataclasses.replace(
        whole,
        stages=whole.stages[1:],
        compute=compute,
        log_every_steps=1,
        save_every_steps=2,
        encoder_checkpoint=str(cache / "encoder.npz"),
    )


def main(argv: list[str]) -> None:
    """What each of the two processes does."""
    parser = ArgumentParser()
    processes.add_flags(parser)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--lost", type=int)
    parser.add_argument("--own", action="store_true")
    args = parser.parse_args(argv)
    with processes.init_distributed(args):
        if args.lost is not None:
            return lose(args.lost)
        if args.own:
            with own_workdir(args.folder):
                return
        run = build.open_run(spec(args.folder), args.folder)
        params = job.train(run, args.folder / "two", lambda log, values: None)
        again = job.restore(run.network, args.folder / "two")
        assert tree.sha256(params, processes.fetch) == tree.sha256(again, processes.fetch)
        resume(run, args.folder)
        row = job.evaluate(run, params, "cell", args.folder / "two")
        if processes.is_primary():
            (args.folder / "row.json").write_text(json.dumps(dataclasses.asdict(row)))


def resume(run: build.Run, folder: Path) -> None:
    """Both go on from the checkpoint of step 2: bit for bit as before."""
    if processes.is_primary():
        shutil.copytree(folder / "two", folder / "again", ignore=shutil.ignore_patterns("summary.json", "4"))
    processes.barrier("copied")
    job.train(run, folder / "again", lambda log, values: None)


def lose(lost: int) -> None:
    """That process is killed: 1 while the other waits for it in a collective, 0 while the other is busy on its own."""
    processes.barrier("both are there")
    if jax.process_index() == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    if lost == 0:
        threading.Event().wait()
    processes.broadcast_from_primary(1)


def start_both(*argv: str, devices: int = 4) -> list[subprocess.Popen[str]]:
    """Two processes of this file, connected to each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.distributed.test_processes", *argv, "--processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--process", str(i), "--coordinator", f"localhost:{port}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def end_both(both: list[subprocess.Popen[str]], timeout_secs: float) -> tuple[list[int], list[str]]:
    """Their exit codes, and what they printed."""
    try:
        output = [process.communicate(timeout=timeout_secs)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], output


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[build.Run, Path]:
    """The run in this process, trained, and the folder of both."""
    from tests import builders
    from vlm_jax.models.vlm import Vlm

    folder = tmp_path_factory.mktemp("processes")
    wanted = spec(folder)
    encoder = builders.params(Vlm(wanted.model, wanted.compute))["encoder"]
    big_vision.save_encoder(folder / "encoder.npz", encoder, wanted.model.encoder)
    run = build.open_run(wanted, folder)
    job.train(run, folder / "one", lambda log, values: None)
    return run, folder


@pytest.fixture(scope="module")
def two(one: tuple[build.Run, Path]) -> Path:
    """The folder, when two processes have trained too."""
    codes, output = end_both(start_both("--folder", str(one[1])), 400)
    assert codes == [0, 0], "\n".join(output)
    return one[1]


def logged(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def test_losses_are_those_of_one_process(two: Path) -> None:
    """And only one of the two wrote: each step has one line, and one file for TensorBoard."""
    assert [line["step"] for line in logged(two / "two")] == [1, 2, 3, 4]
    for mine, theirs in zip(logged(two / "two"), logged(two / "one"), strict=True):
        for name in ("loss", "grad_norm", "token_error", "learning_rate"):
            assert mine[name] == pytest.approx(theirs[name], rel=ROUNDING), name
    assert len(list((two / "two" / "tensorboard").iterdir())) == 1


def test_two_processes_resume_bit_for_bit(two: Path) -> None:
    assert summary(two / "again")["params_sha256"] == summary(two / "two")["params_sha256"]
    losses = [[line["loss"] for line in logged(two / name)] for name in ("again", "two")]
    assert losses[0] == losses[1]


def test_what_two_saved_one_restores(one: tuple[build.Run, Path], two: Path, tmp_path: Path) -> None:
    """Bit for bit on the devices of one process, in the hands of which the run goes on."""
    params = job.restore(one[0].network, two / "two")
    assert tree.sha256(jax.device_get(params)) == summary(two / "two")["params_sha256"]
    workdir = tmp_path / "on"
    shutil.copytree(two / "two", workdir, ignore=shutil.ignore_patterns("summary.json", "4"))
    job.train(one[0], workdir, lambda log, values: None)
    losses = [[line["loss"] for line in logged(folder)] for folder in (workdir, two / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)


def test_every_question_is_asked_once(one: tuple[build.Run, Path], two: Path) -> None:
    """The row that two processes make is the row of one, up to rounding of the parameters."""
    mine = json.loads((two / "row.json").read_text())
    theirs = dataclasses.asdict(job.evaluate(one[0], job.restore(one[0].network, two / "two"), "cell", two / "two"))
    for name in ("images", "questions", "question_tokens", "answer_tokens", "train_secs", "params_sha256", "spec_hash"):
        assert mine[name] == theirs[name], name
    for name in ("error", "stderr", "forced_error", "forced_nll"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "reason"),
    [(1, "process 0 lost another process ("), (0, "process 1 was aborted, as when another one is lost")],
)
def test_where_one_process_is_lost_the_other_exits_and_says_how_to_resume(lost: int, reason: str) -> None:
    codes, output = end_both(start_both("--lost", str(lost), devices=1), 100)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == LOST, output[1 - lost]
    assert f"error: {reason}" in output[1 - lost]
    assert "start all processes again, they resume from the newest checkpoint" in output[1 - lost]


@pytest.mark.slow
def test_where_another_run_owns_the_workdir_all_processes_end_at_once(tmp_path: Path) -> None:
    with FileLock(tmp_path / "run.lock"):
        codes, output = end_both(start_both("--own", "--folder", str(tmp_path), devices=1), 60)
    assert codes == [2, 2], output
    assert "trains here: wait for it, end it, or choose another --workdir" in output[0]
    assert "process 0 cannot lock it, its message says why" in output[1]
    assert all("Traceback" not in text for text in output)


SIGTERM = """
import os, signal, threading
from vlm_jax.distributed import processes

stop = processes.watch_sigterm()
assert not stop(1)
os.kill(os.getpid(), signal.SIGTERM)
{then}
"""


@pytest.mark.parametrize(
    ("then", "code", "output"),
    [
        ("while not stop(2): pass", 0, ""),
        ("processes._GRACE_SECS = 0.1; threading.Event().wait()", STOPPED, "without saving: no step ended in time"),
    ],
    ids=["between_steps", "while_it_compiles"],
)
def test_sigterm_stops_after_a_step(then: str, code: int, output: str) -> None:
    argv = [sys.executable, "-c", SIGTERM.format(then=then)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, output in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--processes", "two"], "expected a number or auto, got 'two'"),
        (["--processes", "2"], "--process 0 to 1 and --coordinator HOST:PORT"),
        (["--processes", "2", "--process", "2", "--coordinator", "a:1"], "--process 0 to 1"),
        (["--processes", "2", "--process", "0", "--coordinator", "localhost:abc"], "--coordinator HOST:PORT"),
        (["--processes", "2", "--process", "0", "--coordinator", "localhost:65536"], "--coordinator HOST:PORT"),
        (["--processes", "2", "--process", "0", "--coordinator", ":99"], "--coordinator HOST:PORT"),
        (["--process", "0"], "need --processes N"),
    ],
)
def test_inconsistent_flags_are_an_error(argv: list[str], message: str) -> None:
    parser = ArgumentParser()
    processes.add_flags(parser)
    with pytest.raises(UserError, match=message), processes.init_distributed(parser.parse_args(argv)):
        pass


if __name__ == "__main__":
    run_main(main)
