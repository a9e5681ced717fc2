"""Corpora for pretraining: folders of images in, one store of checked, equally spaced int16 volumes out.

``medmamba pretrain ingest`` writes a store. It is read with :func:`medmamba_pretrain.corpus.volume.open_volume` and
:class:`medmamba_pretrain.corpus.crops.CropReader`; nothing is imported here, because the command's help must be light.
"""
