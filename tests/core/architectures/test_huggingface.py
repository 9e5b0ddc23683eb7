"""Models of transformers from a config alone; most of this needs the extra `hf`."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attribution_core.architectures.build import build, skeleton
from attribution_core.architectures.huggingface import CAUSAL_TYPES, checked_config
from attribution_core.checkpoints import load_model
from attribution_core.data.batch import Batch
from attribution_core.errors import ArchitectureArgumentsError, CheckpointError
from attribution_core.spec import ArchitectureSpec
from attribution_core.weights import check_weights

GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16}  # fmt: skip
BERT = {"model_type": "bert", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8, "max_position_embeddings": 16, "num_labels": 3}  # fmt: skip
MODELS = [("hf_causal_lm", GPT2), ("hf_causal_lm", LLAMA), ("hf_sequence_classifier", BERT)]


def spec_of(name: str, config: dict[str, Any]) -> ArchitectureSpec:
    return ArchitectureSpec(name=name, arguments={"config": config})


@pytest.mark.parametrize(
    "key",
    ["auto_map", "custom_pipelines", "trust_remote_code", "quantization_config", "_attn_implementation", "kernel_config",
     "_attn_implementation_internal", "attn_implementation", "experts_implementation", "use_kernels"],
)  # fmt: skip
def test_keys_that_name_code_or_kernels_are_refused(key: str) -> None:
    with pytest.raises(ArchitectureArgumentsError, match=key):
        checked_config({**GPT2, key: {"AutoModel": "evil--repo"}}, CAUSAL_TYPES)


@pytest.mark.parametrize("model_type", [None, 3, "", "bert", "gpt2\n", ["gpt2"], {"gpt2": 1}, "../gpt2"])
def test_only_listed_model_types_are_accepted(model_type: Any) -> None:
    with pytest.raises(ArchitectureArgumentsError) as caught:
        checked_config({**GPT2, "model_type": model_type}, CAUSAL_TYPES)
    assert caught.value.pointer == "/architecture/arguments/config/model_type"


@pytest.mark.parametrize(
    "sizes",
    [{"n_layer": 10**6}, {"num_hidden_layers": 10**400}, {"num_labels": 10**9}, {"vocab_size": 10**8},
     {"attention_types": [[["global"], 10**9]]}, {"rope_scaling": {"original_max_position_embeddings": 10**12}}],
)  # fmt: skip
def test_absurd_sizes_are_refused_before_anything_is_built(sizes: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureArgumentsError, match="the most accepted"):
        checked_config({**GPT2, **sizes}, CAUSAL_TYPES)


def test_what_a_published_config_says_of_itself_is_dropped() -> None:
    published = {"_name_or_path": "gpt2", "architectures": ["GPT2LMHeadModel"], "torch_dtype": "float16",
                 "transformers_version": "4.40.0", "use_cache": True, "return_dict": False, "rope_theta": 10**9}  # fmt: skip
    assert checked_config({**GPT2, **published}, CAUSAL_TYPES) == {**GPT2, "rope_theta": 10**9}


def test_without_transformers_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArchitectureArgumentsError, match=r"headwater\[hf\]"):
        build(spec_of("hf_causal_lm", GPT2))


@pytest.mark.hf
@pytest.mark.filterwarnings("default")
class TestWithTransformers:
    @pytest.mark.parametrize(("name", "config"), MODELS)
    def test_logits_do_not_depend_on_padding(self, name: str, config: dict[str, Any]) -> None:
        torch.manual_seed(0)
        module = build(spec_of(name, config)).double()
        tokens = torch.randint(1, 50, (2, 5))
        rows = torch.arange(2)
        alone = Batch(rows, tokens, mask=torch.ones(2, 5, dtype=torch.bool)).forward(module)
        padded = Batch(rows, tokens, mask=torch.ones(2, 5, dtype=torch.bool)).widened(12).forward(module)
        assert alone.shape == ((2, 5, 50) if name == "hf_causal_lm" else (2, 3))
        assert torch.allclose(padded[:, :5] if padded.dim() == 3 else padded, alone, atol=1e-10)
        assert torch.allclose(module(tokens), alone, atol=1e-10)  # without a mask every token is real

    @pytest.mark.parametrize(("name", "config"), MODELS)
    def test_weights_published_by_transformers_load(self, name: str, config: dict[str, Any], tmp_path: Path) -> None:
        import transformers

        options = {key: value for key, value in config.items() if key != "model_type"}
        parsed = transformers.AutoConfig.for_model(config["model_type"], **options)
        kind = "AutoModelForCausalLM" if name == "hf_causal_lm" else "AutoModelForSequenceClassification"
        published = getattr(transformers, kind).from_config(parsed).eval()
        published.save_pretrained(tmp_path)
        path, spec = tmp_path / "model.safetensors", spec_of(name, config)
        check_weights(path, skeleton(spec))
        tokens = torch.randint(1, 50, (2, 5))
        loaded = load_model(spec, path)
        assert torch.allclose(loaded(tokens), published(input_ids=tokens).logits, atol=1e-5)

    def test_the_tied_head_of_gpt2_is_named(self) -> None:
        assert skeleton(spec_of("hf_causal_lm", GPT2))["lm_head.weight"]["tied_to"] == "transformer.wte.weight"

    @pytest.mark.parametrize("name_and_config", MODELS, ids=lambda pair: pair[1]["model_type"])
    @pytest.mark.parametrize(
        "change",
        [{"num_attention_heads": 0, "n_head": 0}, {"hidden_size": -8, "n_embd": -8}, {"vocab_size": "x"},
         {"vocab_size": None}, {"hidden_act": "os.system", "activation_function": "os.system"},
         {"hidden_act": {}, "activation_function": {}}, {"id2label": 5}, {"tie_word_embeddings": "a"}],
    )  # fmt: skip
    def test_hostile_configs_are_refused(
        self, name_and_config: tuple[str, dict[str, Any]], change: dict[str, Any]
    ) -> None:
        name, config = name_and_config
        with pytest.raises(ArchitectureArgumentsError):
            skeleton(spec_of(name, {**config, **change}))

    def test_a_padding_token_outside_the_vocabulary_is_refused(self) -> None:
        with pytest.raises(ArchitectureArgumentsError):
            build(spec_of("hf_causal_lm", {**LLAMA, "pad_token_id": 999}))

    def test_what_a_config_asks_of_the_forward_pass_changes_nothing(self) -> None:
        asked = {"return_dict": False, "output_attentions": True, "torchscript": True, "use_cache": False}
        module = build(spec_of("hf_causal_lm", {**LLAMA, **asked}))
        assert module(torch.ones(1, 4, dtype=torch.long)).shape == (1, 4, 50)

    def test_weights_of_another_shape_are_refused(self, tmp_path: Path) -> None:
        save_file({"transformer.wte.weight": torch.zeros(3, 3)}, tmp_path / "weights")
        with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight has shape"):
            check_weights(tmp_path / "weights", skeleton(spec_of("hf_causal_lm", GPT2)))
