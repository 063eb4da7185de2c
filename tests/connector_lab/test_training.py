"""The lab's models go through the same trainer, checkpoints, adapters and evaluation as the families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.cli.predict.command import main as predict
from qwenvl.config import DataArguments, parse_arguments
from qwenvl.connector_lab.config import CONNECTORS, Connector
from qwenvl.connector_lab.family import FAMILY
from qwenvl.data.collator import Collator, for_model
from qwenvl.data.encoding.encoded import Item
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder, open_processor
from qwenvl.data.types import Sample
from qwenvl.inference.generate import ChatModel, encode_prompts
from qwenvl.inference.prompts import open_example
from qwenvl.models.forward import install
from qwenvl.models.loss.causal_lm import prepare_inputs
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks.objective import causal_loss
from qwenvl.train.run import run
from qwenvl.utils.errors import Origin, UserError
from tests.e2e.runs import (
    LORA,
    changed,
    equal_bits,
    flags,
    history,
    largest_difference,
    read_annotations,
    run_on_two_ranks,
    train,
    weights,
)

DESCENT = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0}
CONNECTOR_ALONE = {"tune_mm_vision": False, "tune_mm_llm": False}


def encoder_of(folder: Path) -> SampleEncoder:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    limits = DataArguments(
        max_pixels=64 * 64,
        min_pixels=32 * 32,
        video_max_pixels=4 * 64 * 64,
        video_min_pixels=4 * 32 * 32,
        video_max_frames=4,
        video_min_frames=2,
    )
    return build_encoder(open_processor(str(folder)), model.config, FAMILY, limits, 4096)


def samples_of(registry: Path) -> list[Sample]:
    records = read_annotations(registry, "mixed")
    return [Sample(Origin("mixed", "mixed.json", n), one, str(registry.parent)) for n, one in enumerate(records)]


@pytest.mark.parametrize(
    ("encoder", "connector"),
    [*(("clip", one) for one in CONNECTORS), ("qwen3_vl", "merger"), ("qwen2_vl", "resampler")],
)
def test_training_reads_the_ids_that_the_saved_processor_makes(
    encoder: str, connector: Connector, lab: Callable[..., Path], registry: Path
) -> None:
    """And positions count tokens one by one, as the language model has learned."""
    folder = lab(encoder, connector=connector)
    opened = encoder_of(folder)
    chat_model = ChatModel(
        AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    )
    for sample in samples_of(registry):
        example = open_example(sample, opened)
        inputs = encode_prompts(chat_model, [example.prompt])
        prompt = inputs["input_ids"][0]
        ids = example.encoded.tokens.input_ids
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert example.encoded.tokens.position_ids[3].tolist() == list(range(len(ids)))


@pytest.mark.parametrize("connector", CONNECTORS)
def test_one_row_gives_the_loss_of_the_stock_forward_pass(
    connector: Connector, lab: Callable[..., Path], registry: Path
) -> None:
    """Samples with pictures, videos and text alone, flattened into one row, against one call each."""
    folder = lab("siglip", "llama", connector)
    opened, processor = encoder_of(folder), open_processor(str(folder))
    samples = samples_of(registry)[:6]
    examples = [open_example(sample, opened) for sample in samples]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    chat_model = ChatModel(model, processor)
    total = 0.0
    for example in examples:
        inputs = encode_prompts(chat_model, [example.prompt])
        tokens = example.encoded.tokens
        inputs = {name: inputs[name] for name in inputs if name.startswith(("pixel", "image", "video"))}
        with torch.no_grad():
            logits = model(input_ids=tokens.input_ids[None], **inputs).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, tokens.labels[1:], reduction="sum"))
    install(model, Patchify.from_processor(processor))
    batch = Collator(0, flatten=True)([Item((example.encoded,)) for example in examples])
    with torch.no_grad():
        found = causal_loss(model, prepare_inputs(for_model(batch)), num_trained_tokens=1.0)
    assert float(found) == pytest.approx(total, rel=1e-5)


def test_switches_move_what_they_name_and_nothing_else(
    lab: Callable[..., Path], registry: Path, tmp_path: Path
) -> None:
    """And padded and flattened batches train alike."""
    base = lab("clip", connector="resampler")
    parts = {"tune_mm_vision": "model.visual.encoder.", "tune_mm_mlp": "model.visual.merger."}
    for switch, prefix in [*parts.items(), ("tune_mm_llm", "")]:
        switches = {**dict.fromkeys([*parts, "tune_mm_llm"], False), switch: True}
        runs = [
            train(base, tmp_path / f"{switch}-{flat}", registry, data_flatten=flat, **DESCENT, **switches)
            for flat in ((False, True) if switch == "tune_mm_mlp" else (True,))
        ]
        moved = changed(base, runs[0])
        wanted = {name for name in weights(base) if name.startswith(prefix) and (prefix or "model.visual." not in name)}
        # a bias of the keys changes no softmax, and class tokens of text alone none either
        assert moved <= wanted
        assert len(moved) > 0.7 * len(wanted), sorted(wanted - moved)
        if len(runs) == 2:
            assert history(runs[1]) == pytest.approx(history(runs[0]), rel=1e-5)
            assert largest_difference(*runs) < 1e-5


def test_the_saved_folder_opens_alone_and_adapters_open_on_their_base(
    lab: Callable[..., Path], registry: Path, tmp_path: Path
) -> None:
    """The trainer compares the logits of a fresh process with its own, and fails where they differ."""
    base = lab("qwen2_vl", "qwen2", "qformer")
    asked = ["--dataset_use", "held_out", "--dataset_registry", str(registry), "--max_new_tokens", "4"]
    for name, settings in {"whole": {"verify_export": True}, "adapters": {**LORA, "tune_mm_mlp": True}}.items():
        folder = train(base, tmp_path / name, registry, **settings)
        assert predict(["--model_name_or_path", str(folder), "--output", str(tmp_path / f"{name}.jsonl"), *asked]) == 0
    assert not list((tmp_path / "adapters").glob("model*.safetensors"))


@pytest.mark.parametrize("language_model", ["qwen3", "llama"])
def test_answers_are_generated_from_the_cache(
    language_model: str, lab: Callable[..., Path], registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After the prompt each step reads one token, whatever transformers calls the cache, and answers as without one."""
    folder = lab("clip", language_model)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    prompt = open_example(samples_of(registry)[0], encoder_of(folder)).prompt
    inputs = encode_prompts(ChatModel(model, open_processor(str(folder))), [prompt])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    read: list[int] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    answer = model.generate(**inputs, **settings)
    handle.remove()
    assert read == [inputs["input_ids"].shape[1], 1, 1, 1]
    assert torch.equal(answer, model.generate(**inputs, **settings, use_cache=False))
    assert "deprecated" not in caplog.text


def test_the_heaviest_step_is_counted_without_the_model(
    lab: Callable[..., Path], registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(lab("qwen3_vl", connector="resampler"), tmp_path / "run", registry, dry_run=True)
    assert "memory" in "".join(capsys.readouterr()).lower()


def test_engines_that_share_weights_out_are_refused(
    lab: Callable[..., Path], registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="leave --deepspeed out"):
        run(parse_arguments(flags(lab(), tmp_path, registry, deepspeed="configs/zero2.json")))


@pytest.mark.slow
def test_two_ranks_train_the_lab_like_one_process(lab: Callable[..., Path], registry: Path, tmp_path: Path) -> None:
    """Text on one rank while the other holds pictures; and a resumed run ends with the same bits."""
    model = lab("clip", connector="qformer")
    settings = {**DESCENT, "per_device_train_batch_size": 1, "max_steps": 4, "data_flatten": True, **CONNECTOR_ALONE}
    alone = train(model, tmp_path / "single", registry, gradient_accumulation_steps=2, **settings)
    saving = {"save_strategy": "steps", "save_steps": 2}
    resume = {"resume_from_checkpoint": tmp_path / "split" / "checkpoint-2"}
    commands = {
        "split": flags(model, tmp_path / "split", registry, **settings, **saving),
        "resumed": flags(model, tmp_path / "resumed", registry, **settings, **saving, **resume),
    }
    split = run_on_two_ranks(tmp_path, commands, "DDP")
    assert history(split["split"]) == pytest.approx(history(alone), rel=1e-5)
    assert largest_difference(split["split"], alone) < 1e-5
    assert equal_bits(split["resumed"], split["split"])
