"""What is run to find something out: whole programs over the library, none of which it needs."""
