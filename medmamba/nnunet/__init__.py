"""nnU-Net side of medmamba: trainers, the folder for ``nnUNet_extTrainer``, and the commands around them.

Importing this package costs nothing; torch and nnunetv2 are imported by the modules that need them.
"""
