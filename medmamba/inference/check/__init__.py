"""Which cases of a folder can be predicted, before anything is: ``medmamba check``."""

from .case_report import CaseReport, ChannelFacts, Reading, examine
from .cases import Case, find_cases
from .finding import Finding
from .folder import check_cases
from .labels import LabelCheck

__all__ = [
    "Case",
    "CaseReport",
    "ChannelFacts",
    "Finding",
    "LabelCheck",
    "Reading",
    "check_cases",
    "examine",
    "find_cases",
]
