"""The doctor: training problems named, with evidence and the fix. Pure functions of a run's log; no trainer inside."""

from trl_ext.diagnostics.catalogue import RULES, diagnose
from trl_ext.diagnostics.finding import Finding, Remedy, Rule, Suspect
from trl_ext.diagnostics.graph import EDGES, Edge, Explained, roots
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Sample
from trl_ext.diagnostics.reading import read_run
from trl_ext.diagnostics.report import Report, write_report
from trl_ext.diagnostics.trial import Trial, try_remedies

__all__ = [
    "EDGES",
    "RULES",
    "Edge",
    "Explained",
    "Finding",
    "Limits",
    "Remedy",
    "Report",
    "Rule",
    "RunLog",
    "Sample",
    "Suspect",
    "Trial",
    "diagnose",
    "read_run",
    "roots",
    "try_remedies",
    "write_report",
]
