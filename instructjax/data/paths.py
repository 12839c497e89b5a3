"""The files that a path or a pattern names."""

import glob
import os


def expand(path: str) -> str:
    """The path with `~` replaced. That of a user who does not exist stays, and names no file."""
    return os.path.expanduser(path)


def files(pattern: str) -> list[str]:
    """The files that a pattern matches, in the order of their names, each file once.

    The path of a file that exists is no pattern, whatever signs it holds. A file that is reached
    by several names, through links, has the name with the fewest folders.
    """
    pattern = expand(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    # `[` stands for itself where that matches a file, and else begins a class as in a shell.
    for spelling in (pattern.replace("[", "[[]"), pattern):
        try:
            names = [name for name in glob.glob(spelling, recursive=True) if os.path.isfile(name)]
        except ValueError:  # a sign that no path can have
            return []
        if names:
            break
    names.sort(key=lambda name: (name.count(os.sep), name))  # the first name of a file stays
    return sorted({os.path.realpath(name): name for name in reversed(names)}.values())
