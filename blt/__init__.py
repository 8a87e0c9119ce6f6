"""What the scripts share. The rule: nothing in here imports the root, and a module imports only modules of a lower level."""
