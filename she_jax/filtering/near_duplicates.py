"""Near-duplicate detection by MinHash (Broder 1997) and locality-sensitive hashing.

The library datasketch computes the signatures. They are compared in bands by sorting, which for a
million texts takes a fraction of the memory of one hash table per band.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

_SHINGLE = 4  # characters
_PERMUTATIONS = 128
_RECALL = 0.99  # share of pairs exactly at the threshold that must agree in a band
_CHUNK = 16_384  # pairs of signatures compared at a time


def signatures(texts: Iterable[str]) -> UInt32[np.ndarray, "N P"]:
    """MinHash signatures of texts, whose share of equal entries estimates the texts' similarity.

    The similarity is the Jaccard similarity of the sets of character 4-grams, regardless of case
    and repeated blanks. With P = 128 permutations, an estimate of 0.9 has standard error 0.027.

    Args:
      texts: a text per pair: the query and the whole product as the policy reads it, because
        products with the same title may differ in other fields. Signatures computed shard by shard,
        in the order of the rows, equal those computed at once.

    Returns:
      A signature per text.
    """
    from datasketch import MinHash  # with scipy, so slow: not at every start

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
    """Finds the texts that are near-duplicates of an earlier text.

    Texts are processed in order: a text is a duplicate if it is similar to an earlier text that is
    not itself a duplicate. So a chain of small changes does not drop texts that are unlike every
    remaining text. Two texts are similar if at least a share ``similarity`` of the entries of their
    signatures agrees. Only texts that agree in a whole band of entries are compared, which misses
    at most 1% of the pairs exactly at the threshold and fewer above it. The time grows with the
    square of the number of texts that share a band, as templated texts do.

    Args:
      signatures: the signatures of all texts, in the order of their rows.
      similarity: the threshold, in [0.5, 1]; 0 finds no duplicates.
      kinds: a number per text; texts with different numbers are never similar. None if all are
        comparable. For query-product pairs, a hash of the query: pairs that differ only in the
        query differ in a few letters of a long text, yet are different prompts.

    Returns:
      For each text, the index of the earliest similar text that is not a duplicate; -1 if none.
    """
    earliest = np.full(len(signatures), -1, np.int64)
    if not similarity or not len(signatures):
        return earliest
    kinds = np.zeros(len(signatures), np.uint32) if kinds is None else kinds
    # Exact copies are handled first: a thousand copies of a text form half a million pairs.
    hashes = _hash_rows(np.column_stack([signatures, kinds]))
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[group]
    copies = np.flatnonzero(original != np.arange(len(original)))
    copies = copies[_count_equal(signatures, copies, original[copies]) == signatures.shape[1]]
    copies = copies[kinds[copies] == kinds[original[copies]]]
    unique = np.delete(np.arange(len(original)), copies)
    for later, earlier in _similar_pairs(signatures, unique, similarity, kinds).tolist():
        if earliest[later] < 0 and earliest[earlier] < 0:
            earliest[later] = earlier
    originals = original[copies]
    earliest[copies] = np.where(earliest[originals] < 0, originals, earliest[originals])
    return earliest


def _similar_pairs(
    signatures: UInt32[np.ndarray, "N P"],
    indices: Int64[np.ndarray, "M"],
    similarity: float,
    kinds: UInt32[np.ndarray, "N"],
) -> Int64[np.ndarray, "E 2"]:
    """Sorted pairs (later, earlier) of similar texts, among those at ``indices``."""
    size = signatures.shape[1]
    width = max(
        r for r in range(1, size + 1) if 1 - (1 - similarity**r) ** (size // r) >= _RECALL or r == 1
    )
    similar = [np.empty((0, 2), np.int64)]
    for start in range(0, size - width + 1, width):
        band = np.column_stack([signatures[:, start : start + width], kinds])
        hashes = _hash_rows(band)[indices]
        order = np.argsort(hashes, kind="stable")
        hashes, texts = hashes[order], indices[order]
        # Texts with equal hashes are neighbors now: compare each with the next, then the one after.
        left, distance = np.arange(len(hashes)), 1
        while len(left := left[left + distance < len(hashes)]):
            left = left[hashes[left] == hashes[left + distance]]
            pairs = np.stack([texts[left + distance], texts[left]], axis=1)
            n_equal = _count_equal(signatures, *pairs.T)
            same_kind = kinds[pairs[:, 0]] == kinds[pairs[:, 1]]
            similar.append(pairs[(n_equal >= similarity * size - 1e-9) & same_kind])
            distance += 1
    return np.unique(np.concatenate(similar), axis=0)


def _hash_rows(rows: UInt32[np.ndarray, "N P"]) -> UInt64[np.ndarray, "N"]:
    """A hash of each row. Equal rows have equal hashes; callers check for collisions."""
    hashes = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + column
        hashes ^= hashes >> np.uint64(32)
    return hashes


def _count_equal(
    signatures: UInt32[np.ndarray, "N P"], a: Int64[np.ndarray, "E"], b: Int64[np.ndarray, "E"]
) -> Int64[np.ndarray, "E"]:
    """Number of equal entries of the signatures ``a[i]`` and ``b[i]``, for each pair i."""
    counts = np.zeros(len(a), np.int64)
    for start in range(0, len(a), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        counts[chunk] = np.count_nonzero(signatures[a[chunk]] == signatures[b[chunk]], axis=1)
    return counts
