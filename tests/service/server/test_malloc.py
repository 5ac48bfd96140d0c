"""Tests that freed memory returns to the system, in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys
from service.server.malloc import limit_malloc_arenas, trim_regularly

limit_malloc_arenas()
arrays, small = [], []
for _ in range(4000):
    # Small objects between the arrays keep the heap from shrinking at its end.
    arrays.append(bytearray(100_000))
    small.append(bytearray(3_000))

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

async def main():
    task = asyncio.create_task(trim_regularly())
    await asyncio.sleep(0.1)
    full = resident()
    arrays.clear()
    freed = resident()
    await asyncio.sleep(float(sys.argv[1]))
    print(full, freed, resident())
    task.cancel()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc and /proc")
def test_freed_memory_returns_to_the_system() -> None:
    completed = subprocess.run([sys.executable, "-c", PROGRAM, "2"], capture_output=True, text=True, check=True)
    full, freed, later = map(int, completed.stdout.split())
    assert full > 4e8
    # malloc itself returns little of it.
    assert freed > 3e8
    assert later < 1e8
