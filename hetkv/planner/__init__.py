"""The planner: what to buy for a traffic and its targets, and how to split it into prefill and decode.

`solve.solve` is the entry point, `problem.load_problem` reads the question. Imports the simulator and the cost model;
neither torch nor the extension.
"""
