"""Send, or put on the disk, the smallest hostile input of each kind, and see that nothing stops or stalls."""
