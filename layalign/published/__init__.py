"""The authors' code: its classes on top of our modules, its parameter names, and the swap of its modules for ours."""
