"""Whether a ``.bin/.idx`` pair can be a data set, by its index alone. No torch."""

from __future__ import annotations

import struct
from pathlib import Path

from elastic_megatron.errors import UserError

_INDEX_HEADER = struct.Struct("<9sQBQQ")
# bytes of a token by its code in an index: ``DType`` of megatron/core/datasets/indexed_dataset.py
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


def check_prefix(prefix: str) -> None:
    """Raise ``UserError`` for a data set of which a file is missing, damaged, empty or another's."""
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise UserError(
                f"data set {prefix}: {prefix}{suffix} is missing; write it by: "
                f"elastic-megatron prepare-data INPUT --output {prefix} --tokenizer DIR"
            )
    described = _described_bytes(Path(f"{prefix}.idx"))
    if described is None:
        raise UserError(f"data set {prefix}: {prefix}.idx is no Megatron index; run prepare-data again")
    if described == 0:
        raise UserError(f"data set {prefix}: holds no tokens; run prepare-data again with more input")
    if described != Path(f"{prefix}.bin").stat().st_size:
        raise UserError(f"data set {prefix}: .bin and .idx do not belong together; run prepare-data again")


def _described_bytes(idx: Path) -> int | None:
    """Size of the .bin that an index describes: where its last sequence ends. None if it is no index.

    Layout (``_IndexWriter`` in ``megatron/core/datasets/indexed_dataset.py``): magic, version, dtype code,
    number n of sequences, number of documents; then n lengths (int32) and n byte offsets (int64).
    """
    with idx.open("rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
        if len(header) < _INDEX_HEADER.size:
            return None
        magic, version, code, sequences, documents = _INDEX_HEADER.unpack(header)
        known = magic == b"MMIDIDX\x00\x00" and version == 1 and code in _ITEM_BYTES
        if not known or idx.stat().st_size < _INDEX_HEADER.size + 12 * sequences + 8 * documents:
            return None
        if sequences == 0:
            return 0
        stream.seek(_INDEX_HEADER.size + 4 * (sequences - 1))
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(_INDEX_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        return int.from_bytes(stream.read(8), "little") + length * _ITEM_BYTES[code]
