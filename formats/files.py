"""
Files that someone else wrote: checked here, so that whatever is wrong with one becomes a line that names it.

    config = read_json("config.json")                   # an object, or a UserError
    take = values(config, "config.json")                # take("hidden_size") -> a whole number, or a UserError
    tensors = open_safetensors("model.safetensors")     # {name: a function that reads it}; open_torch for .bin and .pth
"""
import contextlib
import functools
import json
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open

from cli import MissingFile, UserError

MAX_BYTES = 10**8  # of a configuration or a tokenizer; Llama 3's tokenizer.json has 17 million
MAX_SIZE = 10**7  # of anything in a configuration: positions, vocabulary, width ...
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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


def values(config, where, neutral={}):
    """A function that reads checked values out of a configuration: take(name, default, kind, high). kind int: a size,
    from 1 to high; float: above 0 and finite; bool. Missing and null are the default, without one they are an error.
    neutral: {name: the values that change nothing}; any other asks for what is not here, and is an error."""
    if not isinstance(config, dict):
        raise UserError(f"the configuration in {where} is {config!r:.40}, not an object with names and values")
    for name, nothing in neutral.items():
        if config.get(name) is not None and config[name] not in nothing:
            raise UserError(f"the configuration in {where} has {name} = {config[name]!r:.40}: "
                            + (f"only {nothing[0]} is implemented here" if nothing else "that is not implemented here"))

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


# ---- Weights --------------------------------------------------------------------------------------------------------
# No file can run code: safetensors hold none, and torch.load(weights_only=True) builds nothing but tensors.


@contextlib.contextmanager
def reading(path, what):
    """Any error in here becomes a UserError: the file is damaged, as `what` says, or there is too little memory."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:      # libraries raise many kinds
        why = repr(e) if isinstance(e, (LookupError, TypeError, AttributeError)) else str(e) or type(e).__name__
        why = "it holds more than tensors" if "Weights only" in why else why.splitlines()[0][:200]
        if isinstance(e, MemoryError) or any(w in why for w in ("unable to mmap", "allocate")):
            raise UserError(f"{path}: too little memory to read it ({why})") from None
        raise UserError(f"{path} {what} ({why}): download it again") from None


def checked(tensor, name, path):
    """A weight out of a file, if its numbers are real ones: a cast of others would be nonsense in silence."""
    if tensor.dtype not in FLOATS:
        raise UserError(f"{path}: {name} holds {str(tensor.dtype)[6:]}, not floating-point numbers: "
                        "if this checkpoint is quantized, take the original")
    return tensor


def open_safetensors(path):
    """{name: a function that reads this tensor}"""
    def read(name):     # opened anew for each tensor: the pages of those already copied elsewhere are then given back
        with reading(path, f"holds {name}, which could not be read"), safe_open(path, framework="pt") as file:
            return checked(file.get_tensor(name), name, path)

    with reading(check_file(path), "is truncated or not a safetensors file"), safe_open(path, framework="pt") as file:
        return {name: functools.partial(read, name) for name in file.keys()}


def open_torch(path):
    """The same of a .bin or .pth."""
    with reading(check_file(path), "is truncated or not a PyTorch weight file"):
        if zipped := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:     # torch.save compresses nothing: what unpacks to more is a bomb
                if sum(part.file_size for part in file.infolist()) > Path(path).stat().st_size:
                    raise ValueError("it unpacks to more than itself")
        # mmap (needs the zip of torch >= 1.6): a page is read when a tensor is used, so 70B cost no memory
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        state = state.get("model", state)   # the paper's released checkpoints wrap it with epoch and global_step
        tensors = {str(n): t for n, t in state.items() if torch.is_tensor(t) and t.layout == torch.strided}
        for n, t in tensors.items():            # on the meta device, or one number made to look like many
            if t.is_meta or t.numel() * t.element_size() > t.untyped_storage().nbytes():
                raise ValueError(f"{n} has a shape without its numbers")
        return {n: functools.partial(checked, t, n, path) for n, t in tensors.items()}
