"""The training loop of pretraining, on one or many processes, that can be killed at any time and goes on.

Plain PyTorch: a step is a function of (recipe, corpus, step number), so that nothing but weights and optimizer has to
be saved. ``medmamba pretrain run`` and ``torchrun -m medmamba_pretrain run`` start it; nothing is imported here,
because the command's help must be light.
"""
