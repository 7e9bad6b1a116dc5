"""
What all command lines share. Errors that a user can make become one line, exit status 2, no traceback.

    parser = Parser(__doc__)                                        # argparse, whose own errors are one line, too
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED))    # every number has a range, checked first
    parser.add_device()                                             # --device, one that this machine has
    check_out(args.out)                                             # can a file be written there? asked before the work
    write_whole(path, write)                                        # a file appears whole or not at all
    sys.exit(run_cli(main))
"""
import argparse
import errno
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

MAX_SEED = 10**9


class UserError(ValueError, argparse.ArgumentTypeError):
    """An error that a user can make: the command line prints it in one line, exit status 2. (As ArgumentTypeError it
    may come from the type of an option: argparse then puts the option's name before it.)"""


class MissingFile(UserError, FileNotFoundError):
    """A file, folder or model that is not there."""


class Parser(argparse.ArgumentParser):
    """argparse with a file's docstring as its help; what it refuses is a UserError like any other."""

    def __init__(self, doc, **options):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_device(self):
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", type=available_device, default=default, help="default: %(default)s")

    def add_run(self, out):
        """The options of every training run. out: its folder, where none is given."""
        self.add_argument("settings", nargs="*", metavar="key=value", help="changes a number of the recipe, see below")
        self.add_argument("--out", default=out, help=f"folder for checkpoint, log and plot (default: {out})")
        self.add_argument("--resume", action="store_true",
                          help="go on from the checkpoint in --out, exactly as if never stopped")
        self.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0,
                          help="of new weights, and of the order and contents of the samples (default: %(default)s)")
        self.add_device()

    def parse_known_args(self, args=None, namespace=None):      # all ways to parse come by here
        known, rest = super().parse_known_args(args, namespace)
        for action in self._actions:        # --data "$DATA" without a DATA: another experiment, in silence
            value = getattr(known, action.dest, None)
            if (value == "" or isinstance(value, list) and "" in value) and value != action.default:
                self.error(f"{'/'.join(action.option_strings) or action.dest}: an empty name says nothing")
        return known, rest

    def error(self, message):
        raise UserError(f"{message} (--help shows what there is)")


def printable(text):
    """Text that someone else wrote, for a terminal: what a terminal acts on, such as an escape, is spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def number(kind, low, high):
    """The type of an option that takes a whole number (int) or any (float) in a range, ends included."""

    def read(text):
        try:
            x = kind(text)
            x = x if isinstance(text, str) or x == text else math.nan       # 2.7 is no whole number
        except (ValueError, TypeError, OverflowError):
            x = math.nan
        if not low <= x <= high:  # so written that nan fails, too
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"must be {what} between {low:,} and {high:,}, not {text!s:.40}")
        return x

    return read


def available_device(name):
    """The type of --device: the name of a device that this machine has."""
    there, gpu = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
    if gpu:
        there += [gpu.type, *(f"{gpu.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in there:
        raise UserError(f"{name:.40} is no device of this machine: choose {' or '.join(there)}")
    return name


def run_cli(main):
    """
    Run a script's main; returns the exit status. What a user can mend (UserError, a full disk or another OSError, too
    little memory) becomes one line on stderr. Any other ValueError or RuntimeError is a bug, perhaps of a student who
    edits tensor code: it keeps its traceback.
    """
    for stream in (sys.stdin, sys.stdout):  # what a terminal cannot show, or sends in another encoding, stops nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = main()
        if sys.stdout:  # None where it is closed (>&-)
            sys.stdout.flush()  # here, so that a closed pipe shows now and not while Python shuts down
        return status
    except BrokenPipeError:  # `python graft.py | head`: whoever read has seen enough
        discard(sys.stdout)
        return 1
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as e:
        why = (str(e) or type(e).__name__).splitlines()[0]
        if isinstance(e, torch.OutOfMemoryError):
            why += " (out of GPU memory: try checkpointing=true, a smaller micro_batch or batch, or a smaller --llm)"
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            why += " (make room, or write to another place)"
    except RuntimeError as e:  # torch has no error class of its own for these
        known = ("DefaultCPUAllocator", "DataLoader worker", "No space left on device", "unable to mmap")
        if not any(words in str(e) for words in known):
            raise
        why = str(e).splitlines()[0]
    except KeyboardInterrupt:
        return 130
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # it was stdout that is full or closed: Python would complain a second time
        discard(sys.stdout)
    print(printable(f"error: {why}"), file=sys.stderr)
    return 2


def discard(stream):
    """Send to nowhere what is left in a stream that cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_out(folder):
    """UserError if no file can be written into a folder, which may not be there yet. Leaves nothing behind."""
    for there in (Path(folder), *Path(folder).parents):
        try:
            with tempfile.TemporaryFile(dir=there):
                return
        except OSError as e:
            if not isinstance(e, FileNotFoundError) or os.path.lexists(there):  # what is not there yet will be made
                raise UserError(f"cannot write into the folder {folder} ({there}: {e.strerror}): "
                                "give another --out") from None


def check_out_file(path):
    """UserError if a file cannot be written at this path."""
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    check_out(Path(path).parent)


def write_whole(path, write):
    """Call write(temporary path), then rename: a reader or a crash never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
