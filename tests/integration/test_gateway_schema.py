"""Requests made up from the gateway's own description: none is a fault, none hangs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.integration.conftest import Served

EXAMPLES = 25  # for each operation
SHORT = {"max_tokens": 2, "max_completion_tokens": 2, "n_predict": 2}
FAULTS = (500, 502, 504)


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whatever_is_asked_it_is_no_fault(web: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{web.url}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 12
    seen: set[int] = set()
    for operation in operations:
        strategy = operation.as_strategy() | operation.as_strategy(
            generation_mode=schemathesis.GenerationMode.NEGATIVE
        )

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def ask(data: st.DataObject) -> None:
            case = data.draw(strategy)  # noqa: B023  # it is called in this turn of the loop
            if isinstance(case.body, dict):
                case.body = {**case.body, **SHORT}
            answer = case.call(timeout=20)
            seen.add(answer.status_code)
            assert answer.status_code not in FAULTS, (operation.label, case.body)  # noqa: B023
            if answer.status_code >= 400 and operation.path not in ("/health", "/v1/health"):  # noqa: B023
                assert answer.json()["error"]["message"], answer.text

        ask()
    assert {200, 400, 404} <= seen
