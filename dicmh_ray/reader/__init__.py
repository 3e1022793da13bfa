"""Read an archive: scan and filter its columns, fetch images by key, walk them in any order.

    scan      index ─> filter ─> small columns (checksums) ─> ranges of the matching blobs
    get       index ─> one range: exactly the bytes of the chosen states
    order     index ─> filter ─> shuffle ─> share of one rank ─> batches, with a bookmark

The row index answers everything it can: keys, tags, sizes and rates cost no request to a part.
No blob byte is read unless a blob column is asked for, and none of a row that does not match.
Whatever is handed out was checked: a whole row against its CRC-32C, a bitstream prefix against the
checksums inside it, an original against its SHA-256.
"""

from dicmh_ray.archive.where import Where, parse_where
from dicmh_ray.reader.archive_reader import ArchiveReader
from dicmh_ray.reader.faults import OnError, ReadFault
from dicmh_ray.reader.index import Fragment
from dicmh_ray.reader.order import FragmentRows, ReadOrder

__all__ = [
    "ArchiveReader",
    "Fragment",
    "FragmentRows",
    "OnError",
    "ReadFault",
    "ReadOrder",
    "Where",
    "parse_where",
]
