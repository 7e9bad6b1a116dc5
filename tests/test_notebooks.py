"""The notebooks run, solutions included, and what is committed of them is whole: outputs, links, sizes."""
import base64
import re
from pathlib import Path

import nbformat
import pytest

from notebooks import run

ROOT = Path(__file__).parent.parent
IDS = [p.stem for p in run.NOTEBOOKS]
BADGE = re.compile(r"https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([^)\s]+)")


def code_of(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def text_of(notebook):
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def solutions(notebook):
    return re.findall(r"<details>.*?```python\n(.*?)```", text_of(notebook), re.S)


def without_code(markdown):
    return re.sub(r"```.*?```", "", markdown, flags=re.S)


def test_there_are_three():
    assert [name[0] for name in IDS] == ["1", "2", "3"]


@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=IDS)
def test_notebook_runs_in_a_fresh_kernel_and_so_do_its_solutions(path):
    """With small counts; the cells' own asserts count."""
    notebook = nbformat.read(path, as_version=4)
    assert len(solutions(notebook)) == 2
    notebook.cells += [nbformat.v4.new_code_cell(s) for s in solutions(notebook)]
    run.execute(notebook, quick=True)


def test_an_error_in_a_cell_is_an_error(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3, 'so it stops'")])
    with pytest.raises(Exception, match="so it stops"):
        run.execute(notebook)


@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=IDS)
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


@pytest.mark.parametrize("path", run.NOTEBOOKS, ids=IDS)
def test_links_lead_to_files_and_sections(path):
    text = without_code(text_of(nbformat.read(path, as_version=4)))
    titles = {title.replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in titles, link
        else:
            file = (path.parent / link).resolve()
            assert file.is_relative_to(ROOT) and file.exists(), link


def test_badges_lead_to_the_notebooks_of_one_repository():
    repositories = set()
    for path in run.NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        (repository, file), = BADGE.findall(text_of(notebook))
        assert (ROOT / file).samefile(path)
        named, = re.findall(r'^REPOSITORY = "(.+?)"', code_of(notebook)[0].source, re.M)
        assert named == repository                      # the set-up cell clones what the badge opens
        repositories.add(repository)
    assert len(repositories) == 1


@pytest.mark.parametrize("name", ["README.md", "docs/your-data.md"])
def test_readme_and_docs_point_to_the_notebooks(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    linked = {((ROOT / name).parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.ipynb)\)", text)}
    assert linked and linked <= set(run.NOTEBOOKS)
    assert name != "README.md" or linked == set(run.NOTEBOOKS)


def test_what_is_kept_is_what_a_reader_sees():
    code = f"""import sys; print("\\r 10%|#", end="\\r 100%|##", file=sys.stderr); print("saved {ROOT}/runs/a.png")
print(file=sys.stderr)"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"widgets": {}})
    cell, = run.clean(run.execute(notebook)).cells
    assert {o.name: o.text for o in cell.outputs} == {"stderr": " 100%|##\n", "stdout": "saved ./runs/a.png\n"}
    assert not cell.metadata and "widgets" not in notebook.metadata
