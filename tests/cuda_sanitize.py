"""A small set of every CUDA kernel's work, for compute-sanitizer, under which the tests would take hours:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/cuda_sanitize.py
    NVCC_APPEND_FLAGS=-DDS_FP6_EVERY_LANE_ARRIVES TORCH_EXTENSIONS_DIR=/tmp/racecheck \\
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/cuda_sanitize.py

For racecheck the Hopper kernel is built so that each lane of a warp gives its slot of the ring back itself: usually one
does for all of them, in which the tool sees hazards of the other 31. Without torch's cache of memory each tensor is an
allocation of its own, whose ends the sanitizer watches. An argument is how many of CASES to run, all without.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402

from cuda_cases import Expected, RandomWeight, random_x  # noqa: E402
from ds_fp6 import ops  # noqa: E402
from ds_fp6.formats import E2M2, E2M3, E3M2, Format  # noqa: E402

CASES = [(E3M2, torch.float16), (E3M2, torch.bfloat16), (E2M2, torch.float16), (E2M3, torch.bfloat16), (Format(5, 2), torch.float16)]
#: N, K, group size.
WEIGHTS = [(1, 1, 0), (65, 127, 0), (200, 1096, 0), (330, 2056, 0), (130, 640, 64), (129, 200, 16)]
#: Each tile of both kernels, those from 96 tokens on full as well, and two tiles.
TOKENS = [1, 13, 30, 50, 90, 96, 100, 128, 150]


def main() -> int:
    ops.load("CUDA")
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for fmt, dtype in CASES[: int(sys.argv[1]) if len(sys.argv) > 1 else None]:
        bits = fmt.exponent_bits, fmt.mantissa_bits
        for n, k, group_size in WEIGHTS:
            weight = RandomWeight(fmt, n, k, group_size, generator)
            x = random_x(max(TOKENS), k, dtype, generator)
            bias = torch.randn(n, generator=generator).to(dtype).cuda()
            expected = Expected(x, weight, bias)
            for kernel in ("", "sm80") if group_size in (0, 16, 64) else ("",):
                torch.ops.ds_fp6.select_cuda_kernel(kernel)
                for m in TOKENS:
                    expected.check(weight.linear(x[:m], bias), f"{fmt} {dtype} {m} x {n} x {k} {kernel}", m)
                    checked += 1
            torch.ops.ds_fp6.select_cuda_kernel("")
            for layout, tiles in weight.tiles.items():
                packed, scales = ops.quantize(weight.values.to(dtype), *bits, group_size, None, layout)
                ops.dequantize(packed, scales, *bits, group_size, k, dtype)
                assert torch.equal(ops.unpack(tiles, *bits, n, k), weight.rows)
    gates = RandomWeight(E3M2, 330, 640, 0, generator)
    for layout, tiles in gates.tiles.items():
        ops.gated_linear(random_x(100, 640, layout, generator), tiles, gates.scales, None, 3, 2, 0, 5)
    # Long rows, and the end of a tensor in the middle of 16 bytes.
    long = RandomWeight(E3M2, 70, 33000, 0, generator)
    x = random_x(5, 33003, torch.bfloat16, generator)[:, 3:]
    Expected(x, long).check(long.linear(x), "long rows")
    checked += 1
    torch.cuda.synchronize()
    print(f"{checked} products agree with fp64")
    return 0


if __name__ == "__main__":
    sys.exit(main())
