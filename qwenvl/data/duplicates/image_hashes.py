"""Perceptual hashes of images, in the eight views that mirroring and quarter turns give."""

from __future__ import annotations

import hashlib

import imagehash
import numpy as np
from PIL import Image

SIDE = 32
"""Height and width of the grey image that is hashed."""

VIEWS = (
    "",
    "mirrored",
    "upside down",
    "turned by 90 degrees",
    "turned by 180 degrees",
    "turned by 270 degrees",
    "mirrored and turned by 90 degrees",
    "mirrored and turned by 270 degrees",
)
"""Names of the views, in the order of ``hashes``: as it is, then the members of ``PIL.Image.Transpose``."""

IMAGE, CONTENT, BLANK = 1, 2, 3
"""Kinds of :data:`FEATURES`: an image with hashes; a clip or an unreadable file, and an image of one colour, which have
only a ``digest``."""

HASH_SIDE = 16  # 256 bits
_THUMBNAIL = 16
_BLANK = 2.0  # standard deviation of grey values (0 to 255), below which hashes and correlations are noise

FEATURES = np.dtype(
    [
        ("key", np.uint64),
        ("kind", np.uint8),
        ("digest", np.uint64),
        ("hashes", np.uint8, (len(VIEWS), HASH_SIDE * HASH_SIDE // 8)),
        ("thumbnail", np.uint8, (_THUMBNAIL, _THUMBNAIL)),
    ]
)
"""Features of one image or clip; ``key`` names its file, by path, size and time of change, or by its bytes."""


def digest(text: str) -> int:
    """Return 64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def features_of_image(key: int, grey: Image.Image) -> np.ndarray:
    """Return the features of an image, FEATURES [].

    Args:
        key: Key of its file.
        grey: The image in ``SIDE`` x ``SIDE`` grey pixels.
    """
    features = np.zeros((), FEATURES)
    features["key"], features["kind"] = key, IMAGE
    thumbnail = np.asarray(grey.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX))
    features["thumbnail"] = thumbnail
    if thumbnail.std() < _BLANK:
        features["kind"], features["digest"] = BLANK, digest(f"blank {round(float(thumbnail.mean()))}")
        return features
    for view, hashes in zip((grey, *(grey.transpose(one) for one in Image.Transpose)), features["hashes"], strict=True):
        # The 16 x 16 lowest frequencies of the cosine transform, each above their median or not.
        bits = imagehash.phash(view, hash_size=HASH_SIDE, highfreq_factor=SIDE // HASH_SIDE).hash
        hashes[:] = np.packbits(bits)
    return features


def features_of_content(key: int, content: str) -> np.ndarray:
    """Return the features of media that only equal content makes the same, FEATURES []."""
    features = np.zeros((), FEATURES)
    features["key"], features["kind"], features["digest"] = key, CONTENT, digest(content)
    return features


def in_view(images: np.ndarray, view: int) -> np.ndarray:
    """Return images [n, side, side] in a view of :data:`VIEWS`, as ``PIL.Image.transpose`` shows them."""
    mirrored = images[:, :, ::-1]
    turned = {3: 1, 4: 2, 5: 3}
    if view in turned:
        return np.rot90(images, turned[view], axes=(1, 2))
    return {0: images, 1: mirrored, 2: images[:, ::-1], 6: images.transpose(0, 2, 1)}.get(
        view, images[:, ::-1, ::-1].transpose(0, 2, 1)
    )
