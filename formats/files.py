"""
Files that someone else wrote: checked here, so that whatever is wrong with one becomes a line that names it.

    config = read_json("config.json")                   # an object, or a UserError
    take = values(config, "config.json")                # take("hidden_size") -> a whole number, or a UserError
"""

import json
from pathlib import Path

from cli import MissingFile, UserError

MAX_BYTES = 10**8  # of a configuration or a tokenizer; Llama 3's tokenizer.json has 17 million
MAX_SIZE = 10**7  # of anything in a configuration: positions, vocabulary, width ...
KINDS = {int: "a whole number from 1 to {high:,}", float: "a number above 0", bool: "true or false"}


def expand(path):
    """A path with ~ and ~user written out."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise MissingFile(f"{path}: there is no such home folder: set HOME, or give a whole path "
                          "(of the cache: XDG_CACHE_HOME)") from None


def check_file(path):
    """The path, if a file is there that has an end: not a folder, and not a pipe or a device, on which one may wait."""
    path = Path(path)
    if not path.exists():
        raise MissingFile(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of a file")
    try:
        with open(path, "rb"):
            return path
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None


def read_text(path, limit=MAX_BYTES):
    """The text of a UTF-8 file."""
    size = check_file(path).stat().st_size
    if size > limit:
        raise UserError(f"{path} has {size:,} bytes, more than {limit:,}: is it the right file?")
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}): save it as UTF-8") from None


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # no JSON, endless digits, endless nesting
        raise UserError(f"{where}: not valid JSON ({e}); download or write it again") from None


def read_json(path, kind=dict, limit=MAX_BYTES):
    """What a JSON file holds: an object (dict) or a list."""
    value = parse_json(read_text(path, limit), path)
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {'object' if kind is dict else 'list'}, not {value!r:.40}")
    return value


def values(config, where):
    """
    A function that reads checked values out of a configuration: take(name, default, kind, high). kind int: a size, from
    1 to high; float: above 0 and finite; bool. Missing and null are the default, without one they are an error.
    """
    if not isinstance(config, dict):
        raise UserError(f"the configuration in {where} is {config!r:.40}, not an object with names and values")

    def take(name, default=None, kind=int, high=MAX_SIZE):
        value = config.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"the configuration in {where} lacks {name!r}: is it the whole file of the right model?")
        fits = isinstance(value, bool) == (kind is bool) and isinstance(value, (int, float) if kind is float else kind)
        if not fits or kind is int and not 1 <= value <= high or kind is float and not 0 < value < 1e15:
            what = KINDS[kind].format(high=high)
            raise UserError(f"the configuration in {where} has {name} = {value!r:.40}: it must be {what}")
        return value

    return take
