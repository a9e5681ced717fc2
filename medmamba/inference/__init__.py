"""What happens before and after the network: checked reading, checks of folders, orientation, and scoring."""
