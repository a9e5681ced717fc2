"""Masked pretraining of encoders on unlabelled volumes."""
