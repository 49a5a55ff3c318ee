"""Layouts: one declaration encodes, decodes and documents; what does not fit says so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npulab.bits import Layout, field
from npulab.errors import InvariantError
from npulab.targets.vivante.nn import NNDescriptor
from npulab.targets.vivante.tp import TPDescriptor


class Move(Layout, words=2, source="Example TRM 4.2"):
    width: int = field("w0[0:12]", unit="px")
    scattered: int = field("w0[31] w1[0:3]", default=0)
    offset: int = field("w1[4:7]", signed=True)
    address: int = field("w1[8:20]", scale=64, unit="B")


def test_a_layout_puts_each_piece_where_it_is_declared():
    words = Move(width=5, scattered=0b10011, offset=-1, address=640).encode()

    assert words == [5 | 1 << 31, 0b1001 | 0xF << 4 | 10 << 8]
    assert Move.decode(words) == Move(width=5, scattered=0b10011, offset=-1, address=640)


def test_a_value_that_does_not_fit_names_field_bits_and_source():
    with pytest.raises(InvariantError) as e:
        Move(width=8192, offset=0, address=0)

    assert str(e.value) == (
        "Move.width = 8192 px does not fit\n  want    0..8191\n  bits    w0[0:12]\n  source  Example TRM 4.2"
    )


def test_a_value_off_its_grid_says_the_step():
    with pytest.raises(InvariantError, match=r"Move.address = 65 B does not fit\n  want    0..524224, in steps of 64"):
        Move(width=0, offset=0, address=65)


def test_overlapping_fields_are_refused_when_the_class_is_made():
    with pytest.raises(InvariantError, match="overlaps"):

        class Bad(Layout, words=1, source="nowhere"):
            a: int = field("w0[0:3]")
            b: int = field("w0[3:4]")


def test_bits_no_field_names_are_reported_by_word():
    assert Move.unknown_bits([1 << 13, 1 << 31]) == [(0, 1 << 13), (1, 1 << 31)]


@pytest.mark.parametrize("layout", [NNDescriptor, TPDescriptor])
@given(data=st.data())
def test_what_a_descriptor_encodes_it_decodes(layout, data):
    values = {}
    for name, f in layout.fields.items():
        low, high = f.range
        values[name] = data.draw(st.integers(low // f.scale, high // f.scale)) * f.scale

    one = layout(**values)

    assert layout.decode(one.encode()) == one
    assert layout.unknown_bits(one.encode()) == []
