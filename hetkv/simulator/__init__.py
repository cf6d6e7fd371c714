"""The simulator: what a deployment does to a given traffic, event by event.

`deployment.load_plan` reads a deployment, `run.simulate` runs it. Imports the cost model; neither torch nor the
extension, and nothing of the planner.
"""
