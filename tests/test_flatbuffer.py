"""Reading and writing FlatBuffers: right against LiteRT's generated reader, and refusing what is not in the file."""

import contextlib
import random
import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import ModelError, UsageError
from npulab.formats import flatbuffer
from npulab.formats.flatbuffer import Schema, Table, pack
from npulab.formats.tflite import schema as tflite_schema

SCHEMA = Schema.parse("""
# an example
enum Color u8 RED=0 GREEN=1 BLUE=7
enum Extras u8 NONE=0 Point=1 Note=2
table Note text:string
table Point x:f32 y:f32=1.5 color:Color=GREEN path:[i32] colors:[Color] next:Point _ picture:[u8]@16 extra:union:Extras
table Root points:[Point] big:i64 yes:bool=true
""")

POINT = {
    "x": 0.25, "y": -2.0, "color": 7, "path": (1, -2, 3), "colors": memoryview(b"\0\x07"),
    "picture": memoryview(b"123"), "extra_type": 2, "extra": ("Note", {"text": "größer"}),
}
CONTENT = {"points": [POINT, {}, {"next": {"x": 3.0}}], "big": -(2**60), "yes": False}


def read(data: bytes) -> Table:
    return Table.root(SCHEMA, "Root", memoryview(data))


def write(content) -> bytes:
    return pack(SCHEMA, "Root", content, b"TEST")


def offset_of(data: bytes, needle: bytes) -> int:
    assert data.count(needle) == 1
    return data.index(needle)


def test_unpack_gives_back_what_was_packed():
    assert read(write(CONTENT)).unpack() == CONTENT


def test_equal_content_gives_equal_bytes_whatever_the_order_of_its_fields():
    turned = {k: CONTENT[k] for k in reversed(CONTENT)}
    turned["points"] = [{k: POINT[k] for k in reversed(POINT)}, {}, {"next": {"x": 3.0}}]

    assert write(turned) == write(CONTENT)


def test_an_absent_field_has_its_default():
    _, bare, _ = read(write(CONTENT)).tables("points")

    assert (bare.number("x"), bare.number("y"), bare.choice("color")) == (0.0, 1.5, "green")
    assert bare.numbers("path") == ()
    assert bare.view("picture") is bare.table("next") is bare.union("extra") is None
    assert not bare.has("x")


def test_values_are_given_for_people():
    point = next(read(write(CONTENT)).tables("points"))

    assert point.value("color") == "blue"
    assert point.value("colors") == ("red", "blue")
    assert point.value("picture") == b"123"
    assert point.value("path") == (1, -2, 3)


def test_a_byte_vector_is_a_view_of_the_file_and_aligned_as_declared():
    data = memoryview(write(CONTENT))
    picture = next(Table.root(SCHEMA, "Root", data).tables("points")).view("picture")

    assert picture.obj is data.obj
    assert offset_of(bytes(data), b"123") % 16 == 0


def test_enums_are_packed_by_name_in_any_case():
    first = next(read(write({"points": [{"color": "blue", "colors": ["RED", "green"]}]})).tables("points"))

    assert (first.choice("color"), first.numbers("colors")) == ("blue", (0, 1))


@pytest.mark.parametrize(("content", "message"), [
    ({"point": []}, "Root has no field point\n  want    points, big, yes"),
    ({"points": [{"color": "pink"}]}, "Point.color cannot be 'pink'\n  want    RED, GREEN, BLUE"),
    ({"big": 2**63}, "Root.big cannot be 9223372036854775808\n  want    i64"),
    ({"points": [{"path": [2**31]}]}, None),
])
def test_a_value_that_does_not_fit_the_schema_is_refused(content, message):
    with pytest.raises(UsageError) as e:
        write(content)

    assert message is None or str(e.value) == message


def test_the_path_to_a_table_names_fields_and_positions():
    *_, last = read(write(CONTENT)).tables("points")

    assert last.table("next").path == "Root.points[2].next"


# Damaged files


def test_a_file_that_ends_before_its_first_table():
    with pytest.raises(ModelError) as e:
        read(b"\4\0\0\0")

    assert str(e.value) == (
        "the file is damaged: it ends before its first table\n"
        "  got     4 bytes\n"
        "  try     get the file again"
    )


def test_a_root_outside_the_file():
    with pytest.raises(ModelError) as e:
        read(struct.pack("<I", 1000) + b"TEST" + bytes(8))

    assert str(e.value) == (
        "the file is damaged: a table lies outside it\n"
        "  where   byte 1000 of 16, Root\n"
        "  try     get the file again"
    )


def test_a_vector_that_claims_more_than_the_file_holds():
    data = bytearray(write({"points": [{"path": [77, 78, 79]}]}))
    at = offset_of(data, struct.pack("<4I", 3, 77, 78, 79))
    struct.pack_into("<I", data, at, 2**31)
    point = next(read(bytes(data)).tables("points"))

    with pytest.raises(ModelError) as e:
        point.numbers("path")

    assert str(e.value) == (
        "the file is damaged: a vector is longer than the file\n"
        "  got     2147483648 elements of 4 bytes\n"
        f"  where   byte {at} of {len(data)}, Root.points[0].path\n"
        "  try     get the file again"
    )


def test_an_unknown_enum_value_where_one_must_be_known():
    first = next(read(write({"points": [{"color": 9}]})).tables("points"))

    assert first.value("color") == 9
    with pytest.raises(ModelError, match="Color has no value 9") as e:
        first.choice("color")
    assert e.value.facts["want"] == "red, green, blue"


def test_every_truncation_is_refused_or_harmless():
    data = write(CONTENT)
    for length in range(len(data)):
        with pytest.raises(ModelError):
            read(data[:length]).unpack()


def test_a_table_that_contains_itself_ends():
    data = bytearray(write({"points": [{"next": {"x": 3.0}}]}))
    outer = next(read(bytes(data)).tables("points"))
    at = outer._find(SCHEMA.tables["Point"]["next"], 4)
    struct.pack_into("<I", data, at, (outer._at - at) % 2**32)  # offsets point forward, so this leaves the file
    with pytest.raises(ModelError, match="an offset points outside it"):
        read(bytes(data)).unpack()

    deep = {"x": 1.0}
    for _ in range(flatbuffer.DEPTH_MAX):
        deep = {"next": deep}
    with pytest.raises(ModelError, match="tables are nested too deep"):
        read(write({"points": [deep]})).unpack()


def shared_table(count: int) -> bytes:
    """A file whose vector `points` has `count` entries, all of them the same table with a long vector."""
    data = bytearray(write({"points": [{}] * count + [{"path": range(count)}]}))
    *_, last = read(bytes(data)).tables("points")
    start, _ = read(bytes(data))._vector(SCHEMA.tables["Root"]["points"], 4)
    for i in range(count):
        struct.pack_into("<I", data, start + 4 * i, last._at - (start + 4 * i))
    return bytes(data)


def test_a_small_file_that_means_a_huge_one_is_refused_soon():
    """4,000 pointers to one vector of 4,000 numbers would be 16 million numbers."""
    data = shared_table(4_000)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(ModelError, match="its parts are used over and over") as e:
            read(data).unpack()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert time.perf_counter() - begin < 2
    assert peak < 40 * len(data)
    assert e.value.facts["want"].startswith("at most 2 bytes read per byte of file")


def test_what_the_schema_does_not_know_is_not_dropped_in_silence():
    newer = Schema.parse("table Note text:string\ntable Root points:[Note] big:i64 yes:bool more:i32")
    data = pack(newer, "Root", {"more": 5}, b"TEST")

    assert read(data).integer("big") == 0
    with pytest.raises(ModelError) as e:
        read(data).unpack()
    assert str(e.value) == (
        "the file is newer than this npulab: it does not know fields of Root\n"
        "  where   Root\n"
        "  try     update npulab, or convert the model with an older converter"
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4))
def test_damage_gives_an_error_of_ours_or_other_content(changes):
    data = bytearray(write(CONTENT))
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new[: len(data) - at]
    with contextlib.suppress(ModelError):
        read(bytes(data)).unpack()


# LiteRT's reader as witness


def sample(rng: random.Random, name: str, depth: int = 3) -> dict:
    """A table of the TFLite schema with something in nearly every field."""
    s = tflite_schema()

    def number(f):
        if f.kind in s.enums:
            return rng.choice(list(s.enums[f.kind].values()))
        if f.scalar == "bool":
            return rng.random() < 0.5
        return rng.randrange(-100, 100) / 4 if f.scalar[0] == "f" else rng.randrange(100)

    out = {}
    for f in s.tables[name].values():
        if rng.random() < 0.2 or (depth == 0 and not f.scalar):
            continue
        if f.union:
            member = rng.choice([m for m in s.enums[f.kind] if m != "NONE"])
            out[f.name] = (member, sample(rng, member, depth - 1))
        elif f.vector and not f.scalar:
            out[f.name] = [sample(rng, f.kind, depth - 1) for _ in range(rng.randrange(1, 3))]
        elif f.vector:
            out[f.name] = [number(f) for _ in range(rng.randrange(1, 5))]
        elif f.kind == "string":
            out[f.name] = f"text {rng.randrange(1000)}"
        elif f.scalar and f"{f.name.removesuffix('_type')}" in s.tables[name] and f.name.endswith("_type"):
            continue
        else:
            out[f.name] = number(f) if f.scalar else sample(rng, f.kind, depth - 1)
    return out


def same(ours, theirs, name: str) -> None:
    """Compare a dictionary of ours with an object of LiteRT's generated reader."""
    attributes = {k.lower(): v for k, v in vars(theirs).items()}
    for f in tflite_schema().tables[name].values():
        found = attributes[f.name.replace("_", "").lower()]
        if f.name not in ours:
            if f.scalar and not f.vector and not f.name.endswith("_type"):
                assert found == f.default, (name, f.name)
            continue
        value = ours[f.name]
        if f.union:
            assert type(found).__name__ == f"{value[0]}T"
            same(value[1], found, value[0])
        elif f.vector and not f.scalar:
            for one, other in zip(value, found, strict=True):
                same(one, other, f.kind)
        elif f.vector:
            assert list(value) == list(found), (name, f.name)
        elif f.kind == "string":
            assert value == found.decode()
        elif f.scalar:
            assert value == found, (name, f.name)
        else:
            same(value, found, f.kind)


@pytest.mark.parametrize("name", sorted(tflite_schema().tables))
def test_litert_reads_what_we_write_and_we_read_what_litert_writes(name):
    witness = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs LiteRT as witness")
    import flatbuffers

    content = sample(random.Random(name), name)
    data = pack(tflite_schema(), name, content, b"TFL3")
    theirs = getattr(witness, f"{name}T").InitFromPackedBuf(data)
    same(content, theirs, name)

    builder = flatbuffers.Builder(64)
    builder.Finish(theirs.Pack(builder), b"TFL3")
    again = Table.root(tflite_schema(), name, memoryview(bytes(builder.Output()))).unpack()
    same(again, theirs, name)
