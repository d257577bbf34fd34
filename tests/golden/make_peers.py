"""Makes the golden files with the libraries that they speak for, in an environment of its own, from any Python 3.11+.

    python tests/golden/make_peers.py                        # installs (3 GB on disk), makes all, runs the comparisons
    python tests/golden/make_peers.py --only big_vision --venv /tmp/peers

Nothing here is needed to use or to test the project: the golden files are in the repository, and git tells what is new
in them. The comparisons are `pytest -m parity`. Exit code 2 means that something could not be installed.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
TORCH_OF_CPU = "https://download.pytorch.org/whl/cpu"
BIG_VISION = "https://github.com/google-research/big_vision"
COMMIT = "0127fb6b337ee2a27bf4e54dea79cff176527356"
# Named by the environment variables that `peers_conversations.source` reads.
REPOSITORIES = {
    "LLAVA": ("https://github.com/haotian-liu/LLaVA", "c121f0432da27facab705978f83c4ada465e46fd"),
    "LLAVA_NEXT": ("https://github.com/LLaVA-VL/LLaVA-NeXT", "df179663ae8b83207df100a1f7af24caec633ff9"),
    "TOKENPACKER": ("https://github.com/CircleRadon/TokenPacker", "771a16e7462c3afb908a0c429513ba43f709f2c1"),
    "QUECC": ("https://github.com/locuslab/llava-token-compression", "bdedebdf8f4bf7a48c916357ec1dc5dc2720b606"),
}
_HUGGING_FACE = (TORCH, "transformers==5.23.0")


class Group(NamedTuple):
    """What one golden file takes."""

    golden: str
    module: tuple[str, ...]  # and its arguments
    peers: tuple[str, ...]


GROUPS = {
    "decoders": Group("hf_decoders.npz", ("peers_decoders",), _HUGGING_FACE),
    "vision": Group("peers_vision_hf.npz", ("peers_vision", "hf"), _HUGGING_FACE),
    "text": Group("peers_text.json.gz", ("peers_text",), _HUGGING_FACE),
    "files": Group("peers_files.json.gz", ("peers_files",), _HUGGING_FACE),
    "conversations": Group("peers_conversations.json.gz", ("peers_conversations",), _HUGGING_FACE),
    "llava_json": Group("peers_llava_json.json.gz", ("peers_llava_json",), _HUGGING_FACE),
    "llava_weights": Group("peers_llava_weights.npz", ("peers_llava_weights",), (*_HUGGING_FACE, "einops")),
    "answers": Group("peers_answers.json.gz", ("peers_answers",), _HUGGING_FACE),
    # Of all that big_vision's models import, only these are not ours already.
    "big_vision": Group("peers_vision_bv.npz", ("peers_vision", "big_vision"), ("tensorflow-cpu==2.21.0", "einops")),
}


class Failed(Exception):
    """A step ended badly: its complaint in one line, and all that it said."""

    def __init__(self, complaint: str, said: str = "") -> None:
        super().__init__(complaint)
        self.said = said


def step(title: str, *command: str | Path, **where: Any) -> None:
    """Runs a command; shows its newest line and, at the end, how long it took. Raises `Failed`."""
    start, lines, live = time.monotonic(), [""], sys.stdout.isatty()
    print(f"{title} ...", end="" if live else "\n", flush=True)
    try:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **where)
    except OSError as error:
        raise Failed(f"{title}: {error}") from error
    for line in run.stdout or ():
        lines.append(line.rstrip())
        if live:
            print(f"\r\033[K{title}: {line.strip()[:90]}", end="", flush=True)
    print("\r\033[K" * live, end="")
    if run.wait():
        told = [line.strip() for line in lines if line.lower().lstrip().startswith(("error:", "fatal:"))]
        told.sort(key=lambda line: "subprocess" in line)  # pip's word for what the others explain
        raise Failed(f"{title}: {[*told, lines[-1]][0]}", "\n".join(lines))
    print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)


def install(venv: Path, peers: list[str]) -> Path:
    """The environment's Python, with this project and the peers in the versions of constraints.txt."""
    python = venv / "bin" / "python"
    if not python.exists():
        step(f"an environment in {venv}", sys.executable, "-m", "venv", venv)
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")
    if TORCH in peers:
        # PyPI's wheel for Linux brings gigabytes of CUDA along; torch's own index has one without.
        try:
            step("torch for the CPU", *pip, "--no-deps", "--retries", "1", "--index-url", TORCH_OF_CPU, TORCH)
        except Failed:
            print(f"torch for the CPU: not from {TORCH_OF_CPU}, so as the usual index has it")
    step("this project and its peers", *pip, "-c", ROOT / "constraints.txt", "-e", f"{ROOT}[dev]", *peers)
    return python


def clone(folder: Path, url: str, commit: str) -> None:
    """A repository at the commit that a golden file was made with; it cannot be installed, only imported from here."""
    git = ("git", "-C", folder)
    if not (folder / ".git").is_dir():
        step(f"a folder for {folder.name}", "git", "init", "--quiet", folder)
    if subprocess.run([*git, "cat-file", "-e", commit], capture_output=True).returncode:
        step(folder.name, *git, "fetch", "--quiet", "--depth", "1", url, commit)
    step(f"{folder.name}'s files", *git, "-c", "advice.detachedHead=false", "checkout", "--quiet", "--force", commit)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".cache" / "peers", help="made if it is not there")
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS))
    args = parser.parse_args(argv)
    venv = args.venv.resolve()
    try:
        python = install(venv, sorted({peer for name in args.only for peer in GROUPS[name].peers}))
        if "big_vision" in args.only:
            clone(venv / "big_vision", BIG_VISION, COMMIT)
        if {"conversations", "llava_json", "llava_weights"} & set(args.only):
            for name, (url, commit) in REPOSITORIES.items():
                clone(venv / name.lower(), url, commit)
    except Failed as error:
        print(f"make_peers: {error} (it wants a network; the same command goes on from here)", file=sys.stderr)
        return 2
    # A run on CPU, whatever else the machine has: the golden files are float32 of the CPU.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env |= {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": str(venv / "big_vision")}
    env |= {name: str(venv / name.lower()) for name in REPOSITORIES}
    for name in args.only:
        group = GROUPS[name]
        golden = ROOT / "tests" / "golden" / group.golden
        before = golden.read_bytes() if golden.exists() else None
        module = (f"tests.golden.{group.module[0]}", *group.module[1:])
        try:
            step(golden.name, python, "-m", *module, cwd=ROOT, env=env)
        except Failed as error:
            print(f"{error.said}\nmake_peers: {error}", file=sys.stderr)
            return 1
        print(f"{golden.name} is {'as it was' if golden.read_bytes() == before else 'new'}", flush=True)
    return subprocess.run([python, "-m", "pytest", "-m", "parity", "tests"], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
