"""What keeps a long training alive and visible, whatever loop runs it: parts without nnU-Net."""
