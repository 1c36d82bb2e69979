"""What the W&B client has written while offline, read without it."""

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32768
HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, LAST = 1, 4  # the other kinds are beginnings and middles of a record


def history_steps(directory: Path) -> list[int]:
    """The steps of the rows in one of the client's directories, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = directory.glob("*.wandb")
    steps = []
    for text in _records(path.read_bytes()):
        record = Record.FromString(text)
        if record.WhichOneof("record_type") == "history":
            steps.append(record.history.step.num)
    return steps


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, which begins with seven bytes of the client's own."""
    place, record = 7, b""
    while place + HEADER.size <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:  # the end of a block is padded
            place += left
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        place += HEADER.size
        if place + length > len(data):  # who wrote it was killed
            return
        record += data[place : place + length]
        place += length
        if kind in (FULL, LAST):
            yield record
            record = b""
