"""The one chain that this gateway knows by name is `lucid_blocks`. Of TRON it knows a signature and an address, in one
file; payments, nodes and their libraries are another cluster's.
"""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import ROOT

HOME = ROOT / "lucid/core/security/tron.py"
TYPES = ROOT / "lucid/core/validation.py"
FILES = sorted(path for path in (ROOT / "lucid").rglob("*.py") if path != HOME)

# The word; "electron" and "strong" are others.
_WORD = re.compile(r"(?<![a-z])tron", re.IGNORECASE)
_ALLOWED = re.compile(r"\w*tron_address\w*|TronAddress", re.IGNORECASE)


def _address_type(source: str) -> range:
    """The lines that define the type of an address."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "TronAddress" for target in node.targets
        ):
            return range(node.lineno, (node.end_lineno or node.lineno) + 1)
    raise AssertionError("there is no TronAddress")


def _imports(source: str) -> set[int]:
    """The lines that import the one file."""
    return {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == "lucid.core.security.tron"
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def _mentions(path: Path) -> Iterator[str]:
    source = path.read_text()
    excused = _imports(source) | set(_address_type(source) if path == TYPES else ())
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[0] not in excused and _WORD.search(_ALLOWED.sub("", token.string)):
            yield f"{path.relative_to(ROOT)}:{token.start[0]}: {token.line.strip()}"


def test_the_test_sees_what_it_looks_for(tmp_path: Path) -> None:
    sample = ROOT / "lucid" / "__main__.py"
    assert not list(_mentions(sample))
    for text in (
        "tron = 1",
        "# TRON",
        "x = 'a tron node'",
        "from lucid.core.security import tron",
        "tronpy()",
    ):
        assert _WORD.search(_ALLOWED.sub("", text)), text
    for text in ("find_by_tron_address", "ADMIN_TRON_ADDRESSES", "TronAddress", "electron", "strong"):
        assert not _WORD.search(_ALLOWED.sub("", text)), text


def test_tron_is_known_in_one_file_and_by_its_address() -> None:
    assert not [mention for path in FILES for mention in _mentions(path)]


def test_no_library_of_a_chain_is_installed_or_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = " ".join(
        [*project["dependencies"], *map(str, project["optional-dependencies"].values())]
    ).lower()
    for name in ("tronpy", "tronweb", "web3", "eth-account", "eth_account"):
        assert name not in declared
        for lock in (ROOT / "requirements").glob("*.txt"):
            assert f"\n{name}==" not in lock.read_text(), (name, lock)


@pytest.mark.parametrize("word", ["trc20", "trx", "usdt", "payout", "sunswap"])
def test_there_is_nothing_of_payments(word: str) -> None:
    found = re.compile(rf"\b{word}", re.IGNORECASE)
    assert not [path for path in FILES if found.search(path.read_text())]


def test_the_chain_is_called_lucid_blocks() -> None:
    assert 'chain="lucid_blocks"' in (ROOT / "lucid/blueprints/meta.py").read_text()
