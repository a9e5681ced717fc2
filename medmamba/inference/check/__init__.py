"""Which cases of a folder can be predicted, before anything is: ``medmamba check``."""

from .case_report import CaseReport, ChannelFacts, Reading, examine
from .cases import Case, find_cases
from .finding import Finding
from .folder import check_cases

__all__ = ["Case", "CaseReport", "ChannelFacts", "Finding", "Reading", "check_cases", "examine", "find_cases"]
