"""The simulator against closed forms and measured runs, for docs/simulator-accuracy.md.

Imports the simulator and `hetkv.costmodel.calibration`.
"""
