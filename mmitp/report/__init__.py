"""A page about finished or running trainings, made of what they leave in their work folders."""

from mmitp.report.page import write_report
from mmitp.report.read import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "write_report"]
