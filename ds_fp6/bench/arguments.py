"""Types of arguments that several benchmarks take."""

from __future__ import annotations

import argparse


def integers(text: str) -> list[int]:
    """Positive whole numbers, separated by commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, separated by commas, got {text!r}")
    return values


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value
