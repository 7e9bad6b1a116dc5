"""Kinds of error, each looked for at every place where it could be: a new place of the same kind is found, too."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [f for f in sorted(ROOT.rglob("*.py")) if f.relative_to(ROOT).parts[0] not in ("tests", "runs", ".venv")]


def calls(file):
    """(a call's name, "method" or "function", the call) of every call in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            method = isinstance(node.func, ast.Attribute)
            of = node.func.value.id if method and isinstance(node.func.value, ast.Name) else ""
            yield node.func.attr if method else node.func.id, of if method else None, node


# ---- Text is UTF-8, whatever the locale says ------------------------------------------------------------------------


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_text_file_names_its_encoding(file):
    """What opens a text, or the output of another program, says UTF-8; `text=True` would be the locale's encoding."""
    for name, of, call in calls(file):
        said = {k.arg: k.value for k in call.keywords}
        reads = name in ("read_text", "write_text") and of not in (None, "files") or name == "open" and of is None
        reads |= name == "open" and of not in (None, "Image", "os")
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args[:2])
        assert not reads or binary or "encoding" in said, f"{file}:{call.lineno}"
        if of == "subprocess":
            assert "text" not in said and "universal_newlines" not in said, f"{file}:{call.lineno}"


def test_a_run_in_another_locale(tmp_path):
    """Python's UTF-8 mode switched off, the locale C: the world's instructions, its export and a Chinese record."""
    code = ("from data.world import instructions, caption; from data import check, export; "
            "assert not any('\\udc80' <= c <= '\\udcff' for _, q, a in instructions() for c in q + a); "
            f"export.export({str(tmp_path / 'toy')!r}, 3); assert caption(('flag', 'Peru'))")
    env = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy/data.json").exists()
