"""`medmamba bench`: time and memory of the scan, cores and mixers, with the floor and the alternatives in one process.

commands.py   the command line (imports nothing heavy)
cases.py      which scans are timed: the shapes of the shipped networks, variations, an odd size, a sweep of lengths
peers.py      what people use elsewhere, and what it is allowed to leave out
measure.py    processor time, wall time, peak memory
scan.py       runs the cases of the scan
volumes.py    modules of volumes beside a full convolution of the same width
cores.py      every core of the registry
mixers.py     a block of every mixer of the registry
rows.py       what every row holds, and the CSV
ratios.py     peers against our best backend
plot.py       time and memory over length
commit.py     the commit that a measurement belongs to
"""
