"""What a caller can ask for: data sets, tasks, architectures, stores, filters and selectors; methods are in `method_spec`.

These models are the HTTP contract's vocabulary and the library's. They validate form only; whether a field or
checkpoint exists is decided where the data is. Nothing here imports torch.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

MAX_FILTER_DEPTH = 5
MAX_FILTER_LEAVES = 32
MAX_SELECTED_ROWS = 100_000

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
DatasetFormat = Literal["parquet", "jsonl", "csv", "npz"]


def all_different(values: list[Any]) -> list[Any]:
    """Refuse a list that names something twice.

    Raises:
        ValueError: saying what.
    """
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{str(value)[:80]} is named twice")
    return values


Row = Annotated[int, Field(ge=0, le=2**53)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Spec(BaseModel):
    """A frozen value object that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Normalization(Spec):
    """Per-channel standardisation of images after scaling to [0, 1]: `(x - mean) / std`."""

    mean: list[float] = Field(min_length=1, max_length=16)
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=1, max_length=16)

    @model_validator(mode="after")
    def _same_channels(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError("mean and std must have one entry per channel each")
        return self


# Of one input.
MAX_DIMENSIONS, MAX_SIDE = 8, 2**24


class DatasetSpec(Spec):
    """How the columns of a source become training examples."""

    name: Name = Field(description="Unique name.")
    kind: Literal["tensor", "image", "tabular", "tokens", "text"] = Field(description="What one input is.")
    format: DatasetFormat | None = Field(default=None, description="File format; by default told from the file name.")
    source: str | None = Field(
        default=None, max_length=1024, description="`root:name/path` of a file under a root the operator configured."
    )
    input: ColumnName | Annotated[list[ColumnName], Field(min_length=1, max_length=100_000)] = Field(
        default="input", description="Input column, or the list of feature columns of a tabular data set."
    )
    target: ColumnName | None = Field(default="target", description="Target column; null when there is none.")
    id: ColumnName | None = Field(default=None, description="Column of unique example ids.")
    metadata: list[ColumnName] = Field(
        default_factory=list, max_length=256, description="Columns kept for filters and answers."
    )
    shape: list[Annotated[int, Field(ge=1, le=MAX_SIDE)]] | None = Field(
        default=None,
        max_length=MAX_DIMENSIONS,
        description="Shape of one `tensor` input; by default told from the first row.",
    )
    channels_first: bool = Field(default=False, description="uint8 image arrays are (C, H, W) instead of (H, W, C).")
    normalize: Normalization | None = Field(default=None, description="Standardisation of images.")
    max_length: int | None = Field(default=None, ge=1, le=2**20, description="Cut token inputs to this many tokens.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.input, list) and self.kind != "tabular":
            raise ValueError("a list of input columns needs kind 'tabular'")
        if self.shape is not None and self.kind != "tensor":
            raise ValueError("shape is for kind 'tensor'")
        if self.normalize is not None and self.kind != "image":
            raise ValueError("normalize is for kind 'image'")
        inputs = self.input if isinstance(self.input, list) else [self.input]
        used = [*inputs, *([self.target] if self.target else []), *([self.id] if self.id else [])]
        if len(set(used)) != len(used) or len(set(self.metadata)) != len(self.metadata):
            raise ValueError("a column is named twice")
        reserved = {"row", "id", "target"} & set(self.metadata)
        if reserved:
            raise ValueError(f"metadata columns cannot be called {', '.join(sorted(reserved))}")
        return self


class TokenizerSpec(Spec):
    """How text becomes tokens: raw bytes, or a `tokenizer.json` under a configured root."""

    type: Literal["bytes", "huggingface"] = "bytes"
    source: str | None = Field(default=None, max_length=1024, description="`root:name/path` of a tokenizer.json.")

    @model_validator(mode="after")
    def _source_where_needed(self) -> Self:
        if (self.type == "huggingface") != (self.source is not None):
            raise ValueError("source is for type 'huggingface', and needed there")
        return self


class ArchitectureSpec(Spec):
    """An allowed architecture and its arguments."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    arguments: dict[str, Any] = Field(default_factory=dict)


class ClassificationTask(Spec):
    """Integer targets, cross-entropy loss."""

    measurements: ClassVar[tuple[str, ...]] = ("margin", "log_likelihood", "logit", "loss")
    kinds: ClassVar[tuple[str, ...]] = ("tensor", "image", "tabular", "tokens", "text")
    type: Literal["classification"] = "classification"


class RegressionTask(Spec):
    """Real targets, squared-error loss `(prediction - target)**2 / 2`."""

    measurements: ClassVar[tuple[str, ...]] = ("prediction", "negative_squared_error", "loss")
    kinds: ClassVar[tuple[str, ...]] = ("tensor", "image", "tabular", "tokens", "text")
    type: Literal["regression"] = "regression"


class CausalLanguageModelingTask(Spec):
    """Next-token prediction; padding is masked."""

    measurements: ClassVar[tuple[str, ...]] = ("log_likelihood", "loss")
    kinds: ClassVar[tuple[str, ...]] = ("tokens", "text")
    type: Literal["causal_lm"] = "causal_lm"
    reduction: Literal["mean", "sum"] = Field(default="mean", description="Over the tokens of one example.")


TaskSpec = Annotated[ClassificationTask | RegressionTask | CausalLanguageModelingTask, Field(discriminator="type")]


Precision = Literal["float32", "bfloat16"]


class StoreSpec(Spec):
    """How training gradients are kept."""

    dtype: Literal["auto", "float32", "float16", "int8", "binary"] = Field(
        default="auto",
        description="`auto`: `binary` for whitened vectors (of `ekfac`, `kfac`, `diagonal` and `gauss_newton`) that are searched exhaustively, "
        "else `float32`. `int8`: 256 levels with a scale per row, for vectors and factors. `binary`: one bit per number, the sign, with a scale "
        "per row, for vectors only, and only for methods that score candidates again: scores of stored rows are then rough, and those of "
        "re-scored candidates as exact as ever.",
    )
    layout: Literal["auto", "vectors", "factors"] = Field(
        default="auto",
        description="`vectors`: one projected row per example and checkpoint, searched first and re-scored by running the model. `factors`: "
        "every layer's gradient without loss, as the layer's input and output gradient where these are smaller: scores are exact and "
        "never touch model or data again. `auto`: factors where they take at most 16 KiB per example and checkpoint and the data set "
        "has at most 100,000 examples.",
    )

    @model_validator(mode="after")
    def _bits_are_for_vectors(self) -> Self:
        if self.dtype == "binary" and self.layout == "factors":
            raise ValueError("dtype 'binary' is for layout 'vectors'")
        return self


class SearchSpec(Spec):
    """How feature rows are searched: exactly (`flat`), or only the nearest of `lists` clusters (`ivf`), there by short codes (`ivfpq`).

    Scores are inner products of stored rows in any case: what codes find is scored again.
    """

    type: Literal["flat", "ivf", "ivfpq"] = "flat"
    lists: int | None = Field(
        default=None, ge=1, le=65_536, description="Clusters of an IVF search; about 4·√n by default."
    )
    probes: int | None = Field(
        default=None, ge=1, le=65_536, description="Clusters visited; a third of them by default."
    )
    subquantizers: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Parts a row is cut into for `ivfpq`, each coded apart; one per 4 dimensions by default, and at most one per dimension.",
    )
    bits: int = Field(default=8, ge=4, le=8, description="Bits of a part's code for `ivfpq`.")


FilterValue = str | bool | int | float | None


class Condition(Spec):
    """A comparison of one field: `row`, `id`, `target` or a metadata column. A null never matches but for `exists`."""

    field: ColumnName
    op: Literal["eq", "ne", "in", "gt", "gte", "lt", "lte", "exists", "contains", "prefix"]
    value: FilterValue | Annotated[list[FilterValue], Field(max_length=10_000)] = None

    @model_validator(mode="after")
    def _value_fits(self) -> Self:
        if (self.op == "in") != isinstance(self.value, list):
            raise ValueError("a list value goes with op 'in', and only there")
        if self.op == "exists" and not isinstance(self.value, bool | None):
            raise ValueError("op 'exists' takes true or false")
        if self.op in ("contains", "prefix") and not isinstance(self.value, str):
            raise ValueError(f"op '{self.op}' takes a string")
        if self.op not in ("exists", "in") and self.value is None:
            raise ValueError(f"op '{self.op}' takes a value; ask for missing ones with 'exists'")
        return self


class And(Spec):
    """Every part holds."""

    and_: list["Filter"] = Field(alias="and", min_length=1, max_length=MAX_FILTER_LEAVES)


class Or(Spec):
    """Some part holds."""

    or_: list["Filter"] = Field(alias="or", min_length=1, max_length=MAX_FILTER_LEAVES)


class Not(Spec):
    """The part does not hold."""

    not_: "Filter" = Field(alias="not")


def _kind_of_filter(value: object) -> str:
    """Return which kind of filter is meant, so that what is wrong with it is said of that kind alone."""
    match value:
        case dict():
            return next((name for name in ("and", "or", "not") if name in value), "condition")
        case And():
            return "and"
        case Or():
            return "or"
        case Not():
            return "not"
        case _:
            return "condition"


Filter = Annotated[
    Annotated[Condition, Tag("condition")]
    | Annotated[And, Tag("and")]
    | Annotated[Or, Tag("or")]
    | Annotated[Not, Tag("not")],
    Discriminator(_kind_of_filter),
]


def check_filter_size(value: Filter) -> Filter:
    """Return `value` unless it nests deeper than 5 or has more than 32 conditions (ValueError)."""

    def measure(node: Filter) -> tuple[int, int]:
        match node:
            case And(and_=parts) | Or(or_=parts):
                sizes = [measure(part) for part in parts]
                return 1 + max(depth for depth, _ in sizes), sum(leaves for _, leaves in sizes)
            case Not(not_=part):
                depth, leaves = measure(part)
                return 1 + depth, leaves
            case _:
                return 1, 1

    depth, leaves = measure(value)
    if depth > MAX_FILTER_DEPTH or leaves > MAX_FILTER_LEAVES:
        raise ValueError(f"a filter may nest {MAX_FILTER_DEPTH} deep and hold {MAX_FILTER_LEAVES} conditions")
    return value


class Selector(Spec):
    """A set of training examples, named in exactly one way. The last two are relative to each query."""

    # Lists this long are judged by the first wrong entry: a report of every one takes far longer than reading them.
    rows: Annotated[list[Row], Field(max_length=MAX_SELECTED_ROWS, fail_fast=True)] | None = None
    ids: (
        Annotated[
            list[Annotated[str, StringConstraints(max_length=512)]], Field(max_length=MAX_SELECTED_ROWS, fail_fast=True)
        ]
        | None
    ) = None
    where: Filter | None = None
    top_positive: int | None = Field(default=None, ge=1, le=MAX_SELECTED_ROWS)
    top_negative: int | None = Field(default=None, ge=1, le=MAX_SELECTED_ROWS)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of rows, ids, where, top_positive, top_negative")
        if self.where is not None:
            check_filter_size(self.where)
        return self
