"""Numbers as people write them: 0.934, 12.3 MB, 1 min 20 s."""

import math

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
# Seconds of the smaller unit, how many of it make the larger one, and what they are called.
_TIMES = ((1, 60, "min", "s"), (60, 60, "h", "min"), (3600, 24, "d", "h"))
NONE = "–"  # where there is nothing to tell


def measure(value: float) -> str:
    """A measured number: three digits behind the point while it is below ten, fewer above."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:.2g}"
    if size >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.3f}" if size < 10 else f"{value:,.1f}" if size < 1000 else f"{value:,.0f}"


def count(value: float) -> str:
    """A whole number, thousands apart."""
    return f"{value:,.0f}" if math.isfinite(value) else NONE


def several(number: float, one: str, more: str = "") -> str:
    """A number with its noun: "1 round", "3 rounds"."""
    return f"{count(number)} {one if number == 1 else more or one + 's'}"


def amount(size: float) -> str:
    """Bytes in the unit that suits them; a kB is 1000 of them."""
    if not math.isfinite(size):
        return NONE
    unit = 0
    while abs(size) >= 999.5 and unit < len(_BYTES) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.3g} {_BYTES[unit]}"


def duration(seconds: float) -> str:
    """Seconds as time: "3.2 ms", "0.81 s", "1 min 20 s", "2 h 5 min", "3 d 4 h"."""
    if not math.isfinite(seconds):
        return NONE
    if 0 < seconds < 0.0995:  # what is more would be 100 ms, of three digits
        return f"{seconds * 1000:.2g} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    small, number, one, other = next((time for time in _TIMES if seconds / time[0] < 60 * time[1] - 0.5), _TIMES[-1])
    whole, rest = divmod(round(seconds / small), number)
    return f"{whole} {one} {rest} {other}" if rest else f"{whole} {one}"


def plain(text: object) -> str:
    """Text without characters that no page may hold: control characters and halves of surrogate pairs."""
    kept = "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return kept.encode("utf-8", "replace").decode("utf-8")


def setting(value: object) -> str:
    """A value of an experiment: numbers and lists as they are, strings without quotation marks."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list):
        return ", ".join(setting(part) for part in value) or "none"
    return plain(NONE if value is None else value)
