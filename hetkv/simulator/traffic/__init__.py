"""Requests for the simulator: arrivals, lengths, trace files.

Imports the simulator's `request` only.
"""
