"""
Execute the notebooks anew and keep their outputs: ten minutes on two cores.

    python notebooks/run.py         # all of them
    python notebooks/run.py 3       # those whose names begin so

For a fork: sed -i 's#OWNER/REPO#you/yours#g' notebooks/*.ipynb changes what the badges and the set-up cells name.
"""
import base64
import io
import os
import re
import sys
import time
from pathlib import Path

from PIL import Image

try:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, DeadKernelError
except ImportError:
    nbformat = None

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # run as a script, only this folder is on the path
from cli import MissingFile, Parser, UserError, run_cli, write_whole  # noqa: E402

NOTEBOOKS = sorted(HERE.glob("*.ipynb"))


def execute(notebook, quick=False, timeout=1800):
    """Run all cells of a notebook in a fresh kernel, in place; the first error stops it. quick: with small counts.

    timeout: seconds for one cell. Nothing of the time or of this machine is noted in the notebook.
    """
    env = {k: v for k, v in os.environ.items() if k != "QUICK"} | ({"QUICK": "1"} if quick else {})
    # coalesce_streams: the pieces of a stream become one, and of a progress bar its last state is left
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False,
                            coalesce_streams=True, resources=dict(metadata=dict(path=str(HERE))))
    client.execute(env=env)
    return notebook


def clean(notebook):
    """Keep of the outputs what a reader wants to see: no path of this machine, no times, few colors."""
    notebook.metadata = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"),
                             language_info=dict(name="python"))
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        cell.metadata = {}
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = without_paths(output.text)
            output.get("data", {}).pop("image/jpeg", None)              # a picture's second form
            for kind, content in output.get("data", {}).items():
                if kind == "image/png":
                    output.data[kind] = few_colors(content)
                elif isinstance(content, str):
                    output.data[kind] = without_paths(content)
    return notebook


def without_paths(text):
    for path, name in ((HERE.parent, "."), (sys.prefix, "…"), (os.path.expanduser("~"), "~")):
        text = text.replace(str(path), name)
    return re.sub(r" at 0x[0-9a-f]{6,}", "", text)


def few_colors(png):
    """A PNG in base64 with 64 colors: a third of the size, and no difference to be seen."""
    small = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]).convert("RGB")
    image.quantize(64).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", default=[""], help="how the notebooks' names begin (default: all)")
    args = parser.parse_args(argv)
    if nbformat is None:
        raise MissingFile("notebooks need nbclient and more: pip install -r requirements-dev.txt")
    chosen = [p for p in NOTEBOOKS if p.name.startswith(tuple(args.names))]
    if not chosen:
        raise UserError(f"no notebook begins with {' or '.join(args.names)}: there are {[p.name for p in NOTEBOOKS]}")
    for path in chosen:
        start = time.perf_counter()
        try:
            notebook = clean(execute(nbformat.read(path, as_version=4)))
        except (CellControlSignal, DeadKernelError) as e:           # a cell that failed, or took too long
            lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
            raise UserError(f"{path.name}: a cell failed: {lines[-1]}") from None
        write_whole(path, lambda part: nbformat.write(notebook, part))
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    sys.exit(run_cli(main))
