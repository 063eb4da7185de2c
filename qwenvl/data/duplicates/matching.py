"""Find pairs that are nearly the same among millions: keys that two of them share, then a comparison of each pair."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qwenvl.data.duplicates.image_hashes import IMAGE, VIEWS, in_view

_CHUNK_BYTES = 2
_MOST_BITS = 24
"""Most of the 256 bits of two hashes that may differ. Pairs are found by 16 bits that they share: all pairs that differ
in fewer than 16 bits, and 99 of 100 that differ in 24 at random places."""
_CORRELATION = 0.998
"""Least correlation of two thumbnails. Of 1,797 handwritten digits, the two most alike have 0.996. An image and itself,
recompressed to JPEG of quality 30 or at half the size, have more than 0.9995."""
_BANDS = 25  # of 5 values of a signature: two texts with 80% in common share one with a probability of 0.9999
_LEAST_COMMON = 0.8
_BLOCK = 1 << 18  # queries at a time
_MOST_PER_KEY = 128  # partners tried for each shared key: where thousands share one, a chain still joins them
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing


def similar_images(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of images that show nearly the same in one of :data:`VIEWS`.

    Args:
        features: FEATURES [n].

    Returns:
        int64 [pairs, 2], two places in ``features``, and int64 [pairs], the view of the second one that is like the
        first.
    """
    images = np.flatnonzero(features["kind"] == IMAGE)
    hashes = features["hashes"][images]
    plain = np.ascontiguousarray(hashes[:, 0]).view(np.dtype((np.void, hashes.shape[2])))[:, 0]
    _, first, which = np.unique(plain, return_index=True, return_inverse=True)
    equal = np.flatnonzero(first[which] != np.arange(len(images)))
    found = [np.stack([first[which[equal]], equal, np.zeros_like(equal)], axis=1)]
    found += [images_of_view(hashes, np.sort(first), view) for view in range(len(VIEWS))]
    triples = np.concatenate(found)
    alike = _correlation(features["thumbnail"][images], triples) >= _CORRELATION
    triples = triples[alike]
    return images[triples[:, :2]], triples[:, 2]


def images_of_view(hashes: np.ndarray, among: np.ndarray, view: int) -> np.ndarray:
    """Return int64 [pairs, 3]: two images whose hashes differ in few bits with the second in a view, and the view.

    Args:
        hashes: uint8 [images, views, bytes].
        among: int64 [m], the images that are compared.
        view: Index of :data:`VIEWS`.
    """
    plain, seen = (np.ascontiguousarray(hashes[among, one]) for one in (0, view))
    words, words_seen = plain.view(np.uint64), seen.view(np.uint64)
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, plain.shape[1], _CHUNK_BYTES):
        chunk = slice(start, start + _CHUNK_BYTES)
        keys, queries = (np.ascontiguousarray(one[:, chunk]).view(np.uint16)[:, 0] for one in (plain, seen))
        for first, second in pairs_by_key(keys, None if view == 0 else queries):
            different = np.bitwise_count(words[first] ^ words_seen[second]).sum(axis=1, dtype=np.int64)
            near = different <= _MOST_BITS
            found.append(np.stack([first[near], second[near]], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return np.concatenate([among[pairs], np.full((len(pairs), 1), view)], axis=1)


def closest_views(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the view of the second image of each pair that is most like the first, int64 [pairs]; 0 for other media.

    Args:
        features: FEATURES [n].
        pairs: int64 [pairs, 2], places in ``features``.
    """
    views = [np.concatenate([pairs, np.full((len(pairs), 1), view)], axis=1) for view in range(len(VIEWS))]
    correlations = np.stack([_correlation(features["thumbnail"], triples) for triples in views])
    closest = np.argmax(correlations > correlations.max(axis=0) - 1e-3, axis=0)
    return np.where((features["kind"][pairs] == IMAGE).all(axis=1), closest, 0)


def _correlation(thumbnails: np.ndarray, triples: np.ndarray) -> np.ndarray:
    """Return the correlation of the grey values of each pair, the second in its view, float32 [pairs]."""
    found = np.zeros(len(triples), np.float32)
    for view in range(len(VIEWS)):
        of_view = np.flatnonzero(triples[:, 2] == view)
        for start in range(0, len(of_view), _BLOCK):
            rows = of_view[start : start + _BLOCK]
            first = _standard(thumbnails[triples[rows, 0]])
            second = _standard(in_view(thumbnails[triples[rows, 1]], view))
            found[rows] = (first * second).sum(axis=1)
    return found


def _standard(images: np.ndarray) -> np.ndarray:
    """Return images [n, side, side] as rows of mean 0 and length 1."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    unit: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return unit


def similar_texts(texts: np.ndarray, signatures: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return pairs of samples of the same group whose texts are the same, or have most runs of three words in common.

    Args:
        texts: uint64 [n], hashes of whole texts.
        signatures: uint32 [n, permutations], MinHash signatures.
        groups: uint64 [n], samples of different groups are never a pair.

    Returns:
        int64 [pairs, 2]; of many equal texts, each is paired with the first.
    """
    whole = texts * _FACTOR + groups
    _, first, which = np.unique(whole, return_index=True, return_inverse=True)
    equal = np.flatnonzero(first[which] != np.arange(len(texts)))
    found = [np.stack([first[which[equal]], equal], axis=1)]
    among = np.sort(first)
    size = signatures.shape[1] // _BANDS
    for band in range(_BANDS):
        keys = groups[among]
        for column in signatures[among, band * size : (band + 1) * size].T:
            keys = mixed(keys + column)
        for one, other in pairs_by_key(keys):
            pairs = np.stack([among[one], among[other]], axis=1)
            found.append(pairs[in_common(signatures, pairs) >= _LEAST_COMMON])
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[groups[pairs[:, 0]] == groups[pairs[:, 1]]]


def in_common(signatures: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the estimated share of runs of three words that the texts of each pair have in common, float [pairs]."""
    share: np.ndarray = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)
    return share


def pairs_by_key(keys: np.ndarray, queries: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs (i, j), i < j, with ``keys[i] == queries[j]``, as two int64 arrays.

    Args:
        keys: Unsigned integers [n].
        queries: Unsigned integers [n]; None for ``keys`` themselves, so that every pair comes once.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    for start in range(0, len(keys), _BLOCK):
        if queries is None:  # partners are those behind a key in the order
            asked = order[start : start + _BLOCK]
            low = np.arange(start, start + len(asked)) + 1
        else:
            asked = np.arange(start, min(start + _BLOCK, len(keys)))
            low = np.searchsorted(ordered, queries[asked], "left")
        high = np.searchsorted(ordered, (keys if queries is None else queries)[asked], "right")
        counts = np.minimum(high - low, _MOST_PER_KEY)
        ends = np.cumsum(counts)
        places = np.arange(ends[-1]) - np.repeat(ends - counts, counts) + np.repeat(low, counts)
        first, second = order[places], np.repeat(asked, counts)
        if queries is None:
            first, second = np.minimum(first, second), np.maximum(first, second)
        kept = first < second
        yield first[kept], second[kept]


def clusters(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return the number of the cluster of each of ``count`` items, int64, where pairs [n, 2] join clusters."""
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    numbers: np.ndarray = connected_components(graph, directed=False)[1]
    return numbers.astype(np.int64)


def mixed(values: np.ndarray) -> np.ndarray:
    """Return uint64 values with their bits mixed, so that sums of them are hashes of what was added."""
    values = (values + _FACTOR) * _FACTOR
    return (values ^ (values >> np.uint64(29))) * _FACTOR
