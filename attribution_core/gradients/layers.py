"""One rule per layer type: from a layer's input and output gradient to the factors of its parameter gradient.

A per-example gradient is `Σ_t g_t a_tᵀ` over positions `t` (tokens, pixels, uses of the layer). The rules only prepare `a` and `g`;
the product is formed where it is needed. A bias is a last column of ones in `a`.
"""

from torch import Tensor, nn

from attribution_core.gradients.attention import ATTENTION
from attribution_core.gradients.convolutions import CONVOLUTIONS
from attribution_core.gradients.embeddings import EMBEDDINGS, SCALED, scales_what_it_looks_up
from attribution_core.gradients.functional import FUNCTIONAL
from attribution_core.gradients.norms import NORMS, SCALE, scales_elementwise
from attribution_core.gradients.rule import Arguments, Factors, LayerRule, Part, weight_and_bias, with_ones


def _linear(module: nn.Linear, prepared: Arguments, gradients: Tensor) -> Factors:
    return prepared[0], gradients.reshape(len(gradients), 1, -1, gradients.shape[-1])


def _linear_prepared(module: nn.Linear, arguments: Arguments) -> Arguments:
    inputs = arguments[0]
    return (with_ones(inputs.reshape(len(inputs), 1, -1, inputs.shape[-1]), module.bias),)


def _linear_parts(module: nn.Linear) -> tuple[Part, ...]:
    return (weight_and_bias(module, 1, module.out_features, module.in_features),)


def _conv1d_parts(module: nn.Module) -> tuple[Part, ...]:
    assert isinstance(module.weight, Tensor)
    d_in, d_out = module.weight.shape
    return (weight_and_bias(module, 1, d_out, d_in, transposed=True),)


_LINEAR = LayerRule(_linear_parts, _linear, prepare=_linear_prepared)  # type: ignore[arg-type]
# The linear layer of transformers' GPT-2, with its weight as (inputs, outputs); told by name, as the library may not be installed.
_GPT2_LINEAR = LayerRule(_conv1d_parts, _linear, prepare=_linear_prepared)  # type: ignore[arg-type]
RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: _LINEAR,
    nn.MultiheadAttention: ATTENTION,
    **EMBEDDINGS,
    **CONVOLUTIONS,
    **NORMS,
}


def rule_for(module: nn.Module) -> LayerRule:
    """Return the rule of a module: that of its class, or of the one it inherits its `forward` from; else the one for any module."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D":
        found: LayerRule | None = _GPT2_LINEAR
    elif scales_elementwise(module):
        found = SCALE
    elif scales_what_it_looks_up(module):
        found = SCALED
    else:
        found = next((RULES[base] for base in kind.__mro__ if base in RULES and base.forward is kind.forward), None)
    return found if found is not None and _has_usual_parameters(module, found) else FUNCTIONAL


def _has_usual_parameters(module: nn.Module, rule: LayerRule) -> bool:
    """Return whether a module's parameters are those of its class, not others that it is computed from (weight normalisation)."""
    if "forward" in vars(module) or hasattr(module, "parametrizations"):
        return False
    named = {columns.parameter for part in rule.parts(module) for columns in part.columns}
    return named == {name for name, _ in module.named_parameters(recurse=False)}
