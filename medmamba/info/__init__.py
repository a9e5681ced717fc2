"""`medmamba info`: what a network is made of, how far its scans remember, and what a model package is.

commands.py     the command line (imports nothing heavy)
subject.py      the network in question: from a name, a plans file, a checkpoint
report.py       the numbers, and their lines of text
plot.py         the picture of `--horizon`
package.py      a model package
"""
