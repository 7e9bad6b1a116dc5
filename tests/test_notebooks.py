"""The notebooks run, solutions included, and what is committed of them is whole: outputs, sizes, and all links."""
import base64
import re
from pathlib import Path

import nbformat
import pytest

from notebooks import run

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *run.NOTEBOOKS]
BADGE = re.compile(r"https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([^)\s]+)")
each_notebook = pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda p: p.stem)


def code_of(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def text_of(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")


def links_of(path):
    """Where its links lead that stay within the project."""
    text = re.sub(r"```.*?```", "", text_of(path), flags=re.S)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]


@each_notebook
def test_notebook_runs_in_a_fresh_kernel_and_so_do_its_solutions(path):
    """With small counts; the cells' own asserts count."""
    notebook = nbformat.read(path, as_version=4)
    solutions = re.findall(r"<details>.*?```python\n(.*?)```", text_of(path), re.S)
    assert len(solutions) == 2
    notebook.cells += [nbformat.v4.new_code_cell(s) for s in solutions]
    run.execute(notebook, quick=True)


@each_notebook
def test_committed_outputs_are_of_one_run_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_of(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))     # each executed, in order
    assert max(len(c.source.splitlines()) for c in cells) <= 12
    outputs = [o for c in cells for o in c.outputs]
    assert not any(o.output_type == "error" for o in outputs)
    figures = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert figures and max(map(len, figures)) <= 40 * 1024
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) <= 150 * 1024
    assert "widgets" not in notebook.metadata and "application/vnd.jupyter.widget" not in text
    assert not any(c.metadata for c in cells)                                       # no times of execution
    # no path of a machine; a stream's pieces and pictures aside, what is left is prose and code
    shown = "\n".join(o.get("text", "") + str({k: v for k, v in o.get("data", {}).items() if k != "image/png"})
                      for o in outputs)
    assert not re.search(r"/(home|root|tmp|usr|work|Users|content|opt)/|site-packages", shown)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_to_files_and_sections(path):
    for link in links_of(path):
        name, _, section = link.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_relative_to(ROOT) and file.exists(), link
        if section:     # Jupyter keeps a title as it is, GitHub lowers it without its points
            titles = [t.replace(" ", "-") for t in re.findall(r"^#+ (.+)$", text_of(file), re.M)]
            assert section in titles or section in [re.sub(r"[^\w-]", "", t).lower() for t in titles], link


def test_the_readme_and_the_badges_lead_to_the_notebooks_of_one_repository():
    linked = {(ROOT / link).resolve() for link in links_of(ROOT / "README.md") if link.endswith(".ipynb")}
    assert linked == set(run.NOTEBOOKS) and len(linked) == 3
    repositories = set()
    for path in run.NOTEBOOKS:
        (repository, file), = BADGE.findall(text_of(path))
        assert (ROOT / file).samefile(path)
        setup = code_of(nbformat.read(path, as_version=4))[0].source        # clones what the badge opens
        assert re.findall(r'^REPOSITORY = "(.+?)"', setup, re.M) == [repository]
        repositories.add(repository)
    assert len(repositories) == 1


def test_what_is_kept_is_what_a_reader_sees():
    code = f"""import sys; print("\\r 10%|#", end="\\r 100%|##", file=sys.stderr); print("saved {ROOT}/runs/a.png")
print(file=sys.stderr)"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"widgets": {}})
    cell, = run.clean(run.execute(notebook)).cells
    assert {o.name: o.text for o in cell.outputs} == {"stderr": " 100%|##\n", "stdout": "saved ./runs/a.png\n"}
    assert not cell.metadata and "widgets" not in notebook.metadata
