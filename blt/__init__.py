"""What the scripts share. Nothing in here imports the root, and a module imports only modules of a lower level."""
