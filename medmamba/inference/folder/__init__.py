"""Prediction of a whole folder: one case after the other, each for itself, with a report that a later run trusts."""

from .report import MergedReport, merge_reports
from .run import Options, run_folder

__all__ = ["MergedReport", "Options", "merge_reports", "run_folder"]
