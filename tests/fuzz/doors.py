"""The ways by which annotations and media come in: the tool that checks them, and training's dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.config import DataArguments
from qwenvl.data.dataset import ConversationDataset, open_tables
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder, open_processor
from qwenvl.data.types import DatasetSpec
from qwenvl.families import get_family
from qwenvl.utils.errors import UserError

LONGEST_MESSAGE = 2000


def open_run_encoder(checkpoint: Path, max_length: int = 4096) -> SampleEncoder:
    """Return what makes model inputs of samples, with small limits."""
    arguments = DataArguments(
        max_pixels=64 * 64, min_pixels=32 * 32, video_max_pixels=4 * 64 * 64, video_min_pixels=4 * 32 * 32
    )
    family = "qwen3_vl"
    return build_encoder(
        open_processor(str(checkpoint)),
        AutoConfig.from_pretrained(checkpoint),
        get_family(family),
        arguments,
        max_length,
    )


@dataclass(frozen=True)
class Doors:
    """Both doors to the files of one folder.

    Args:
        folder: its ``media`` is the dataset's ``data_path``.
        encoder: of training.
    """

    folder: Path
    encoder: SampleEncoder

    def write(self, name: str, content: bytes) -> Path:
        """Write a file of the folder, as a new one: what was known of an old one of that name does not matter."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path

    def check(self, annotations: Path, *flags: str) -> int:
        """Run the tool; it may find problems or refuse the file, and nothing else."""
        arguments = ["--annotation_path", str(annotations), "--data_path", str(self.folder / "media")]
        arguments += ["--data_cache_dir", str(self.folder / "cache"), "--output", str(self.folder / "out")]
        code = check_image([*arguments, "--workers", "0", "--decode", *flags])
        assert code in (0, 1, 2)
        return code

    def train(self, annotations: Path, many: int = 20) -> list[str]:
        """Read rows as training would, if the file can be opened; return what was said about those left out.

        With ``--on_bad_sample raise`` and ``skip`` the same rows are usable, and every other one has its reason.
        """
        spec = DatasetSpec("hostile", (str(annotations),), str(self.folder / "media"))
        try:
            tables = open_tables([spec], seed=0, cache_dir=str(self.folder / "cache"))
        except UserError as error:
            assert 0 < len(str(error)) < LONGEST_MESSAGE
            return [str(error)]
        strict, lenient = (ConversationDataset(tables, self.encoder, skips) for skips in (False, True))
        said = []
        for index in range(min(len(strict), many)):
            stopped, left_out = strict[index], lenient[index]
            measured = lenient.measure(0, index)
            assert left_out.error is None and measured.error is None
            bad = [event.message for event in left_out.events if event.kind == "bad"]
            assert (stopped.error is None) == (not bad), (stopped, left_out)
            assert bad or left_out.samples or left_out.events, "a row went without a word"
            assert all(0 < len(message) < LONGEST_MESSAGE for message in bad)
            said += bad
        return said
