"""Sequences of any length -> rows of a fixed length, with little padding.

Best-fit decreasing: the longest sequence goes first, each into the fullest row that still has room
for it (Ding et al. 2024, arXiv 2404.10830).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Groups sequences into rows.

    Args:
      lengths: tokens of each sequence, 1 to `capacity`.
      capacity: tokens of a row.
    Returns:
      The indices of each row's sequences; every index occurs once.
    Raises:
      ValueError: a sequence does not fit a row, or is empty.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        problem = f"lengths from {lengths.min()} to {lengths.max()}"
        raise ValueError(f"{problem}: each must be from 1 to {capacity}, the tokens of a row")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> the rows with that room
    rooms: list[int] = []  # the keys of open_rows, ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fit = bisect_left(rooms, length)
        if fit == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[fit]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[fit]
        rows[row].append(index)
        room -= length
        if room and room not in open_rows:
            insort(rooms, room)
        if room:
            open_rows.setdefault(room, []).append(row)
    return rows
