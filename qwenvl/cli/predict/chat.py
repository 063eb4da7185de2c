"""A chat with a model in the terminal, about images and videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import TextStreamer

from qwenvl.data.conversation.media_items import image_item, video_item
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.resize import VisionSettings
from qwenvl.data.types import ImageItem, Message, Part, TextPart, VideoItem
from qwenvl.inference.generate import ChatModel, Decoding, generate
from qwenvl.inference.prompts import Prompt, open_prompt
from qwenvl.utils.errors import SampleError

HELP = """\
/image PATH   show an image with the next question
/video PATH   show a video with the next question
/new          forget the conversation
/help         this list
/quit         leave (or Ctrl-D)
Everything else is a question."""


@dataclass
class Chat:
    """A chat: the turns so far, and the media of the next question.

    Args:
        chat_model: Model that answers.
        settings: Limits of images and videos.
        reader: Reader of media files.
        decoding: Settings of greedy decoding or sampling.
        console: Console to print to.
        turns: Turns so far.
        waiting: Media to show with the next question.
    """

    chat_model: ChatModel
    settings: VisionSettings
    reader: MediaReader
    decoding: Decoding
    console: Console = field(default_factory=lambda: Console(highlight=False))
    turns: list[Message] = field(default_factory=list)
    waiting: list[ImageItem | VideoItem] = field(default_factory=list)

    def run(self) -> None:
        """Take questions and commands until the end."""
        self.console.print(f"[dim]{escape(HELP)}[/dim]")
        while True:
            try:
                line = input(f"[{len(self.waiting)} shown] > " if self.waiting else "> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line == "/quit":
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """Execute a command or ask a question; print a message if that is not possible."""
        command, _, rest = line.partition(" ")
        try:
            if command in ("/image", "/video"):
                self._show(command, rest.strip())
            elif command == "/new":
                self.turns, self.waiting = [], []
                self.console.print("[dim]A new conversation.[/dim]")
            elif command == "/help":
                self.console.print(escape(HELP))
            elif command.startswith("/") and not Path(line).exists():
                self.console.print(f"There is no {escape(command)}; /help lists the commands.", style="yellow")
            else:
                self._ask(line)
        except SampleError as error:
            self.console.print(escape(error.reason), style="yellow")

    def _show(self, command: str, path: str) -> None:
        if not path:
            self.console.print(f"Name the file: {command} PATH", style="yellow")
            return
        source = str(Path(path).expanduser())
        item = image_item(source) if command == "/image" else video_item(source)
        plan = open_prompt([Message("user", (item,))], self.reader, self.settings).plans[0]
        self.waiting.append(item)
        height, width = plan.resized
        frames = f"{plan.grid[0]} x " if isinstance(item, VideoItem) else ""
        self.console.print(f"[dim]Shown with the next question ({frames}{width} x {height} pixels).[/dim]")

    def _ask(self, question: str) -> None:
        parts: tuple[Part, ...] = (*self.waiting, TextPart(question))
        turns = [*self.turns, Message("user", parts)]
        answer = answer_aloud(self.chat_model, open_prompt(turns, self.reader, self.settings), self.decoding)
        self.turns = [*turns, Message("assistant", (TextPart(answer),))]
        self.waiting = []


def answer_aloud(chat_model: ChatModel, prompt: Prompt, decoding: Decoding) -> str:
    """Answer one prompt, and print the answer while it is generated."""
    streamer = TextStreamer(chat_model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = generate(chat_model, [prompt], decoding=decoding, streamer=streamer)
    if answer.finish_reason == "length":
        console = Console(stderr=True, highlight=False)
        console.print(f"The answer was cut at --max_new_tokens {decoding.max_new_tokens}.", style="yellow")
    return answer.text
