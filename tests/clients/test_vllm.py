"""Saved folders in a real vLLM on the CPU, started with the command that ``check_serving`` prints.

Prompts have the ids of training, those of images, and of clips longer than the frame limits, among them; the
log-probabilities of what it answers are the trainer's own.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qwenvl.cli.check_serving import main
from qwenvl.cli.merge_lora import main as merge
from qwenvl.cli.predict.command import main as predict
from qwenvl.serving.commands import DRAFTS, WITHOUT_PREFIXES
from tests.clients.reference import Row, log_probabilities, open_float32, rows_of
from tests.clients.vllm_server import SETTINGS, ask, counted, printed_command, read, running, serving
from tests.e2e.runs import LORA, REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.client("vLLM", arguments="those that `check_serving` prints")]

Check = Callable[[Path, str, str, float], None]
Compare = Callable[..., str]

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest difference of a log-probability from the trainer's own in float32, by the type that vLLM computes with.

transformers in bfloat16 is up to 0.026 away from float32 in these folders, and vLLM as much.
"""

ROUNDED = "exact, but for the rounding of bfloat16"


@pytest.fixture
def check(registry: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return a function of a folder, a dataset and a server's address that holds its answers against the folder."""

    def function(folder: Path, dataset: str, address: str, tolerance: float) -> None:
        data = ["--dataset_registry", str(registry), "--dataset_use", dataset]
        rows = list(rows_of(folder, *data))
        capsys.readouterr()
        assert main(["--model_name_or_path", str(folder), *data, "--server", address]) == 0
        said = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  server ")]
        assert [words[:4] for words in said] == [["server", "prompt", "ids", "equal"]] * len(rows), said
        name = "adapter" if (folder / "adapter_config.json").is_file() else str(folder)
        hold(folder, rows, [ask(address, name, row.messages(), row.arguments()) for row in rows], tolerance)

    return function


def hold(folder: Path, rows: Sequence[Row], answers: Sequence[Mapping[str, Any]], tolerance: float) -> None:
    """Hold answers of vLLM against the folder: their prompts, and the log-probabilities of their tokens."""
    model = open_float32(folder)
    for row, answer in zip(rows, answers, strict=True):
        assert answer["prompt"] == row.inputs().input_ids.tolist(), row.name
        own = log_probabilities(model, row, answer["answer"])
        assert len(own) > 1 and answer["logprobs"] == pytest.approx(own, abs=tolerance), row.name


@pytest.fixture
def compare(vllm: Path, registry: Path, check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Return a function of a folder and a dataset that holds them against vLLM; returns what the tool printed.

    What the server counted is written to ``metrics.txt``.
    """

    def function(folder: Path, dataset: str, *more: str, dtype: str = "float32") -> str:
        capsys.readouterr()
        data = ["--dataset_registry", str(registry), "--dataset_use", dataset]
        assert main(["--model_name_or_path", str(folder), *data]) == 0
        printed = capsys.readouterr().out
        with serving(vllm, [*printed_command(printed), *more], tmp_path / "vllm.log", dtype) as address:
            check(folder, dataset, address, TOLERANCES[dtype])
            (tmp_path / "metrics.txt").write_text(read(f"{address}/metrics"))
        return printed

    return function


@pytest.mark.client(kind="whole")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_whole_models(family: str, trained: Callable[..., Path], compare: Compare) -> None:
    compare(trained(family), "mixed")


@pytest.mark.client(family="qwen3_vl_moe", kind="whole, also from a checkpoint that stock transformers saved")
def test_experts(trained: Callable[..., Path], compare: Compare) -> None:
    """The checkpoint is as stock transformers saves it, which vLLM cannot read; what training saves, it can."""
    compare(trained("qwen3_vl_moe"), "mixed")


PUBLISHED_HEADS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
"""Width of the heads of linear attention in all published checkpoints; vLLM's kernels for the CPU refuse 32."""


WHOLE, ADAPTERS = pytest.mark.client(kind="whole"), pytest.mark.client(kind="LoRA")


@pytest.mark.client(result=ROUNDED)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("qwen3_5", {}, id="dense", marks=WHOLE),
        pytest.param("qwen3_5_moe", {}, id="experts", marks=WHOLE),
        pytest.param("qwen3_5", {**LORA, "learning_rate": 5e-3}, id="adapters", marks=ADAPTERS),
    ],
)
def test_linear_attention(
    family: str, settings: dict[str, object], trained: Callable[..., Path], compare: Compare
) -> None:
    """On the CPU vLLM computes linear attention in bfloat16 alone."""
    printed = compare(trained(family, PUBLISHED_HEADS, **settings), "mixed", dtype="bfloat16")
    assert ("--enable-lora" in printed) == bool(settings)


OFFLINE_WHOLE = pytest.mark.client(kind="whole, without a server")
OFFLINE_ADAPTERS = pytest.mark.client(kind="LoRA, without a server")
OFFLINE = "the same as keyword arguments of `LLM`"


@pytest.mark.client(arguments=OFFLINE)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(pytest.param(name, {}, id=name, marks=OFFLINE_WHOLE) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
        pytest.param("qwen3_vl_moe", {}, id="qwen3_vl_moe", marks=OFFLINE_WHOLE),
        pytest.param("qwen3_vl", {**LORA, "learning_rate": 5e-3}, id="adapters", marks=OFFLINE_ADAPTERS),
        pytest.param("qwen3_5", {}, id="qwen3_5", marks=[OFFLINE_WHOLE, pytest.mark.client(result=ROUNDED)]),
    ],
)
def test_without_a_server(
    family: str,
    settings: dict[str, object],
    vllm: Path,
    trained: Callable[..., Path],
    registry: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    heads, dtype = (PUBLISHED_HEADS, "bfloat16") if family == "qwen3_5" else (None, "float32")
    folder, data = trained(family, heads, **settings), ["--dataset_registry", str(registry), "--dataset_use", "mixed"]
    assert main(["--model_name_or_path", str(folder), *data]) == 0
    flags = [*printed_command(capsys.readouterr().out)[2:], "--enforce-eager", "--dtype", dtype]
    rows, requests, answers = list(rows_of(folder, *data)), tmp_path / "requests.json", tmp_path / "answers.json"
    requests.write_text(json.dumps([(row.messages(), row.arguments()) for row in rows]))
    command = [vllm / "bin" / "python", Path(__file__).with_name("vllm_offline.py"), requests, answers, *flags]
    done = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    hold(folder, rows, json.loads(answers.read_text()), TOLERANCES[dtype])


@pytest.mark.client(family="qwen3_5", kind="whole, its layers of full attention alone, in float32")
def test_positions_beside_linear_attention(trained: Callable[..., Path], compare: Compare) -> None:
    """Wrong positions change bfloat16 answers less than its rounding where one layer of four sees them."""
    folder = trained("qwen3_5", {"layer_types": ["full_attention"] * 4})
    compare(folder, "mixed", WITHOUT_PREFIXES)  # vLLM keeps prefixes of states, of which there are none here


CARRIED = pytest.mark.client(kind="whole, `mtp.*` as draft")
TRAINED = pytest.mark.client(kind="whole, `mtp.*` trained with it, as draft; more than half of the drafts accepted")


@pytest.mark.client(
    family="qwen3_5", result=ROUNDED, arguments=f"`vllm serve {shlex.join((*DRAFTS, WITHOUT_PREFIXES))}`"
)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="carried", marks=CARRIED),
        pytest.param({"train_mtp": True, "max_steps": 60}, id="trained", marks=TRAINED),
    ],
)
def test_multi_token_prediction(
    settings: dict[str, object], trained: Callable[..., Path], compare: Compare, tmp_path: Path
) -> None:
    """The layers draft tokens, which the model itself accepts or not: its answers stay the same."""
    folder = trained("qwen3_5", PUBLISHED_HEADS, **settings)
    printed = compare(folder, "mixed", *DRAFTS, WITHOUT_PREFIXES, dtype="bfloat16")
    assert f"{shlex.join(DRAFTS)} makes vLLM draft tokens" in printed and f"needs {WITHOUT_PREFIXES} too" in printed
    metrics = (tmp_path / "metrics.txt").read_text()
    drafted, accepted = (
        counted(metrics, f"vllm:spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")
    )
    assert drafted > 0
    assert (accepted / drafted > 0.5) == bool(settings)


@pytest.mark.client(family="qwen3_5", result=ROUNDED, arguments="`scripts/serve.sh`, which gives all")
@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        pytest.param({}, DRAFTS, id="whole", marks=CARRIED),
        pytest.param({**LORA, "learning_rate": 5e-3}, (), id="adapters", marks=ADAPTERS),
    ],
)
def test_the_script_that_serves(
    settings: dict[str, object],
    flags: Sequence[str],
    vllm: Path,
    trained: Callable[..., Path],
    check: Check,
    tmp_path: Path,
) -> None:
    folder = trained("qwen3_5", PUBLISHED_HEADS, **settings)
    command = ["bash", str(REPOSITORY / "scripts" / "serve.sh"), str(folder), *flags]
    variables = {"VLLM": str(vllm / "bin" / "vllm"), "PYTHON": sys.executable}
    with running(command, tmp_path / "vllm.log", **variables) as address:
        check(folder, "mixed", address, TOLERANCES["bfloat16"])


BF16 = pytest.mark.client(kind="trained in bf16; images")
NEW_TOKEN = pytest.mark.client(kind="whole, with a new token; images")


@pytest.mark.client(family="qwen3_vl")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"bf16": True}, id="bf16", marks=BF16),
        pytest.param({"additional_tokens": "slowly"}, id="new token", marks=NEW_TOKEN),
    ],
)
def test_other_kinds_of_training(settings: dict[str, object], trained: Callable[..., Path], compare: Compare) -> None:
    compare(trained("qwen3_vl", **settings), "images")


@pytest.mark.client(family="qwen3_vl", kind="merged LoRA")
def test_merged_adapters(trained: Callable[..., Path], compare: Compare, tmp_path: Path) -> None:
    adapter = trained("qwen3_vl", **LORA, learning_rate=5e-3, video_max_frame_pixels=None)
    assert merge(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert "--enable-lora" not in compare(tmp_path / "merged", "mixed")


@pytest.mark.client(family="qwen3_vl", kind="whole, `tools/predict.py --server`", result="the same answers")
def test_predictions(
    vllm: Path, trained: Callable[..., Path], registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers by ``predict --server`` are those of the folder's own model, also to clips."""
    folder, data = trained("qwen3_vl"), ["--dataset_registry", str(registry), "--dataset_use", "mixed"]
    model = ["--model_name_or_path", str(folder), *data]
    assert main(model) == 0
    command = printed_command(capsys.readouterr().out)
    own, served, long = (tmp_path / f"{name}.jsonl" for name in ("own", "served", "long"))
    model += ["--max_new_tokens", "24"]
    assert predict([*model, "--device", "cpu", "--output", str(own)]) == 0
    with serving(vllm, command, tmp_path / "vllm.log") as address:
        asked = [*model, "--server", address]
        assert predict([*asked, "--output", str(served)]) == 0
        assert served.read_text() == own.read_text()
        assert predict([*asked, "--max_new_tokens", "5000", "--output", str(long)]) == 1
        assert predict([*asked, "--server_model", "none", "--output", str(tmp_path / "none.jsonl")]) == 2
    errors = [json.loads(line)["error"] for line in long.read_text().splitlines()]
    assert all(error.startswith("server: refused (400): ") and "5000" in error for error in errors), errors


@pytest.mark.client(
    kind="LoRA with other limits than its base", arguments="`mm-processor-kwargs`, `media-io-kwargs`, `lora-modules`"
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_adapters_with_other_limits_than_their_base(
    family: str, trained: Callable[..., Path], compare: Compare
) -> None:
    # A server cannot be told the budget that the frames of a clip of Qwen2.5-VL share: here their own limit counts.
    frame = "64*64" if family == "qwen2_5_vl" else None
    printed = compare(trained(family, **LORA, learning_rate=5e-3, video_max_frame_pixels=frame), "mixed")
    assert "pixels that the frames of a clip share" not in printed
    assert "--mm-processor-kwargs" in printed and "--enable-lora" in printed


READ_EXPERTS = """
import sys
from types import SimpleNamespace
import torch
from safetensors.torch import save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration as Model

folder, output, experts = sys.argv[1], sys.argv[2], int(sys.argv[3])
helper = PEFTHelper.from_local_dir(folder, None)
assert not helper._validate_features()
expected = {"experts", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
options = {"peft_helper": helper, "device": "cpu", "weights_mapper": Model.hf_to_vllm_mapper}
lora = LoRAModel.from_local_checkpoint(folder, expected, **options)
manager = SimpleNamespace(_is_3d_moe_model=Model.is_3d_moe_weight, _get_lora_layer_weights=LoRAModel.get_lora)
layer = SimpleNamespace(w13_lora_a_stacked=[torch.empty(1, experts)], global_num_experts=experts, ep_rank=0)
found = {}
for name, weights in list(lora.loras.items()):
    weights.optimize()
for name, weights in list(lora.loras.items()):
    if name.endswith(".experts"):
        LoRAModelManager._stack_moe_lora_weights(manager, lora, layer, name)
        pairs = zip(("gate_up_proj", "down_proj"), weights.lora_a, weights.lora_b)
        found |= {f"{name}.{projection}": up @ down for projection, down, up in pairs}
save_file(found, output)
"""


@pytest.mark.client(
    family="qwen3_vl_moe", kind="LoRA of stacked experts, loaded, not served", arguments="as any adapter"
)
def test_adapters_of_stacked_experts(vllm: Path, trained: Callable[..., Path], tmp_path: Path) -> None:
    """Read by vLLM's own loader, with their rank in ``rank_pattern``; its kernels for them need a GPU."""
    adapter = trained("qwen3_vl_moe", **LORA, learning_rate=5e-3)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForImageTextToText.from_pretrained(base)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if ".experts." in name}
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    (tmp_path / "read.py").write_text(READ_EXPERTS)
    number = merged.config.text_config.num_experts
    command = [vllm / "bin" / "python", tmp_path / "read.py", adapter, tmp_path / "products.safetensors", str(number)]
    subprocess.run(command, env=os.environ | SETTINGS, check=True)
    found = load_file(tmp_path / "products.safetensors")
    assert len(found) == len(before)
    for name, weight in before.items():
        own = name.replace("model.language_model.", "language_model.model.", 1)
        added = merged.get_parameter(name) - weight
        assert added.abs().max() > 1e-5
        torch.testing.assert_close(found[own], added, rtol=1e-4, atol=1e-6)


YARN: dict[str, object] = {"rope_scaling": "yarn", "rope_factor": 4, "rope_native_length": 64, "model_max_length": 256}


WHOLE_YARN = pytest.mark.client(kind="whole, with YaRN", arguments="`hf-overrides` with a quarter of the native length")
LORA_YARN = pytest.mark.client(kind="LoRA with YaRN", arguments="`hf-overrides` with the context of training")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("qwen2_5_vl", {}, marks=WHOLE_YARN, id="whole"),
        pytest.param("qwen3_vl", LORA, marks=LORA_YARN, id="LoRA"),
    ],
)
def test_extended_contexts(
    family: str, settings: dict[str, object], trained: Callable[..., Path], compare: Compare
) -> None:
    """A whole Qwen2.5-VL, whose frequencies vLLM computes with another length, and adapters on a base without YaRN."""
    assert "--hf-overrides" in compare(trained(family, **settings, **YARN), "mixed")
