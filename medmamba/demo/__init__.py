"""`medmamba demo`: from raw volumes to a scored segmentation and a picture, in one folder.

commands.py   the command line (imports nothing heavy)
dataset.py    which cases train and which are held out; every check on the input
folder.py     the one output folder: what belongs to the demo and what does not
quiet.py      nnU-Net without child processes, environment variables and console noise
run.py        the steps
picture.py    three planes, reference and prediction
data/         eight real volumes with their own licence
"""
