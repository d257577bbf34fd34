"""One of the faults of `experiments.faults`, for real: a run is killed while it saves, and started again."""

from pathlib import Path

from experiments.faults import kills, victim


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """The same parameters, and the same numbers in every line of metrics."""
    cache, undisturbed, killed = tmp_path / "cache", tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    assert victim.finish(undisturbed, cache) == 0, victim.last_line(undisturbed)
    process = victim.start(killed, cache)
    victim.until(lambda: kills.doing(killed) == "saving" or process.poll() is not None)
    process.kill()
    process.wait()
    assert victim.finish(killed, cache) == 0, victim.last_line(killed)
    assert victim.same_end(killed, undisturbed)
