"""Layers of the transformers library, told by name, in whole models: Conv1D, and RMS norms that scale by w or by 1 + w."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attribution_core.gradients import GradientCapture
from attribution_core.gradients.functional import FUNCTIONAL
from attribution_core.gradients.layers import rule_for
from attribution_core.gradients.parameters import ParameterLayout
from attribution_core.gradients.self_check import check_capture

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("default")]
SMALL = {"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 12, "max_position_embeddings": 16, "head_dim": 4}  # fmt: skip
CONFIGS = {
    "gpt2": {"vocab_size": 17, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2},
    "llama": {**SMALL, "tie_word_embeddings": True},
    "qwen3": SMALL,
    "gemma": SMALL,
    "gemma2": SMALL,
}
# The norms of the others compute in float32 whatever they are given.
STAY_DOUBLE = ("gpt2",)


def model(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name], bos_token_id=0, eos_token_id=0, pad_token_id=0)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def objective(module: nn.Module, tokens: Tensor) -> Tensor:
    return module(input_ids=tokens, use_cache=False).logits.log_softmax(-1)[..., 3].sum(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_whole_models_equal_autograd(name: str) -> None:
    module, tokens = model(name), torch.randint(1, 17, (3, 5))
    named = dict(module.named_parameters())
    rows = [torch.autograd.grad(objective(module, row[None]).sum(), list(named.values())) for row in tokens]
    expected = {key: torch.stack(parts) for key, parts in zip(named, zip(*rows, strict=True), strict=True)}
    module.requires_grad_(False)
    capture = GradientCapture(module)
    assert capture.coverage.percent == 100
    assert all(rule_for(part) is not FUNCTIONAL for part in module.modules() if list(part.parameters(recurse=False)))
    forward = partial(capture.run, lambda network: network(input_ids=tokens, use_cache=False).logits, len(tokens))
    check_capture(capture, forward)
    run = forward()
    found = run.gradients(run.output.log_softmax(-1)[..., 3].sum(1))
    layout = ParameterLayout(capture)
    for key, ours in layout.unpacked([gradient.materialise() for gradient in found]).items():
        error = 1e-9 if name in STAY_DOUBLE else 1e-4
        torch.testing.assert_close(ours, expected[key], rtol=error, atol=error * float(expected[key].abs().max()))
