"""The simulator: what a deployment does to a given traffic, event by event.

`deployment.load_plan` reads a deployment, `run.simulate` runs it. Imports the cost model; neither torch, the
extension nor the planner.
"""
