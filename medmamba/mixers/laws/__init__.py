"""What every core and every mixer must do, ours and those of third parties, as functions that a test can call.

``medmamba doctor --mixer NAME`` and the tests of this repository check the same laws. In a test of your own::

    import pytest
    from medmamba.mixers.laws import CORE_LAWS, MIXER_LAWS


    @pytest.mark.parametrize("law", MIXER_LAWS, ids=str)
    def test_a_law_of_mixers(law):
        law.check(SPEC.block)


    @pytest.mark.parametrize("law", CORE_LAWS, ids=str)
    def test_a_law_of_cores(law):
        law.check(MyCore)

They run on the CPU, in float64 where a law is exact, and need torch alone.

law.py      :class:`Law`, :class:`LawBroken`
cores.py    laws of cores: a class, or a partial of it with options
blocks.py   laws of mixers: the options of their blocks
"""

from __future__ import annotations

from .blocks import LAWS as MIXER_LAWS
from .cores import LAWS as CORE_LAWS
from .law import Law, LawBroken

__all__ = ["CORE_LAWS", "MIXER_LAWS", "Law", "LawBroken"]
