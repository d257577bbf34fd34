"""Freed memory is used again instead of being mapped anew."""

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, resource, sys
from vlm_jax.core import memory
if sys.argv[1] == "reused":
    memory.reuse_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def page_faults(size=64 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = page_faults(), page_faults()
print(second < first / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
@pytest.mark.parametrize("kind", ["reused", "default"])
def test_a_block_of_the_same_size_has_its_pages_already(kind: str) -> None:
    out = subprocess.run([sys.executable, "-c", _PROGRAM, kind], check=True, capture_output=True, text=True).stdout
    assert out.strip() == str(kind == "reused")
