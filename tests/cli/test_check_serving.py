"""The tool that holds what serving gives a model against what training gave it."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from qwenvl.cli.check_serving import main
from qwenvl.data.media.video.decode import TorchcodecBackend
from qwenvl.serving.video_reader import working_reader
from tests.data.clips import UNEVEN, encode
from tests.data.conversation.test_thoughts import blind_to_think
from tests.data.media.video.test_decode import make_video
from tests.e2e.runs import train

LIMITS = ["--max_pixels", "64*64", "--min_pixels", "32*32", "--video_max_pixels", "4*64*64", "--video_min_pixels"]
LIMITS += ["4*32*32", "--video_max_frames", "4", "--video_min_frames", "2"]
ODD_IMAGES = ("alpha", "gray_alpha", "deep")
Check = Callable[..., tuple[int, str]]


def _record(name: str, tag: str, answer: str = "A thing.", **media: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{tag}What is it?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **media}


def _draw_odd_images(folder: Path) -> None:
    """Write images of 64 x 64 pixels that processors read in different ways; of transparent ones, half is red."""
    colours = np.zeros((64, 64, 4), dtype=np.uint8)
    colours[...] = (200, 30, 40, 255)
    colours[:32] = (10, 20, 30, 0)
    Image.fromarray(colours).save(folder / "alpha.png")
    Image.fromarray(colours).convert("LA").save(folder / "gray_alpha.png")
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(folder / "deep.png")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of text, a picture that is shrunk and one that is not, and a clip."""
    folder = tmp_path_factory.mktemp("served")
    generator = np.random.default_rng(0)
    for name, size in (("large", (90, 70)), ("exact", (64, 64)), ("turned", (90, 40))):
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "turned" else 1
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=95, exif=exif)
    make_video(folder / "clip.mp4")
    make_video(folder / "long.mp4", frames=20, fps=1)
    encode(folder / "uneven.mp4", "libx264", UNEVEN)
    _draw_odd_images(folder)
    Image.fromarray(generator.integers(0, 2, (70, 50, 3), dtype=np.uint8) * 255).save(folder / "noise.png")
    encoded = base64.b64encode((folder / "clip.mp4").read_bytes()).decode()
    sets = {
        "all": [
            _record("text", ""),
            _record("two", "<image><image>", image=["large.jpg", "exact.jpg"]),
            _record("clip", "<video>", video="clip.mp4"),
        ],
        "exact": [_record("exact", "<image>", image="exact.jpg")],
        "own": [_record("own", "<image>", image=[{"image": "large.jpg", "max_pixels": 64 * 32}])],
        "turned": [_record("turned", "<image>", image="turned.jpg")],
        "thought": [_record("thought", "", answer="<think>\nhm\n</think>\n\nYes.")],
        "newline": [_record("newline", "", answer="\n\nYes.")],
        "long": [_record("long", "<video>", video="long.mp4")],
        "bytes": [_record("bytes", "<video>", video=f"data:video/mp4;base64,{encoded}")],
        "many": [_record("many", "<video>", video=[{"video": "clip.mp4", "nframes": 3, "video_end": 0.3}])],
        "bad": [_record("bad", "<image>", image="none.jpg")],
        "noise": [_record("noise", "<image>", image="noise.png")],
        "uneven": [_record("uneven", "<video>", video="uneven.mp4")],
        **{name: [_record(name, "<image>", image=f"{name}.png")] for name in ODD_IMAGES},
    }
    for name, records in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    entries = {name: {"annotation_path": str(folder / f"{name}.json"), "data_path": str(folder)} for name in sets}
    (folder / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return folder / "registry.py"


@pytest.fixture
def check(registry: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Function of a folder, a dataset and flags that returns the exit code and what was printed."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", str(working_reader()))  # as the tool does in a process of its own;
    for name in [name for name in sys.modules if name.partition(".")[0] == "qwen_vl_utils"]:  # read at import
        monkeypatch.delitem(sys.modules, name)

    def run(folder: Path, dataset: str = "all", *flags: str) -> tuple[int, str]:
        named = ["--model_name_or_path", str(folder), "--dataset_registry", str(registry), "--dataset_use", dataset]
        code = main([*named, *flags])
        return code, "".join(capsys.readouterr())

    return run


def _states(printed: str, way: str, item: str) -> list[str]:
    return re.findall(rf"^  {way} +{item} +(equal|known|different|not compared)", printed, flags=re.MULTILINE)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def saved(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a run of one step."""
    output = tmp_path_factory.mktemp("saved") / request.param
    return train(tiny_checkpoint(request.param), output, registry, dataset_use="all", max_steps=1)


def test_a_saved_folder_gives_what_training_fed(saved: Path, check: Check) -> None:
    code, printed = check(saved)
    assert code == 0, printed
    assert "different" not in printed
    assert _states(printed, "processor", "pixel and frame limits") == ["equal"]
    for item in ("image grids", "image pixels", "video frames", "video grids", "video pixels"):
        assert _states(printed, "apply_chat_template", item) == ["equal"], item
    assert _states(printed, "apply_chat_template", "input ids")[:2] == ["equal", "equal"]
    assert _states(printed, "apply_chat_template", "positions")[:2] == ["equal", "equal"]
    assert _states(printed, "qwen-vl-utils", "image pixels") == ["known"]
    assert "resizes images by PIL" in printed


def test_a_second_pair_of_markers_is_known_where_it_is(saved: Path, check: Check) -> None:
    _, printed = check(saved)
    state = _states(printed, "apply_chat_template", "input ids")[2]
    assert state == ("known" if "2 more tokens" in printed else "equal")
    assert ("standing around those of a video's frames" in printed) == (state == "known")


def test_commands_carry_the_limits(saved: Path, check: Check) -> None:
    _, printed = check(saved)
    vllm, sglang = re.findall(r"^(?:vllm|python) (?:.*\\\n)*.*", printed, flags=re.MULTILINE)
    assert "--mm-processor-kwargs" not in vllm  # the folder's own processor has them
    assert "--max-model-len 2048" in vllm and "--context-length 2048" in sglang
    assert """--limit-mm-per-prompt '{"image": 2, "video": 1}'""" in vllm
    assert """--media-io-kwargs '{"video": {"fps": 2.0, "min_frames": 2, "max_frames": 4}}'""" in vllm
    template = f"--chat-template {saved / 'chat_template_videos.jinja'}"
    assert [template in command for command in (vllm, sglang)] == [saved.name == "qwen3_vl"] * 2
    assert '"image": {"size": {"shortest_edge": 1024, "longest_edge": 4096}}' in sglang
    assert '"fps": 2.0, "min_frames": 2, "max_frames": 4' in sglang


def test_lines_of_other_programs_carry_the_limits(saved: Path, check: Check) -> None:
    _, printed = check(saved)
    newer = saved.name == "qwen3_vl"
    name, tokens = ("qwen3_vl", (1, 4)) if newer else ("qwen2_5_vl", (2, 5))  # of 32 and of 28 pixels a side
    limits = f"pretrained={saved},min_pixels=1024,max_pixels=4096,fps=2,max_num_frames=4"
    assert (
        f"lmms-eval: python -m lmms_eval --force_simple --model {name} --model_args {limits} --tasks TASKS" in printed
    )
    assert f"--image-min-tokens {tokens[0]} --image-max-tokens {tokens[1]}" in printed
    assert f"model_path={str(saved)!r}, min_pixels=1024, max_pixels=4096" in printed
    assert ('processor_kwargs={"do_sample_frames": True}' in printed) != newer
    assert (f"chat_template=open({str(saved / 'chat_template_videos.jinja')!r}).read()" in printed) == newer


@pytest.mark.parametrize("published", [True, False])
def test_experts_that_other_programs_cannot_read_are_noted(
    published: bool, tiny_checkpoint: Callable[[str], Path], check: Check, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen3_vl_moe"), folder)
    if published:
        tensors = load_file(folder / "model.safetensors")
        turned = {name: one.transpose(1, 2).contiguous() for name, one in tensors.items() if ".experts." in name}
        save_file(tensors | turned, folder / "model.safetensors", {"format": "pt"})
    _, printed = check(folder, "exact")
    assert ("Its experts are stored as [experts, out, in]" in printed) != published


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_limits_of_a_checkpoint_are_noticed(
    family: str, tiny_checkpoint: Callable[[str], Path], check: Check
) -> None:
    code, printed = check(tiny_checkpoint(family), "all", *LIMITS)
    assert code == 1
    assert _states(printed, "processor", "pixel and frame limits") == ["different"]
    assert "image_processor size: 1024 to 4096 pixels in training" in printed
    assert _states(printed, "apply_chat_template", "image grids") == ["different"]
    assert """--mm-processor-kwargs '{"images_kwargs": {"size": {"shortest_edge": 1024,""" in printed


def test_a_folder_whose_template_was_exchanged_is_noticed(saved: Path, check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(saved, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", " <|im_end|>"))
    code, printed = check(folder)
    assert code == 1
    assert set(_states(printed, "apply_chat_template", "input ids")) == {"different"}
    assert re.search(r"tokens, first at \d+: '.+' in training, '.+' here", printed)


def test_another_normalisation_is_noticed(saved: Path, check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(saved, folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(config))
    code, printed = check(folder)
    assert code == 1
    assert _states(printed, "apply_chat_template", "image pixels") == ["different"]
    assert _states(printed, "apply_chat_template", "video pixels") == ["equal"]
    assert re.search(r"100\.0% of the values, by \d+\.\d of 255 levels at most", printed)


def test_a_small_shift_is_not_taken_for_the_rounding_of_another_resize(
    saved: Path, check: Check, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(saved, folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["image_mean"] = [mean + 1 / 255 for mean in config["image_processor"]["image_mean"]]
    path.write_text(json.dumps(config))
    code, printed = check(folder)
    assert code == 1
    assert _states(printed, "qwen-vl-utils", "image pixels") == ["different"]


def test_noise_that_is_resized_by_pil_is_known(saved: Path, check: Check) -> None:
    """Widened noise: PIL clips between its passes, so that values differ by far more than rounding."""
    code, printed = check(saved, "noise")
    assert code == 0, printed
    assert _states(printed, "apply_chat_template", "image pixels") == ["equal"]
    assert _states(printed, "qwen-vl-utils", "image pixels") == ["known"]
    assert float(re.findall(r"by (\d+\.\d) of 255", printed)[0]) > 10


@pytest.mark.parametrize(
    ("dataset", "way", "reason"),
    [
        ("own", "apply_chat_template", "the sample has max_pixels of its own, which apply_chat_template does not read"),
        ("turned", "qwen-vl-utils", "does not turn images as their EXIF orientation says"),
    ],
)
def test_known_differences_are_named(saved: Path, check: Check, dataset: str, way: str, reason: str) -> None:
    code, printed = check(saved, dataset)
    assert code == 0, printed
    assert [line for line in printed.splitlines() if reason in line and line.startswith(f"  {way}")]


def test_an_answer_that_opens_with_a_newline_has_the_prompt_of_a_server(saved: Path, check: Check) -> None:
    code, printed = check(saved, "newline")
    assert code == 0, printed
    assert _states(printed, "apply_chat_template", "input ids") == ["equal"]
    assert _states(printed, "apply_chat_template", "target ids") == ["equal"]


def test_a_sample_that_cannot_be_used_fails(saved: Path, check: Check) -> None:
    code, printed = check(saved, "bad")
    assert code == 1
    assert "none.jpg does not exist" in printed


@pytest.mark.parametrize("reader", ["torchcodec", "torchvision", "unknown"])
def test_a_reader_of_qwen_vl_utils_that_does_not_work_is_named_and_the_rest_compared(
    saved: Path, check: Check, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """On a machine without FFmpeg, or where the variable names a reader that is not there."""
    if reader == "torchcodec":
        with contextlib.suppress(ImportError):
            TorchcodecBackend()
            pytest.skip("torchcodec works here")
    elif hasattr(torchvision.io, "read_video"):
        pytest.skip("torchvision reads videos here")
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", reader)
    code, printed = check(saved)
    assert code == 0, printed
    assert "Traceback" not in printed
    said = " ".join(printed.split())  # the table breaks long rows
    assert said.count("not compared") == 1
    assert f"all not compared qwen-vl-utils reads videos with {reader} here, which does not work (" in said
    assert "set FORCE_QWENVL_VIDEO_READER to one that does: torchcodec or decord" in said
    assert _states(printed, "apply_chat_template", "video pixels") == ["equal"]
    assert _states(printed, "qwen-vl-utils", "image pixels") == ["known"]


def test_a_video_that_is_not_in_a_file_is_not_compared_with_qwen_vl_utils(saved: Path, check: Check) -> None:
    code, printed = check(saved, "bytes")
    assert code == 0, printed
    assert re.search(r"^  qwen-vl-utils +all +not compared +.*from files alone", printed, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("dataset", "transformers", "utils"),
    [
        ("alpha", "transformers drops the transparency of an image file", None),
        ("gray_alpha", "transformers drops the transparency of an image file", "RGBA alone on white, and this has LA"),
        ("deep", None, "clips values of 16 bits at 255"),
    ],
)
def test_images_that_are_read_in_other_ways_are_known_with_the_reason(
    saved: Path, check: Check, dataset: str, transformers: str | None, utils: str | None
) -> None:
    code, printed = check(saved, dataset)
    assert code == 0, printed
    for way, reason in (("apply_chat_template", transformers), ("qwen-vl-utils", utils)):
        (line,) = re.findall(rf"^  {way} +image pixels +.*", printed, flags=re.MULTILINE)
        assert (" equal " in line) if reason is None else (" known " in line and reason in line), line


def test_real_times_that_servers_do_not_know_are_known_with_the_reason(saved: Path, check: Check) -> None:
    code, printed = check(saved, "uneven")
    assert code == 0, printed
    assert _states(printed, "apply_chat_template", "video frames") == ["known"]
    assert "their times differ by up to" in printed
    assert "the frames have no constant rate: training writes their real times" in printed
    expected = "known" if saved.name == "qwen3_vl" else "equal"  # Qwen2.5-VL has one step for the whole video
    assert _states(printed, "apply_chat_template", "input ids") == [expected]


def test_positions_behind_a_long_clip_are_known_with_the_reason(saved: Path, check: Check) -> None:
    """Four frames of 20 s: what follows them stands behind their last second, which new transformers leaves out."""
    code, printed = check(saved, "long")
    assert code == 0, printed
    assert _states(printed, "apply_chat_template", "positions") == ["known"]
    reason = "lets text go on behind the height and width of a clip"
    assert (reason in printed) == (saved.name == "qwen2_5_vl")  # of Qwen3-VL, the markers move them


def test_a_refusal_of_qwen_vl_utils_is_given_with_its_reason(saved: Path, check: Check) -> None:
    """And not the error of torchvision's reader, which it tries then."""
    code, printed = check(saved, "many")
    assert code == 1
    assert "qwen-vl-utils or the processor refuses it: nframes should in interval" in printed


def test_an_adapter_is_served_beside_its_base(saved: Path, check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, folder / name)
    shutil.copy(saved / "training_args.yaml", folder)
    config = {"base_model_name_or_path": str(saved), "r": 12, "rank_pattern": {"q_proj": 20}, "peft_type": "LORA"}
    config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.model.visual.x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    code, printed = check(folder, "own")
    assert code == 0, printed
    assert f"vllm serve {saved} \\" in printed
    assert "--mm-processor-kwargs" in printed  # the base model's processor has other limits
    assert f"--max-lora-rank 32 \\\n    --lora-modules adapter={folder}" in printed
    assert f"--max-lora-rank 20 \\\n    --lora-paths adapter={folder}" in printed
    assert "adapters of the vision tower or its merger: merge the adapter" in printed
    assert "stacked experts (target_parameters), which vLLM loads on GPUs alone and SGLang does not know" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_use", "text"], "--model_name_or_path is missing"),
        (["--model_name_or_path", "x", "--samples", "-1"], "--samples -1 must be 0 or more"),
    ],
)
def test_mistakes_are_one_message(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 1
    assert message in capsys.readouterr().err


def test_a_thought_in_the_text_is_served_apart_where_the_template_reads_it_so(
    check: Check, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = blind_to_think(tiny_checkpoint("qwen3_vl", "thinking"), tmp_path / "model")
    for model in (tiny_checkpoint("qwen3_vl", "thinking"), folder):
        _, printed = check(model, "thought")  # limits of pictures differ, of which there are none
        for way in ("apply_chat_template", "qwen-vl-utils"):
            assert _states(printed, way, "input ids") == ["equal"], printed
