"""Models of the `transformers` library, from a config alone: no download, no remote code, no attention kernel of the config's choice.

`config.json` is data from a user. Only a listed `model_type` is accepted, and keys that name code, kernels or quantisers are refused.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn

from attribution_core.architectures.arguments import HuggingFaceArguments
from attribution_core.errors import ArchitectureArgumentsError

CAUSAL_TYPES = frozenset({"gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen2", "qwen3", "smollm3"})
CLASSIFIER_TYPES = frozenset({"albert", "bert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta"})
_REFUSED_KEYS = ("auto_map", "custom_pipelines", "quantization_config", "trust_remote_code", "_name_or_path")
_POINTER = "/architecture/arguments/config"


class LogitsOnly(nn.Module):
    """Wraps a model so that it maps (tokens, mask) to its logits tensor; parameter names stay those of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits of (batch, tokens) inputs."""
        attention = torch.ones_like(tokens) if mask is None else mask.to(tokens.dtype)
        logits: Tensor = self.model(input_ids=tokens, attention_mask=attention).logits
        return logits


def causal_lm(arguments: HuggingFaceArguments) -> nn.Module:
    """Return a causal language model."""
    return LogitsOnly(_from_config("AutoModelForCausalLM", arguments.config, CAUSAL_TYPES))


def sequence_classifier(arguments: HuggingFaceArguments) -> nn.Module:
    """Return a sequence classifier; the number of classes is the config's `num_labels` or its `id2label`."""
    return LogitsOnly(_from_config("AutoModelForSequenceClassification", arguments.config, CLASSIFIER_TYPES))


def checked_config(config: dict[str, Any], allowed: frozenset[str]) -> dict[str, Any]:
    """Return the config without what only concerns how transformers loads it.

    Raises:
        ArchitectureArgumentsError: if the model type is not listed, or the config names code or kernels.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in allowed:
        listed = ", ".join(sorted(allowed))
        raise ArchitectureArgumentsError(f"model_type {model_type!r} is not one of {listed}", f"{_POINTER}/model_type")
    for key in config:
        if key in _REFUSED_KEYS or key.startswith(("_attn", "attn_implementation", "_experts")):
            raise ArchitectureArgumentsError(f"{key} is not accepted in a config", f"{_POINTER}/{key}")
    return {key: value for key, value in config.items() if key not in ("transformers_version", "torch_dtype", "dtype")}


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
    parsed = transformers.AutoConfig.for_model(model_type, **checked)
    model: nn.Module = getattr(transformers, factory).from_config(
        parsed, trust_remote_code=False, attn_implementation="eager", dtype=torch.float32
    )
    return model
