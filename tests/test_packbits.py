"""Codes packed into 32-bit words are one bit stream, and come back unchanged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.core import packbits

ALL_BITS = (2, 3, 4, 8)


def random_codes(bits, count, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (count, columns), dtype=torch.uint8, generator=generator)


def stream_words(codes, bits):
    """The words of one column: all codes in one big integer, the first in the lowest bits."""
    stream = sum(code << (bits * k) for k, code in enumerate(codes))
    return [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(codes) * bits // 32)]


def unsigned(words):
    return [word & 0xFFFFFFFF for word in words.tolist()]


@given(
    bits=st.sampled_from(ALL_BITS),
    blocks=st.integers(1, 5),
    columns=st.integers(1, 5),
    data=st.data(),
)
def test_unpack_inverts_pack(bits, blocks, columns, data):
    count = blocks * packbits.block_codes(bits)
    values = st.integers(0, 2**bits - 1)
    flat = data.draw(st.lists(values, min_size=count * columns, max_size=count * columns))
    codes = torch.tensor(flat, dtype=torch.uint8).reshape(count, columns)
    packed = packbits.pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (count * bits // 32, columns)
    assert torch.equal(packbits.unpack(packed, bits), codes)


@given(
    bits=st.sampled_from(ALL_BITS),
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3),
)
def test_pack_inverts_unpack_for_every_word(bits, words):
    packed = torch.tensor(words, dtype=torch.int32)[:, None]
    assert torch.equal(packbits.pack(packbits.unpack(packed, bits), bits), packed)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_words_are_the_bit_stream(bits):
    codes = random_codes(bits, 3 * packbits.block_codes(bits), 4)
    packed = packbits.pack(codes, bits)
    for column in range(4):
        expected = stream_words(codes[:, column].tolist(), bits)
        assert unsigned(packed[:, column]) == expected


def test_a_4_bit_word_drawn_by_hand():
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]], dtype=torch.uint8)
    assert unsigned(packbits.pack(codes, 4)[0]) == [0x87654321]


def test_an_8_and_a_2_bit_word_drawn_by_hand():
    codes = torch.tensor([[0x01], [0x23], [0xCD], [0xFF]], dtype=torch.uint8)
    assert unsigned(packbits.pack(codes, 8)[0]) == [0xFFCD2301]
    codes = torch.tensor([0, 1, 2, 3] * 4, dtype=torch.uint8)[:, None]
    assert unsigned(packbits.pack(codes, 2)[0]) == [0xE4E4E4E4]


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (9, [0x7 << 27, 0, 0]),
        (10, [0x3 << 30, 0x1, 0]),  # two bits in the first word, one in the second
        (11, [0, 0x7 << 1, 0]),
        (20, [0, 0x7 << 28, 0]),
        (21, [0, 0x1 << 31, 0x3]),  # one bit in the second word, two in the third
        (22, [0, 0, 0x7 << 2]),
        (31, [0, 0, 0x7 << 29]),
    ],
)
def test_where_a_3_bit_code_lies(position, words):
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[position] = 7
    assert unsigned(packbits.pack(codes, 3)[:, 0]) == words


def test_columns_do_not_touch_each_other():
    codes = random_codes(3, 64, 3)
    apart = [packbits.pack(codes[:, i : i + 1], 3) for i in range(3)]
    assert torch.equal(packbits.pack(codes, 3), torch.cat(apart, 1))


@pytest.mark.parametrize(("bits", "codes"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_how_many_codes_fill_whole_words(bits, codes):
    assert packbits.block_codes(bits) == codes
    assert packbits.words(codes * 5, bits) == codes * 5 * bits // 32


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_count_that_does_not_fill_words_is_refused(bits):
    count = packbits.block_codes(bits) + 1
    with pytest.raises(ValueError, match=f"{count} codes of {bits} bits"):
        packbits.words(count, bits)
    with pytest.raises(ValueError, match="whole 32-bit words"):
        packbits.pack(torch.zeros(count, 1, dtype=torch.uint8), bits)


@pytest.mark.parametrize("total", [1, 2, 4])
def test_words_that_are_not_whole_3_bit_blocks_are_refused(total):
    with pytest.raises(ValueError, match=f"{total} words"):
        packbits.unpack(torch.zeros(total, 1, dtype=torch.int32), 3)
