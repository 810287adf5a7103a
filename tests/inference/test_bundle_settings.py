"""What a bundle's configuration may not say."""

import pytest

from megarec.base.errors import UserError
from megarec.inference.bundle import BundleConfig
from tests.inference.synthetic import CONFIGS, FIELDS, SCHEMA


@pytest.mark.parametrize("limit", [0, -5])
def test_a_history_length_below_one_is_refused(limit: int) -> None:
    with pytest.raises(UserError, match="max_history_events: must be at least 1"):
        BundleConfig(
            model=CONFIGS["argus"], schema=SCHEMA, fields=FIELDS, has_timestamps=True, max_history_events=limit
        )
