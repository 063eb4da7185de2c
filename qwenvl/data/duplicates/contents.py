"""Read what is compared of samples: the features of their media, kept on disk, and a MinHash of their texts."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasketch import MinHash
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.dataset import SampledTable
from qwenvl.data.duplicates.image_hashes import FEATURES, SIDE, digest, features_of_content, features_of_image
from qwenvl.data.media import images
from qwenvl.data.media.locate import MediaSources
from qwenvl.data.types import Conversation, ImageItem, Sample, Source, VideoItem
from qwenvl.utils.cache import fingerprint, new_hash, replacing
from qwenvl.utils.errors import SampleError
from qwenvl.utils.logging import shows_bars
from qwenvl.utils.processes import in_processes

PERMUTATIONS = 125
"""Length of a MinHash signature: 25 bands of 5."""

_SHINGLE = 3  # words
_VERSION = 1  # of the features: raise it when they change, so that older caches are not read
_ROWS_A_TASK = 128
_SAVED_EVERY = 50_000  # new images, so that a killed run goes on from there
_END_BYTES = 1 << 20
# A word; or one character of Chinese, Japanese or Korean, which have no spaces.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Contents:
    """What is compared of the samples of some rows; a sample with a problem is left out.

    Args:
        rows: int64 [samples], row of each sample in its table.
        members: int64 [samples], place of each sample in its row, from 0.
        texts: uint64 [samples], hash of all words of a sample.
        signatures: uint32 [samples, PERMUTATIONS], MinHash of its runs of three words.
        media: uint64 [media], keys of the media of all samples, one sample after the other.
        counts: int64 [samples], number of media of each sample.
        features: FEATURES [different media], ascending by key.
    """

    rows: np.ndarray
    members: np.ndarray
    texts: np.ndarray
    signatures: np.ndarray
    media: np.ndarray
    counts: np.ndarray
    features: np.ndarray


def read_contents(
    table: SampledTable, reserved_tokens: Sequence[str], allow_remote: bool, cache: Path | None, workers: int
) -> Contents:
    """Read the contents of a table's rows; images that an earlier call saw come from the cache.

    Args:
        table: Dataset, and the rows of it that are compared.
        reserved_tokens: Strings that no text of a usable sample contains.
        allow_remote: Media may be fetched by http(s).
        cache: Cache folder; None to keep nothing.
        workers: Number of processes; 0 or 1 for none besides this one.
    """
    spec = table.table.spec
    path = None if cache is None else cache / "image_hashes" / f"{_name(table)}.npy"
    known = np.load(path) if path is not None and path.exists() else np.zeros(0, FEATURES)
    tasks = _Tasks(table, reserved_tokens, allow_remote, known["key"])
    parts, new, unsaved = list[Contents](), [known], 0
    with tqdm(total=len(tasks.rows), desc=f"Comparing {spec.name}", unit=" rows", disable=not shows_bars()) as progress:
        for part in in_processes(tasks, len(tasks), workers):
            parts.append(part)
            new.append(part.features)
            unsaved += len(part.features)
            if unsaved > _SAVED_EVERY:
                new, unsaved = [_save(new, path)], 0
            progress.update(_ROWS_A_TASK)
    features = _save(new, path) if unsaved else known
    columns = [[getattr(part, name) for part in parts] for name in Contents.__slots__[:-1]]
    rows, members, texts, signatures, media, counts = map(np.concatenate, columns)
    used = np.isin(features["key"], media)
    return Contents(rows, members, texts, signatures, media, counts, features[used])


def _name(table: SampledTable) -> str:
    spec = table.table.spec
    files = [os.path.realpath(path) for path in spec.annotation_paths]
    return fingerprint(_VERSION, files, os.path.realpath(spec.data_path), spec.hf_dataset and spec.hf_dataset.name)


def _save(parts: Sequence[np.ndarray], path: Path | None) -> np.ndarray:
    """Return the features of all parts, once each, ascending by key, after writing them to the cache."""
    features = np.concatenate(parts)
    features = features[np.unique(features["key"], return_index=True)[1]]
    if path is not None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, features)
    return features


class _Tasks(Dataset[Contents]):
    """Contents of some rows for each index; features only of media whose keys are not ``known`` (uint64, ascending)."""

    def __init__(
        self, table: SampledTable, reserved_tokens: Sequence[str], allow_remote: bool, known: np.ndarray
    ) -> None:
        self.rows = np.unique(table.rows)
        self._table, self._reserved = table.table, reserved_tokens
        self._allow_remote, self._known = allow_remote, known

    def __len__(self) -> int:
        return -(-len(self.rows) // _ROWS_A_TASK)

    def __getitem__(self, index: int) -> Contents:
        places, texts, media, features = [], list[list[str]](), list[list[int]](), dict[int, np.ndarray]()
        for row in self.rows[index * _ROWS_A_TASK : (index + 1) * _ROWS_A_TASK].tolist():
            for member, sample, conversation in self._usable(row):
                places.append((row, member))
                texts.append(_WORDS.findall(" ".join(message.text for message in conversation.messages).lower()))
                media.append([self._key_of(item, sample, features) for item in conversation.media()])
        rows, members = np.array(places, np.int64).reshape(-1, 2).T
        return Contents(
            *(rows, members, np.array([digest(" ".join(words)) for words in texts], np.uint64), _signatures(texts)),
            media=np.array([key for keys in media for key in keys], np.uint64),
            counts=np.array([len(keys) for keys in media], np.int64),
            features=np.stack(list(features.values())) if features else np.zeros(0, FEATURES),
        )

    def _usable(self, row: int) -> list[tuple[int, Sample, Conversation]]:
        try:
            samples = self._table[row]
            built = [build_conversation(sample, self._reserved, answered=False) for sample in samples]
        except SampleError:  # the check itself reports it, and training leaves it out or stops
            return []
        return [(member, *one) for member, one in enumerate(zip(samples, built, strict=True))]

    def _key_of(self, item: ImageItem | VideoItem, sample: Sample, features: dict[int, np.ndarray]) -> int:
        """Return the key of an image or clip, after adding its features where nobody knows them."""
        sources = MediaSources(sample.data_path, self._allow_remote, sample.allow_absolute)
        named = item.source if isinstance(item.source, tuple) else (item.source,)
        try:
            located = [sources.locate(one) for one in named]
            key = digest(repr([type(item).__name__, *map(_state, located)]))
        except (SampleError, OSError):
            located, key = [], digest(repr(named))
        place = int(np.searchsorted(self._known, np.uint64(key)))
        if key not in features and not (place < len(self._known) and self._known[place] == key):
            features[key] = _features(key, item, located)
        return key


def _state(located: Source) -> str:
    """Return a text that is another one once a file has changed; only bytes are read."""
    if isinstance(located, bytes):
        return _hash(located)
    state = os.stat(located)
    return fingerprint(os.path.abspath(located), state.st_size, state.st_mtime_ns)


def _features(key: int, item: ImageItem | VideoItem, located: Sequence[Source]) -> np.ndarray:
    """Return the features of an image or clip; a file that cannot be read is equal to itself alone."""
    if not located:
        return features_of_content(key, f"unreadable {key}")
    try:
        if isinstance(item, ImageItem):
            return features_of_image(key, images.read_small_grey(located[0], SIDE))
        return features_of_content(key, repr([_ends(one) for one in located]))
    except (SampleError, OSError):
        return features_of_content(key, f"unreadable {key}")


def _ends(located: Source) -> str:
    """Return a hash of a clip's size, first and last bytes: reading all of a long clip would take too long."""
    if isinstance(located, bytes):
        return _hash(located)
    size, state = os.path.getsize(located), new_hash()
    with open(located, "rb") as file:
        state.update(f"{size} ".encode() + file.read(_END_BYTES))
        file.seek(max(size - _END_BYTES, 0))
        state.update(file.read(_END_BYTES))
    return state.hexdigest()


def _hash(content: bytes) -> str:
    """Return a hash of bytes."""
    state = new_hash()
    state.update(content)
    return state.hexdigest()


def _shingles(words: Sequence[str]) -> set[bytes]:
    """Return a text's runs of three words."""
    last = max(len(words) - _SHINGLE, 0)
    return {" ".join(words[start : start + _SHINGLE]).encode(errors="surrogatepass") for start in range(last + 1)}


def _signatures(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the MinHash of each text's runs of three words, uint32 [texts, PERMUTATIONS]."""
    hashes = MinHash.bulk([_shingles(words) for words in texts], num_perm=PERMUTATIONS)
    return np.array([one.hashvalues for one in hashes], np.uint32).reshape(-1, PERMUTATIONS)
