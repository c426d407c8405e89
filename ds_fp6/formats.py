"""Number formats and quantization modes: the one place that knows e, m, bias and max.

``Format`` describes a signed minifloat; its C++ twin is ``csrc/common/format.h``. ``Mode`` is what a user
names when asking for quantization, e.g. ``wf6af16``; ``Mode.parse`` holds the grammar. No torch in here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

MIN_BITS, MAX_BITS, MAX_EXPONENT_BITS = 3, 8, 5


@dataclass(frozen=True)
class Format:
    """A signed floating-point format of 3 to 8 bits in which every code is a number.

    A code is, from its most significant bit, sign ``s``, exponent ``e``, mantissa ``m``; with
    ``bias = 2^(exponent_bits - 1) - 1`` and ``M = mantissa_bits`` its value is

        (-1)^s · 2^(e - bias) · (1 + m / 2^M)    for e > 0
        (-1)^s · 2^(1 - bias) · m / 2^M          for e = 0 (subnormal)

    There are no infinities and no NaN, as in the OCP MX formats of 6 and 4 bits.

    Raises ``ValueError`` for sizes outside 1 to 5 exponent bits and 3 to 8 bits in all.
    """

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.exponent_bits <= MAX_EXPONENT_BITS:
            raise ValueError(f"exponent_bits must lie in 1..{MAX_EXPONENT_BITS}, got {self.exponent_bits}")
        if self.mantissa_bits < 0 or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(
                f"a format has {MIN_BITS} to {MAX_BITS} bits; e{self.exponent_bits}m{self.mantissa_bits} "
                f"has {self.bits}"
            )

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """The largest value: all exponent and mantissa bits set."""
        return 2.0 ** (2 ** (self.exponent_bits - 1)) * (2.0 - 2.0**-self.mantissa_bits)

    @property
    def smallest(self) -> float:
        """The smallest positive value: the last subnormal, or, without mantissa bits, the first normal."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def name(self) -> str:
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of each code, ``2^bits`` of them, exact in fp32. Code ``2^(bits-1)`` is -0."""
        half = []
        for code in range(2 ** (self.bits - 1)):
            exponent, mantissa = divmod(code, 2**self.mantissa_bits)
            fraction = mantissa / 2**self.mantissa_bits
            half.append(
                2.0 ** (exponent - self.bias) * (1 + fraction) if exponent else 2.0 ** (1 - self.bias) * fraction
            )
        return tuple(half) + tuple(-v for v in half)

    def __str__(self) -> str:
        return self.name


E3M2, E2M2, E2M3, E3M1, E2M1 = Format(3, 2), Format(2, 2), Format(2, 3), Format(3, 1), Format(2, 1)

#: What ``wf<bits>`` means when the mode does not spell exponent and mantissa out.
DEFAULT_FORMATS = {3: Format(1, 1), 4: E2M1, 5: E2M2, 6: E3M2, 7: Format(3, 3), 8: Format(4, 3)}


def all_formats() -> list[Format]:
    """Every ``Format`` there is, by bits, then by exponent bits."""
    return [
        Format(e, bits - 1 - e)
        for bits in range(MIN_BITS, MAX_BITS + 1)
        for e in range(1, min(MAX_EXPONENT_BITS, bits - 1) + 1)
    ]


#: What a mode's activation names; ``None`` is "the 16-bit type of the checkpoint".
ACTIVATIONS = {"f16": "float16", "bf16": "bfloat16", "16": None, "32": "float32"}

GRAMMAR = (
    "w f BITS [eXmY] a (f16 | bf16 | 16 | 32) [gN]: weights of BITS (3 to 8) bits, eXmY spelling their "
    "exponent and mantissa (default " + ", ".join(f"{b}: {f}" for b, f in DEFAULT_FORMATS.items()) + "); "
    "activations in fp16, bf16, the checkpoint's own 16-bit type, or fp32; one scale per output channel, "
    "or per group of N along the input channels. Examples: wf6af16, wf6abf16, wf5af16, wf6e2m3af16, wf6af16g128"
)

_MODE = re.compile(
    r"w(?P<kind>[fi])(?P<bits>\d+)(?:e(?P<e>\d+)m(?P<m>\d+))?a(?P<activation>f16|bf16|16|32)(?:g(?P<group>\d+))?"
)


@dataclass(frozen=True)
class Mode:
    """What is stored for a weight and what it is multiplied with.

    ``group_size`` is the number of input channels that share a scale; 0 is one scale per output channel.
    ``activation`` is ``"float16"``, ``"bfloat16"``, ``"float32"``, or None for the checkpoint's 16-bit type.
    """

    format: Format
    activation: str | None = None
    group_size: int = 0

    @classmethod
    def parse(cls, text: str | Mode) -> Mode:
        """``"wf6af16g128"`` → ``Mode(E3M2, "float16", 128)``. Raises ``ValueError`` that holds the grammar."""
        if isinstance(text, Mode):
            return text
        match = _MODE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"unknown quantization mode {text!r}; a mode is {GRAMMAR}")
        bits = int(match["bits"])
        if match["kind"] == "i":
            raise ValueError(f"quantization mode {text!r}: integer weights are not supported; a mode is {GRAMMAR}")
        try:
            fmt = Format(int(match["e"]), int(match["m"])) if match["e"] else DEFAULT_FORMATS[bits]
        except KeyError:
            raise ValueError(f"quantization mode {text!r}: no format of {bits} bits; a mode is {GRAMMAR}") from None
        except ValueError as error:
            raise ValueError(f"quantization mode {text!r}: {error}; a mode is {GRAMMAR}") from None
        if fmt.bits != bits:
            raise ValueError(f"quantization mode {text!r}: {fmt} has {fmt.bits} bits, not {bits}; a mode is {GRAMMAR}")
        group_size = int(match["group"]) if match["group"] else 0
        if match["group"] and group_size == 0:
            raise ValueError(f"quantization mode {text!r}: a group holds at least one channel; a mode is {GRAMMAR}")
        return cls(fmt, ACTIVATIONS[match["activation"]], group_size)

    @property
    def name(self) -> str:
        """The shortest spelling that parses back to this mode."""
        activation = next(short for short, dtype in ACTIVATIONS.items() if dtype == self.activation)
        spelled = "" if DEFAULT_FORMATS[self.format.bits] == self.format else self.format.name
        group = f"g{self.group_size}" if self.group_size else ""
        return f"wf{self.format.bits}{spelled}a{activation}{group}"

    def __str__(self) -> str:
        return self.name
