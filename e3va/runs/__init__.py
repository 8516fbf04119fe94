"""Runs: what ``e3va train`` makes of a folder of data, and what a folder of a run can do."""
