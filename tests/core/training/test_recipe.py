"""The recipe's form, and its schedules against torch's."""

import warnings
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim import lr_scheduler as torch_schedules

from attribution_core.training.recipe import Recipe

STEPS, EACH = 60, 6


def recipe(**fields: Any) -> Recipe:
    plain = {"optimizer": {"type": "sgd"}, "learning_rate": 0.3, "epochs": STEPS // EACH, "batch_size": 4}
    return Recipe.model_validate({**plain, **fields})


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"optimizer": {"type": "sgd", "nesterov": True}}, ("optimizer", "sgd")),
        ({"optimizer": {"type": "sgd", "momentum": 1.0}}, ("optimizer", "sgd", "momentum")),
        ({"optimizer": {"type": "adam", "momentum": 0.9}}, ("optimizer", "adam", "momentum")),
        ({"optimizer": {"type": "adamw", "betas": [0.9, 1.0]}}, ("optimizer", "adamw", "betas", 1)),
        ({"optimizer": {"type": "lion"}}, ("optimizer",)),
        ({"learning_rate": 0}, ("learning_rate",)),
        ({"learning_rate": float("nan")}, ("learning_rate",)),
        ({"epochs": 0}, ("epochs",)),
        ({"batch_size": 0}, ("batch_size",)),
        ({"weight_decay": -1}, ("weight_decay",)),
        ({"gradient_clip": 0}, ("gradient_clip",)),
        ({"augmentation": "mixup"}, ("augmentation",)),
        ({"initialisation": {"type": "checkpoint"}}, ("initialisation", "checkpoint", "checkpoint")),
        ({"schedule": {"type": "step"}}, ("schedule", "step", "every")),
        ({"schedule": {"type": "cosine", "warmup_steps": 3, "warmup_fraction": 0.1}}, ("schedule", "cosine")),
        ({"schedule": {"type": "one_cycle", "rise": 1.0}}, ("schedule", "one_cycle", "rise")),
    ],
)
def test_nonsense_is_refused_at_its_field(fields: dict[str, Any], place: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe(**fields)
    assert caught.value.errors()[0]["loc"] == place


def test_every_field_is_described() -> None:
    schema = Recipe.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        for name, field in part["properties"].items():
            assert name == "type" or field.get("description"), name


def _torch_rates(make: Any, per_epoch: bool = False) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimizer)
    rates = []
    for step in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not per_epoch or (step + 1) % EACH == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SequentialLR warns of its own call
                scheduler.step()
    return rates


def _warmed(optimizer: Any) -> Any:
    rise = torch_schedules.LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=12)
    fall = torch_schedules.CosineAnnealingLR(optimizer, STEPS - 12, eta_min=0.3 * 0.05)
    return torch_schedules.SequentialLR(optimizer, [rise, fall], [12])


@pytest.mark.parametrize(
    ("schedule", "make", "per_epoch"),
    [
        ({"type": "constant"}, lambda o: torch_schedules.ConstantLR(o, 1.0), False),
        ({"type": "step", "every": 3, "gamma": 0.5}, lambda o: torch_schedules.StepLR(o, 3, 0.5), True),
        ({"type": "cosine"}, lambda o: torch_schedules.CosineAnnealingLR(o, STEPS), False),
        ({"type": "linear", "final": 0.2}, lambda o: torch_schedules.LinearLR(o, 1.0, 0.2, STEPS), False),
        ({"type": "cosine", "final": 0.05, "warmup_steps": 12, "warmup_start": 0.1}, _warmed, False),
        ({"type": "cosine", "final": 0.05, "warmup_fraction": 0.2, "warmup_start": 0.1}, _warmed, False),
        ({"type": "one_cycle"}, lambda o: torch_schedules.OneCycleLR(o, 0.3, STEPS), False),
        (
            {"type": "one_cycle", "rise": 0.25, "initial_divisor": 10, "final_divisor": 100, "anneal": "linear"},
            lambda o: torch_schedules.OneCycleLR(
                o, 0.3, STEPS, pct_start=0.25, div_factor=10, final_div_factor=100, anneal_strategy="linear"
            ),
            False,
        ),
    ],
)
def test_schedules_are_torchs(schedule: dict[str, Any], make: Any, per_epoch: bool) -> None:
    found = list(recipe(schedule=schedule).learning_rates(EACH * 4))
    assert found == pytest.approx(_torch_rates(make, per_epoch), abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "one_cycle"])
def test_the_shortest_trainings_have_rates(kind: str, steps: int) -> None:
    rates = list(recipe(schedule={"type": kind}, epochs=steps).learning_rates(4))
    assert len(rates) == steps
    assert all(0 <= rate <= 0.3 for rate in rates)


def test_the_last_batch_counts_unless_dropped() -> None:
    assert recipe().steps_per_epoch(9) == 3
    assert recipe(drop_last=True).steps_per_epoch(9) == 2
