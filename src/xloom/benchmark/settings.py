"""What all benchmarks are told: names, and numbers that make sense. Cheap to import."""

from collections.abc import Callable, Sequence

from xloom.errors import ConfigError

RANDOM = "random"
DTYPES = ("float32", "bfloat16", "float16", "float64")

Say = Callable[[str], None]


def check_dtype(name: str) -> None:
    """Raises ConfigError for a dtype that no benchmark takes."""
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, found {name!r}")


def at_least_one(**numbers: Sequence[int]) -> None:
    """Raises ConfigError for the first option that is empty or holds a number below 1."""
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise ConfigError(f"{name} must be at least 1, found {', '.join(map(str, values)) or 'nothing'}")
