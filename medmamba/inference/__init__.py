"""What happens before and after the network: checked reading, and scoring (prediction itself is nnU-Net's)."""
