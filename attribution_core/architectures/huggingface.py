"""Models of the `transformers` library, from a config alone: no download, no remote code, no attention kernel of the config's choice.

`config.json` is data from a user. Only a listed `model_type` is accepted, keys that name code, kernels or quantisers are
refused, and sizes are bounded before anything is built.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from attribution_core.architectures.arguments import HuggingFaceArguments
from attribution_core.errors import ArchitectureArgumentsError

CAUSAL_TYPES = frozenset({"gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen2", "qwen3", "smollm3"})
CLASSIFIER_TYPES = frozenset({"albert", "bert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta"})
MAX_SIZE = 2_000_000
MAX_LAYERS = 512
_POINTER = "/architecture/arguments/config"
_REFUSED_KEYS = (
    "auto_map",
    "custom_pipelines",
    "kernel_config",
    "quantization_config",
    "trust_remote_code",
    "use_kernels",
)
_REFUSED_STARTS = ("_attn", "attn_implementation", "_experts", "experts_implementation")
# What a config says of its own origin, of number formats and of what a forward pass returns: ours to decide.
_DROPPED_KEYS = frozenset({
    "_commit_hash", "_name_or_path", "architectures", "dtype", "name_or_path", "output_attentions", "output_hidden_states",
    "return_dict", "torch_dtype", "torchscript", "transformers_version", "use_cache",
})  # fmt: skip


def causal_lm(arguments: HuggingFaceArguments) -> nn.Module:
    """Return a causal language model that maps (tokens, mask) to logits, with the parameter names of transformers."""
    return _from_config("AutoModelForCausalLM", arguments.config, CAUSAL_TYPES)


def sequence_classifier(arguments: HuggingFaceArguments) -> nn.Module:
    """Return a sequence classifier; the number of classes is the config's `num_labels` or its `id2label`."""
    return _from_config("AutoModelForSequenceClassification", arguments.config, CLASSIFIER_TYPES)


def checked_config(config: dict[str, Any], allowed: frozenset[str]) -> dict[str, Any]:
    """Return the config without what only concerns how transformers loads and calls it.

    Raises:
        ArchitectureArgumentsError: if the model type is not listed, the config names code or kernels, or a size is absurd.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in allowed:
        listed = ", ".join(sorted(allowed))
        raise ArchitectureArgumentsError(f"model_type {model_type!r} is not one of {listed}", f"{_POINTER}/model_type")
    for key, value in config.items():
        if key in _REFUSED_KEYS or key.startswith(_REFUSED_STARTS):
            raise ArchitectureArgumentsError(f"{key!r} is not accepted in a config", _POINTER)
        _check_sizes(key, value)
    return {key: value for key, value in config.items() if key not in _DROPPED_KEYS}


def _check_sizes(key: str, value: Any) -> None:
    """Refuse whole numbers, however deep, that would build a module without end."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_sizes(str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            _check_sizes(key, inner)
    elif isinstance(value, int) and "theta" not in key:
        counts_layers = "layer" in key or "group" in key or key == "attention_types"
        largest = MAX_LAYERS if counts_layers else MAX_SIZE
        if value > largest:
            raise ArchitectureArgumentsError(f"{key!r} holds a number above {largest:,}, the most accepted", _POINTER)


def _from_config(factory: str, config: dict[str, Any], allowed: frozenset[str]) -> nn.Module:
    checked = checked_config(config, allowed)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers  # noqa: PLC0415, an optional extra
    except ImportError:
        raise ArchitectureArgumentsError(
            "this architecture needs the extra `hf`: pip install headwater[hf]", "/architecture/name"
        ) from None
    model_type = checked.pop("model_type")
    try:
        parsed = transformers.AutoConfig.for_model(model_type, **checked)
        model: nn.Module = getattr(transformers, factory).from_config(
            parsed, trust_remote_code=False, attn_implementation="eager", dtype=torch.float32
        )
    except Exception as error:  # every model type raises what it likes: assertions, divisions by zero, its own
        raise ArchitectureArgumentsError(f"{model_type} cannot be built of this config: {error}", _POINTER) from error
    # Hooks instead of a wrapping module: a wrapper's name would stand before every name of a published checkpoint.
    model.register_forward_pre_hook(_named_inputs, with_kwargs=True)
    model.register_forward_hook(_logits_of)
    return model


def _named_inputs(
    module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Tensor | None]
) -> tuple[tuple[()], dict[str, Any]]:
    """Translate (tokens, mask) into transformers' arguments."""
    (tokens,) = inputs
    mask = options.get("mask")
    attention = torch.ones_like(tokens) if mask is None else mask.to(tokens.dtype)
    return (), {"input_ids": tokens, "attention_mask": attention, "return_dict": True}


def _logits_of(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits
