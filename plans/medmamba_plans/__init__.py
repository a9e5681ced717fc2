"""Plans for nnU-Net that name a network of medmamba. Light; nnU-Net is imported only to plan a new dataset."""
