"""Installs the package `vlm_jax`. The versions it was tested with are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vlm_jax",
    version="0.1.0",
    description="Inference-optimal vision-language models in JAX: train a grid, fit a law, plan from it",
    long_description=Path(__file__).with_name("README.md").read_text()
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vlm_jax", "vlm_jax.*"]),
    package_data={
        "vlm_jax": [
            "py.typed",
            "evaluation/metrics/*.json",
            "scaling/*.css",
            "scaling/*.html",
            "scaling/*.js",
            "studies/glyphs/tokenizer/*.json",
        ]
    },
    install_requires=[
        "filelock>=4",
        "flax>=0.12",
        "grain>=0.2.18",
        "importlib_resources",  # tensorflow-datasets 4.9.10 imports it without declaring it
        "jax>=0.10",
        "jaxtyping",
        "jinja2>=3.1.6",  # earlier sandboxes can be left
        "matplotlib",
        "ml_collections",
        "ml_dtypes",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=11.3",
        "plotly",
        "protobuf",  # the schema of SentencePiece files
        "pyarrow",
        "pyyaml",
        "rich",
        "safetensors",
        "scikit-image",
        "scikit-learn",
        "scipy",
        "sentencepiece>=0.2.3",  # earlier ones have no offset_mapping
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tokenizers",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        "slurm": ["submitit>=1.5.2"],
        "serve": ["starlette>=1.10", "uvicorn>=0.40"],
        "dev": [
            "beartype",
            "httpx2",
            "pytest",
            "pytest-xdist",
            "ruff",
            "starlette>=1.10",
            "submitit>=1.5.2",
            "uvicorn>=0.40",
        ],
    },
)
