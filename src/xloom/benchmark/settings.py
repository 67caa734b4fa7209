"""What all benchmarks are told: names, and numbers that make sense. Cheap to import."""

from collections.abc import Callable, Sequence

from xloom.errors import ConfigError

RANDOM = "random"
PEFT = "peft"
DTYPES = ("float32", "bfloat16", "float16", "float64")

Say = Callable[[str], None]


def check_dtype(name: str) -> None:
    """Raises ConfigError for a dtype that no benchmark takes."""
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, found {name!r}")


def at_least(least: int, **numbers: Sequence[int]) -> None:
    """Raises ConfigError for the first option that is empty or holds a number below `least`."""
    for name, values in numbers.items():
        if not values or min(values) < least:
            raise ConfigError(f"{name} must be at least {least}, found {', '.join(map(str, values)) or 'nothing'}")


def at_least_one(**numbers: Sequence[int]) -> None:
    """Raises ConfigError for the first option that is empty or holds a number below 1."""
    at_least(1, **numbers)
