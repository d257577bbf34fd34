#!/usr/bin/env bash
# Prepares one host of a TPU slice; run in the repository, on every host: bash experiments/launching/host_setup.sh [BUCKET]
# Python and packages into .venv; with a bucket's name, that bucket under ~/bucket.
set -euo pipefail

bucket=${1:-}
export PATH="$HOME/.local/bin:$PATH"

# The images of TPU hosts bring an older Python than the package needs.
command -v uv >/dev/null || curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh
[ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[tpu]'

if [ -n "$bucket" ]; then
    if ! command -v gcsfuse >/dev/null; then
        key=/usr/share/keyrings/cloud.google.asc
        curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
            sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
        sudo apt-get update --quiet --quiet
        sudo apt-get install --yes --quiet --quiet gcsfuse
    fi
    mkdir -p "$HOME/bucket"
    # Checkpoints become complete by renaming a folder, which a bucket does file by file.
    mountpoint --quiet "$HOME/bucket" || gcsfuse --implicit-dirs --rename-dir-limit 100000 "$bucket" "$HOME/bucket"
fi
echo "ready: $(.venv/bin/python --version)"
