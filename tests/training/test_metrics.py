"""Metrics are written by a thread of their own, completely, and its errors are not lost."""

import json
import math
import os
import struct
import threading
from pathlib import Path

import pytest
from tensorboardX import RecordWriter
from tensorboardX.proto import event_pb2

from vlm_jax.core.errors import UserError
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


def events(workdir: Path) -> list[event_pb2.Event]:
    """TFRecords: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    (path,) = (workdir / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    """A resumed run starts a session at its first step, so that TensorBoard drops what an earlier one logged later."""
    writer = MetricWriter(tmp_path, 3)
    for step in (4, 5):
        writer.write(step, lambda step=step: {"loss": step / 2, "token_error": 0.25})
    writer.close()
    version, start, *scalars = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (4, event_pb2.SessionLog.START)
    values = [(event.step, event.summary.value[0].tag, event.summary.value[0].simple_value) for event in scalars]
    assert values == [(4, "loss", 2.0), (4, "token_error", 0.25), (5, "loss", 2.5), (5, "token_error", 0.25)]


@pytest.mark.parametrize("full", ["_lines", "_board"])
def test_a_full_disk_is_the_error_of_the_next_call(tmp_path: Path, full: str) -> None:
    """No thread of its own dies of it, and `close` closes the other file and returns."""
    writer = MetricWriter(tmp_path)
    writer._lines.close()
    writer._board.close()
    if full == "_lines":
        writer._lines = open("/dev/full", "a")  # noqa: SIM115 - closed by close()
        writer._board = RecordWriter(str(tmp_path / "events"))
    else:
        writer._lines = open(tmp_path / "lines", "a")  # noqa: SIM115 - closed by close()
        writer._board = RecordWriter("/dev/full")
        writer._flushed = -math.inf
    writer.write(1, lambda: {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert writer._lines.closed


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_folder_or_file_in_the_place_of_the_other_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "metrics.jsonl").mkdir() if name == "metrics.jsonl" else (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"{name}: metrics cannot be written here \(.*\): move it"):
        MetricWriter(tmp_path, 2)


def test_damaged_lines_are_dropped(tmp_path: Path) -> None:
    good = '{"step": 1, "loss": 1.5, "grad_norm": null, "skipped": 2}'
    lines = [
        good, '{"step": "2", "loss": 1.0}', '{"step": 2, "loss": "x"}', "[" * 100_000, "3", "\0", '{"loss": 1}',
        '{"step": true, "loss": 1}', '{"step": 2, "loss": NaN}', '{"step": 2, "loss": ' + "9" * 5000 + "}",
        '{"step": 2, "loss": 1' + "0" * 400 + "}", '{"step": 2, "a": {}}',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    writer = MetricWriter(tmp_path, 2)
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == good + "\n"
    assert (writer.last["loss"], writer.last["skipped"]) == (1.5, 2.0)


@pytest.mark.parametrize("step", [None, 2])
def test_a_pipe_in_the_place_of_the_file_is_refused(tmp_path: Path, step: int | None) -> None:
    """It would block until somebody reads."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl: expected a file or folder, got a named pipe"):
        MetricWriter(tmp_path, step)


def test_lists_are_no_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5, "examples": ["a"]}\n')
    writer = MetricWriter(tmp_path, 2)
    writer.close()
    assert writer.last == {"loss": 1.5}
