"""From a data set on disk, or JSON values, to the tensors that a model sees."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from attribution_core.data.batch import Batch
from attribution_core.data.collate import ExampleSource
from attribution_core.data.importer import import_dataset
from attribution_core.data.reader import DatasetReader
from attribution_core.data.tokenizers import BytesTokenizer, load_tokenizer
from attribution_core.errors import InvalidInputError
from attribution_core.progress import NoProgress
from attribution_core.spec import (
    CausalLanguageModelingTask,
    ClassificationTask,
    DatasetSpec,
    RegressionTask,
    TokenizerSpec,
)
from attribution_core.tasks import build_task

CLASSES, NUMBERS, TEXTS = ClassificationTask(), RegressionTask(), CausalLanguageModelingTask()


def source(folder: Path, columns: dict[str, list[Any]], task: Any = CLASSES, **spec: Any) -> ExampleSource:
    (folder / "data").mkdir()
    pq.write_table(pa.table(columns), folder / "source.parquet")
    described = DatasetSpec.model_validate({"name": "some", **spec})
    import_dataset(folder / "source.parquet", described, folder / "data", NoProgress())
    tokenizer = BytesTokenizer() if described.kind == "text" else None
    return ExampleSource(DatasetReader(folder / "data", described), task, tokenizer)


def png(pixels: np.ndarray) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()


def images(folder: Path, **spec: Any) -> tuple[ExampleSource, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    columns = {"input": [png(one) for one in pixels], "target": [0, 1, 2, 0, 1]}
    return source(folder, columns, kind="image", **spec), pixels


def test_images_are_scaled_channels_first(tmp_path: Path) -> None:
    made, pixels = images(tmp_path)
    batch = made.batch([3, 1])
    assert batch.rows.tolist() == [3, 1] and batch.targets.tolist() == [0, 1] and batch.mask is None
    assert batch.inputs.dtype == torch.float32 and batch.targets.dtype == torch.int64
    assert torch.allclose(batch.inputs, torch.tensor(pixels[[3, 1]]).permute(0, 3, 1, 2) / 255)


def test_images_are_standardised_where_asked(tmp_path: Path) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    made, pixels = images(tmp_path, normalize={"mean": mean, "std": std})
    wanted = (torch.tensor(pixels) / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(made.batch(range(5)).inputs, wanted.permute(0, 3, 1, 2), atol=1e-6)


def test_an_image_given_inline_is_the_image_of_the_row(tmp_path: Path) -> None:
    made, pixels = images(tmp_path)
    batch = made.inline([{"input": base64.b64encode(png(pixels[2])).decode(), "target": 2}])
    assert batch.rows.tolist() == [-1]
    assert torch.equal(batch.inputs, made.batch([2]).inputs)
    assert torch.equal(batch.targets, made.batch([2]).targets)


@pytest.mark.parametrize(
    "value",
    ["not base64 !", base64.b64encode(b"not an image").decode(), base64.b64encode(b"\x80\x05pickle").decode(), "", None, 7,
     [[300]], [], [[1, 2], [3]], base64.b64encode(png(np.zeros((9, 9, 3), np.uint8))).decode(), "\ud800"],
)  # fmt: skip
def test_an_image_that_is_none_is_refused_with_its_pointer(value: Any, tmp_path: Path) -> None:
    made, pixels = images(tmp_path)
    good = {"input": base64.b64encode(png(pixels[0])).decode(), "target": 0}
    with pytest.raises(InvalidInputError) as caught:
        made.inline([good, {"input": value, "target": 0}])
    assert caught.value.pointer == "/queries/1/example/input"
    with pytest.raises(InvalidInputError) as caught:
        made.inline([{"input": value, "target": 0}], first=7)
    assert caught.value.pointer == "/queries/7/example/input"


def test_tensors_keep_their_shape(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    made = source(tmp_path, {"input": values.tolist(), "target": [0, 1]}, kind="tensor", shape=[2, 3])
    assert torch.equal(made.batch([0, 1]).inputs, torch.tensor(values).view(2, 2, 3))
    assert torch.equal(made.inline([{"input": values[1].reshape(2, 3).tolist()}]).inputs, made.batch([1]).inputs)
    for wrong in ([1, 2, 3], [[1, 2, 3], [4, 5, float("inf")]], [["a"] * 3] * 2, {"a": 1}):
        with pytest.raises(InvalidInputError) as caught:
            made.inline([{"input": wrong}])
        assert caught.value.pointer == "/queries/0/example/input"


@pytest.mark.parametrize(
    ("wrong", "field"), [({"input": [[1], [2, 3]]}, "input"), ({"target": [[1], [2, 3]]}, "target")]
)
def test_lists_of_different_lengths_are_refused_with_their_pointer(wrong: dict, field: str, tmp_path: Path) -> None:
    made = source(tmp_path, {"input": [[1, 2]], "target": [0.5]}, NUMBERS, kind="tokens")
    with pytest.raises(InvalidInputError) as caught:
        made.inline([{"input": [1, 2], "target": 1, **wrong}])
    assert caught.value.pointer == f"/queries/0/example/{field}"


def test_features_may_be_given_by_name(tmp_path: Path) -> None:
    columns = {"a": [1.0, 2.0], "b": [3.0, 4.0], "target": [0.5, 1.5]}
    made = source(tmp_path, columns, NUMBERS, kind="tabular", input=["b", "a"])
    assert made.batch([1]).inputs.tolist() == [[4.0, 2.0]]
    assert torch.equal(made.inline([{"input": {"a": 2, "b": 4}}]).inputs, made.batch([1]).inputs)
    for wrong in ({"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": "x"}, {"a": 1, "b": None}):
        with pytest.raises(InvalidInputError):
            made.inline([{"input": wrong}])


def tokens(folder: Path, task: Any = TEXTS, **spec: Any) -> ExampleSource:
    columns = {"input": [[1, 2, 3], list(range(11)), [5, 6]]}
    return source(folder, columns, task, kind="tokens", target=None, **spec)


def test_tokens_are_padded_to_the_longest_and_masked(tmp_path: Path) -> None:
    made = tokens(tmp_path)
    short, long = made.batch([0, 2]), made.batch([0, 1])
    assert short.inputs.shape == (2, 3) and long.inputs.shape == (2, 11)
    assert short.inputs.dtype == torch.int64 and short.mask.dtype == torch.bool
    assert short.mask.sum(1).tolist() == [3, 2] and long.mask.sum(1).tolist() == [3, 11]
    assert short.inputs[0, short.mask[0]].tolist() == long.inputs[0, long.mask[0]].tolist() == [1, 2, 3]
    assert short.targets is None


def test_long_texts_are_cut_to_the_maximal_length(tmp_path: Path) -> None:
    batch = tokens(tmp_path, max_length=4).batch([0, 1])
    assert batch.mask.sum(1).tolist() == [3, 4]
    assert batch.inputs[1, :4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [[], [1.5], [-1], [2**31], ["a"], "text", None, [[1]], {}, [10**30]])
def test_tokens_that_are_none_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        tokens(tmp_path).inline([{"input": value}])


def test_text_becomes_bytes(tmp_path: Path) -> None:
    made = source(tmp_path, {"input": ["héllo", "a"], "target": [0, 1]}, kind="text")
    batch = made.batch([0, 1])
    assert bytes(batch.inputs[0, batch.mask[0]].tolist()).decode() == "héllo"
    assert set(batch.inputs[~batch.mask].tolist()) == {256}
    assert batch.targets.tolist() == [0, 1]
    assert torch.equal(made.inline([{"input": "a"}]).inputs, made.batch([1]).inputs)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    made = source(tmp_path, {"input": ["hello"], "target": [0]}, kind="text")
    with pytest.raises(InvalidInputError, match="tokenizer"):
        ExampleSource(made.reader, CLASSES).batch([0])


def test_batches_give_every_row_once_in_order(tmp_path: Path) -> None:
    made, _ = images(tmp_path)
    batches = list(made.batches(np.array([4, 0, 2, 1, 3]), 2))
    assert [batch.rows.tolist() for batch in batches] == [[4, 0], [2, 1], [3]]
    assert torch.equal(Batch.joined(batches).inputs, made.batch([4, 0, 2, 1, 3]).inputs)


@pytest.mark.parametrize(
    ("task", "target"),
    [(CLASSES, 0.5), (CLASSES, "one"), (CLASSES, [1, 2]), (CLASSES, float("nan")), (NUMBERS, "x"), (NUMBERS, {"a": 1}),
     (NUMBERS, float("nan")), (NUMBERS, float("inf")), (NUMBERS, 10**400)],
)  # fmt: skip
def test_targets_that_do_not_fit_the_task_are_refused(task: Any, target: Any, tmp_path: Path) -> None:
    made = source(tmp_path, {"input": [[1.0]], "target": [0]}, task, kind="tensor")
    with pytest.raises(InvalidInputError):
        batch = made.inline([{"input": [1.0], "target": target}])
        build_task(task).check(torch.zeros(1, 3) if task == CLASSES else torch.zeros(1), batch)


def test_whole_floats_are_classes(tmp_path: Path) -> None:
    made = source(tmp_path, {"input": [[1.0]], "target": [0]}, kind="tensor")
    assert made.inline([{"input": [1.0], "target": 2.0}]).targets.tolist() == [2]


def test_joined_texts_are_padded_to_the_longest_and_slices_keep_together(tmp_path: Path) -> None:
    made = tokens(tmp_path)
    joined = Batch.joined([made.batch([0]), made.batch([1])])
    assert torch.equal(joined.mask, made.batch([0, 1]).mask)
    assert len(joined) == 2 and joined[1:].rows.tolist() == [1]
    assert joined[torch.tensor([1, 0])].mask.sum(1).tolist() == [11, 3]


def test_batches_that_do_not_fit_together_are_refused() -> None:
    rows = torch.arange(1)
    with pytest.raises(InvalidInputError, match="shapes"):
        Batch.joined([Batch(rows, torch.zeros(1, 2)), Batch(rows, torch.zeros(1, 3))])
    with pytest.raises(InvalidInputError, match="target"):
        Batch.joined([Batch(rows, torch.zeros(1, 2)), Batch(rows, torch.zeros(1, 2), rows)])


def test_a_tokenizer_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    spec = TokenizerSpec(type="huggingface", source="root:files/tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (None, tmp_path / "tokenizer.json", tmp_path / "nothing.json"):
        with pytest.raises(InvalidInputError) as caught:
            load_tokenizer(spec, path)
        assert caught.value.pointer.startswith("/tokenizer")
