"""The doctor: training problems named, with evidence and the fix. Pure functions of a run's log; no trainer inside."""

from trl_ext.diagnostics.catalogue import RULES, diagnose
from trl_ext.diagnostics.finding import Finding, Remedy, Rule
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Sample
from trl_ext.diagnostics.reading import read_run
from trl_ext.diagnostics.report import Report, write_report

__all__ = [
    "RULES",
    "Finding",
    "Limits",
    "Remedy",
    "Report",
    "Rule",
    "RunLog",
    "Sample",
    "diagnose",
    "read_run",
    "write_report",
]
