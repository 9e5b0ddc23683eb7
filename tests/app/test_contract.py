"""Schemathesis against the running service: no server error, no undocumented status, no answer against its schema."""

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.conftest import Loaded
from tests.service import ROOT

SCHEMA = schemathesis.openapi.from_path(str(ROOT / "openapi.json")).exclude(path_regex="/events$")
SCHEMA.config.phases.coverage.enabled = False  # thousands of fixed cases; run by hand with the tool itself


@SCHEMA.parametrize()
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_request_gets_a_documented_answer(case: schemathesis.Case, steady: Loaded) -> None:
    answer = case.call(base_url=steady.service.url)
    case.validate_response(
        answer,
        checks=(not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance),
    )
