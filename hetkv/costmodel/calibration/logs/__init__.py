"""Logs of an operator's engine as observations to calibrate with: one module for each kind of file.

`read` finds the kind from the content. Imports the datasets' rows and nothing of the fit.
"""

from hetkv.costmodel.calibration.logs.observations import Period, Prompt, Setup
from hetkv.costmodel.calibration.logs.read import read

__all__ = ["Period", "Prompt", "Setup", "read"]
