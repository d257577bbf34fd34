"""pod.sh with a fake gcloud that records its calls and simulates preemption."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launching.conftest import ROOT

# What is there stands in the file `state`; the first run finds it in `fate`, if there is that.
GCLOUD = """
case "$*" in
*"queued-resources describe"*) cat {home}/state 2>/dev/null || {{ echo "NOT_FOUND: no $4" >&2; exit 1; }} ;;
*"queued-resources create"*) cat {home}/made 2>/dev/null >{home}/state || echo ACTIVE >{home}/state ;;
*"queued-resources delete"*) rm {home}/state ;;
*ssh*experiments.launch*) [ ! -e {home}/fate ] || {{ mv {home}/fate {home}/state; exit 1; }} ;;
esac
"""
STEPS = {
    "describe": "state", "queued-resources create": "create", "queued-resources delete": "delete", "scp": "send",
    "host_setup": "prepare", "experiments.launch": "run", "storage rsync": "fetch",
}  # fmt: skip


class Pod:
    """`pod("up")` runs the script; `steps()` are gcloud's calls in short, without the questions for the state."""

    def __init__(self, home: Path, calls: Path):
        self.home, self.calls = home, calls
        (home / ".venv").mkdir()
        for name in ("configs", "experiments"):
            (home / name).symlink_to(ROOT / name)

    def __call__(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        given = dict(POD="study", ZONE="us-east5-b", TYPE="v6e-16", BUCKET="gs://b/one", GRID="configs/grids/demo.py")
        environment = {**os.environ, **given, "POLL_SECS": "0", "WORKDIR": str(self.home / "work"), **settings}
        return subprocess.run(
            ["bash", "experiments/pod.sh", *words], cwd=self.home, env=environment, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip

    def steps(self) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        named = [next(short for text, short in STEPS.items() if text in line) for line in lines]
        return [step for step in named if step != "state"]


@pytest.fixture
def pod(tmp_path: Path, program: Callable[..., Path]) -> Pod:
    home = tmp_path / "home"
    home.mkdir()
    program("tar", 'touch "$4"')
    return Pod(home, program("gcloud", GCLOUD.format(home=home)))


def test_the_scripts_parse() -> None:
    for script in ("pod.sh", "launching/host_setup.sh"):
        subprocess.run(["bash", "-n", ROOT / "experiments" / script], check=True)


def test_up_makes_runs_fetches_and_deletes(pod: Pod) -> None:
    done = pod("up")
    assert done.returncode == 0, done.stderr
    assert pod.steps() == ["create", "send", "prepare", "run", "fetch", "delete"]
    calls = pod.calls.read_text()
    assert "create study --node-id study --accelerator-type v6e-16 --runtime-version v2-alpha-tpuv6e --spot" in calls
    assert "--grid configs/grids/demo.py --workdir bucket/one --index all --processes auto" in calls
    assert all("--zone us-east5-b" in line for line in calls.splitlines() if "storage" not in line)
    assert not (pod.home / "state").exists()


@pytest.mark.parametrize("fate", ["SUSPENDED", "SUSPENDING", "FAILED"])
def test_a_slice_that_is_taken_away_is_made_anew_and_the_grid_goes_on(pod: Pod, fate: str) -> None:
    (pod.home / "fate").write_text(fate)
    done = pod("up")
    assert done.returncode == 0, done.stderr
    again = ["create", "send", "prepare", "run"]
    assert pod.steps() == [*again, "delete", *again, "fetch", "delete"]
    assert "taken away" in done.stderr


def test_a_grid_that_fails_is_tried_three_times_and_the_slice_given_back(
    pod: Pod, program: Callable[..., Path]
) -> None:
    text = GCLOUD.format(home=pod.home).replace("*ssh*", "*ssh*experiments.launch*) exit 1 ;;\n*ssh*")
    program("gcloud", text)
    done = pod("up")
    assert done.returncode == 1
    assert pod.steps().count("run") == 3
    assert pod.steps()[-2:] == ["fetch", "delete"]
    assert pod.steps().count("create") == 1


def test_a_slice_that_is_gone_but_still_called_active_is_waited_for(pod: Pod, program: Callable[..., Path]) -> None:
    """Five failures under ACTIVE, then gcloud knows: nothing is given up, and the slice is made anew."""
    late = (
        f"*scp*) [ -e {pod.home}/again ] && exit; echo >>{pod.home}/failed; "
        f"[ $(wc -l <{pod.home}/failed) -lt 6 ] || {{ touch {pod.home}/again; echo SUSPENDED >{pod.home}/state; }}; "
        "echo preempted >&2; exit 1 ;;\n"
    )
    program("gcloud", GCLOUD.format(home=pod.home).replace("*ssh*", f"{late}*ssh*", 1))
    done = pod("up", PATIENCE_SECS="3600")
    assert done.returncode == 0, done.stderr
    assert pod.steps() == ["create", *["send"] * 6, "delete", "create", "send", "prepare", "run", "fetch", "delete"]


def test_failures_before_a_slice_is_taken_away_do_not_count_after_it(pod: Pod, program: Callable[..., Path]) -> None:
    """Two failures, taken away, two failures: never three in a row, so the grid ends well."""
    said = ["FAIL", "FAIL", "SUSPENDED", "FAIL", "FAIL"]
    (pod.home / "fates").write_text("\n".join(said) + "\n")
    fates = (
        f"*ssh*experiments.launch*) fate=$(head -n 1 {pod.home}/fates); sed -i 1d {pod.home}/fates; "
        f"case $fate in '') exit ;; FAIL) exit 1 ;; *) echo $fate >{pod.home}/state; exit 1 ;; esac ;;\n"
    )
    program("gcloud", GCLOUD.format(home=pod.home).replace("*ssh*", f"{fates}*ssh*", 1))
    done = pod("up")
    assert done.returncode == 0, done.stderr
    assert pod.steps().count("run") == 6
    assert pod.steps().count("create") == 2


def test_creating_a_slice_is_retried_a_limited_number_of_times(pod: Pod) -> None:
    (pod.home / "made").write_text("FAILED")
    done = pod("create", CAPACITY="on-demand")
    assert done.returncode == 2
    assert "could not be made" in done.stderr
    assert pod.steps() == ["create", "delete"] * 3
    assert "--spot" not in pod.calls.read_text()


def test_of_several_slices_each_has_its_share(pod: Pod) -> None:
    done = pod("up", SHARE="1/4")
    assert done.returncode == 0, done.stderr
    assert "--index 1/4 --processes auto" in pod.calls.read_text()


def test_a_grid_that_the_slice_cannot_run_is_refused_before_it_is_made(pod: Pod) -> None:
    python = pod.home / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/bash\necho error: $* >&2\nexit 2\n")
    python.chmod(0o755)
    done = pod("up")
    assert done.returncode == 2
    assert "--dry-run --accelerator v6e-16" in done.stderr
    assert pod.steps() == []


def test_each_step_alone(pod: Pod) -> None:
    for step, wanted in {
        "create": ["create"], "install": ["send", "prepare"], "run": ["run"], "fetch": ["fetch"], "delete": ["delete"],
    }.items():  # fmt: skip
        before = len(pod.steps())
        assert pod(step).returncode == 0
        assert pod.steps()[before:] == wanted


@pytest.mark.parametrize(
    ("setting", "value"),
    [("POD", ""), ("TYPE", "v6e"), ("BUCKET", "gs://b"), ("GRID", "nothing.py"), ("CAPACITY", "cheap"),
     ("SHARE", "4"),
     ("GRID", str(ROOT / "configs" / "grids" / "demo.py"))],
)  # fmt: skip
def test_a_wrong_setting_is_one_line_and_calls_no_gcloud(pod: Pod, setting: str, value: str) -> None:
    done = pod("up", **{setting: value})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert setting in done.stderr
    assert not pod.calls.exists()


def test_unknown_subcommands_and_a_failing_gcloud(pod: Pod, program: Callable[..., Path]) -> None:
    assert pod("--help").returncode == 0
    assert pod("begin").returncode == 2
    program("gcloud", "echo you are not logged in >&2; exit 1")
    done = pod("up")
    assert done.returncode == 2
    assert "not logged in" in done.stderr
