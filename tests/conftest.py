"""Annotations become assertions, warnings become errors (pyproject.toml), and every test sees eight CPU devices."""

import jax
import jaxtyping

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# No test depends on what another left on disk.
jax.config.update("jax_enable_compilation_cache", False)
# Tests run each program once or twice: compiling it is what costs.
jax.config.update("jax_disable_most_optimizations", True)

# Stays installed for the whole session: modules are hooked when a test first imports them.
jaxtyping.install_import_hook("vlm_jax", "beartype.beartype")
