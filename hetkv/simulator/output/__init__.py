"""Pictures and pages of simulations.

Imports the simulator; only the command line and the planner's output import it.
"""
