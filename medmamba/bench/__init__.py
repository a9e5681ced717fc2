"""`medmamba bench`: time and memory of the scan, with the floor and the alternatives in the same process.

commands.py   the command line (imports nothing heavy)
cases.py      which scans are timed: the shapes of the shipped networks, and one odd size
measure.py    processor time, wall time, peak memory
scan.py       runs the cases and writes the CSV
"""
