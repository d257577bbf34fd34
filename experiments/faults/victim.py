"""The run that is disturbed, started as a user starts it, and what is compared of it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Logged often and saved often, so that a moment drawn at random finds it at anything.
CONFIG = "configs/vlm.py:smoke,llm=d24,data=rows4_tiny,compressor=pool,steps=40"
OFTEN = ("--config.log_every_steps=3", "--config.save_every_steps=8", "--config.keep_checkpoints=3")
STEPS, EVERY = 40, 8
_SPEEDS = ("step_secs", "examples_per_sec", "model_flops_per_sec", "mfu")


def start(workdir: Path, cache: Path, *words: str, devices: int = 1) -> subprocess.Popen[bytes]:
    """One process; what it says goes to `log_of(workdir)`."""
    workdir = workdir.absolute()
    command = [sys.executable, "-m", "vlm_jax.train", "--config", CONFIG, *OFTEN, *words, "--workdir", str(workdir)]
    environment = {
        **os.environ,
        "VLM_JAX_CACHE": str(cache.absolute()),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the same program each time is what counts, not a fast one
    }
    log_of(workdir).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(workdir), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)


def start_all(workdir: Path, cache: Path, processes: int, devices: int, *words: str) -> list[subprocess.Popen[bytes]]:
    """Several processes of one run, on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    joined = lambda i: (f"--processes={processes}", f"--process={i}", f"--coordinator=localhost:{port}")  # noqa: E731
    return [
        start(workdir, cache, *words, *(joined(i) if processes > 1 else ()), devices=devices) for i in range(processes)
    ]


def log_of(workdir: Path) -> Path:
    """Not beside the workdir, whose disk may be full."""
    return workdir.parents[1] / "logs" / f"{workdir.parent.name}-{workdir.name}.log"


def finish(workdir: Path, cache: Path, *words: str, devices: int = 1) -> int:
    """Starts the run, or starts it again, and waits for its end. Returns the exit code."""
    return start(workdir, cache, *words, devices=devices).wait(timeout=600)


def last_line(workdir: Path) -> str:
    """The last thing that a run said."""
    return log_of(workdir).read_text(errors="replace").strip().splitlines()[-1].strip()


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the speeds, which no two runs share."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in _SPEEDS} for line in lines if line.endswith("}")]


def steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are complete."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def same_end(workdir: Path, undisturbed: Path) -> bool:
    """Parameters and every logged number are those of the undisturbed run, bit for bit."""
    prints = [
        json.loads((path / "summary.json").read_text())["params_sha256"] if (path / "summary.json").exists() else path
        for path in (workdir, undisturbed)
    ]
    return prints[0] == prints[1] and logged(workdir) == logged(undisturbed)


def until(what: Any, secs: float = 300) -> None:
    """Waits until `what()` holds. Raises `TimeoutError` if it never does."""
    end = time.monotonic() + secs
    while not what():
        if time.monotonic() > end:
            raise TimeoutError("the run did not come to where it was to be disturbed")
        time.sleep(0.02)


def short(text: str) -> str:
    """On one line."""
    return " ".join(text.split())
