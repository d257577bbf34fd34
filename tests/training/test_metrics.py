"""Metrics are written by a thread of their own, completely, and its errors are not lost."""

import json
import math
import threading
from pathlib import Path

import pytest

from vlm_jax.training.metrics import MetricWriter


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_there_after_close(tmp_path) -> None:
    """In the order of the calls; a second writer goes on where the first stopped."""
    for start in (0, 50):
        writer = MetricWriter(tmp_path)
        for step in range(start, start + 50):
            writer.write(step, lambda step=step: {"loss": step / 2})
        writer.close()
        assert writer.last == {"loss": (start + 49) / 2}
    assert lines(tmp_path) == [{"step": step, "loss": step / 2} for step in range(100)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_caller_does_not_wait(tmp_path) -> None:
    """`write` returns while the numbers are not there yet, and they are made on another thread."""
    writer, there, threads = MetricWriter(tmp_path), threading.Event(), []

    def make() -> dict[str, float]:
        assert there.wait(timeout=60)
        threads.append(threading.current_thread())
        return {"loss": 1.0}

    for step in range(3):
        writer.write(step, make)
    assert lines(tmp_path) == []
    there.set()
    writer.close()
    assert len(lines(tmp_path)) == 3
    assert threading.main_thread() not in threads


def broken() -> dict[str, float]:
    raise RuntimeError("the device is gone")


def test_an_error_surfaces_at_close(tmp_path) -> None:
    """The lines of the others are written nevertheless, and the file is closed."""
    writer = MetricWriter(tmp_path)
    writer.write(1, lambda: {"loss": 1.0})
    writer.write(2, broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        writer.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    assert writer._lines.closed


def test_an_error_surfaces_at_the_next_write(tmp_path) -> None:
    """Once the thread has met it: a run does not go on for hours without its metrics."""
    writer, met = MetricWriter(tmp_path), threading.Event()
    writer.write(1, broken)
    writer._outstanding[0].add_done_callback(lambda future: met.set())
    assert met.wait(timeout=60)
    with pytest.raises(RuntimeError, match="the device is gone"):
        writer.write(2, lambda: {"loss": 1.0})
    with pytest.raises(RuntimeError, match="the device is gone"):
        writer.close()


def test_what_is_no_number_becomes_null(tmp_path) -> None:
    """JSON has no NaN and no infinity."""
    writer = MetricWriter(tmp_path)
    writer.write(1, lambda: {"loss": math.nan, "grad_norm": math.inf, "token_error": 0.5})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": None, "token_error": 0.5,
    }  # fmt: skip
    assert math.isnan(writer.last["loss"])


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    """Steps 1 to 4 were logged and a fifth was cut off; the checkpoint was of step 2."""
    writer = MetricWriter(tmp_path)
    for step in range(1, 5):
        writer.write(step, lambda: {"loss": 1.0})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    writer = MetricWriter(tmp_path, 2)
    assert writer.last == {"loss": 1.0}
    for step in range(3, 6):
        writer.write(step, lambda: {"loss": 2.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
