"""Public benchmarks: read, asked and scored as their publishers and the common harnesses do.

loaded = load(find("gqa"), data, options)     # items with prompts, images and references
"""

from pathlib import Path

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.ai2d import AI2D
from vlm_jax.evaluation.benchmarks.chartqa import CHARTQA
from vlm_jax.evaluation.benchmarks.documents import DOCVQA, INFOVQA
from vlm_jax.evaluation.benchmarks.easy_vqa import EASY_VQA
from vlm_jax.evaluation.benchmarks.gqa import GQA
from vlm_jax.evaluation.benchmarks.items import Benchmark, Loaded, SuiteOptions
from vlm_jax.evaluation.benchmarks.mathvista import MATHVISTA
from vlm_jax.evaluation.benchmarks.mmbench import MMBENCH
from vlm_jax.evaluation.benchmarks.mme import MME
from vlm_jax.evaluation.benchmarks.mmmu import MMMU
from vlm_jax.evaluation.benchmarks.ocrbench import OCRBENCH
from vlm_jax.evaluation.benchmarks.own import OWN
from vlm_jax.evaluation.benchmarks.pope import POPE
from vlm_jax.evaluation.benchmarks.scienceqa import SCIENCEQA
from vlm_jax.evaluation.benchmarks.seed import SEED
from vlm_jax.evaluation.benchmarks.textvqa import TEXTVQA
from vlm_jax.evaluation.benchmarks.vizwiz import VIZWIZ
from vlm_jax.evaluation.benchmarks.vqav2 import VQAV2

_ALL = (
    AI2D, CHARTQA, DOCVQA, EASY_VQA, GQA, INFOVQA, MATHVISTA, MMBENCH, MME, MMMU, OCRBENCH, OWN, POPE, SCIENCEQA, SEED,
    TEXTVQA, VIZWIZ, VQAV2,
)  # fmt: skip
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def find(name: str) -> Benchmark:
    """Raises `UserError` with the nearest name for an unknown one."""
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def load(benchmark: Benchmark, data: Path, options: SuiteOptions) -> Loaded:
    """The items of a benchmark's split below the folder `data`.

    Raises `UserError` for files that are missing, broken or do not match, ids that occur twice, and missing images.
    """
    try:
        loaded = benchmark.read(data, options)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a field is missing, or of another type
        raise UserError(
            f"{benchmark.name}: its files in {data} are not of the form of their layout"
            f" ({type(error).__name__}: {error}): download them again"
        ) from error
    files.check(benchmark.name, loaded.items)
    return loaded
