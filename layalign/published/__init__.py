"""The authors' code: its classes over our modules, its parameter names, and swapping its modules for ours."""
