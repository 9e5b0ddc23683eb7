"""Documentation that must not fall behind: settings and errors."""

from pydantic import BaseModel

from app import errors
from app.settings import Settings
from tests.service import ROOT


def settings(model: type[BaseModel], prefix: str) -> list[tuple[str, str]]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += settings(field.annotation, f"{prefix}{name.upper()}__")
        else:
            found.append((f"{prefix}{name.upper()}", field.description or ""))
    return found


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    found = settings(Settings, "HEADWATER_")
    assert len(found) > 20
    for name, _ in found:
        assert f"| `{name}` |" in text, name


def problems(kind: type[errors.Problem]) -> list[type[errors.Problem]]:
    return [found for sub in kind.__subclasses__() for found in (sub, *problems(sub))]


def test_every_problem_is_documented() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    for kind in problems(errors.Problem):
        assert f"| `/problems/{kind.slug}` | {kind.status} |" in text, kind
