"""Errors that a user can make, and how a command line tells of them: one line, exit status 2, no traceback."""

import os
import sys

import torch


class UserError(ValueError):
    """An error that a user can make: the command line prints it in one line, exit status 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file, folder or model that is not there."""


def run_cli(main):
    """
    Run a script's main; returns the exit status. What a user can mend (UserError, a full disk or another OSError, too
    little memory, an unknown device) becomes one line on stderr. Any other ValueError or RuntimeError is a bug, perhaps
    of a student who edits tensor code: it keeps its traceback.
    """
    try:
        status = main()
        sys.stdout.flush()  # here, so that a closed pipe shows now and not while Python shuts down
        return status
    except BrokenPipeError:  # `python graft.py | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        why = (str(e) or type(e).__name__).splitlines()[0]
        if isinstance(e, torch.OutOfMemoryError):
            why += " (out of GPU memory: try a smaller batch or micro_batch, or a smaller --llm)"
    except RuntimeError as e:  # torch has no error class of its own for these two
        known = ("DefaultCPUAllocator", "device type at start of device string", "Invalid device")
        if not any(words in str(e) for words in known):
            raise
        why = str(e).splitlines()[0]
    except KeyboardInterrupt:
        return 130
    print(f"error: {why}", file=sys.stderr)
    return 2
