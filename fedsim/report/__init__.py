"""Reports: tables and plots out of run directories, and one page that shows them without a network."""

from fedsim.report.comparison import Comparison, compare
from fedsim.report.reading import RunRecord, read_run
from fedsim.report.tradeoff import Bound
from fedsim.report.writing import write_report

__all__ = ["Bound", "Comparison", "RunRecord", "compare", "read_run", "write_report"]
