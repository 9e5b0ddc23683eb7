"""Banks: how a model is trained, which retrainings there are of it, and where."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.banks import repository
from app.banks.schemas import BankOut
from app.datasets import service as datasets
from app.db.ids import new_id
from app.db.tables import Bank, Dataset, Model
from app.errors import InUse, InvalidRequest, NotFound, RecipeMissing
from app.jobs import service as jobs
from app.models import service as models
from app.settings import Settings
from app.storage.artifacts import ArtifactStore
from app.storage.roots import resolve
from app.web.pagination import Page, PageOf, cut
from app.web.resources import Resources
from attribution_core.references import CheckpointRef
from attribution_core.spec import TokenizerSpec
from attribution_core.training.recipe import CheckpointInitialisation, Recipe
from attribution_core.training.spec import Protocol, TrainSpec

Json = dict[str, Any]
GROUP_FILE = "group.safetensors"


def recipe_of(model: Model, pointer: str = "") -> Recipe:
    """Return a model's recipe; `pointer` is the field that needs it.

    Raises:
        RecipeMissing: if it has none.
    """
    if model.recipe is None:
        raise RecipeMissing(
            f"Model {model.name!r} was registered without a `recipe`: optimizer, learning_rate, schedule, weight_decay, epochs "
            "and batch_size. Register a model with one; its weights can be uploaded as its checkpoints, or trained from it.",
            pointer=pointer,
        )
    return Recipe.model_validate(model.recipe)


async def train_spec(
    session: AsyncSession,
    model: Model,
    dataset: Dataset,
    left_out: list[int],
    settings: Settings,
    artifacts: ArtifactStore,
) -> TrainSpec:
    """Return everything a training depends on but its seed; it sees none of the rows that are left out."""
    assert dataset.artifact is not None
    recipe = recipe_of(model)
    initial = None
    if isinstance(recipe.initialisation, CheckpointInitialisation):
        found = await models.any_checkpoint(session, recipe.initialisation.checkpoint)
        initial = CheckpointRef(
            id=found.id, path=artifacts.open(found.artifact) / models.WEIGHTS_FILE, sha256=found.sha256
        )
    tokenizer = TokenizerSpec.model_validate(model.tokenizer) if model.tokenizer else None
    source = tokenizer.source if tokenizer else None
    return TrainSpec.model_validate(
        {
            "architecture": model.architecture,
            "task": model.task,
            "tokenizer": model.tokenizer,
            "tokenizer_path": resolve(settings.roots, source, "/model") if source else None,
            "dataset": datasets.dataset_ref(dataset, artifacts),
            "recipe": model.recipe,
            "initial": initial,
            "left_out": left_out,
        }
    )


async def existing_bank(session: AsyncSession, spec: TrainSpec, protocol: Protocol) -> Bank | None:
    """Return the bank of a protocol if there is one."""
    return await repository.existing_bank(session, protocol.bank_key(spec))


async def find_bank(session: AsyncSession, model: Model, dataset: Dataset, spec: TrainSpec, protocol: Protocol) -> Bank:
    """Return the bank of a protocol, made if there is none; equal requests wait for this transaction, so it must end soon."""
    stored = protocol.model_dump(mode="json", exclude={"subsets"})
    values = {"id": new_id("bank"), "model_id": model.id, "dataset_id": dataset.id, "protocol": stored}
    return await repository.bank_of_key(session, protocol.bank_key(spec), values)


async def group_files(session: AsyncSession, bank_id: str, artifacts: ArtifactStore, count: int) -> dict[int, Path]:
    """Return the files of those of a bank's first groups that were retrained."""
    known = await repository.groups(session, bank_id)
    return {number: artifacts.open(known[number]) / GROUP_FILE for number in range(count) if number in known}


async def find(session: AsyncSession, bank_id: str) -> Bank:
    """Return a bank.

    Raises:
        NotFound: if there is none.
    """
    found = await repository.bank(session, bank_id)
    if found is None:
        raise NotFound(f"There is no bank {bank_id[:64]!r}.")
    return found


async def missing_examples(
    session: AsyncSession, bank: Bank | None, protocol: Protocol, model: Model, spec: TrainSpec
) -> float:
    """Return how many training examples, all retrainings together, a bank lacks of a protocol; one that is not there lacks all."""
    known = {} if bank is None else await repository.groups(session, bank.id)
    missing = protocol.num_groups(model.num_parameters) - sum(
        number < protocol.num_groups(model.num_parameters) for number in known
    )
    share = protocol.alpha if protocol.semantics == "resample" else 1.0
    per_group = protocol.subsets_per_group(model.num_parameters) * protocol.seeds
    return missing * per_group * share * spec.num_training


async def check_hours(
    resources: Resources, spec: TrainSpec, examples: float, asked: float | None, pointer: str = "/max_hours"
) -> None:
    """Refuse retraining that would take too long, before it starts.

    Args:
        resources: the engine measures a step.
        spec: how the model is trained.
        examples: training examples of all retrainings together; each is seen once an epoch.
        asked: hours that the request allows.
        pointer: the field that could ask for less.

    Raises:
        InvalidRequest: with the estimate.
    """
    refuse_hours(resources, await hours_of(resources, spec, examples), asked, pointer)


async def hours_of(resources: Resources, spec: TrainSpec, examples: float) -> float:
    """Return about how many hours trainings take of so many examples, each seen once an epoch."""
    steps = examples * spec.recipe.epochs / spec.recipe.batch_size
    if steps == 0:
        return 0.0
    payload = {"train": spec.model_dump(mode="json", by_alias=True)}
    per_step: float = (await resources.engine.call("training_seconds", payload))["seconds_per_step"]
    return per_step * steps / 3600


def refuse_hours(resources: Resources, hours: float, asked: float | None, pointer: str = "/max_hours") -> None:
    """Refuse what takes longer than the request or the operator allows.

    Raises:
        InvalidRequest: with the estimate.
    """
    allowed = min(asked or math.inf, resources.settings.limits.max_replay_hours)
    if hours > allowed:
        raise InvalidRequest(
            f"The retrainings would take about {hours:.2g} hours, and {allowed:g} are allowed: ask for fewer subsets or seeds, "
            "or raise max_hours up to the operator's limit.",
            pointer=pointer,
        )


async def add_groups(session: AsyncSession, bank_id: str, groups: Sequence[Json]) -> None:
    """Record retrained groups of a bank.

    Raises:
        NotFound: if the bank was deleted meanwhile.
    """
    if groups and await repository.lock_bank(session, bank_id) is None:
        raise NotFound(f"The bank {bank_id} was deleted.")
    for group in groups:
        await repository.add_group(session, {"bank_id": bank_id, **group})


async def named_artifacts(session: AsyncSession, names: Sequence[str]) -> set[str]:
    """Return which artifacts are groups of banks."""
    return await repository.named_artifacts(session, names)


async def page_of_banks(session: AsyncSession, page: Page) -> PageOf[BankOut]:
    """Return one page of banks, newest first."""
    rows, following = cut(await repository.banks(session, page), page, "banks")
    totals = await repository.totals(session, [row.id for row in rows])
    return PageOf[BankOut](items=[_shown(row, totals.get(row.id, (0, 0, 0))) for row in rows], next=following)


async def shown_bank(session: AsyncSession, bank_id: str) -> BankOut:
    """Return a bank.

    Raises:
        NotFound: if there is none.
    """
    found = await find(session, bank_id)
    totals = await repository.totals(session, [found.id])
    return _shown(found, totals.get(found.id, (0, 0, 0)))


async def delete(session: AsyncSession, bank_id: str, artifacts: ArtifactStore) -> Callable[[], None]:
    """Delete a bank; returns what removes its files once that is committed.

    Raises:
        NotFound: if there is none.
        InUse: if an index is built on it, or a job needs it.
    """
    found = await repository.lock_bank(session, bank_id, deleting=True)
    if found is None:
        raise NotFound(f"There is no bank {bank_id[:64]!r}.")
    await jobs.refuse_if_needed(session, found)
    folder = folder_of(found)
    await session.delete(found)
    try:
        await session.flush()
    except IntegrityError:
        raise InUse("An index is built on this bank; delete the index first.") from None
    return lambda: artifacts.delete(folder)


def folder_of(bank: Bank) -> str:
    """Return where a bank's groups are, below its model's folder: deleting a model deletes that."""
    return f"{models.bank_folder(bank.model_id)}/{bank.id}"


def _shown(bank: Bank, totals: tuple[int, int, int]) -> BankOut:
    retrainings, diverged, size = totals
    return BankOut(
        id=bank.id,
        model=bank.model_id,
        dataset=bank.dataset_id,
        protocol=bank.protocol,
        retrainings=retrainings,
        diverged=diverged,
        bytes=size,
        created_at=bank.created_at,
    )
