"""Imports go one way, and nothing outside a family's folder says the family's name (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "npulab"
FAMILIES = [p.name for p in (SRC / "targets").iterdir() if (p / "__init__.py").exists() and p.name != "facts"]
MODULES = {".".join(p.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): p for p in SRC.rglob("*.py")}

ROWS = (
    ("errors", "units", "bits", "_kernels", "_sums", "_floats", "_rounding"),
    ("ir", "plan.types", "program.types", "profiling.types", "runtime.device", "targets.target"),
    ("dialects", "formats", "importers", "exporters", "reference", "passes", "postprocess", "quantization", "plan",
     "program", "runtime", "profiling", "gpu"),
    ("targets",),
    ("api", "atlas", "cliffs", "doors", "evaluation", "explaining", "patching", "probing", "quantizing",
     "quantizing_budget", "report", "rooflines", "samples", "sweep", "teardown", "validation", "zoo", "cli", "__init__",
     "__main__", ""),
)


def row(module):
    """The longest name of the table that the module begins with decides."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        for i, names in enumerate(ROWS):
            if ".".join(parts[:end]) in names:
                return i
    raise AssertionError(f"npulab.{module} is in no row of the table")


def imported(path):
    """(line, module) of every npulab module that the file imports, at its head or inside functions."""
    tree = ast.parse(path.read_text())
    typing_only = {n for b in ast.walk(tree) if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.unparse(b.test)
                   for n in ast.walk(b)}
    for n in ast.walk(tree):
        if n in typing_only:
            continue
        if isinstance(n, ast.Import):
            found = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            found = [f"{n.module}.{a.name}" if f"{n.module}.{a.name}".removeprefix("npulab.") in MODULES else n.module
                     for a in n.names]
        else:
            continue
        for name in found:
            if name == "npulab" or name.startswith("npulab."):
                yield n.lineno, name.removeprefix("npulab").removeprefix(".")


def family(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "targets" and len(parts) > 1 and parts[1] in FAMILIES else None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    if module == "targets.target":
        return  # its find function looks families up by folder
    for line, name in imported(MODULES[module]):
        assert row(name) <= row(module), f"npulab.{module}:{line} imports npulab.{name}, a row further on"
        assert family(name) in (None, family(module)), f"npulab.{module}:{line} reaches into another family"


def test_no_module_outside_a_family_names_it():
    for module, path in MODULES.items():
        for name in FAMILIES:
            assert family(module) == name or name not in path.read_text().lower(), f"npulab.{module} names {name}"


def test_the_front_door_offers_what_it_lists_and_loads_nothing_heavy():
    code = ("import sys, npulab; assert 'numpy' not in sys.modules and 'msgspec' not in sys.modules; "
            f"import npulab.api; npulab.api.profile({str(SRC / 'samples' / 'digits.tflite')!r}); "
            "assert not any(type(getattr(npulab, n)) is type(sys) for n in npulab.__all__); "  # a room of that name
            "assert set(npulab.__all__) <= set(dir(npulab))")

    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_loads_nothing_heavy_for_its_help():
    code = ("import sys, npulab.cli; heavy = {'numpy', 'msgspec', 'PIL', 'rich', 'ai_edge_litert'} & set(sys.modules); "
            "assert not heavy, heavy")

    subprocess.run([sys.executable, "-c", code], check=True)
