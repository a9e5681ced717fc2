"""What happens after the network: scoring segmentations (prediction itself is nnU-Net's)."""
