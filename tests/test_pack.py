from __future__ import annotations

import pytest
import torch

from ds_fp6.pack import pack, row_bytes, unpack


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("n, k", [(1, 1), (3, 7), (2, 8), (5, 9), (4, 63), (1, 64), (2, 65), (3, 129)])
def test_pack_is_a_dense_little_endian_bit_stream(bits, n, k):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    rows = pack(codes, bits)
    assert rows.shape == (n, row_bytes(k, bits)) == (n, -(-k * bits // 8))
    for row, row_codes in zip(rows.tolist(), codes.tolist()):
        stream = sum(byte << (8 * i) for i, byte in enumerate(row))
        assert stream == sum(code << (i * bits) for i, code in enumerate(row_codes)), "padding bits are zero"
    assert torch.equal(unpack(rows, bits, k), codes)


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="64 does not fit in 6 bits"):
        pack(torch.tensor([[64]], dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(2, 2), 6)
    with pytest.raises(ValueError, match="3..8"):
        pack(torch.zeros(2, 2, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"\[N, 6\]"):
        unpack(torch.zeros(2, 5, dtype=torch.uint8), 6, 8)
