"""Installs the package `vlm_jax`. The versions it was tested with are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# What commands read by these paths outside a checkout too (`vlm_jax.core.located`).
SHIPPED = (
    "configs/**/*.py",
    "experiments/glyph_encoder/encoder.npz",
    "experiments/published_law/*.csv",
    "experiments/published_law/law.json",
)


class BuildWithShipped(build_py):
    """Copies `SHIPPED` to vlm_jax/shipped/ of a wheel, and lists it for a source distribution."""

    def run(self) -> None:
        super().run()
        for file in [] if self.editable_mode else self.shipped():
            target = Path(self.build_lib, "vlm_jax", "shipped", file)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(file, str(target))

    def get_source_files(self) -> list[str]:
        return super().get_source_files() + self.shipped()

    def shipped(self) -> list[str]:
        return sorted(str(file) for pattern in SHIPPED for file in Path().glob(pattern))


setup(
    name="vlm_jax",
    version="0.1.0",
    description="Inference-optimal vision-language models in JAX: train a grid, fit a law, plan from it",
    long_description=Path(__file__).with_name("README.md").read_text(),
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
    cmdclass={"build_py": BuildWithShipped},
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
            "ipykernel>=7",
            "mkdocs-material",
            "mkdocstrings[python]",
            "mypy",
            "nbclient>=0.10",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",  # a test builds the package
            "starlette>=1.10",
            "submitit>=1.5.2",
            "uvicorn>=0.40",
        ],
    },
)
