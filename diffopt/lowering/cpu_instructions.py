"""What the CPU of this machine has instructions for."""

import platform
from functools import cache
from pathlib import Path

# They accumulate products of 8-bit integers in 32 bits; others of x86 saturate in 16.
_INTEGERS = ("avx512_vnni", "avx_vnni", "amx_int8")


@cache
def instructions() -> frozenset[str]:
    """Return the instruction sets, as Linux names them; none on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return frozenset()
    rows = (line.partition(":") for line in path.read_text().splitlines())
    flags = (value for name, _, value in rows if name.startswith(("flags", "Features")))
    return frozenset(next(flags, "").split())


def has_integer_products() -> bool:
    """Tell whether an x86 CPU multiplies 8-bit integers without saturating sums."""
    return not instructions().isdisjoint(_INTEGERS)


def saturates() -> bool:
    """Tell whether kernels on this CPU may saturate sums of products of 8-bit integers."""
    return platform.machine() in ("x86_64", "AMD64") and not has_integer_products()
