"""What people look at: one page, one Markdown file and two tables per run or comparison.

Everything is read from run folders; no model, no data set and no network is needed.
"""

from lmcl.report.write import write_report

__all__ = ["write_report"]
