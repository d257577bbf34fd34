"""Annotations become assertions, warnings become errors (pyproject.toml), and every test sees eight CPU devices.

Tests run each program once or twice, so compiling is what costs: it is asked for as little work as it can do.
"""

import gc
import importlib.metadata
import os

# Read by XLA when it starts, here and in every process that a test starts. Without the fusion emitters and with one
# LLVM module a program, compiling takes a sixth of the CPU seconds. XLA ends the process over a flag that it does not
# know, so only the version of constraints.txt gets them.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib") == "0.10.2" and QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

gc.set_threshold(200_000, 20, 50)
import jax  # noqa: E402
import jaxtyping  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# No test depends on what another left on disk.
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_disable_most_optimizations", True)

# Stays installed for the whole session: modules are hooked when a test first imports them.
jaxtyping.install_import_hook("vlm_jax", "beartype.beartype")
