"""Which pairs nearly repeat the text of an earlier one.

MinHash signatures (Broder 1997) come from the library datasketch; they are compared in bands
(locality-sensitive hashing) by sorting, which for a million pairs takes a fraction of the memory of
a hash table a band.
"""

from collections.abc import Iterable

import numpy as np
from datasketch import MinHash
from jaxtyping import Int64, UInt32, UInt64

_SHINGLE = 4  # characters
_PERMUTATIONS = 128
_RECALL = 0.99  # share of pairs at the very threshold that the bands must bring together
_CHUNK = 16_384


def signatures(texts: Iterable[str]) -> UInt32[np.ndarray, "N P"]:
    """MinHash signatures of texts: the share of equal entries estimates the texts' similarity.

    That similarity is Jaccard's, of the sets of all runs of 4 characters; case and the number of
    blanks do not count. 128 permutations: the estimate of 0.9 has a standard error of 0.027.

    Args:
      texts: one a pair: its query and all that the policy reads of its product, for two products
        of one title may differ in the rest. Shard by shard, in the order of the rows, gives the
        same as all at once.
    """
    sketches = MinHash.generator(map(_shingles, texts), num_perm=_PERMUTATIONS)
    rows = [sketch.hashvalues for sketch in sketches]
    return np.stack(rows) if rows else np.empty((0, _PERMUTATIONS), np.uint32)


def _shingles(text: str) -> set[bytes]:
    text = " ".join(text.lower().split())
    return {text[i : i + _SHINGLE].encode() for i in range(max(1, len(text) - _SHINGLE + 1))}


def near_duplicates(
    signatures: UInt32[np.ndarray, "N P"],
    similarity: float,
    kinds: UInt32[np.ndarray, "N"] | None = None,
) -> Int64[np.ndarray, "N"]:
    """Which texts nearly repeat an earlier one.

    Text by text, in order: one that is similar to an earlier text that stays, goes. So a chain of
    small changes does not take texts with it that are unlike the one that stays. Similar are texts
    whose signatures agree in a share of at least ``similarity``; they are compared where they
    agree in a whole band of entries (locality-sensitive hashing), which misses at most 1% of the
    pairs at the threshold itself and fewer above. Texts of one pattern meet often: the time grows
    with the square of how many share a band.

    Args:
      signatures: of all texts, in the order of their rows.
      similarity: 0.5 to 1; 0 finds nothing.
      kinds: texts of different kinds are never similar; None for one kind. Of a pair it is the
        query: what differs in that alone is a few letters of a long text, and another question.

    Returns:
      For each text the index of the earliest one that stays and is similar to it; -1 for none.
    """
    earliest = np.full(len(signatures), -1, np.int64)
    if not similarity or not len(signatures):
        return earliest
    kinds = np.zeros(len(signatures), np.uint32) if kinds is None else kinds
    # Equal signatures first: a thousand copies of a text would make half a million pairs.
    keys = _fold(np.column_stack([signatures, kinds]))
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    head = first[group]
    copies = np.flatnonzero(head != np.arange(len(head)))
    copies = copies[_agreement(signatures, copies, head[copies]) == signatures.shape[1]]
    copies = copies[kinds[copies] == kinds[head[copies]]]
    alone = np.delete(np.arange(len(head)), copies)
    for later, earlier in _similar(signatures, alone, similarity, kinds).tolist():
        if earliest[later] < 0 and earliest[earlier] < 0:
            earliest[later] = earlier
    heads = head[copies]
    earliest[copies] = np.where(earliest[heads] < 0, heads, earliest[heads])
    return earliest


def _similar(
    signatures: UInt32[np.ndarray, "N P"],
    alone: Int64[np.ndarray, "M"],
    similarity: float,
    kinds: UInt32[np.ndarray, "N"],
) -> Int64[np.ndarray, "E 2"]:
    """All similar pairs among some texts that meet in a band, (later, earlier), sorted."""
    size = signatures.shape[1]
    width = max(
        r for r in range(1, size + 1) if 1 - (1 - similarity**r) ** (size // r) >= _RECALL or r == 1
    )
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, size - width + 1, width):
        key = _fold(np.column_stack([signatures[:, start : start + width], kinds]))[alone]
        order = np.argsort(key, kind="stable")
        key, rows = key[order], alone[order]
        # Pairs that share a key, by how far apart they stand in the sorted order.
        at, distance = np.arange(len(key)), 1
        while len(at := at[at + distance < len(key)]):
            at = at[key[at] == key[at + distance]]
            pairs = np.stack([rows[at + distance], rows[at]], axis=1)
            agree = _agreement(signatures, *pairs.T)
            alike = kinds[pairs[:, 0]] == kinds[pairs[:, 1]]
            found.append(pairs[(agree >= similarity * size - 1e-9) & alike])
            distance += 1
    return np.unique(np.concatenate(found), axis=0)


def _fold(columns: UInt32[np.ndarray, "N P"]) -> UInt64[np.ndarray, "N"]:
    """One number for each row. Equal rows have equal ones; the reverse is for others to check."""
    key = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        key = key * np.uint64(0x9E3779B97F4A7C15) + column
        key ^= key >> np.uint64(32)
    return key


def _agreement(
    signatures: UInt32[np.ndarray, "N P"], a: Int64[np.ndarray, "E"], b: Int64[np.ndarray, "E"]
) -> Int64[np.ndarray, "E"]:
    """In how many entries signatures agree, pair by pair."""
    counts = np.zeros(len(a), np.int64)
    for start in range(0, len(a), _CHUNK):
        part = slice(start, start + _CHUNK)
        counts[part] = np.count_nonzero(signatures[a[part]] == signatures[b[part]], axis=1)
    return counts
