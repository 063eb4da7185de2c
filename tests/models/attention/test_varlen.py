"""Attention in one call a layer: equal to the loop over samples and to the stock tower, and so are all gradients."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import transformers.modeling_flash_attention_utils as flash
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from qwenvl.models.attention import varlen
from qwenvl.models.attention.packed import attend_by_segments, segmented_attention, stock_attention
from qwenvl.models.attention.segments import Segments
from qwenvl.models.attention.varlen import adapt_kernel, torch_kernel, varlen_attention, varlen_obstacle
from qwenvl.models.trainable.freezing import configure_checkpointing
from qwenvl.tasks.objective import causal_loss
from qwenvl.utils.errors import UserError
from tests.models.attention.reference import ReferenceKernel
from tests.patches import install

CAUSAL, WHOLE = (-1, 0), (-1, -1)
CONTENTS = ("text", "two images", "video, image", "text")


def test_the_kernel_of_the_installed_torch_takes_what_it_is_given() -> None:
    """Also true of torch 2.13, whose signature is the same."""
    kernel = torch_kernel()
    assert kernel is not None
    theirs, ours = (list(inspect.signature(one).parameters.values()) for one in (kernel, ReferenceKernel()))
    positional = [one.name for one in ours if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert [one.name for one in theirs if one.kind is one.POSITIONAL_OR_KEYWORD] == positional
    by_name = {one.name: one.default for one in theirs if one.kind is one.KEYWORD_ONLY}
    assert {one.name: one.default for one in ours if one.kind is one.KEYWORD_ONLY}.items() <= by_name.items()


def test_the_kernel_of_an_older_torch_takes_heads_that_share_a_key_head_without_a_flag() -> None:
    """``varlen_attn`` of torch 2.11; one without windows is none."""
    given: list[dict[str, Any]] = []

    def older(query: Tensor, *borders: Any, scale: float | None = None, window_size: Any = (-1, -1)) -> Tensor:
        given.append({"scale": scale, "window_size": window_size})
        return query

    kernel = adapt_kernel(older)
    assert kernel is not None
    query, key, borders = torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    kernel(query, key, key, borders, borders, 3, 3, scale=0.5, window_size=(-1, 0), enable_gqa=True)
    assert given == [{"scale": 0.5, "window_size": (-1, 0)}]
    assert adapt_kernel(lambda query, scale: query) is None


def test_it_does_not_run_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert varlen_obstacle() == "there is no CUDA device"


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("groups", [1, 3])
def test_samples_of_a_row_attend_as_in_the_loop(window: int | None, groups: int) -> None:
    lengths = (4, 1, 7)
    query = torch.randn(1, 2 * groups, 12, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 12, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    layer: Any = SimpleNamespace(is_causal=True)
    options = {"scaling": 0.3, "sliding_window": window}
    loop, _ = segmented_attention(layer, query, key, value, None, segments=Segments(lengths), **options)
    borders = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    kernel = ReferenceKernel()
    once, _ = varlen_attention(
        layer, query, key, value, None, kernel=kernel, cu_seq_lens_q=borders, max_length_q=7, **options
    )
    torch.testing.assert_close(once, loop)
    weights = torch.randn_like(loop)
    expected = torch.autograd.grad((loop * weights).sum(), [query, key, value])
    torch.testing.assert_close(torch.autograd.grad((once * weights).sum(), [query, key, value]), expected)
    assert kernel.calls == {((-1 if window is None else window - 1, 0), torch.float64): 1}


def losses_of(model: Any, batch: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss = causal_loss(model, batch, num_trained_tokens=10.0)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in model.named_parameters()}


def test_loss_and_gradients_are_those_of_the_loop(family_name, layout, load_tiny, mixture, make_batch):
    """Of every family, with checkpointing: tower and language model in one call a layer, each with its own borders."""
    batch = make_batch(layout, [mixture(family_name)[name] for name in CONTENTS])
    found, kernel = [], ReferenceKernel()
    for chosen in (None, kernel):
        model = load_tiny(family_name)
        install(model)
        attend_by_segments(model, chosen)
        configure_checkpointing(model, "both")
        found.append(losses_of(model, batch))
    (loop, expected), (once, gradients) = found
    assert once == pytest.approx(loop, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text
        )
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum(kind != "linear_attention" for kind in kinds)
    # forward pass and recomputation
    assert kernel.calls == {
        (CAUSAL, torch.float32): 2 * layers,
        (WHOLE, torch.float32): 2 * len(model.model.visual.blocks),
    }


def test_queries_and_keys_have_the_type_of_values_under_autocast(load_tiny, mixture, make_batch):
    """Norms of queries and keys return float32 there."""
    model, kernel = load_tiny("qwen3_vl"), ReferenceKernel()
    install(model)
    attend_by_segments(model, kernel)
    batch = make_batch("flattened", [mixture("qwen3_vl")[name] for name in ("text", "image")])
    with torch.autocast("cpu", torch.bfloat16):
        causal_loss(model, batch, num_trained_tokens=1.0)
    assert {dtype for _, dtype in kernel.calls} == {torch.bfloat16}


def test_generate_takes_the_stock_attention_and_training_takes_its_own_again(load_tiny, mixture):
    sample, plain, model = mixture("qwen2_5_vl")["video, image"], load_tiny("qwen2_5_vl"), load_tiny("qwen2_5_vl")
    kernel = ReferenceKernel()
    attend_by_segments(model, kernel)
    options = {**sample.inputs, "max_new_tokens": 4, "do_sample": False}
    with stock_attention(model):
        answer = model.eval().generate(**options)
    assert torch.equal(answer, plain.eval().generate(**options)) and not kernel.calls
    config = model.config
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == varlen.NAME
    with stock_attention(plain):
        assert plain.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"softcap": 30.0}])
def test_what_the_kernel_cannot_do_is_refused(option):
    part = torch.zeros(1, 2, 3, 8)
    with pytest.raises(UserError, match=f"Identity needs {next(iter(option))}.*--attn_implementation sdpa"):
        varlen_attention(nn.Identity(), part, part, part, None, kernel=ReferenceKernel(), **option)


def test_a_tower_of_its_own_keeps_its_attention(load_tiny):
    model = load_tiny("qwen3_vl")
    attend_by_segments(model, ReferenceKernel(), stock_tower=False)
    config = model.config
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == (varlen.NAME, "sdpa")


class FlashAttention:
    """The functions of the flash-attn package that transformers calls, computed by the reference."""

    def __init__(self, kernel: ReferenceKernel) -> None:
        self.kernel = kernel

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        assert dropout_p == 0
        return self.kernel(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            scale=softmax_scale,
            window_size=CAUSAL if causal else WHOLE,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def whole(self, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("rows without borders")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="the test replaces what older versions have elsewhere"
)
def test_the_flash_path_of_transformers_trains_alike(family_name, load_tiny, mixture, make_batch, monkeypatch):
    """With a reference in the place of the package's kernels, which run on CUDA alone."""
    batch, kernel = make_batch("flattened", [mixture(family_name)[name] for name in CONTENTS]), ReferenceKernel()
    package = FlashAttention(kernel)
    process = flash._lazy_define_process_function(package.varlen)
    functions = (package.whole, package.varlen, None, None, None), (process, process)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: functions)
    found = []
    for ours in (True, False):
        model = load_tiny(family_name)
        install(model)
        if ours:
            attend_by_segments(model)
        else:  # the public way asks for the package
            for config in (model.config, model.config.text_config, model.config.vision_config):
                config._attn_implementation_internal = "flash_attention_2"
        found.append(losses_of(model, batch))
    (loop, expected), (once, gradients) = found
    assert once == pytest.approx(loop, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, at=name: at + text)
    assert {window for window, _ in kernel.calls} == {CAUSAL, WHOLE}


@torch.library.custom_op("qwenvl::reference_attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int) -> Tensor:
    """Stand for torch's kernel, which is an operator of its own too: dynamo does not look inside."""
    return value.repeat_interleave(query.shape[1] // key.shape[1], 1) + longest * 0.01


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int) -> Tensor:
    return torch.empty_like(query)


def as_kernel(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, _: Tensor, longest: int, *__: Any, **___: Any
):
    return attend(query, key, value, borders, longest)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_layers_compile_to_one_graph_for_packs_of_any_size(family, load_tiny, mixture, make_batch):
    """The loop breaks the graph in each layer, and dynamo would compile anew for each number of samples."""
    counter = CompileCounter()
    torch._dynamo.reset()
    model = load_tiny(family).to(torch.bfloat16)
    install(model)
    attend_by_segments(model, as_kernel)
    for layer in model.model.language_model.layers:
        layer.compile(backend=counter, dynamic=True, fullgraph=True)
    samples = mixture(family)
    for names in (
        ["text", "image"],
        ["text", "two images", "video"],
        ["image"],
        ["video, image", "text", "text", "text"],
    ):
        with torch.no_grad():
            causal_loss(model, make_batch("flattened", [samples[name] for name in names]), num_trained_tokens=1.0)
    assert counter.frame_count <= 2, "recompiled"
