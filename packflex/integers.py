"""Whole numbers on the host; Triton's own of these names take microseconds, which launches cannot spare."""


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for b above 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is no less than n; 1 for n below 1."""
    return 1 << max(n - 1, 0).bit_length()
