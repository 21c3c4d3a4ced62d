"""Numbers as readers want them: no false digits, no exponents, a dash for what is not there."""

NONE = "–"
_MOST_DIGITS = 9


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent, and all of a large whole part: 0.0512, 5.12, 51.2, 5,123."""
    rounded = float(f"{value:.{digits - 1}e}")
    if abs(rounded) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    exponent = int(f"{rounded:e}".partition("e")[2]) if rounded else 0
    return f"{rounded:.{digits - 1 - exponent}f}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, without the unit."""
    return significant(1e3 * seconds)


def megabytes(size: int | None) -> str:
    """Bytes as 10^6 bytes, without the unit."""
    return NONE if size is None else significant(size / 1e6)


def millions(number: int | None) -> str:
    """A count such as 124.44 M."""
    return NONE if number is None else f"{number / 1e6:,.2f} M"


def perplexity(value: float) -> str:
    """Two decimals, fewer where a value is so large that they say nothing, and an exponent at last."""
    return f"{value:,.2f}" if value < 1e4 else f"{value:,.0f}" if value < 1e9 else f"{value:.2e}"


def change(value: float, base: float) -> str:
    """A relative change in percent with its sign: `+0.80 %`, `−3.1 %`."""
    percent = 100 * (value / base - 1)
    digits = 2 if abs(percent) < 9.995 else 1 if abs(percent) < 99.95 else 0
    return f"{percent:+,.{digits}f} %".replace("-", "−")


def share(value: float) -> str:
    """A share of one in percent: `12.5 %`."""
    return f"{significant(100 * value)} %"


def times(ratio: float) -> str:
    """`1.92 ×`."""
    return f"{ratio:,.2f} ×"


def span(low: float, high: float, digits: int = 4, bound: float = 1.0) -> str:
    """An interval, `0.9941 to 0.9998`: with more digits where an end would else read as the `bound` that it is not."""
    ends = [end for end in (low, high) if end != bound]
    while digits < _MOST_DIGITS and any(f"{end:.{digits}f}" == f"{bound:.{digits}f}" for end in ends):
        digits += 1
    return f"{low:,.{digits}f} to {high:,.{digits}f}"


def tiny(value: float) -> str:
    """A value from nothing to one and beyond: `1.8`, `0.023`, `2.7e-4`, and `0` below 1e-9, which is rounding."""
    if value < 1e-9:
        return "0"
    if value >= 1e-3:
        return significant(value, 2)
    return f"{value:.1e}".replace("e-0", "e-")
