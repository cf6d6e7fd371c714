"""Plans for people and machines: terminal, pages, pictures, launch lines, manifests.

Imports the planner and the simulator's output.
"""
