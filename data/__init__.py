"""
What is shown in training.

images.py    from a file to what CLIP expects          llava.py    LLaVA's JSON, checked record by record
world.toml   what the drawn world holds and asks: TABLE; world.py makes samples of it, drawing.py draws them
batches.py   a sample, the order in which samples come, and a batch of them
sources.py   what a run reads: a new dataset goes in here
export.py    the drawn world as PNGs with LLaVA's JSON      check.py    what a run would meet in such a folder
icons.py     icon sets of several artists, likewise
"""
import tomllib
from pathlib import Path

TABLE = tomllib.loads(Path(__file__).with_name("world.toml").read_text(encoding="utf-8"))
