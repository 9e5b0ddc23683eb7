"""The arguments of every built-in architecture, as schemas; bounded, so that no request can ask for the absurd."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from attribution_core.spec import Spec

Width = Annotated[int, Field(ge=1, le=262_144)]
Classes = Annotated[int, Field(ge=1, le=1_000_000)]
Depth = Annotated[int, Field(ge=1, le=256)]
Side = Annotated[int, Field(ge=1, le=4096)]
Activation = Literal["relu", "gelu", "tanh", "silu"]


class LinearArguments(Spec):
    """One affine map."""

    input_dim: Width
    output_dim: Classes = 1
    bias: bool = True


class LogisticArguments(Spec):
    """Multinomial logistic regression: one affine map to class logits."""

    input_dim: Width
    num_classes: Annotated[int, Field(ge=2, le=1_000_000)]
    bias: bool = True


class MlpArguments(Spec):
    """Fully connected layers."""

    input_dim: Width
    hidden: list[Width] = Field(min_length=1, max_length=64)
    output_dim: Classes
    activation: Activation = "relu"


class CnnArguments(Spec):
    """Convolutions with pooling after each, then one linear layer, or two with `hidden`."""

    input_shape: Annotated[list[Side], Field(min_length=3, max_length=3, description="(channels, height, width)")]
    channels: list[Annotated[int, Field(ge=1, le=4096)]] = Field(min_length=1, max_length=16)
    num_classes: Classes
    kernel_size: Literal[1, 3, 5, 7] = 3
    groups: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=1, description="Groups of every convolution but the first."
    )
    pool: Annotated[int, Field(ge=1, le=8)] = 2
    hidden: Width | None = None
    activation: Activation = "relu"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(width % self.groups for width in self.channels):
            raise ValueError("every entry of channels must be divisible by groups")
        _, height, width = self.input_shape
        for _ in self.channels:
            height, width = height // self.pool, width // self.pool
        if not height or not width:
            raise ValueError("pooling leaves nothing of the image: fewer channels entries, or a smaller pool")
        return self

    @property
    def flat_dim(self) -> int:
        """Numbers left per image after the last pooling."""
        _, height, width = self.input_shape
        shrink = [self.pool] * len(self.channels)
        for factor in shrink:
            height, width = height // factor, width // factor
        return self.channels[-1] * height * width


class Resnet9Arguments(Spec):
    """The nine-layer residual network of fast CIFAR training."""

    input_channels: Annotated[int, Field(ge=1, le=64)] = 3
    num_classes: Classes
    width: Annotated[int, Field(ge=4, le=1024, multiple_of=4)] = 64
    norm: Literal["group", "batch", "none"] = "group"


class TransformerLmArguments(Spec):
    """A decoder-only transformer with pre-normalisation."""

    vocab_size: Annotated[int, Field(ge=2, le=1_000_000)]
    max_length: Annotated[int, Field(ge=2, le=131_072)]
    width: Annotated[int, Field(ge=1, le=16_384)]
    depth: Depth
    heads: Annotated[int, Field(ge=1, le=256)]
    mlp_width: Width | None = Field(default=None, description="4 · width by default.")
    positions: Literal["learned", "sinusoidal"] = "learned"
    tied: bool = Field(default=False, description="The output layer shares the token embedding's weight.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError("width must be divisible by heads")
        return self


class HuggingFaceArguments(Spec):
    """A transformers model described by its config.json; only listed model types, and no code from the config."""

    config: dict[str, Any] = Field(description="The parsed config.json, with `model_type`.")
