"""Makes the golden files with the libraries that they speak for, in an environment of its own.

    python tests/golden/make_peers.py --venv .cache/peers              # installs, makes all, runs the comparisons
    python tests/golden/make_peers.py --venv .cache/peers --only decoders

Nothing here is needed to use or to test the project: the golden files are in the repository.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = ("torch==2.13.0", "transformers==5.23.0", "sentencepiece==0.2.3", "pillow", "protobuf")
# Group -> the module that writes its golden files, and arguments.
GROUPS = {
    "decoders": ("tests.golden.peers_decoders",),
    "vision": ("tests.golden.peers_vision", "hf"),
    "text": ("tests.golden.peers_text",),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".cache" / "peers", help="made if it is not there")
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS))
    args = parser.parse_args(argv)
    python = args.venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(args.venv)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *PEERS], check=True)
    subprocess.run([*install, "-c", "constraints.txt", "-e", ".[dev]"], check=True, cwd=ROOT)
    # A run on CPU, whatever else the machine has: the golden files are float32 of the CPU.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for name in args.only:
        print(f"{name}: {' '.join(GROUPS[name])}", flush=True)
        subprocess.run([str(python), "-m", *GROUPS[name]], check=True, cwd=ROOT, env=env)
    return subprocess.run([str(python), "-m", "pytest", "-m", "parity", "tests"], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
