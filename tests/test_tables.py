"""Generated tables are fresh, and every table has a place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("medmamba_tables", CHECKOUT / "tools" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()
DOCUMENTS = [path for path in tables.documents() if tables.MARKED.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_tables_are_fresh(path):
    text = path.read_text(encoding="utf-8")
    assert tables.refreshed(text) == text, "stale; run `python tools/tables.py`"


def test_every_table_stands_in_a_document():
    used = {match["name"] for path in DOCUMENTS for match in tables.MARKED.finditer(path.read_text())}
    assert used == set(tables.TABLES)


def test_the_readme_holds_the_networks_table():
    names = [match["name"] for match in tables.MARKED.finditer((CHECKOUT / "README.md").read_text())]
    assert names == ["networks-readme"]


def test_a_stale_table_is_seen_and_an_unknown_one_refused():
    text = "<!-- table: ssm-modes -->\nold\n<!-- end table -->\n"
    assert "old" not in tables.refreshed(text)
    with pytest.raises(KeyError, match="known: block-options, changes"):
        tables.refreshed("<!-- table: nothing -->\n<!-- end table -->")


def test_counts_agree_with_a_network_that_has_memory():
    from medmamba.networks import create_network

    network = create_network("vmunet", tables.INPUT_CHANNELS, tables.NUM_CLASSES, strides=tables.STRIDES)
    total = sum(parameter.numel() for parameter in network.parameters())
    assert tables.count_parameters("vmunet", strides=tables.STRIDES) == total
