"""What every core must do (medmamba/mixers/laws), run over the registry: a new entry is tested without further work."""

from __future__ import annotations

import pytest

from medmamba.mixers import CONTROLS, CORES
from medmamba.mixers.laws import CORE_LAWS
from medmamba.mixers.laws.cores import rms_by_size

EVERY_CASE = [
    pytest.param(name, law, case, id="-".join((name, law.name, case)))
    for name in sorted(CORES)
    for law in CORE_LAWS
    for case in law.cases
]


def test_the_controls_are_cores():
    assert set(CONTROLS) < set(CORES)
    assert "scan" not in CONTROLS


@pytest.mark.parametrize(("name", "law", "case"), EVERY_CASE)
def test_a_core_keeps_the_law(name, law, case):
    law.check(CORES[name], case)


# All that hsm_ssd reads are means over the tokens, which vanish for white noise.
@pytest.mark.parametrize("name", sorted(set(CORES) - {"hsm_ssd"}))
def test_the_magnitude_does_not_fall_with_the_number_of_tokens(name):
    sizes = rms_by_size(CORES[name])
    assert max(sizes) < 1.5 * min(sizes)
