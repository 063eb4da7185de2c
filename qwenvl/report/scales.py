"""Round numbers for axes, and numbers in few characters."""

from __future__ import annotations

import math

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def round_up(value: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten that is not below a positive value."""
    magnitude = 10.0 ** math.floor(math.log10(value))
    return next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= value * 0.999)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers from ``low`` to ``high``, at most about ``count`` of them."""
    step = round_up((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    found = [float(f"{step * index:.12g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]
    return [0.0 if tick == 0 else tick for tick in found]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers between two powers of ten: 1, 2, 5 of each decade, or some decades if there are many.

    Args:
        low: Exponent of the lower end.
        high: Exponent of the upper end.
        count: Approximate limit to the number of ticks.
    """
    factors = (1, 2, 5) if 3 * (high - low) <= count + 1 else (1,)
    every = max(1, math.ceil((high - low) / count))
    exponents = [one for one in range(math.floor(low) - 1, math.ceil(high) + 1) if one % every == 0]
    candidates = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [tick for tick in candidates if low <= math.log10(tick) <= high]


def short(value: float) -> str:
    """Return a number in few characters: 1,234, 0.123, 2e-5."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000 or value == round(value):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return _plain(f"{value:.3g}")


def tick_label(value: float) -> str:
    """Return a round number for an axis: 20k, 0.05, 2e-5."""
    for size, prefix in _PREFIXES:
        if abs(value) >= 10_000 and abs(value) >= size:
            return f"{value / size:g}{prefix}" if abs(value) < 1e15 else _plain(f"{value:.3g}")
    return _plain(f"{value:g}")


def _plain(text: str) -> str:
    """Return a number without leading zeros in its exponent."""
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else mantissa
