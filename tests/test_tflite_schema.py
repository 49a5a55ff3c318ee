"""The schema table against an outside witness: the reader and writer that LiteRT ships, generated from schema.fbs."""

import inspect
import re

import pytest

from npulab.errors import InvariantError
from npulab.formats.flatbuffer import Schema
from npulab.formats.tflite import options_of, schema

try:
    from ai_edge_litert import schema_py_generated as witness
except ImportError:
    witness = None

needs_litert = pytest.mark.skipif(witness is None, reason="needs LiteRT as witness: pip install 'npulab[litert]'")

SCALAR = {"Bool": "bool", "Int8": "i8", "Uint8": "u8", "Int16": "i16", "Uint16": "u16", "Int32": "i32",
          "Uint32": "u32", "Int64": "i64", "Uint64": "u64", "Float32": "f32", "Float64": "f64"}
SIZE = {"bool": 1, "i8": 1, "u8": 1, "u16": 2, "i32": 4, "u32": 4, "f32": 4, "i64": 8, "u64": 8}


class Recorder:
    """Stands in for a flatbuffers Builder and writes down what it is asked to do."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, method):
        return lambda *args: self.calls.append((method, args))


def record(function, *args):
    recorder = Recorder()
    function(recorder, *args)
    return recorder.calls[0]


def plain(name):
    return name.replace("_", "").lower()


def witness_tables():
    return {n for n, c in vars(witness).items() if inspect.isclass(c) and hasattr(c, "GetRootAs")}


def witness_enums():
    return {
        n: {k: v for k, v in vars(c).items() if isinstance(v, int) and not k.startswith("__")}
        for n, c in vars(witness).items()
        if inspect.isclass(c) and not hasattr(c, "GetRootAs") and not hasattr(c, "InitFromBuf")
    }


def witness_fields(table):
    """plain name -> (number, scalar or "", default), by what the generated writer does with a field."""
    fields = {}
    for name, function in vars(witness).items():
        if match := re.fullmatch(f"{table}Add(.+)", name):
            method, (number, _, default) = record(function, 0)
            fields[plain(match[1])] = (number, SCALAR.get(method[len("Prepend"):-len("Slot")], ""), default)
    return fields


def witness_element(table, field):
    """What the generated reader returns for a field that is an offset: "string", a table, "[scalar]", "[table]" or
    "union"."""
    for name, method in vars(getattr(witness, table)).items():
        if plain(name) == plain(field) and callable(method):
            source = inspect.getsource(method)
            vector = ", j)" in source.splitlines()[0]
            if match := re.search(r"\bobj = (\w+)\(\)", source):
                kind = match[1]
            elif "Table(bytearray(), 0)" in source:
                return "union"
            elif "_tab.String(" in source:
                kind = "string"
            else:
                kind = SCALAR[re.search(r"_tab.Get\(flatbuffers.number_types.(\w+)Flags", source)[1]]
            return f"[{kind}]" if vector else kind
    raise AssertionError(f"{table}.{field} has no reader")


@needs_litert
def test_the_tables_are_those_of_litert():
    assert set(schema().tables) == witness_tables()


@needs_litert
def test_the_enums_are_those_of_litert_value_for_value():
    assert schema().enums == witness_enums()


@needs_litert
@pytest.mark.parametrize("table", sorted(schema().tables))
def test_numbers_types_and_defaults_of_a_table_are_those_of_litert(table):
    ours = {plain(f.name): (f.index, "" if f.vector else f.scalar, f.default if f.scalar and not f.vector else 0)
            for f in schema().tables[table].values()}

    expected = witness_fields(table)

    assert ours == expected
    method, (width,) = record(getattr(witness, f"{table}Start"))
    assert (method, width) == ("StartObject", schema().widths[table])


@needs_litert
@pytest.mark.parametrize("table", sorted(schema().tables))
def test_the_kind_behind_every_offset_is_that_of_litert(table):
    for f in schema().tables[table].values():
        if f.scalar and not f.vector:
            continue
        ours = "union" if f.union else f"[{f.scalar or f.kind}]" if f.vector else f.kind
        assert ours == witness_element(table, f.name), f.name
        if f.vector:
            start = next(w for n, w in vars(witness).items() if plain(n) == plain(f"{table}Start{f.name}Vector"))
            method, (size, _, _) = record(start, 1)
            assert (method, size) == ("StartVector", SIZE.get(f.scalar, 4)), f.name


def test_every_table_of_options_belongs_to_an_operator():
    tables = {place[1] for op in schema().enums["BuiltinOperator"] if (place := options_of(op))}

    assert tables == (set(schema().enums["BuiltinOptions"]) | set(schema().enums["BuiltinOptions2"])) - {"NONE"}


def test_every_member_of_a_union_is_a_table():
    for enum in ("BuiltinOptions", "BuiltinOptions2", "QuantizationDetails", "SparseIndexVector"):
        assert set(schema().enums[enum]) - {"NONE"} <= set(schema().tables)


def test_a_schema_line_with_an_undeclared_type_is_refused():
    with pytest.raises(InvariantError) as e:
        Schema.parse("table Point x:f33")

    assert str(e.value) == (
        "schema field 'x:f33' has a type that nothing declares\n"
        "  want    a scalar, enum or table"
    )


def test_a_schema_line_that_is_neither_enum_nor_table_is_refused():
    with pytest.raises(InvariantError) as e:
        Schema.parse("struct Point x:f32")

    assert str(e.value) == "a schema line begins with 'struct'\n  want    enum or table"
