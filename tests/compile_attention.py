"""Compiles the kernels of attention and argmax without a GPU and prints, as JSON, what each takes: run as a program.

    python tests/compile_attention.py CAPABILITY      (such as 90)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_fp6.triton_ops import argmax, decode, plan, prefill

#: query heads per key/value head, head size, tokens in a cache block
SHAPES = [(8, 128, 64), (1, 64, 128), (4, 80, 64), (1, 256, 64)]
_STRIDES = ("q_stride", "qkv_stride", "out_stride", "block_stride", "token_stride")
#: Integers that are multiples of 16.
_ALIGNED = (*_STRIDES, "vocabulary", "row_stride")
_TYPES = {
    "sequences": "*i32", "pointers": "*i64", "partials": "*fp32", "maxima": "*fp32", "sums": "*fp32",
    "counters": "*i32", "frequencies": "*fp32", "scale": "fp32", "window": "i32",
    "n_sequences": "i32", "program_tiles": "i32", **dict.fromkeys(_STRIDES, "i32"),
    **dict.fromkeys(("out", "q", "qkv", "cache"), "*fp16"),
}  # fmt: skip
_ARGMAX_TYPES = {
    "out": "*i64", "keys": "*i64", "counters": "*i32", "vocabulary": "i32", "row_stride": "i32", "tiles_each": "i32",
}  # fmt: skip


def usage(kernel, constants: dict, tile: plan.Tile, capability: int, types: dict[str, str] = _TYPES) -> dict[str, int]:
    """Bytes of shared memory and of a thread's stack, registers of a thread."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
        if name in _ALIGNED or signature[name].startswith("*")
    }  # fmt: skip
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"shared": compiled.metadata.shared, "stack": int(stack), "registers": int(registers)}


def main() -> None:
    capability, found = int(sys.argv[1]), {}
    for group, head, page in SHAPES:
        overlapped = capability >= 90
        tile = plan.decode_tile(head, group, page)
        constants = decode.constants(group, head, page, head // 2, False, tile, overlapped)
        found[f"decode {group} {head}"] = usage(decode._decode_kernel, constants, tile, capability)
        for long in (False, True):
            tile = plan.prefill_tile(head, group, page, long)
            constants = {
                "GROUP": group, "HEAD": head, "PAGE": page, "COLUMNS": plan.power_of_two(head), "WINDOWED": False,
                "OVERLAP": overlapped, "ROWS": tile.rows, "KEYS": tile.keys, "QUERIES": tile.rows // group,
                "SEQUENCES": 64,
            }  # fmt: skip
            name = f"prefill {group} {head}" + " long" * long
            found[name] = usage(prefill._prefill_kernel, constants, tile, capability)
    for kind in ("fp16", "bf16", "fp32"):
        constants = {"TILE": argmax.TILE, "OVERLAP": capability >= 90}
        tile = plan.Tile(rows=1, keys=argmax.TILE, warps=argmax.WARPS, stages=3)
        types = {**_ARGMAX_TYPES, "logits": f"*{kind}"}
        found[f"argmax {kind}"] = usage(argmax._argmax_kernel, constants, tile, capability, types)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
