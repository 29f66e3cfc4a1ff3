"""What the type checkers say: nothing about the package, the tests' actions and the example; exactly the expected about wrong lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROJECT = TESTS.parent
WRONG = TESTS / "typing" / "wrong.py"
RIGHT = [PROJECT / "src" / "dagorama", PROJECT.parent / "examples" / "pages.py", TESTS / "flows.py", TESTS / "typing" / "right.py"]
Found = dict[int, set[str]]


def mypy(*paths: Path) -> Found:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", str(PROJECT / "pyproject.toml"), "--no-error-summary",
         "--hide-error-context", *map(str, paths)], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode in (0, 1), done.stderr + done.stdout
    found: Found = {}
    for line in done.stdout.splitlines():
        if said := re.fullmatch(r"[^:]+:(\d+): error: .*\[([a-z-]+)\]", line):
            found.setdefault(int(said[1]), set()).add(said[2])
    assert bool(found) == bool(done.returncode), done.stdout
    return found


def pyright(*paths: Path) -> Found:
    config = PROJECT / "pyproject.toml"
    done = subprocess.run([sys.executable, "-m", "pyright", "-p", str(config), "--outputjson", *map(str, paths)],
                          capture_output=True, text=True, cwd=PROJECT, env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})
    said = json.loads(done.stdout)
    assert said["summary"]["filesAnalyzed"] >= len(paths), said
    found: Found = {}
    for one in said["generalDiagnostics"]:
        if one["severity"] == "error":
            found.setdefault(one["range"]["start"]["line"] + 1, set()).add(one["rule"])
    return found


def expected(which: int) -> Found:
    found: Found = {}
    for number, line in enumerate(WRONG.read_text().splitlines(), 1):
        if said := re.search(r"  # ([a-z, -]+) \| ([A-Za-z, ]+)$", line):
            found[number] = set(said[which + 1].split(", "))
    return found


def test_there_are_enough_wrong_lines() -> None:
    assert len(expected(0)) >= 14 and expected(0).keys() == expected(1).keys()


@pytest.mark.timeout(300)
def test_mypy_rejects_exactly_the_wrong_lines() -> None:
    assert mypy(WRONG) == expected(0)


@pytest.mark.timeout(300)
def test_pyright_rejects_exactly_the_wrong_lines() -> None:
    assert pyright(WRONG) == expected(1)


@pytest.mark.timeout(300)
def test_both_accept_what_is_right() -> None:
    assert mypy(*RIGHT) == {}
    assert pyright(*RIGHT) == {}
