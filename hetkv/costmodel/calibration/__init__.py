"""Calibration: measured data sets in, efficiencies and the sections of docs/accuracy.md out.

Imports the rest of `hetkv.costmodel`; only the `calibrate` command imports it.
"""
